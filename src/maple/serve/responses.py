"""Response bodies of the API, errors included: the source of their OpenAPI description."""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.exceptions import HTTPException

from maple import __version__
from maple.data.catalogue import short_name
from maple.errors import visible
from maple.inference.predictor import Predictor
from maple.names import replace_lone_surrogates, without_folders
from maple.serve.limits import Limits

ERROR_CODES: Mapping[str, HTTPStatus] = {
    "malformed": HTTPStatus.BAD_REQUEST,
    "unauthorized": HTTPStatus.UNAUTHORIZED,
    "cross_origin": HTTPStatus.FORBIDDEN,
    "not_found": HTTPStatus.NOT_FOUND,
    "method_not_allowed": HTTPStatus.METHOD_NOT_ALLOWED,
    "upload_timeout": HTTPStatus.REQUEST_TIMEOUT,
    "too_large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "url_too_long": HTTPStatus.REQUEST_URI_TOO_LONG,
    "unsupported_media_type": HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    "wrong_host": HTTPStatus.MISDIRECTED_REQUEST,
    "invalid_request": HTTPStatus.UNPROCESSABLE_ENTITY,
    "class_names": HTTPStatus.UNPROCESSABLE_ENTITY,
    "unreadable_image": HTTPStatus.UNPROCESSABLE_ENTITY,
    "head_too_large": HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    "internal": HTTPStatus.INTERNAL_SERVER_ERROR,
    "model_failed": HTTPStatus.INTERNAL_SERVER_ERROR,
    "busy": HTTPStatus.SERVICE_UNAVAILABLE,
    "not_ready": HTTPStatus.SERVICE_UNAVAILABLE,
    "timeout": HTTPStatus.GATEWAY_TIMEOUT,
}
"""Every error code and its HTTP status."""

RETRY_SECONDS = 1
_MAX_DETAILS = 100


