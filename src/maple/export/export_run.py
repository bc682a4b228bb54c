"""Export a run: one entry for every format, which leaves a checked folder or nothing."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maple import files
from maple.errors import ConfigError, one_of, output_error
from maple.export.export_source import open_export_source

FORMATS = ("onnx", "torchscript", "openclip", "transformers", "openai")


@dataclass(frozen=True)
class ExportResult:
    """A written export.

    Attributes:
        difference: the largest difference of logits from those of PyTorch, measured after writing.
        images: the number of the run's images in that measurement, in addition to random ones.
        scores: of 8-bit weights: `images`, the number of held-out images, and the fractions of these `accuracy`,
            `accuracy_float32` and `same_class`; None where there are no images of trained classes.
        new_names: why new class names cannot be used there; None where they can.
        notes: what the user of a checkpoint should know, in sentences.

    Example:
        >>> result = export_run("runs/pets", "exported")
        >>> result.difference < 1e-3, result.bytes
        (True, 41400000)
    """

    folder: Path
    difference: float
    images: int
    new_names: str | None
    notes: tuple[str, ...] = ()
    scores: dict[str, float] | None = None

    @property
    def bytes(self) -> int:
        """The size of its files."""
        return sum(path.stat().st_size for path in self.folder.iterdir())


def export_run(
    run: str | Path,
    output: str | Path,
    format: str = "onnx",
    *,
    zero_shot: bool = False,
    int8: bool = False,
    data_root: str | None = None,
    **clip: Any,
) -> ExportResult:
    """Write a trained method into a new folder in another format, and check that its logits are the same.

    Args:
        run: a finished run's folder, a prompts file, or `hub:OWNER/NAME`.
        output: a folder that does not exist yet, or is empty.
        zero_shot, int8: onnx only: include the frozen CLIP; 8-bit weights.
        data_root: the folder of the run's data set, for images to check on.
        clip: `backbone`, `pretrained` and `trust_backbone`, as in `maple.load_prompts`.

    Raises:
        ConfigError: an unknown format, an option that it does not have, a folder that is taken, or a missing package.
        ExportError: the format cannot hold the method, or the logits differ by more than 1e-3; nothing is left then.
        MapleError: the run cannot be loaded.

    Example:
        >>> export_run("runs/pets", "exported", "onnx", zero_shot=True).new_names is None
        True
    """
    if format not in FORMATS:
        raise ConfigError(one_of("format", format, FORMATS))
    for option, given in (("zero_shot", zero_shot), ("int8", int8)):
        if given and format != "onnx":
            raise ConfigError(f"{option}=True goes with format=onnx only; leave it out")
    target = Path(output).expanduser()
    if target.is_symlink():  # the folder it leads to is made, and the link stays
        target = target.resolve()
    with files.output_errors(f"{str(target)!r:.80}", "cannot be a folder"):
        taken = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if taken or not target.name:
        raise output_error(f"{target} exists already", ": the name of a folder to be made")
    source = open_export_source(run, data_root, scored=int8, **clip)
    refusal: str | None
    notes: list[str] = []
    scores: dict[str, float] | None = None
    with ExitStack() as stack:
        # Written next to its place, under another name, and renamed when the check has passed.
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(files.temporary_path(target.parent, folder=True))
        except OSError as error:
            raise output_error(f"{target} cannot be made ({error.strerror})", ", where files may be written") from error
        if format == "onnx":
            from maple.export.onnx_folder import write_onnx

            manifest = write_onnx(source, temporary, zero_shot=zero_shot, int8=int8)
            difference, refusal = manifest.maximal_difference or 0.0, manifest.new_names
            scores = manifest.checked.get("scores")
        elif format == "torchscript":
            from maple.export.torchscript import write_torchscript

            difference, refusal = write_torchscript(source, temporary), "the module has no text tower"
        else:
            from maple.export.plain_clip import write_plain_clip

            difference, refusal, notes = write_plain_clip(source, temporary, format)
        for path in (*temporary.iterdir(), temporary):
            files.make_public(path)
        with files.output_errors(target, "cannot be made"):
            temporary.rename(target)
    return ExportResult(target, difference, len(source.run_images), refusal, tuple(notes), scores)
