"""What requests and answers look like: the source of the OpenAPI description."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator

from maple.names import replace_lone_surrogates
from maple.serve.limits import Limits
from maple.serve.problems import CODES


def _whole(value: Any) -> Any:
    # In JSON Schema 5.0 is an integer.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def _speakable(value: Any) -> Any:
    """The same with texts that can be written as UTF-8: folder names may hold bytes of another encoding."""
    if isinstance(value, str):
        return replace_lone_surrogates(value)
    if isinstance(value, list):
        return [_speakable(one) for one in value]
    if isinstance(value, dict):
        return {_speakable(key): _speakable(one) for key, one in value.items()}
    return value


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _write_as_utf8(cls, values: Any) -> Any:
        return _speakable(values)


class Ranked(_Model):
    """A class and its probability."""

    name: Annotated[str, Field(alias="class", description="The class name.")]
    probability: Probability


class Prediction(_Model):
    """The likeliest classes of one picture, best first."""

    source: Annotated[str, Field(description="The picture's file name, or its place in the request: images[0].")]
    best: Annotated[list[Ranked], Field(description="By the trained method.", min_length=1)]
    zero_shot: Annotated[
        list[Ranked] | None, Field(description="By the frozen CLIP; null where it was not asked for.")
    ] = None


class Predictions(_Model):
    """The answer for all pictures of a request, in their order."""

    predictions: Annotated[list[Prediction], Field(min_length=1)]
    class_count: Annotated[int, Field(ge=1, description="How many class names were considered.")]
    note: Annotated[
        str | None, Field(description="Where class names were not trained: which, and whether they are far away.")
    ]


class LimitsInForce(_Model):
    """What a request may hold."""

    upload_bytes: int
    pixels: int
    images: int
    classes: int
    name_chars: int
    top: int


class Model(_Model):
    """What answers."""

    title: Annotated[str, Field(description="Method and backbone, for people.")]
    about: Annotated[dict[str, Any], Field(description="What is known of the model: method, backbone, data set ...")]
    class_names: Annotated[list[str], Field(description="The classes it was trained on; used where none are given.")]
    zero_shot: Annotated[bool, Field(description="Whether the frozen CLIP's answers can be asked for.")]
    limits: LimitsInForce
    version: Annotated[str, Field(description="Of maple-clip.")]


class Example(_Model):
    """A picture to try."""

    id: Annotated[int, Field(ge=0)]
    class_name: str
    trained: Annotated[bool, Field(description="Whether its class is among the trained ones.")]


class Examples(_Model):
    """Pictures to try."""

    source: Annotated[str | None, Field(description="Where they come from; null if there are none.")]
    examples: list[Example]


class Alive(_Model):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Ready(_Model):
    """The model answers."""

    status: Literal["ready"] = "ready"


class ErrorDetail(_Model):
    """One thing that is wrong."""

    where: Annotated[str, Field(description="A place in the request: images[2], class_names[0] ...")]
    message: str


class ErrorBody(_Model):
    """What is wrong."""

    code: Annotated[str, Field(json_schema_extra={"enum": sorted(CODES)})]
    message: Annotated[str, Field(description="What is wrong, what is allowed, what to do.")]
    details: list[ErrorDetail]


class ErrorAnswer(_Model):
    """A request that was not answered."""

    error: ErrorBody


def request_model(limits: Limits, trained: int) -> type[BaseModel]:
    """The model of a request: what JSON may hold.

    Args:
        trained: how many classes were trained; as many may always be named.
    """
    name = Annotated[str, Field(min_length=1, max_length=limits.name_chars, pattern=r"[^\s_]")]
    bounded = Field(
        min_length=1,
        max_length=max(limits.classes, trained),
        description="What to choose from, each once; new names work at once. Default: the trained ones.",
        examples=[["red car", "blue car"]],
        json_schema_extra={"uniqueItems": True},
    )
    names = Annotated[list[name], bounded]
    images = Annotated[
        list[Annotated[str, Field(min_length=1, json_schema_extra={"contentEncoding": "base64"})]],
        Field(
            min_length=1,
            max_length=limits.images,
            description="Encoded pictures (JPEG, PNG, WebP ...) in base64, or as data: URLs.",
        ),
    ]
    top = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=limits.top, description="How many classes to name.")]
    zero_shot = Annotated[bool, Field(description="Whether the frozen CLIP answers too.")]
    made: Any = {"images": (images, ...), "class_names": (names | None, None), "top": (top, 5)}
    made["zero_shot"] = (zero_shot, False)
    return create_model(
        "PredictRequest",
        __config__=ConfigDict(extra="forbid", strict=True),
        __doc__="Pictures, and what to say of them.",
        **made,
    )