# Class names taken from folders may contain undecodable bytes, which JSON cannot carry.
Text = Annotated[str, BeforeValidator(replace_lone_surrogates)]
# Messages quote requests, which may contain anything.
Message = Annotated[str, BeforeValidator(lambda text: visible(text, "\N{REPLACEMENT CHARACTER}"))]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class ApiModel(BaseModel):
    """Base of the response bodies: no other fields than the declared ones."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class RankedClass(ApiModel):
    """A class and its probability."""

    name: Annotated[Text, Field(alias="class", description="The class name.")]
    probability: Probability


class ImagePrediction(ApiModel):
    """The most likely classes of one image, best first."""

    source: Annotated[Message, Field(description="The image's file name, or its place in the request: images[0].")]
    best: Annotated[list[RankedClass], Field(description="By the trained method.", min_length=1)]
    rejected: Annotated[
        bool | None,
        Field(description="Whether the answer is none of these classes; only with `reject` in the request."),
    ] = None
    zero_shot: Annotated[
        list[RankedClass] | None, Field(description="By the frozen CLIP; null unless it was requested.")
    ] = None


class PredictResponse(ApiModel):
    """The predictions for all images of a request, in their order."""

    predictions: Annotated[list[ImagePrediction], Field(min_length=1)]
    class_count: Annotated[int, Field(ge=1, description="The number of class names that were compared.")]
    note: Annotated[
        Text | None, Field(description="If class names were not trained: which, and whether they are far from those.")
    ]


class RequestLimits(ApiModel):
    """The bounds of one request; fields as in `Limits`."""

    upload_bytes: int
    pixels: int
    images: int
    classes: int
    name_chars: int
    top: int


class ModelInfo(ApiModel):
    """The served model."""

    title: Annotated[Text, Field(description="Method, backbone and data set in one line.")]
    about: Annotated[dict[str, Any], Field(description="Properties of the model: method, backbone, data set ...")]
    class_names: Annotated[list[Text], Field(description="The trained classes; the default of a request.")]
    zero_shot: Annotated[bool, Field(description="Whether predictions of the frozen CLIP can be requested.")]
    limits: RequestLimits
    version: Annotated[str, Field(description="Version of maple-clip.")]


class ExampleImage(ApiModel):
    """An example image; `png` is served under its own path."""

    id: Annotated[int, Field(ge=0)]
    class_name: Text
    trained: Annotated[bool, Field(description="Whether its class is one of the trained ones.")]
    png: Annotated[bytes, Field(exclude=True, repr=False)]


class ExampleList(ApiModel):
    """Example images to try."""

    source: Annotated[Text | None, Field(description="Their data set; null if there are none.")]
    examples: list[ExampleImage]


class ServerStatus(ApiModel):
    """The process is running (ok), or the model accepts requests (ready)."""

    status: Literal["ok", "ready"]


class ErrorDetail(ApiModel):
    """One invalid part of a request."""

    where: Annotated[Message, Field(description="A place in the request: images[2], class_names[0] ...")]
    message: Message


class ErrorBody(ApiModel):
    """What is wrong with a request."""

    code: Annotated[str, Field(json_schema_extra={"enum": sorted(ERROR_CODES)})]
    message: Annotated[Message, Field(description="What is wrong, what is allowed, and how to fix it.")]
    details: list[ErrorDetail]


class ErrorResponse(ApiModel):
    """The body of every response with a status of 400 or more."""

    error: ErrorBody


class ApiError(HTTPException):
    """A request that cannot be answered; raised anywhere, and sent as an `ErrorResponse`.

    Args:
        code: one of `ERROR_CODES`, which also gives the status.
        message: what is wrong, what is allowed, and how to fix it.
        details: the same for each invalid part of the request; the first few are sent, and all are counted.
        headers: further HTTP headers.
    """

    def __init__(
        self, code: str, message: str, details: Sequence[ErrorDetail] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        status = ERROR_CODES[code]
        retry = {"Retry-After": str(RETRY_SECONDS)} if status == HTTPStatus.SERVICE_UNAVAILABLE else {}
        more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
        super().__init__(int(status), message + more, {**retry, **(headers or {})})
        self.code = code
        self.details = details

    def response(self) -> JSONResponse:
        """The HTTP response of this error."""
        error = ErrorBody(code=self.code, message=self.detail, details=list(self.details[:_MAX_DETAILS]))
        return JSONResponse(ErrorResponse(error=error).model_dump(), self.status_code, self.headers)


def error_responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` argument of a FastAPI route that can fail with these error codes."""
    responses: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        response = responses.setdefault(int(ERROR_CODES[code]), {"model": ErrorResponse, "description": ""})
        response["description"] += f" or `{code}`" if response["description"] else f"`{code}`"
        if ERROR_CODES[code] == HTTPStatus.SERVICE_UNAVAILABLE:
            response["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return responses


def model_title(about: Mapping[str, Any]) -> str:
    """Method, backbone and data set of a model in one line."""
    title = f"{about.get('title') or about.get('method') or 'a model'} on {about.get('backbone') or 'a CLIP'}"
    dataset = about.get("dataset")
    return f"{title}, trained on {short_name(dataset)}" if dataset else title


def describe_model(predictor: Predictor, limits: Limits) -> ModelInfo:
    """What clients may know of a model: no paths of this machine."""
    about = dict(predictor.about)
    if about.get("dataset"):
        about["dataset"] = short_name(about["dataset"])
    about |= {key: without_folders(about[key]) for key in ("backbone", "pretrained") if about.get(key)}
    return ModelInfo(
        title=model_title(about),
        about=json.loads(replace_lone_surrogates(json.dumps(about, ensure_ascii=False))),
        class_names=list(predictor.trained_names),
        zero_shot=predictor.has_zero_shot,
        limits=RequestLimits.model_validate(limits, from_attributes=True),
        version=__version__,
    )
