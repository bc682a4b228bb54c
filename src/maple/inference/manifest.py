"""The description of an export to ONNX: `maple-export.json`, stored with its graphs."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from maple import files
from maple.errors import CheckpointError, ClassNamesError, shortened
from maple.names import clean_class_names

MANIFEST = "maple-export.json"
FORMAT: Literal[1] = 1

IMAGE = "image.onnx"
TEXT = "text.onnx"
FROZEN_TEXT = "text_frozen.onnx"
"""The text tower of the frozen CLIP, where that of the method is another without learned tokens too."""
CLASSES = "classes.npy"
ZERO_SHOT = "zero_shot.npy"
MERGES = "bpe_simple_vocab_16e6.txt.gz"

_MOST_FILES = 100
_MOST_TEMPLATES = 10_000
_LARGEST_IMAGE = 4096
_ONE_HOLE = r"^([^{]|\{[^}])*\{\}([^{]|\{[^}])*$"
_PLAIN_NAME = re.compile(r"\w[\w.-]{0,200}")


Positive = Annotated[float, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Slots(_Section):
    """Sentences with learned tokens: "{words} {class name}.", whose first `length` words are replaced by them."""

    kind: Literal["slots"] = "slots"
    length: int = Field(ge=1)
    words: str
    position: Literal["end", "middle", "front"]


class Templates(_Section):
    """Fixed sentences with {} for the class name; the features are their normalised mean."""

    kind: Literal["templates"] = "templates"
    templates: tuple[Annotated[str, Field(pattern=_ONE_HOLE)], ...] = Field(min_length=1, max_length=_MOST_TEMPLATES)


class Preprocess(_Section):
    """The arguments of `EvalView`."""

    size: int = Field(ge=1, le=_LARGEST_IMAGE)
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]
    interpolation: str
    resize: Literal["shortest", "longest", "squash", "none"] = "shortest"
    resize_size: int | None = Field(None, ge=1, le=_LARGEST_IMAGE)
    fill: int = Field(0, ge=0, le=255)
    crop_offset: Literal["rounded", "floor"] = "rounded"


class Manifest(_Section):
    """The content of the file.

    Attributes:
        head: how logits are computed from unit image features. `cosine`: logit_scale x features x classes; `logits`:
            the graph outputs those of the trained names; `shifted`: `cosine`, with classes that `text.onnx` computes
            for each image under the graph's `shift`.
        text_weight: where `shifted` classes depend on whether they were trained, the weight of the text feature in the
            embedding of a trained name, to which its row of the table is added. Only written there.
        temperature: by which these logits are divided already, for probabilities: in the graph, or in the logit_scale,
            which is that of the method divided by it. Only written where it is not 1.
        frozen_logit_scale: that of the frozen CLIP. Only written where the method has another.
        sentences, new_names: how new names are written; or None, and the reason why they cannot be predicted.
        zero_shot: the sentences of the frozen CLIP; None where it is not included.
        files: sizes in bytes.
        maximal_difference: of logits from those of PyTorch, as measured after the export.
    """

    format: Literal[1]
    maple: str
    about: dict[str, Any]
    class_names: tuple[str, ...] = Field(min_length=1)
    preprocess: Preprocess
    logit_scale: Positive
    head: Literal["cosine", "logits", "shifted"]
    text_weight: Annotated[float, Field(ge=0, le=1)] | None = None
    temperature: float = Field(1.0, ge=1e-3, le=1e3)
    frozen_logit_scale: Positive | None = None
    int8: bool
    context_length: Annotated[int, Field(ge=3)] | None
    sentences: Slots | Templates | None = Field(discriminator="kind")
    new_names: str | None
    zero_shot: Templates | None
    versions: dict[str, str]
    files: dict[str, int] = Field(max_length=_MOST_FILES)
    maximal_difference: float | None
    checked: dict[str, Any]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        try:
            clean_class_names(self.class_names)
        except ClassNamesError as error:
            raise ValueError(str(error)) from error
        needed = {
            IMAGE: True,
            **dict.fromkeys((TEXT, MERGES), self.sentences is not None),
            CLASSES: self.head == "cosine" or self.text_weight is not None,
            ZERO_SHOT: self.zero_shot is not None,
        }
        if absent := [name for name, is_needed in needed.items() if is_needed and name not in self.files]:
            raise ValueError(f"files does not list {', '.join(absent)}")
        if outside := [name for name in self.files if not _PLAIN_NAME.fullmatch(name)]:
            raise ValueError(
                f"files lists {shortened(repr(outside[0]))}, which is not the name of a file in the folder"
            )
        if self.sentences is not None and self.context_length is None:
            raise ValueError("sentences need a context_length")
        if isinstance(self.sentences, Slots) and self.sentences.length > (self.context_length or 0) - 2:
            raise ValueError(f"a prompt of {self.sentences.length} tokens exceeds the context_length")
        if self.text_weight is not None and self.head != "shifted":
            raise ValueError("a text_weight needs the head 'shifted'")
        if self.head == "shifted" and not isinstance(self.sentences, Slots):
            raise ValueError("classes that depend on the image need sentences with learned tokens")
        return self


def is_export(path: str | Path) -> bool:
    """Whether a path is the folder of an export to ONNX, or its manifest, which may be damaged."""
    return os.path.lexists(export_folder(path) / MANIFEST)


def export_folder(path: str | Path) -> Path:
    """The folder of an export, which may also be given by its manifest."""
    path = Path(path).expanduser()
    return path.parent if path.name == MANIFEST else path


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an export, and check that its files are complete.

    Raises:
        CheckpointError: unreadable, of a newer format, or a file is missing or of another size than was written.
    """
    path = folder / MANIFEST
    content: dict[str, Any] = files.read_json(
        path, missing=f"{folder} is not an exported method: it has no {MANIFEST}", advice="export the run again"
    )
    version = content.get("format")
    if isinstance(version, int) and version > FORMAT:
        known = f"this version of maple reads format {FORMAT}"
        raise CheckpointError(f"{path} has format {shortened(str(version))}; {known}: upgrade maple")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        problem = first["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{path} is damaged: {place}{problem}; export the run again") from error
    for name, expected in manifest.files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None  # a pipe or a device is not a file either
        if size != expected:
            problem = "is missing" if size is None else f"has {size:,} bytes instead of {expected:,}"
            raise CheckpointError(f"{file} {problem}; copy the whole folder again, or export the run again")
    return manifest
