"""Run folders in, evaluations out. A damaged file costs its own rows and is listed; it never spoils the rest."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from pydantic import ValidationError

from maple.errors import DataError
from maple.files import FAILURE
from maple.report.costs import read_costs
from maple.report.records import ZERO_SHOT, Collection, Evaluation, Problem, Row, Run

_SECTIONS = ("method", "backbone", "data", "train", "evaluate")


def collect(folder: Path) -> Collection:
    """Read every run below `folder`, or `folder` itself.

    Raises:
        DataError: no such folder, no run in it, or no evaluation in any run; unless there are records of costs.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give one that holds runs of `maple train`")
    runs: list[Run] = []
    evaluations: list[Evaluation] = []
    problems: list[Problem] = []
    silent: list[Problem] = []
    for place in _run_folders(folder):
        if not (place / "config.json").exists():
            silent.append(Problem(place.relative_to(folder).as_posix(), f"failed: {_failure(place)}"))
            continue
        run, found, wrong = _read_run(place, place.relative_to(folder).as_posix())
        problems += wrong
        if run is None:
            continue
        runs.append(run)
        evaluations += found
        if not found:
            silent.append(Problem(run.name, _why_silent(run)))
    costs, damaged = read_costs(folder)
    problems += damaged
    if not runs and not problems and not costs:
        raise DataError(f"there is no run in {folder}; a run is a folder with a config.json, as `maple train` makes it")
    kept, doubled = _without_doubles(evaluations)
    problems += doubled
    if not kept and not costs:
        told = "; ".join(f"{problem.place}: {problem.reason}" for problem in [*problems, *silent][:5])
        raise DataError(
            f"no run in {folder} has a readable evaluation ({told}); evaluate first: "
            "maple evaluate RUN --classes base,novel"
        )
    told_apart = tuple(_tell_names_apart(_tell_places_apart(kept)))
    return Collection(folder, tuple(runs), told_apart, tuple(problems), tuple(silent), costs)


def _run_folders(folder: Path) -> Iterator[Path]:
    for place, folders, found in os.walk(folder):
        if "config.json" in found or FAILURE in found:
            yield Path(place)
            # A run may hold the one that it is compared with, as `maple fit` leaves it.
            folders[:] = [name for name in folders if name == ZERO_SHOT]
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _read_run(folder: Path, name: str) -> tuple[Run | None, list[Evaluation], list[Problem]]:
    problems: list[Problem] = []
    try:
        settings = _read_object(folder / "config.json")
    except (OSError, ValueError) as error:
        return None, [], [Problem(f"{name}/config.json", f"unreadable or damaged: {error}")]
    if "method" not in settings or "data" not in settings:
        return None, [], []  # somebody else's config.json
    if odd := [key for key in _SECTIONS if not isinstance(settings.get(key, {}), dict)]:
        return None, [], [Problem(f"{name}/config.json", f"damaged: {', '.join(odd)} must be an object")]
    environment: dict[str, Any] = {}
    if (folder / "environment.json").exists():
        try:
            environment = _read_object(folder / "environment.json")
        except (OSError, ValueError) as error:
            problems.append(Problem(f"{name}/environment.json", f"unreadable or damaged: {error}"))
    history, wrong = _read_lines(folder / "metrics.jsonl", name)
    problems += wrong
    epochs = tuple(epoch for epoch in history.values() if _is_epoch(epoch))
    problems += [
        Problem(f"{name}/metrics.jsonl line {number}", "is no report of an epoch")
        for number, epoch in history.items()
        if not _is_epoch(epoch)
    ]
    remarks, wrong = _remarks(folder, name)
    problems += wrong
    finished = (folder / "prompts.safetensors").is_file()
    run = Run(folder, name, settings, environment, epochs, finished=finished, remarks=remarks)
    lines, wrong = _read_lines(folder / "rows.jsonl", name)
    problems += wrong
    evaluations = []
    for number, line in lines.items():
        try:
            row = Row(**line)
        except (ValidationError, TypeError) as error:
            problems.append(Problem(f"{name}/rows.jsonl line {number}", f"is no evaluation: {_brief(error)}"))
            continue
        evaluations.append(Evaluation(run, row, own=_is_own(row, folder)))
    return run, evaluations, problems


def _remarks(folder: Path, name: str) -> tuple[tuple[str, ...], list[Problem]]:
    """The lines of data.json; none where there is no such file."""
    if not (folder / "data.json").exists():
        return (), []
    try:
        lines = _read_object(folder / "data.json")["lines"]
        if not isinstance(lines, list):
            raise ValueError("its lines are no list")
    except (OSError, ValueError, KeyError) as error:
        return (), [Problem(f"{name}/data.json", f"unreadable or damaged: {error}")]
    return tuple(str(line) for line in lines), []


def _is_epoch(line: dict[str, Any]) -> bool:
    kinds = {"loss": int | float, "logs": dict, "losses": list}
    if not all(isinstance(line.get(key), kind) for key, kind in kinds.items()):
        return False
    return all(value is None or isinstance(value, int | float) for value in (*line["logs"].values(), *line["losses"]))


