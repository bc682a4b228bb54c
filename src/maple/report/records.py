"""The records that a report is made of: evaluations, runs and costs, as their files hold them."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from maple.descriptions import MethodDescription
from maple.errors import CheckpointError, visible
from maple.files import read_json

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

# Settings that change the speed or the memory of a run, not its result.
_WITHOUT_EFFECT = {"workers", "images", "micro_batch", "text_memory"}


class Stored(BaseModel):
    """Base of the records that are read from files; unknown keys, of later versions, are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class BackboneRecord(Stored):
    """Which CLIP; `computed_by` says it where precomputed features stand for one."""

    name: str
    pretrained: str | None = None
    precision: str = "fp32"
    fingerprint: str = ""
    computed_by: str = ""


class TrainingSource(Stored):
    """What a run was trained on, and how its images are read; `shots` None is all images."""

    dataset: str
    shots: int | None = None
    classes: str = "all"
    class_names: dict[str, str] = {}
    validation: str = "few-shot"
    image_column: str | None = None
    label_column: str | None = None
    draft: bool = False


class Row(Stored):
    """One evaluation, a line of rows.jsonl. Accuracies are fractions.

    `sentences` are the settings that differ from `method` where another data set was read with its own sentences.
    """

    method: dict[str, Any]
    backbone: BackboneRecord
    source: TrainingSource
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
    uncalibrated_error: Fraction | None = None
    temperature: float = Field(1.0, gt=0)
    per_class: tuple[Fraction | None, ...] = ()
    predictions: str | None = None
    asked: dict[str, Any] = {}
    is_own: bool | None = None
    place: str | None = None
    sentences: dict[str, Any] = {}
    target_rule: str = ""

    @field_validator("method")
    @classmethod
    def _named(cls, method: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(method.get("name"), str) or not method["name"]:
            raise ValueError('must hold the "name" of a method')
        return method

    @field_validator("predictions")
    @classmethod
    def _inside_the_run(cls, path: str | None) -> str | None:
        if path is not None and (PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts):
            raise ValueError("must be inside the run")
        return path

    @model_validator(mode="after")
    def _consistent(self) -> "Row":
        if len(self.per_class) not in (0, len(self.class_names)):
            raise ValueError(f"{len(self.per_class)} accuracies per class for {len(self.class_names)} class names")
        return self


class SpeedRow(Stored):
    """Images per second at one batch size: of training, and of inference with classes encoded each time, and once."""

    batch: int = Field(ge=1)
    training: Rate | None = None
    inference: Rate
    cached: Rate | None = None


class CostRow(Stored):
    """The cost of a method on one backbone, machine and number of classes, as `maple efficiency` measured it.

    `recipe` is the first part of the preset's name, such as `maple-shallow`; a multiply-add is two `flops`.
    `embedding_parameters` are those of the token embeddings, 0 where an earlier version did not count them.
    """

    recipe: str = Field(min_length=1)
    method: dict[str, Any]
    backbone: str
    precision: str
    image_size: int
    backbone_parameters: int = Field(ge=1)
    embedding_parameters: Count = 0
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
        """What the rows of one table share."""
        return f"{self.backbone}, {self.precision}, {self.classes} classes, on {self.machine}"

    @property
    def identity(self) -> str:
        """Equal for two measurements of the same thing."""
        key = [self.recipe, self.method, self.backbone, self.precision, self.image_size, self.conditions]
        return json.dumps(key, sort_keys=True)


@dataclass(frozen=True)
class RunRecord:
    """A run folder without its evaluations; `name` is its path relative to the folder of the report.

    `history` are the epochs of metrics.jsonl, `remarks` what `maple fit` noticed about the images; `failure` is the
    error that a sweep recorded, or "".
    """

    folder: Path
    name: str
    settings: dict[str, Any] = field(hash=False)
    environment: dict[str, Any] = field(hash=False)
    history: tuple[dict[str, Any], ...] = field(hash=False)
    finished: bool
    remarks: tuple[str, ...] = ()
    failure: str = ""

    @cached_property
    def trained_classes(self) -> int | None:
        """The number of classes that the run has training images of; None where items.json does not say it."""
        try:
            content: dict[str, Any] = read_json(self.folder / "items.json")
            return len({item["label"] for item in content["items"]})
        except (CheckpointError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class EvaluationRecord:
    """One row with its run; `on_own_data` where the evaluated data set is the one that the run was trained on.

    `names` is "" where the classes have their usual names, otherwise how they differ; `location` is "" unless two data
    sets share a name, then the folder of this one. `defaults` are those of settings that came after the run's version.
    """

    run: RunRecord = field(repr=False)
    row: Row = field(repr=False, hash=False)
    description: MethodDescription = field(repr=False)
    on_own_data: bool
    names: str = ""
    location: str = ""
    defaults: dict[str, str] = field(default_factory=dict, repr=False, hash=False)

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.row.method["name"])

    @property
    def dataset(self) -> str:
        """The evaluated data set, with a word where its name alone is ambiguous."""
        return " ".join(word for word in (self.row.dataset, self.location, self.names) if word)

    @property
    def place(self) -> str | None:
        """Where the evaluated images are from: an absolute path, or hf:OWNER/NAME; "" for a data set of the catalogue.

        None where that is not known: earlier versions kept paths as they were written.
        """
        if self.row.place is not None:
            return self.row.place
        asked = self.row.source.dataset if self.on_own_data else str(self.row.asked.get("dataset", ""))
        if PurePath(asked).is_absolute() or asked.startswith("hf:"):
            return asked
        return "" if self.on_own_data else None

    @cached_property
    def settings(self) -> dict[str, str]:
        """All settings that can distinguish runs of one method, flat, as text: method, training, images."""
        return {**self.defaults, **self.stored_settings}

    @cached_property
    def stored_settings(self) -> dict[str, str]:
        """Those of them that the version of the run had."""
        source, learns = self.row.source, not self.description.is_zero_shot
        method = {key: value for key, value in self.row.method.items() if key != "name"}
        train = dict(self.run.settings.get("train") or {}) if learns else {}
        read = {"image_column", "label_column", "draft", *(["validation"] if learns else [])}
        images = source.model_dump(include=read, exclude_unset=True)
        renamed = {"class_names": source.class_names} if source.class_names else {}
        flat = {**images, **train, **method, **renamed}
        return {key: str(value) for key, value in flat.items() if key not in _WITHOUT_EFFECT}


@dataclass(frozen=True)
class Problem:
    """Something that was left out of the report, and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Collection:
    """Everything that was read below a folder.

    `problems` are what was left out: damaged files, duplicate evaluations, and those that a failed run has not reached.
    """

    folder: Path
    runs: tuple[RunRecord, ...]
    evaluations: tuple[EvaluationRecord, ...]
    problems: tuple[Problem, ...]
    without_evaluation: tuple[Problem, ...]
    costs: tuple[CostRow, ...]
    methods: Mapping[str, MethodDescription] = field(repr=False)


def read_stored(path: Path, place: str, problems: list[Problem]) -> dict[str, Any] | None:
    """The JSON object of a file; None, and one more problem, if it cannot be read."""
    try:
        return read_json(path)
    except CheckpointError as error:
        problems.append(Problem(place, reason_of(error, path)))
        return None


def reason_of(error: Exception, path: Path | None = None) -> str:
    """An error in one line, without the path; of a failed validation the first key and its message."""
    if not isinstance(error, ValidationError):
        return str(error).removeprefix(f"{path} is ")
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    return f"{key}: {first['msg']}" if key else first["msg"]


def harmless(text: str) -> str:
    """A text of others for a report, with escape sequences for control characters and marks of writing direction.

    Terminals obey the first, and the second reverse what follows them. Joiners, which emoji and scripts need, remain.
    """
    return _CONTROLS.sub(lambda match: visible(match[0]), text)


_CONTROLS = re.compile("[\0-\b\v\f\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def command_of(environment: dict[str, Any]) -> str:
    """The command that was recorded, as typed; "" where none was."""
    command = environment.get("command")
    words = [str(word) for word in command] if isinstance(command, list) else []
    if words and PurePath(words[0]).name in ("__main__.py", "maple"):
        words[0] = "maple"
    return shlex.join(words)
