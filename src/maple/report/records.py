"""What a report is made of: runs and their evaluations, as their folders tell them."""

import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class BackboneId(_Stored):
    """Which CLIP."""

    name: str
    pretrained: str | None = None
    precision: str = "fp32"
    fingerprint: str = ""


class Source(_Stored):
    """What a run was trained on."""

    dataset: str
    shots: int | None = None
    classes: str = "all"
    class_names: dict[str, str] = {}


class Row(_Stored):
    """One evaluation, as a line of rows.jsonl has it. Accuracies are fractions."""

    method: dict[str, Any]
    backbone: BackboneId
    source: Source
    seed: int
    dataset: str
    classes: Literal["all", "base", "novel"]
    part: str
    class_names: tuple[str, ...] = Field(min_length=1)
    items: str = ""
    images: int = Field(ge=1)
    top1: Fraction
    top5: Fraction
    macro_f1: Fraction
    calibration_error: Fraction
    per_class: tuple[Fraction | None, ...] = ()
    predictions: str | None = None
    asked: dict[str, Any] = {}

    @field_validator("method")
    @classmethod
    def _named(cls, method: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(method.get("name"), str) or not method["name"]:
            raise ValueError('must hold the "name" of a method')
        return method

    @field_validator("predictions")
    @classmethod
    def _inside(cls, path: str | None) -> str | None:
        if path is not None and (PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts):
            raise ValueError("must lie inside the run")
        return path

    @model_validator(mode="after")
    def _consistent(self) -> "Row":
        if len(self.per_class) not in (0, len(self.class_names)):
            raise ValueError(f"{len(self.per_class)} accuracies per class for {len(self.class_names)} class names")
        return self


class SpeedRow(_Stored):
    """Images per second at one batch size: a training step; inference with the classes encoded each time, and once."""

    batch: int = Field(ge=1)
    training: Rate | None = None
    inference: Rate
    cached: Rate | None = None


class CostRow(_Stored):
    """One method on one backbone with C classes on one machine; operations are floating-point ones, two a multiply-add.

    Attributes:
        recipe: the first part of the preset's name, such as `maple-shallow`.
        method: the method's settings, with its name.
    """

    recipe: str = Field(min_length=1)
    method: dict[str, Any]
    backbone: str
    precision: str
    image_size: int
    backbone_parameters: int = Field(ge=1)
    classes: int = Field(ge=1)
    device: str
    machine: str
    parameters: Count
    flops_plain: Count | None = None
    flops: Count
    flops_cached: Count | None = None
    speeds: tuple[SpeedRow, ...] = ()
    environment: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """The method's name."""
        return str(self.method.get("name", self.recipe))

    @property
    def conditions(self) -> str:
        """What rows of one table share."""
        return f"{self.backbone}, {self.precision}, {self.classes} classes, on {self.machine}"

    @property
    def identity(self) -> str:
        """Two records of one identity are two measurements of one thing."""
        told = [self.recipe, self.method, self.backbone, self.precision, self.image_size, self.conditions]
        return json.dumps(told, sort_keys=True)


@dataclass(frozen=True)
class Run:
    """A run folder, but for its evaluations. `name` is its path relative to the folder that was searched.

    `remarks` are what `maple fit` found in the images.
    """

    folder: Path
    name: str
    settings: dict[str, Any] = field(hash=False)
    environment: dict[str, Any] = field(hash=False)
    history: tuple[dict[str, Any], ...] = field(hash=False)
    finished: bool
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """One row with its run.

    Attributes:
        own: the evaluated data set is the one the run was trained on.
        names: "" where the classes have their usual names, else how they differ.
        place: "" unless two data sets have one name; then where this one lies.
    """

    run: Run = field(repr=False)
    row: Row = field(repr=False, hash=False)
    own: bool
    names: str = ""
    place: str = ""

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.row.method["name"])

    @property
    def dataset(self) -> str:
        """The evaluated data set, with a word where its name alone would not tell it from another."""
        return " ".join(word for word in (self.row.dataset, self.place, self.names) if word)

    @property
    def settings(self) -> dict[str, str]:
        """All settings that tell runs of one method apart, flat, as text: method, training, renamed classes."""
        method = {key: value for key, value in self.row.method.items() if key != "name"}
        train = {} if self.method == ZERO_SHOT else dict(self.run.settings.get("train") or {})
        renamed = {"class_names": self.row.source.class_names} if self.row.source.class_names else {}
        flat = {**train, **method, **renamed}
        return {key: str(value) for key, value in flat.items() if key not in _WITHOUT_EFFECT}


ZERO_SHOT = "zero_shot"
_WITHOUT_EFFECT = {"workers", "images", "micro_batch", "text_memory"}


@dataclass(frozen=True)
class Problem:
    """Something that was left out of the report, and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Collection:
    """All that was found below a folder.

    Attributes:
        problems: damaged files and doubled evaluations, left out.
        silent: runs without any evaluation, and why.
        costs: what methods cost, as `maple efficiency` measured.
    """

    folder: Path
    runs: tuple[Run, ...]
    evaluations: tuple[Evaluation, ...]
    problems: tuple[Problem, ...] = ()
    silent: tuple[Problem, ...] = ()
    costs: tuple[CostRow, ...] = ()
