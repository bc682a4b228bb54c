"""The files of a fit: how far an earlier call came, and the result of a finished one."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
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
from maple.fitting.reliability import Reliability, read_reliability
from maple.methods import ZERO_SHOT, describe_methods
from maple.report import Chapter, Opening, Table, ThumbnailLoader, collect, write_report
from maple.report.comparison import MeasuredAccuracy, PairedAccuracy, held_out, paired_accuracy
from maple.report.tables import Cell, Section
from maple.runs import finished_prompts, read_rows
from maple.runs.folder import RUN_FILES, differences, read_settings
from maple.runs.selection import Selection, read_selection
from maple.runs.selection_plan import SelectionSettings
from maple.runs.spec import absolute_backbone, relevant
from maple.train import describe_kept

INSPECTION = "data.json"
SELECTION = "selection.json"
PAGE = "report.html"
TRIALS = ".selection"
"""The runs of a selection and of a calibration, in the folder of the fit until it is trained."""
NO_TEXT = "no text features"
"""The kind of the finding that there are no text features of the classes, and so no zero-shot CLIP to compare with."""
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
        selection: how the method was chosen; None if it was given.
        reliability: its calibration and its accuracy where it is sure; None without held-out images.
        kept: which state of the training is the result, and why; "" for the last one, without a choice.

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
    selection: Selection | None = None
    reliability: Reliability | None = None
    kept: str = ""


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
    selection = read_selection(folder / SELECTION) if (folder / SELECTION).exists() else None
    state = read_prompts(folder / "prompts.safetensors").info.get("kept")
    kept = describe_kept(state) if state else ""
    try:
        trained, zero_shot = held_out(collect(folder, describe_methods()))
    except DataError:  # no evaluations
        trained = zero_shot = None
    evaluation = trained or zero_shot
    if evaluation is None:
        return FitResult(folder, tuple(findings), was_finished=was_finished, selection=selection, kept=kept)
    try:
        comparison = paired_accuracy(trained, zero_shot) if trained and zero_shot else None
    except ValueError as error:
        raise CheckpointError(f"{folder}: its predictions cannot be compared: {error}") from error
    accuracy, reliability = MeasuredAccuracy.of(evaluation), read_reliability(folder, evaluation)
    if not (was_finished and (folder / PAGE).is_file()):
        opening = _opening(accuracy, comparison, [_shots(folder), kept], selection, reliability)
        write_report(folder, ["html"], methods=describe_methods(), load_thumbnail=load_thumbnail, opening=opening)
    page = folder / PAGE
    return FitResult(folder, tuple(findings), accuracy, comparison, page, was_finished, selection, reliability, kept)


def _shots(folder: Path) -> str:
    """How many images of each class the run was trained on, in words."""
    if read_settings(folder).method["name"] == ZERO_SHOT:
        return "Nothing was trained."
    try:
        items: list[dict[str, Any]] = files.read_json(folder / "items.json", advice="")["items"]
        counts = Counter(item["label"] for item in items).values()
        fewest, most = min(counts), max(counts)
    except (CheckpointError, KeyError, TypeError, ValueError):
        return ""  # of a run that learned nothing, or a damaged file, which is not needed otherwise
    return f"{len(items):,} training images, {fewest if fewest == most else f'{fewest} to {most}'} of each class."


def _opening(
    accuracy: MeasuredAccuracy,
    comparison: PairedAccuracy | None,
    training: Sequence[str],
    selection: Selection | None,
    reliability: Reliability | None,
) -> Opening:
    """The headline and the first chapters of the page: what the terminal shows.

    `training` are sentences on how the run was trained.
    """

    def percent(value: float) -> str:
        return f"{100 * value:.1f}"

    def with_interval(measured: MeasuredAccuracy) -> str:
        return "{} % ({} to {})".format(*map(percent, (measured.fraction, *measured.interval)))

    measures = [comparison.zero_shot, comparison.method] if comparison else [accuracy]
    title = accuracy.title
    result = (
        f"{title[:1].upper()}{title[1:]} classifies {with_interval(accuracy)} of {accuracy.images:,} held-out images"
    )
    headline = [f"{result} correctly."]
    if comparison is not None:
        other = f"Zero-shot CLIP classifies {with_interval(comparison.zero_shot)} correctly"
        if comparison.is_significant:
            gain = comparison.method.fraction > comparison.zero_shot.fraction
            headline.append(f"{other}: the {'gain' if gain else 'loss'} is unlikely to be chance.")
        else:
            headline.append(f"{other}: the difference may be chance.")
    rows = tuple(
        (
            measured.title,
            (Cell(percent(measured.fraction)), Cell("{} to {}".format(*map(percent, measured.interval)))),
        )
        for measured in measures
    )
    notes = [f"In per cent, with 95 % intervals (Wilson), on {accuracy.images:,} images that were not trained on."]
    if comparison is not None:
        notes.append(f"{comparison.method.title}: {comparison.verdict}.")
    notes += filter(None, training)
    table = Table("Accuracy on held-out images", (Section("", ("Method", "Accuracy", "Interval"), rows),), tuple(notes))
    chapters = [Chapter(table.caption, [table], [])]
    chapters += [_leaderboard(selection)] if selection else []
    chapters += [reliability.chapter()] if reliability else []
    return Opening(tuple(headline), tuple(chapters))


def _leaderboard(selection: Selection) -> Chapter:
    """The candidates and the choice, for the page."""
    is_new = selection.goal == "new"
    interval = "95 % interval"
    measures = ("Trained", interval, "New", interval, "Harmonic mean") if is_new else ("Accuracy", interval)
    rows = []
    for place, candidate in enumerate(selection.tried):
        intervals = [candidate.interval, *([candidate.new_interval] if is_new else [])]
        values = [candidate.accuracy, *([candidate.new_accuracy] if is_new else [])]
        measured = []
        for value, (low, high) in zip(values, intervals, strict=True):
            measured += [f"{100 * value:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"]
        measured += [f"{100 * candidate.score:.1f}"] if is_new else []
        best = len(measured) - 1 if is_new else 0
        cells = [Cell(text, best=place == 0 and column == best) for column, text in enumerate(measured)]
        rows.append((candidate.title, (*cells, Cell(f"{candidate.seconds:.0f} s"))))
    remarks = [f"{candidate.title}: {candidate.remark}." for candidate in selection.tried if candidate.remark]
    skipped = [f"Not tried: {each.title} ({each.skipped})." for each in selection.candidates if each.skipped]
    how = f"{selection.conditions} Time: as estimated before. The held-out images had no part in the choice."
    notes = (how, *remarks, *skipped)
    table = Table("Methods tried", (Section("", ("Method", *measures, "Time"), tuple(rows)),), notes)
    return Chapter("How the method was chosen", [table], [], selection.reason)


def write_inspection(folder: Path, request: dict[str, Any], inspection: dict[str, Any], lines: Sequence[str]) -> None:
    """Keep the inspection of the images, with the request that it was made for."""
    files.write_json(folder / INSPECTION, {"format": FORMAT, "request": request, **inspection, "lines": lines})


def fit_request(
    candidates: Mapping[str, RunSettings], selection: SelectionSettings | None, keep_near_copies: bool
) -> dict[str, Any]:
    """What identifies a fit: its settings, or those of all candidates; an equal request resumes it."""
    described = []
    for settings in candidates.values():
        values = relevant(settings)
        # A fit calibrates by default, so that fits made before there was such a setting are found.
        if not values["train"].pop("calibrate", False):
            values["train"]["calibrate"] = False
        described.append(values)
    request = described[0]
    if selection is not None:
        differing = ("method", "train")
        request = {key: value for key, value in request.items() if key not in differing}
        request["candidates"] = {
            recipe: {key: settings[key] for key in differing}
            for recipe, settings in zip(candidates, described, strict=True)
        }
        request["selection"] = selection.model_dump(mode="json")
    # Only where it is set, so that fits made before there was such an option are found.
    return request | ({"keep_near_copies": True} if keep_near_copies else {})


def read_inspection(folder: Path) -> dict[str, Any]:
    """Read the inspection of the images that `write_inspection` has kept.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: it is a file of the user's own.
    """
    path = folder / INSPECTION
    again = f"choose another output, or remove {folder} to start again"
    missing = f"{folder} does not contain {INSPECTION}: it was not made by `maple fit`"
    content: dict[str, Any] = files.read_json(path, missing=missing, advice=again)
    if content and not content.keys() & {"format", "request"}:
        raise output_error(f"{path} is not a file of `maple fit`")
    lines = content.get("lines")
    complete = isinstance(content.get("request"), dict) and isinstance(lines, list)
    complete = complete and all(isinstance(line, str) for line in lines or ())
    if content.get("format") != FORMAT or not complete:
        raise CheckpointError(f"{path} is damaged, or of another version; {again}")
    return content


def load_previous(request: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """Return the inspection of an earlier call with this request; None if this is the first call.

    One with other settings counts only if it has begun to train.

    Raises:
        ConfigError: the earlier call had other settings, or the folder has files that `maple fit` did not make and
            would replace.
    """
    if not (folder / INSPECTION).exists():
        _refuse_other_files(folder)
        return None
    previous = read_inspection(folder)
    if isinstance(backbone := previous["request"].get("backbone"), dict):
        previous["request"]["backbone"] = absolute_backbone(backbone)
    request = json.loads(json.dumps(request))
    has_begun = any((folder / name).exists() for name in ("config.json", SELECTION, TRIALS))
    if not has_begun and (previous["request"] != request or not (folder / SAVED_SPLIT).exists()):
        return None
    if previous["request"] != request:
        changes = differences(previous["request"], request)
        chose = "candidates" in previous["request"]
        if chose != ("candidates" in request):
            several, given = "chose among several methods", "was given one method"
            changes = f"it {several}; now one is named" if chose else f"it {given}; now several are to be compared"
        problem = f"{folder} belongs to a `maple fit` with other settings ({changes})"
        raise output_error(problem, ", or remove the folder")
    return previous


def _refuse_other_files(folder: Path) -> None:
    """Raise ConfigError if a folder without an inspection has a file that a fit writes: it is not one of a fit's.

    But for a saved split: a process that was killed may have left it.
    """
    names = [name for name in (*RUN_FILES, SELECTION, PAGE) if (folder / name).exists()]
    if (folder / SAVED_SPLIT).exists():
        try:
            read_saved_split(folder / SAVED_SPLIT, look=False)
        except DataError:
            names.append(SAVED_SPLIT)
    if {"prompts.safetensors", "resume.safetensors"} & {*names}:
        raise output_error(f"{folder} holds a run that `maple fit` did not make")
    if names:
        raise output_error(f"{folder} holds files that `maple fit` did not make and would replace: {', '.join(names)}")


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


def is_finished(folder: Path) -> bool:
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
    findings = read_inspection(folder).get("findings") or []
    is_compared = not any(isinstance(each, dict) and each.get("kind") == NO_TEXT for each in findings)
    is_compared = is_compared and read_settings(folder).method["name"] != ZERO_SHOT
    runs = [folder, folder / ZERO_SHOT] if is_compared else [folder]
    return not test or all(is_evaluated(run, test) for run in runs)
