"""What an exported method says of itself: `maple-export.json`, beside its graphs."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maple.errors import CheckpointError

MANIFEST = "maple-export.json"
FORMAT: Literal[1] = 1

IMAGE = "image.onnx"
TEXT = "text.onnx"
CLASSES = "classes.npy"
ZERO_SHOT = "zero_shot.npy"
MERGES = "bpe_simple_vocab_16e6.txt.gz"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Slots(_Part):
    """Sentences with learned tokens: "{words} {class name}.", whose first `length` words are replaced by them."""

    kind: Literal["slots"] = "slots"
    length: int = Field(ge=1)
    words: str
    position: Literal["end", "middle", "front"]


class Templates(_Part):
    """Fixed sentences with {} for the class name; the mean of their unit features, made unit."""

    kind: Literal["templates"] = "templates"
    templates: tuple[str, ...] = Field(min_length=1)


class Preprocess(_Part):
    """What `EvalView` takes."""

    size: int = Field(ge=1)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


class Manifest(_Part):
    """The content of the file.

    Attributes:
        head: how logits are made of unit image features. `cosine`: logit_scale x features x classes; `logits`: the
            graph gives those of the trained names; `shifted`: `cosine`, with classes that `text.onnx` gives for each
            image under the graph's `shift`.
        sentences: how new names are written, None where the method cannot speak of them.
        new_names: why not, then.
        zero_shot: the sentences of the frozen CLIP; None where it is not included.
        files: sizes in bytes.
        maximal_difference: of logits from those of PyTorch, as measured after the export.
    """

    format: Literal[1]
    maple: str
    about: dict[str, Any]
    class_names: tuple[str, ...] = Field(min_length=1)
    preprocess: Preprocess
    logit_scale: float
    head: Literal["cosine", "logits", "shifted"]
    int8: bool
    context_length: Annotated[int, Field(ge=3)] | None
    sentences: Slots | Templates | None = Field(discriminator="kind")
    new_names: str | None
    zero_shot: Templates | None
    versions: dict[str, str]
    files: dict[str, int]
    maximal_difference: float | None
    checked: dict[str, Any]


def is_export(path: str | Path) -> bool:
    """Whether a path is the folder of a method that was exported to ONNX, or its manifest."""
    folder = export_folder(path)
    return (folder / MANIFEST).is_file()


def export_folder(path: str | Path) -> Path:
    """The folder of an export, which may also be given by its manifest."""
    path = Path(path).expanduser()
    return path.parent if path.name == MANIFEST else path


def read_manifest(folder: Path) -> Manifest:
    """Read what an export says of itself, and see that its files are whole.

    Raises:
        CheckpointError: unreadable, of a newer format, or a file is missing or of another size than was written.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no exported method: it has no {MANIFEST}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is unreadable or damaged ({error}); export the run again") from error
    found = content.get("format") if isinstance(content, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise CheckpointError(f"{path} has format {found}; this version of maple reads format {FORMAT}: upgrade maple")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        raise CheckpointError(f"{path} is damaged: {where}: {first['msg']}; export the run again") from error
    for name, size in manifest.files.items():
        file = folder / name
        there = file.stat().st_size if file.is_file() else None
        if there != size:
            said = "is missing" if there is None else f"has {there:,} bytes instead of {size:,}"
            raise CheckpointError(f"{file} {said}; copy the whole folder again, or export the run again")
    return manifest
