"""The settings of a run, validated."""

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from maple.descriptions import DEFAULT_METHOD
from maple.errors import ConfigError, one_of, shortened

BUNDLED_BACKBONE = "maple-small"
"""The packaged small CLIP; `load_clip` knows it by this name."""
BUNDLED_PREFIX = "emoji-"
"""The prefix of the names of the bundled data sets."""
BUNDLED_DATASET = f"{BUNDLED_PREFIX}animals"
"""The data set if none is named."""

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Threads = Annotated[int, Field(ge=0, le=1024)] | None
ImagePlace = Literal["auto", "host", "device"]


def _is_number(kind: Any) -> bool:
    return kind in (int, float) or any(map(_is_number, get_args(kind)))


class Settings(BaseModel):
    """Base of all settings: unknown names are refused, instances are immutable."""

    section: ClassVar[str] = ""
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and _is_number(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError("must be a number, not true or false")
        return value

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            lines = []
            for problem in error.errors():
                place = self.section + ".".join(str(part) for part in problem["loc"])
                message = problem["msg"].removeprefix("Value error, ")
                unknown = problem["type"] == "extra_forbidden"
                details = f"{place} = {shortened(repr(problem['input']))}: {message[0].lower()}{message[1:]}"
                lines.append(one_of("setting", place, type(self).model_fields) if unknown else details)
            raise ConfigError("; ".join(lines)) from None

    def changed(self, **values: Any) -> Self:
        """A copy with other values, validated again."""
        return type(self)(**{**self.model_dump(), **values})


class BackboneSettings(Settings):
    """Which frozen CLIP, as `load_clip` takes it."""

    section = "backbone."
    name: str = "ViT-B-16"
    pretrained: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"


class DataSettings(Settings):
    """Which images. `classes` is the part of the sorted labels that is trained on (SPEC: base-to-novel).

    `validation` is which validation images a method selects its settings on: "few-shot" draws min(shots, 4) of each
    class, as the papers of prompt learning do; "all" takes every one, as Tip-Adapter's authors do.

    `listing` is the hash of a saved split (a list of images and their splits) in the run folder, which `maple fit`
    writes; it then replaces the data set.
    """

    section = "data."
    dataset: str = ""
    root: str | None = None
    shots: Positive | None = 16
    classes: Literal["all", "base", "novel"] = "all"
    class_names: dict[str, str] = {}
    validation: Literal["few-shot", "all"] = "few-shot"
    listing: str | None = None


class TrainSettings(Settings):
    """How prompts are trained. Source: SPEC section 4; Dassl.pytorch@c61a1b5 dassl/optim.

    With the schedule `cosine_per_step` the rate changes at each step, from `lr` down to `final_lr`, without a warm-up.
    `epsilon` is that of Adam and AdamW.

    `steps` is a budget that replaces `epochs`: training takes as many whole epochs as it needs for this number of
    steps, and at least one after the warm-up. Of two layers, one that sets `epochs` alone takes the budget away.

    `views` is the number of augmented views of each image, used in turn by the epochs; None for a new one in every
    epoch, 0 for no augmentation. Where the image tower is unchanged, the features of these views are extracted once and
    replace the images.

    `keep` is which state of the training is the result: that after the last epoch, or the best one, by the accuracy on
    validation images after at most ten epochs, evenly spread (ties: the lowest loss, then the later state). These are
    the images that `calibrate` uses. There is no early stopping: the rate is lowest, and most states best, at the end.

    `calibrate` fits a temperature for probabilities, at the end of the training, on images that are neither trained on
    nor tested on: the validation images and, of a user's own images, also those that the sample has left over.

    `text_memory` is the memory in GiB that the states of the text tower may take while a gradient is computed; where
    all classes at once would take more, they are computed in pieces, and again for the gradient. None for a quarter of
    the device's memory. The result is the same up to rounding.

    `workers` threads read images ahead (None: none on the CPU, otherwise up to four); the result does not depend on it.
    `images` has no effect; it is accepted because run folders of the first edition hold it.
    """

    section = "train."
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.002
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    epochs: Annotated[int, Field(ge=0)] = 5
    steps: Positive | None = None
    warmup_epochs: Annotated[int, Field(ge=0)] = 1
    warmup_lr: Annotated[float, Field(ge=0)] = 1e-5
    schedule: Literal["cosine", "constant", "cosine_per_step"] = "cosine"
    final_lr: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Positive = 4
    micro_batch: Positive | None = None
    drop_last: bool = True
    crop_scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.08, 1.0)
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    views: Annotated[int, Field(ge=0)] | None = None
    keep: Literal["last", "best"] = "last"
    calibrate: bool = False
    workers: Threads = None
    images: ImagePlace = "auto"
    text_memory: Annotated[float, Field(gt=0)] | None = None

    @field_validator("crop_scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if scale[0] > scale[1]:
            raise ValueError("the smaller fraction comes first, as in [0.08, 1.0]")
        return scale

    def with_epochs_for(self, steps_per_epoch: int) -> Self:
        """These settings, with the epochs that the budget of steps takes, if there is one.

        Example:
            >>> TrainSettings(steps=100).with_epochs_for(7).epochs
            15
        """
        if self.steps is None:
            return self
        return self.changed(epochs=max(self.warmup_epochs + 1, -(-self.steps // max(steps_per_epoch, 1))), steps=None)


class EvaluateSettings(Settings):
    """How a run is evaluated. `workers` (None: up to four, by the number of cores) and `images` as in training."""

    section = "evaluate."
    batch_size: Positive = 100
    workers: Threads = None
    images: ImagePlace = "auto"


class RunSettings(Settings):
    """All settings that determine the result of a run.

    `method` holds the method's name under "name" and its own settings; the method's class validates them.
    """

    method: dict[str, Any] = {"name": DEFAULT_METHOD}
    backbone: BackboneSettings = BackboneSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 1

    @field_validator("method")
    @classmethod
    def _named(cls, method: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(method.get("name"), str):
            raise ValueError('must hold the "name" of a method, a string')
        return method


SECTIONS = tuple(RunSettings.model_fields)


class Rule(Settings):
    """Settings that replace the preset's for some data sets, shots or backbones (for any, where not given)."""

    section = "rules."
    dataset: list[str] | None = None
    shots: list[int] | None = None
    backbone: list[str] | None = None
    method: dict[str, Any] = {}
    train: dict[str, Any] = {}

    @model_validator(mode="after")
    def _refuse_empty(self) -> Self:
        if not self.method and not self.train:
            raise ValueError("a rule must set something under method or train")
        TrainSettings(**self.train)
        return self

    def fits(self, settings: RunSettings) -> bool:
        """Whether the rule applies to a run with these settings."""
        values = (settings.data.dataset, settings.data.shots, settings.backbone.name)
        conditions = zip((self.dataset, self.shots, self.backbone), values, strict=True)
        return all(allowed is None or value in allowed for allowed, value in conditions)
