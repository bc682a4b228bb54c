"""What a report is made of: runs and their evaluations, as their folders tell them."""

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

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
_WITHOUT_EFFECT = {"workers", "micro_batch"}


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
    """

    folder: Path
    runs: tuple[Run, ...]
    evaluations: tuple[Evaluation, ...]
    problems: tuple[Problem, ...] = ()
    silent: tuple[Problem, ...] = ()
