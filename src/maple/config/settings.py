"""The settings of a run, validated."""

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from maple.descriptions import ALL_SHOTS, DEFAULT_METHOD
from maple.errors import ConfigError, one_of, shortened

BUNDLED_BACKBONE = "maple-small"
"""The packaged small CLIP; `load_clip` knows it by this name."""
BUNDLED_PREFIXES = ("emoji-", "icons-")
"""The prefixes of the names of the bundled data sets."""
BUNDLED_DATASET = "emoji-animals"
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
    """A packaged CLIP, an architecture of open_clip, a hub repository, a folder or a file. Default on the bundled data
    sets: the packaged CLIP."""
    pretrained: str | None = None
    """For an architecture: a tag of open_clip, a weight file, `random` or `random:SEED`."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the large weights and of the states between blocks."""


class DataSettings(Settings):
    """Which images."""

    section = "data."
    dataset: str = ""
    """A data set, a folder of class-named folders, FOLDER:DOMAIN, a table, a Parquet or Arrow file, an archive, shards,
    hf:OWNER/NAME, or files of features. Default: emoji-animals."""
    root: str | None = None
    """The folder of the published data sets."""
    shots: Positive | None = 16
    """Training images per class; None, `"all"` in files, for every one."""
    classes: Literal["all", "base", "novel"] = "all"
    """The part of the sorted labels that is trained on: in base-to-novel, the first half are the base classes."""
    class_names: dict[str, str] = {}
    """Names in place of those of the data set, by these."""
    validation: Literal["few-shot", "shots", "all"] = "few-shot"
    """The validation images that a method selects its settings on: `few-shot` draws min(shots, 4) of each class, as the
    papers of prompt learning do; `shots` as many as training images, as LP++'s authors do; `all` takes every one, as
    Tip-Adapter's authors do."""
    image_column: str | None = None
    """The column of images in a table of them, where it is not clear; in shards, the extension."""
    label_column: str | None = None
    """The column of labels, where it is not clear; in shards, the key in the .json, or the extension."""
    draft: bool = False
    """Whether large JPEGs are decoded at a half, a quarter or an eighth of their size, with at least twice the pixels
    that the CLIP sees: several times as fast for photographs of 4,000 pixels, and nearly the same."""
    listing: str | None = None
    """The hash of the list of images and their splits in the run folder, which `maple fit` writes and which then
    replaces the data set."""

    @field_validator("shots", mode="before")
    @classmethod
    def _every_image(cls, value: Any) -> Any:
        return None if value == ALL_SHOTS else value


class TrainSettings(Settings):
    """How prompts are trained. Source: SPEC section 4; Dassl.pytorch@c61a1b5 dassl/optim."""

    section = "train."
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """SGD has momentum, without Nesterov."""
    lr: Annotated[float, Field(gt=0)] = 0.002
    """The learning rate after the warm-up."""
    momentum: Fraction = 0.9
    """Of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """On every learned parameter."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Of Adam and AdamW."""
    epochs: Annotated[int, Field(ge=0)] = 5
    """Passes over the training images."""
    steps: Positive | None = None
    """A budget that replaces `epochs`: as many whole epochs as it takes for this number of steps, and at least one
    after the warm-up. Of two layers of settings, one that sets `epochs` alone takes the budget away."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 1
    """Epochs with the rate `warmup_lr`."""
    warmup_lr: Annotated[float, Field(ge=0)] = 1e-5
    """The rate of the warm-up."""
    schedule: Literal["cosine", "constant", "cosine_per_step"] = "cosine"
    """How the rate changes after the warm-up: at each epoch, not at all, or at each step from `lr` to `final_lr`
    without a warm-up."""
    final_lr: Annotated[float, Field(ge=0)] = 0.0
    """The last rate of `cosine_per_step`."""
    batch_size: Positive = 4
    """Images of a step."""
    micro_batch: Positive | None = None
    """Images that pass through the towers at once; None for the whole batch. The result is the same up to rounding."""
    drop_last: bool = True
    """Whether an epoch leaves out its last images if they are fewer than a batch."""
    crop_scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.08, 1.0)
    """The least and the greatest share of an image's area that a training crop has."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The probability that a training crop is mirrored."""
    views: Annotated[int, Field(ge=0)] | None = None
    """The number of augmented views of each image, used in turn by the epochs; None for a new one in every epoch, 0 for
    no augmentation. Where the image tower is unchanged, the features of these views are extracted once."""
    mix_views: bool = False
    """Whether a batch is drawn from all views of all images, instead of from one view of each; an epoch has as many
    steps. Only for methods whose features are extracted once."""
    keep: Literal["last", "best"] = "last"
    """Which state of the training is the result: that after the last epoch, or the best one, by the accuracy on
    validation images after at most ten epochs, evenly spread (ties: the lowest loss, then the later state). These are
    the images that `calibrate` uses. There is no early stopping: the rate is lowest, and most states best, at the
    end."""
    calibrate: bool = False
    """Whether to fit a temperature for probabilities, at the end of the training, on images that are neither trained on
    nor tested on: validation images and, of a user's own images, also those that the sample has left over."""
    workers: Threads = None
    """Threads that read images ahead; None: none on the CPU, otherwise up to four. The result does not depend on it."""
    images: ImagePlace = "auto"
    """Has no effect; it is accepted because run folders of the first edition hold it."""
    text_memory: Annotated[float, Field(gt=0)] | None = None
    """The memory in GiB that the states of the text tower may take while a gradient is computed; where all classes at
    once would take more, they are computed in pieces, and again for the gradient. None for a quarter of the device's
    memory. The result is the same up to rounding."""

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
    """How a run is evaluated."""

    section = "evaluate."
    batch_size: Positive = 100
    """Images that pass through the tower at once."""
    workers: Threads = None
    """Threads that read images; None: up to four, by the number of cores."""
    images: ImagePlace = "auto"
    """Has no effect, as in training."""


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

LATER_SETTINGS: dict[str, dict[str, Any]] = {
    "train": {
        "views": None,
        "mix_views": False,
        "steps": None,
        "keep": "last",
        "epsilon": 1e-8,
        "final_lr": 0.0,
        "calibrate": False,
    },
    "data": {
        "listing": None,
        "draft": False,
        "validation": "few-shot",
        "image_column": None,
        "label_column": None,
    },
    "method": {"prompt_sharing": "per_layer", "meta_net_layers": 2},
}
"""Settings that the first versions did not have; a run that lacks them is one with these values."""


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
