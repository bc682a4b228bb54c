"""The result of a fit, read from the files of its folder."""

from dataclasses import dataclass
from pathlib import Path

from maple.errors import CheckpointError, ConfigError, DataError
from maple.fitting.state import read_found
from maple.methods import describe_methods
from maple.report import ThumbnailLoader, collect, write_report
from maple.report.comparison import MeasuredAccuracy, PairedAccuracy, held_out, paired_accuracy
from maple.runs import finished_prompts

PAGE = "report.html"


@dataclass(frozen=True)
class FitResult:
    """What `fit` leaves.

    Attributes:
        folder: the run.
        lines: what was found in the images.
        ours: the accuracy on the held-out images; None where none could be held out.
        versus: the comparison with zero-shot CLIP; None without held-out images, or where that is the method.
        page: the page; None without held-out images, or where it cannot be drawn.
        no_page: why there is none.
        was_finished: there was nothing left to compute.
    """

    folder: Path
    lines: tuple[str, ...]
    ours: MeasuredAccuracy | None
    versus: PairedAccuracy | None
    page: Path | None
    no_page: str = ""
    was_finished: bool = False


def read_fit(folder: Path, load_thumbnail: ThumbnailLoader | None = None) -> FitResult:
    """The result of a finished fit, from its files.

    Raises:
        CheckpointError: the folder holds none, or it has not finished.
    """
    finished_prompts(folder)
    return result_of(folder, tuple(read_found(folder)["lines"]), load_thumbnail, was_finished=True)


def result_of(
    folder: Path, lines: tuple[str, ...], load_thumbnail: ThumbnailLoader | None, *, was_finished: bool = False
) -> FitResult:
    """Everything from the files; the page is drawn if it is not there."""
    try:
        ours, theirs = held_out(collect(folder, describe_methods()))
    except DataError:
        return FitResult(folder, lines, None, None, None, "there were no held-out images", was_finished)
    best = ours or theirs
    if best is None:
        return FitResult(folder, lines, None, None, None, "there were no held-out images", was_finished)
    page, problem = folder / PAGE, ""
    if not (was_finished and page.is_file()):
        try:
            write_report(folder, ["html"], methods=describe_methods(), load_thumbnail=load_thumbnail)
        except ConfigError as error:
            problem = str(error)
    try:
        compared = paired_accuracy(ours, theirs) if ours and theirs else None
    except ValueError as error:
        raise CheckpointError(f"{folder}: its predictions cannot be compared: {error}") from error
    return FitResult(
        folder, lines, MeasuredAccuracy.of(best), compared, None if problem else page, problem, was_finished
    )