def _read_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def _read_lines(path: Path, run: str) -> tuple[dict[int, dict[str, Any]], list[Problem]]:
    """The JSON objects of a .jsonl file by line number, and the lines that are none."""
    objects: dict[int, dict[str, Any]] = {}
    problems = []
    try:
        # Not splitlines, which also cuts at characters that JSON leaves as they are in a string.
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    except (OSError, ValueError) as error:
        return {}, [Problem(f"{run}/{path.name}", f"unreadable: {error}")]
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            problems.append(Problem(f"{run}/{path.name} line {number}", f"is no JSON: {error}"))
            continue
        if isinstance(content, dict):
            objects[number] = content
        else:
            problems.append(Problem(f"{run}/{path.name} line {number}", "holds no JSON object"))
    return objects, problems


def _brief(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else first["msg"]


def _is_own(row: Row, folder: Path) -> bool:
    """Whether the evaluated data set is the one that the run was trained on, whichever way that was written."""
    asked, found = row.source.dataset, row.dataset
    if asked == found or row.asked.get("dataset") == asked:
        return True
    if PurePath(asked).is_absolute():
        # FOLDER:DOMAIN is called FOLDER/DOMAIN, a table by its name without the end.
        return found in (PurePath(asked).name, PurePath(asked).stem, PurePath(asked).name.replace(":", "/"))
    if not found.startswith(f"{asked}/"):
        return False
    # The name of a group stands for one of its styles, the one that the training items come from.
    try:
        first = _read_object(folder / "items.json")["items"][0]["path"]
    except (OSError, ValueError, LookupError, TypeError):
        return True
    return str(first).startswith(f"{found.removeprefix(f'{asked}/')}/")


def _why_silent(run: Run) -> str:
    if (run.folder / FAILURE).exists():
        return f"failed: {_failure(run.folder)}"
    if run.finished:
        return f"finished, but not evaluated: maple evaluate {run.folder}"
    epochs = (run.settings.get("train") or {}).get("epochs", "?")
    done = len(run.history)
    return f"not finished: {done} of {epochs} epochs; repeat its command to go on"


def _failure(folder: Path) -> str:
    try:
        return str(_read_object(folder / FAILURE).get("error"))
    except (OSError, ValueError) as error:
        return f"{FAILURE} is unreadable ({error})"


def _without_doubles(evaluations: list[Evaluation]) -> tuple[list[Evaluation], list[Problem]]:
    """One evaluation for each question; the first by folder name where several runs give one."""
    kept: dict[str, Evaluation] = {}
    problems = []
    for evaluation in evaluations:
        row = evaluation.row
        question = json.dumps(
            [
                evaluation.method,
                evaluation.settings,
                row.backbone.model_dump(),
                row.source.model_dump(),
                row.seed,
                [row.dataset, row.classes, row.part, row.class_names],
            ],
            sort_keys=True,
        )
        if question not in kept:
            kept[question] = evaluation
            continue
        other = kept[question]
        same = "the same" if row.items == other.row.items else "a data set of the same name, with other images"
        answers = f"{100 * row.top1:.2f} % here, {100 * other.row.top1:.2f} % there"
        problems.append(
            Problem(
                f"{evaluation.run.name}, {row.dataset} {row.classes}",
                f"{other.run.name} holds {same} evaluation with these settings and seed ({answers}); left out",
            )
        )
    return list(kept.values()), problems


def _tell_places_apart(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Mark the data sets that have one name and are different folders."""
    places: dict[str, set[str]] = defaultdict(set)
    for evaluation in evaluations:
        if evaluation.own:
            places[evaluation.row.dataset].add(evaluation.row.source.dataset)
    return [
        replace(evaluation, place=f"in {PurePath(evaluation.row.source.dataset).parent}")
        if evaluation.own
        and len(places[evaluation.row.dataset]) > 1
        and PurePath(evaluation.row.source.dataset).is_absolute()
        else evaluation
        for evaluation in evaluations
    ]


def _tell_names_apart(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Mark evaluations whose classes are named otherwise, or are fewer, than in most evaluations of the data set."""
    names: dict[tuple[str, str, str], Counter[tuple[str, ...]]] = defaultdict(Counter)
    for evaluation in evaluations:
        row = evaluation.row
        names[row.dataset, row.classes, row.part][row.class_names] += 1
    marked = []
    for evaluation in evaluations:
        row = evaluation.row
        counts = names[row.dataset, row.classes, row.part]
        usual = max(counts, key=lambda found: (counts[found], len(found)))
        others = [found for found in counts if found != usual]
        if row.class_names == usual:
            marked.append(evaluation)
            continue
        what = "other names" if len(row.class_names) == len(usual) else f"{len(row.class_names)} classes"
        alike = [found for found in others if (len(found) == len(usual)) == (what == "other names")]
        number = f" {alike.index(row.class_names) + 1}" if len(alike) > 1 else ""
        marked.append(replace(evaluation, names=f"({what}{number})"))
    return marked
