"""The files of a fit: how far an earlier call came, and the result of a finished one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maple import files
from maple.checkpoint import read_prompts
from maple.config import RunSettings
from maple.data import Item
from maple.data.records import items_hash
from maple.data.saved_split import SAVED_SPLIT, read_saved_split
from maple.errors import CheckpointError, DataError, output_error
from maple.methods import ZERO_SHOT, describe_methods
from maple.report import ThumbnailLoader, collect, write_report
from maple.report.comparison import MeasuredAccuracy, PairedAccuracy, held_out, paired_accuracy
from maple.runs import finished_prompts, read_rows
from maple.runs.folder import differences
from maple.runs.spec import absolute_backbone, relevant

INSPECTION = "data.json"
PAGE = "report.html"
FORMAT = 1


@dataclass(frozen=True)
class FitResult:
    """The result of `fit`.

    Attributes:
        findings: the summary of the images, and what was unusual about them.
        accuracy: on the held-out images; None if no images could be held out.
        comparison: with zero-shot CLIP; None without held-out images, or if that is the method itself.
        page: the report page; None without held-out images.
        was_finished: an earlier call had finished, so nothing was computed.

    Example:
        >>> result = read_fit(Path("runs/flowers"))
        >>> print(result.accuracy.fraction, result.page)
    """

    folder: Path
    findings: tuple[str, ...]
    accuracy: MeasuredAccuracy | None = None
    comparison: PairedAccuracy | None = None
    page: Path | None = None
    was_finished: bool = False


def read_fit(folder: Path, load_thumbnail: ThumbnailLoader | None = None) -> FitResult:
    """Read the result of a finished fit from its folder; write its page, with these thumbnails, if it is missing.

    Raises:
        CheckpointError: the folder does not hold a fit, or the fit has not finished.

    Example:
        >>> print(read_fit(Path("runs/flowers")).comparison)
    """
    finished_prompts(folder)
    return build_result(folder, read_inspection(folder)["lines"], load_thumbnail, was_finished=True)


def build_result(
    folder: Path, findings: Sequence[str], load_thumbnail: ThumbnailLoader | None, *, was_finished: bool = False
) -> FitResult:
    """Build the result from the files of a trained run; write the page, unless it was finished and has one."""
    try:
        trained, zero_shot = held_out(collect(folder, describe_methods()))
    except DataError:  # no evaluations
        trained = zero_shot = None
    evaluation = trained or zero_shot
    if evaluation is None:
        return FitResult(folder, tuple(findings), was_finished=was_finished)
    if not (was_finished and (folder / PAGE).is_file()):
        write_report(folder, ["html"], methods=describe_methods(), load_thumbnail=load_thumbnail)
    try:
        comparison = paired_accuracy(trained, zero_shot) if trained and zero_shot else None
    except ValueError as error:
        raise CheckpointError(f"{folder}: its predictions cannot be compared: {error}") from error
    accuracy = MeasuredAccuracy.of(evaluation)
    return FitResult(folder, tuple(findings), accuracy, comparison, folder / PAGE, was_finished)


def write_inspection(
    folder: Path, settings: RunSettings, keep_near_copies: bool, inspection: dict[str, Any], lines: Sequence[str]
) -> None:
    """Keep the inspection of the images, with the settings that it was made for."""
    request = {"format": FORMAT, "request": _request(settings, keep_near_copies)}
    files.write_json(folder / INSPECTION, {**request, **inspection, "lines": lines})


def _request(settings: RunSettings, keep_near_copies: bool) -> dict[str, Any]:
    # Only where it is set, so that fits made before there was such an option are found.
    return relevant(settings) | ({"keep_near_copies": True} if keep_near_copies else {})


def read_inspection(folder: Path) -> dict[str, Any]:
    """Read the inspection of the images that `write_inspection` has kept.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / INSPECTION
    again = f"remove {folder} to start again"
    missing = f"{folder} does not contain {INSPECTION}: it was not made by `maple fit`"
    content: dict[str, Any] = files.read_json(path, missing=missing, advice=again)
    lines = content.get("lines")
    complete = isinstance(content.get("request"), dict) and isinstance(lines, list)
    complete = complete and all(isinstance(line, str) for line in lines or ())
    if content.get("format") != FORMAT or not complete:
        raise CheckpointError(f"{path} is damaged, or of another version; {again}")
    return content


def load_previous(settings: RunSettings, folder: Path, keep_near_copies: bool) -> dict[str, Any] | None:
    """Return the inspection of an earlier call with these settings; None if this is the first call.

    Raises:
        ConfigError: the earlier call had other settings.
    """
    if not (folder / INSPECTION).exists() or not (folder / SAVED_SPLIT).exists():
        return None
    previous = read_inspection(folder)
    if isinstance(backbone := previous["request"].get("backbone"), dict):
        previous["request"]["backbone"] = absolute_backbone(backbone)
    request = json.loads(json.dumps(_request(settings, keep_near_copies)))
    if previous["request"] != request:
        changes = differences(previous["request"], request)
        problem = f"{folder} belongs to a `maple fit` with other settings ({changes})"
        raise output_error(problem, ", or remove the folder")
    return previous


def is_evaluated(run: Path, test: Sequence[Item]) -> bool:
    """Whether a run has been evaluated on these held-out images, under their own class names."""
    test_hash = items_hash(test)
    return any(
        row.get("items") == test_hash
        and (row.get("classes"), row.get("part")) == ("all", "test")
        and not (row.get("asked") or {}).get("names")
        and (run / str(row.get("predictions"))).is_file()
        for row in read_rows(run)
    )


def is_finished(settings: RunSettings, folder: Path) -> bool:
    """Whether the run is trained, and it and zero-shot CLIP are evaluated on the held-out images, if there are any.

    Raises:
        CheckpointError: the prompts file is damaged, which the next command would find otherwise.
    """
    prompts = folder / "prompts.safetensors"
    if not prompts.is_file():
        return False
    try:
        read_prompts(prompts)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; remove the file and repeat the command to train again") from error
    test = read_saved_split(folder / SAVED_SPLIT, look=False).test
    runs = [folder] if settings.method["name"] == ZERO_SHOT else [folder, folder / ZERO_SHOT]
    return not test or all(is_evaluated(run, test) for run in runs)
