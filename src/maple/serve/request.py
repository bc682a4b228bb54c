"""The body of a prediction request, as JSON or as a form: its schema, and how it is parsed."""

import base64
import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import UploadFile
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from maple.errors import ClassNamesError
from maple.names import names_in
from maple.serve.limits import Limits
from maple.serve.responses import ApiError, ErrorDetail

_JSON = "application/json"
_FORM = "multipart/form-data"
_MAX_FILE_NAME = 255
_MAX_SHOWN = 40
_MAX_OPTIONS = 10
_FORM_NAMES = {
    "type": "array",
    "items": {"type": "string", "minLength": 1},
    "minItems": 1,
    "description": "Class names: one in each of several fields, or all in one field, separated by commas or new lines; "
    "there, a name that contains a comma, or begins with [ or {, is in double quotes. Or a JSON list in one field.",
}


@dataclass(frozen=True)
class PredictRequest:
    """A valid request."""

    images: list[tuple[str, bytes]]  # the name of each image in the response, and its encoded content
    class_names: tuple[str, ...] | None  # None for the trained ones
    top: int
    zero_shot: bool
    reject: float | None  # the threshold of the greatest probability


class RequestParser:
    """Parses prediction requests within the limits of a server."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        base64_text = Field(min_length=1, json_schema_extra={"contentEncoding": "base64"})
        name = Field(min_length=1, max_length=limits.name_chars, pattern=r"[^\s_]")
        count = Field(min_length=1, max_length=limits.images)

        class PredictOptions(BaseModel):
            model_config = ConfigDict(extra="forbid", strict=True)
            class_names: Annotated[
                list[Annotated[str, name, AfterValidator(_refuse_control_characters)]] | None,
                Field(description="The classes to choose from, each once; any names work. Default: the trained ones."),
                Field(min_length=1, max_length=limits.classes, json_schema_extra={"uniqueItems": True}),
                Field(examples=[["red car", "blue car"]]),
            ] = None
            top: Annotated[
                int,
                Field(ge=1, le=limits.top, description="Number of classes in a prediction."),
                BeforeValidator(_whole_number),
            ] = 5
            zero_shot: Annotated[bool, Field(description="Whether to add the predictions of the frozen CLIP.")] = False
            reject: Annotated[
                float | None,
                Field(gt=0, lt=1, description="Mark images as rejected whose greatest probability is below this."),
            ] = None

        class PredictJson(PredictOptions):
            """Images, and how to classify them."""

            images: Annotated[
                list[Annotated[str, base64_text, AfterValidator(_decode_base64)]],
                count,
                Field(description="Encoded images (JPEG, PNG, WebP ...) in base64, or as data: URLs."),
            ]

        class PredictForm(PredictOptions):
            """Images, and how to classify them."""

            images: Annotated[
                list[UploadFile],
                count,
                Field(description="Encoded images, each a file with a file name."),
            ]

        self._json, self._form = PredictJson, PredictForm

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI description of the body."""
        form = self._form.model_json_schema()
        form["properties"]["class_names"] = _FORM_NAMES
        form["properties"]["images"]["items"] = {"type": "string", "format": "binary"}
        content = {
            _JSON: {"schema": self._json.model_json_schema()},
            _FORM: {"schema": form, "encoding": {"images": {"contentType": "application/octet-stream"}}},
        }
        return {"required": True, "content": content}

    async def parse(self, request: Request) -> PredictRequest:
        """Read the body, once, and check it; any problem of it is an ApiError."""
        if request.query_params:
            options = ", ".join(f"{name[:80]!r}" for name in [*request.query_params][:_MAX_OPTIONS])
            raise _refused("query", f"the address has the options {options}, which belong in the body")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError("unsupported_media_type", "compressed bodies are not supported; omit Content-Encoding")
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        body: Any
        try:
            if media_type == _JSON:
                body = self._json.model_validate_json(await request.body())
                images = [(f"images[{index}]", content) for index, content in enumerate(body.images)]
            elif media_type == _FORM:
                form = await self._read_form(request)
                try:
                    body = self._form.model_validate(_form_values(form))
                    names = [(file.filename or "")[:_MAX_FILE_NAME] for file in body.images]
                    images = [
                        (name or f"images[{index}]", await body.images[index].read())
                        for index, name in enumerate(names)
                    ]
                finally:
                    await form.close()
            else:
                allowed = f"{_FORM} with files named 'images', or {_JSON} with images in base64"
                raise ApiError("unsupported_media_type", f"the body is {media_type[:80]!r}; send {allowed}")
        except ValidationError as error:
            raise _invalid_request(error) from None
        except ClassNamesError as error:
            raise ApiError("class_names", str(error)) from None
        class_names = None if body.class_names is None else tuple(body.class_names)
        return PredictRequest(images, class_names, body.top, body.zero_shot, body.reject)

    async def _read_form(self, request: Request) -> FormData:
        # Too many images or names are reported by the schema; the parser's limits only bound its work.
        max_names = self._limits.classes + 1000
        parser = _InMemoryFormParser(
            request.headers,
            request.stream(),
            max_files=self._limits.images + 1000,
            max_fields=max_names,
            max_part_size=4 * self._limits.name_chars * max_names,
        )
        try:
            form = await parser.parse()
        except HTTPException:  # from reading the body
            raise
        except Exception as error:  # noqa: BLE001 - the parser does not catch everything a hostile header can cause
            reason = error.message if isinstance(error, MultiPartException) else type(error).__name__
            raise ApiError("malformed", f"the form cannot be read: {reason}") from None
        if not parser.complete:
            await form.close()
            raise ApiError("malformed", "the form is truncated: its last boundary is missing")
        return form


