"""The description of an export to ONNX: `maple-export.json`, stored with its graphs."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maple import files
from maple.errors import CheckpointError, shortened

MANIFEST = "maple-export.json"
FORMAT: Literal[1] = 1

IMAGE = "image.onnx"
TEXT = "text.onnx"
CLASSES = "classes.npy"
ZERO_SHOT = "zero_shot.npy"
MERGES = "bpe_simple_vocab_16e6.txt.gz"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Slots(_Section):
    """Sentences with learned tokens: "{words} {class name}.", whose first `length` words are replaced by them."""

    kind: Literal["slots"] = "slots"
    length: int = Field(ge=1)
    words: str
    position: Literal["end", "middle", "front"]


class Templates(_Section):
    """Fixed sentences with {} for the class name; the features are their normalised mean."""

    kind: Literal["templates"] = "templates"
    templates: tuple[str, ...] = Field(min_length=1)


class Preprocess(_Section):
    """The arguments of `EvalView`."""

    size: int = Field(ge=1)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


class Manifest(_Section):
    """The content of the file.

    Attributes:
        head: how logits are computed from unit image features. `cosine`: logit_scale x features x classes; `logits`:
            the graph outputs those of the trained names; `shifted`: `cosine`, with classes that `text.onnx` computes
            for each image under the graph's `shift`.
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
    """Whether a path is the folder of an export to ONNX, or its manifest."""
    return (export_folder(path) / MANIFEST).is_file()


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
        place = ".".join(map(str, first["loc"])) or "its content"
        raise CheckpointError(f"{path} is damaged: {place}: {first['msg']}; export the run again") from error
    for name, expected in manifest.files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            problem = "is missing" if size is None else f"has {size:,} bytes instead of {expected:,}"
            raise CheckpointError(f"{file} {problem}; copy the whole folder again, or export the run again")
    return manifest