class _InMemoryFormParser(MultiPartParser):
    """Starlette's parser, but files stay in memory, and text must be UTF-8."""

    spool_max_size = 0  # never write an upload to disk
    complete = False

    def on_end(self) -> None:
        # python-multipart does not report a missing last boundary.
        self.complete = True

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        part = self._current_part
        if part.field_name == "images" and part.file is None:
            index = sum(name == "images" for name, _ in self.items)
            raise _refused(f"images[{index}]", "must be a file, with a file name (curl: -F images=@cat.jpg)")

    def on_part_end(self) -> None:
        part = self._current_part
        if part.file is None and self._charset == "utf-8":
            try:
                part.data.decode()
            except UnicodeDecodeError:  # Starlette would fall back to Latin-1
                raise MultiPartException(f"the text of {part.field_name[:80]!r} is not UTF-8") from None
        super().on_part_end()


def _form_values(form: FormData) -> dict[str, Any]:
    """The fields of a form, with the values that JSON would have."""
    fields: dict[str, Any] = {}
    for key in form:
        values = form.getlist(key)
        if key == "class_names" and len(values) == 1 and isinstance(values[0], str):
            fields[key] = _class_names(values[0])
        elif key in ("images", "class_names"):
            fields[key] = [value.strip() if isinstance(value, str) else value for value in values]
        else:
            # A repeated field stays a list, which the schema refuses.
            value = _parse_json(values[0]) if len(values) == 1 else values
            fields[key] = bool(value) if key == "zero_shot" and value in (0, 1) else value
    return fields


def _class_names(text: str) -> list[str]:
    """The class names of one field: a JSON list of texts, or names separated by commas or new lines."""
    if not text.lstrip().startswith(("[", "{")):
        return names_in(text)
    with suppress(ValueError, RecursionError):
        names = json.loads(text)
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    forms = 'write a JSON list of texts (["red car", "blue car"]), or names with commas between them'
    raise _refused(
        "class_names",
        f"begins as JSON, but is not a list of texts; {forms}; a name that begins with [ or {{ goes in double quotes",
    )


def _whole_number(value: Any) -> Any:
    # In JSON Schema, 5.0 is an integer.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _decode_base64(text: str) -> bytes:
    head, comma, data = text.partition(",") if text[:5].lower() == "data:" else (";base64", ",", text)
    try:
        if comma and head.lower().endswith(";base64"):
            return base64.b64decode(data.replace("\r", "").replace("\n", ""), validate=True)
    except ValueError:
        pass
    raise PydanticCustomError("base64", "is not base64; send an encoded image in base64, or as a data: URL")


def _refuse_control_characters(name: str) -> str:
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        raise PydanticCustomError("control_character", "contains a control character")
    return name


def _parse_json(text: Any) -> Any:
    """The value that a form field stands for, else its text."""
    try:
        return json.loads(text.strip().lower())
    except (AttributeError, ValueError, RecursionError):
        return text


def _refused(where: str, message: str) -> ApiError:
    return ApiError("invalid_request", f"{where}: {message}", [ErrorDetail(where=where, message=message)])


def _invalid_request(error: ValidationError) -> ApiError:
    """Name every invalid value by its place in the request."""
    details = []
    for problem in error.errors(include_url=False, include_context=False):
        if problem["type"] == "json_invalid":
            return ApiError("malformed", f"the body is not JSON: {problem['msg'].removeprefix('Invalid JSON: ')}")
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:80]}" for part in problem["loc"])
        value = problem["input"]
        message = problem["msg"].removeprefix("Value error, ")
        if isinstance(value, str | int | float) and len(str(value)) <= _MAX_SHOWN:
            message += f" (got {json.dumps(value)})"
        details.append(ErrorDetail(where=place.lstrip(".") or "body", message=message))
    return ApiError("invalid_request", f"{details[0].where}: {details[0].message}", details)
