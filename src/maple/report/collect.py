"""Read run folders into evaluations. A damaged file costs its own rows and is listed; the rest is unaffected."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from pydantic import ValidationError

from maple.config.settings import LATER_SETTINGS
from maple.descriptions import MethodDescription
from maple.errors import CheckpointError, DataError
from maple.files import FAILURE, read_json, read_json_lines
from maple.plugins import code_title
from maple.report.records import Collection, CostRow, EvaluationRecord, Problem, Row, RunRecord, read_stored, reason_of

COSTS = "complexity"
"""The folder of `maple efficiency`'s records, in a folder of runs."""

_BASELINE_RUN = "zero_shot"  # the run inside a run that `maple fit` compares with
_SECTIONS = ("method", "backbone", "data", "train", "evaluate")


def collect(folder: Path, methods: Mapping[str, MethodDescription]) -> Collection:
    """Read every run below `folder`, or `folder` itself; `methods` are those of `maple.methods.describe_methods()`.

    Raises:
        DataError: no such folder, no run in it, or no evaluation in any run; unless there are records of costs.

    Example:
        >>> collection = collect(Path("runs"), describe_methods())
        >>> [evaluation.row.top1 for evaluation in collection.evaluations if evaluation.row.classes == "novel"]
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give one that holds runs of `maple train`")
    runs: list[RunRecord] = []
    evaluations: list[EvaluationRecord] = []
    problems: list[Problem] = []
    without_evaluation: list[Problem] = []
    for path in _run_folders(folder):
        name = path.relative_to(folder).as_posix()
        if not (path / "config.json").exists():
            without_evaluation.append(Problem(name, f"failed: {_failure(path)}"))
        elif run := _read_run(path, name, problems):
            own_evaluations = _read_evaluations(run, methods, problems)
            runs.append(run)
            evaluations += own_evaluations
            if not own_evaluations:
                without_evaluation.append(Problem(name, _why_not_evaluated(run)))
            elif run.failure:
                problems.append(Problem(name, f"failed before its other evaluations: {run.failure}"))
    costs = read_costs(folder, problems)
    if not runs and not problems and not costs:
        raise DataError(f"there is no run in {folder}; a run is a folder with a config.json, as `maple train` makes it")
    evaluations = _without_outdated(_with_later_settings(evaluations), problems)
    evaluations = _without_duplicates(evaluations, problems)
    if not evaluations and not costs:
        reasons = "; ".join(f"{problem.place}: {problem.reason}" for problem in [*problems, *without_evaluation][:5])
        raise DataError(
            f"no run in {folder} has a readable evaluation ({reasons}); evaluate first: "
            "maple evaluate RUN --classes base,novel"
        )
    evaluations = _with_distinct_datasets(evaluations)
    return Collection(
        folder, tuple(runs), tuple(evaluations), tuple(problems), tuple(without_evaluation), costs, methods
    )


def _run_folders(folder: Path) -> Iterator[Path]:
    for path, folders, names in os.walk(folder):
        if "config.json" in names or FAILURE in names:
            yield Path(path)
            folders[:] = [name for name in folders if name == _BASELINE_RUN]
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _read_run(folder: Path, name: str, problems: list[Problem]) -> RunRecord | None:
    """The run; None where config.json is damaged, or belongs to another program."""
    settings = read_stored(folder / "config.json", f"{name}/config.json", problems)
    if settings is None or "method" not in settings or "data" not in settings:
        return None
    if odd := [key for key in _SECTIONS if not isinstance(settings.get(key, {}), dict)]:
        problems.append(Problem(f"{name}/config.json", f"damaged: {', '.join(odd)} must be an object"))
        return None
    stored = {}
    for part in ("environment", "data"):
        path = folder / f"{part}.json"
        stored[part] = (read_stored(path, f"{name}/{path.name}", problems) if path.exists() else None) or {}
    remarks = stored["data"].get("lines", [])
    if not isinstance(remarks, list):
        problems.append(Problem(f"{name}/data.json", "damaged: lines must be a list"))
        remarks = []
    epochs = []
    kinds = {"loss": int | float, "logs": dict, "losses": list}
    for number, line in _read_lines(folder / "metrics.jsonl", name, problems).items():
        if all(isinstance(line.get(key), kind) for key, kind in kinds.items()) and all(
            value is None or isinstance(value, int | float) for value in (*line["logs"].values(), *line["losses"])
        ):
            epochs.append(line)
        else:
            problems.append(Problem(f"{name}/metrics.jsonl line {number}", "not the report of an epoch"))
    finished = (folder / "prompts.safetensors").is_file()
    failure = _failure(folder) if (folder / FAILURE).exists() else ""
    return RunRecord(
        folder, name, settings, stored["environment"], tuple(epochs), finished, tuple(map(str, remarks)), failure
    )


def _read_evaluations(
    run: RunRecord, methods: Mapping[str, MethodDescription], problems: list[Problem]
) -> list[EvaluationRecord]:
    evaluations = []
    for number, line in _read_lines(run.folder / "rows.jsonl", run.name, problems).items():
        try:
            row = Row(**line)
        except (ValidationError, TypeError) as error:
            problems.append(Problem(f"{run.name}/rows.jsonl line {number}", f"not an evaluation: {reason_of(error)}"))
            continue
        method = row.method["name"]
        description = methods.get(method, MethodDescription(code_title(method)))
        evaluations.append(EvaluationRecord(run, row, description, on_own_data=_is_own(row, run.folder)))
    return evaluations


def _read_lines(path: Path, run: str, problems: list[Problem]) -> dict[int, dict[str, Any]]:
    """The JSON objects of a .jsonl file by line number."""

    def report(number: int, reason: str) -> None:
        problems.append(Problem(f"{run}/{path.name} line {number}", reason))

    try:
        return read_json_lines(path, error=DataError, on_damage=report)
    except DataError as error:
        problems.append(Problem(f"{run}/{path.name}", reason_of(error, path)))
        return {}


def _is_own(row: Row, folder: Path) -> bool:
    """Whether the evaluated data set is the one that the run was trained on, however it was written."""
    if row.is_own is not None:
        return row.is_own
    trained, evaluated = row.source.dataset, row.dataset
    if trained == evaluated or row.asked.get("dataset") == trained:
        return True
    if PurePath(trained).is_absolute():
        # FOLDER:DOMAIN is called FOLDER/DOMAIN, a table by its name without the suffix.
        return evaluated in (PurePath(trained).name, PurePath(trained).stem, PurePath(trained).name.replace(":", "/"))
    if not evaluated.startswith(f"{trained}/"):
        return False
    # The name of a group stands for one of its styles, the one that the training items come from.
    try:
        items: Any = read_json(folder / "items.json")
        first = str(items["items"][0]["path"])
    except (CheckpointError, LookupError, TypeError):
        return True
    return first.startswith(f"{evaluated.removeprefix(f'{trained}/')}/")


def _why_not_evaluated(run: RunRecord) -> str:
    if run.failure:
        return f"failed: {run.failure}"
    if run.finished:
        return f"finished, but not evaluated: maple evaluate {run.folder}"
    train, epochs = run.settings.get("train") or {}, len(run.history)
    made = (
        f"{epochs} epochs of {train['steps']} steps"
        if train.get("steps")
        else f"{epochs} of {train.get('epochs', '?')} epochs"
    )
    return f"not finished: {made}; repeat its command to continue"


def _failure(folder: Path) -> str:
    try:
        return str(read_json(folder / FAILURE).get("error"))
    except CheckpointError as error:
        return f"{FAILURE} is {reason_of(error, folder / FAILURE)}"


def _with_later_settings(evaluations: list[EvaluationRecord]) -> list[EvaluationRecord]:
    """The same, with the defaults of those settings of their method that only runs of later versions have."""
    defaults = {key: str(value) for section in LATER_SETTINGS.values() for key, value in section.items()}
    known: dict[str, set[str]] = defaultdict(set)
    for evaluation in evaluations:
        known[evaluation.method] |= evaluation.stored_settings.keys()
    return [
        replace(evaluation, defaults={key: defaults[key] for key in known[evaluation.method] & defaults.keys()})
        for evaluation in evaluations
    ]


def _without_outdated(evaluations: list[EvaluationRecord], problems: list[Problem]) -> list[EvaluationRecord]:
    """The same, without those on other data sets that earlier versions made in another way, where there are both.

    They evaluated every data set with the sentences of the one that a run was trained on, and methods that predict
    trained names by a rule of their own had no rule for lists of other data sets.
    """
    with_own = {(evaluation.method, evaluation.row.dataset) for evaluation in evaluations if evaluation.row.sentences}
    with_rule = {
        (evaluation.method, evaluation.row.dataset) for evaluation in evaluations if evaluation.row.target_rule
    }
    kept = []
    for evaluation in evaluations:
        row = evaluation.row
        key = evaluation.method, row.dataset
        if not evaluation.on_own_data and key in with_own and not row.sentences:
            reason = f"read this data set with the sentences of {row.source.dataset}"
        elif not evaluation.on_own_data and key in with_rule and not row.target_rule:
            reason = "predicted the names that were trained by another rule than the rest of the list"
        else:
            kept.append(evaluation)
            continue
        reason = f"an earlier version {reason}; evaluate it again"
        problems.append(Problem(f"{evaluation.run.name}, {row.dataset} {row.classes}", reason))
    return kept


def _without_duplicates(evaluations: list[EvaluationRecord], problems: list[Problem]) -> list[EvaluationRecord]:
    """The first, by folder name, of the evaluations that agree in everything that was asked; of one run the last."""
    by_run: dict[str, dict[int, EvaluationRecord]] = defaultdict(dict)
    for evaluation in evaluations:
        row = evaluation.row
        key = [evaluation.method, evaluation.settings, row.backbone.model_dump(), row.source.model_dump(), row.seed]
        key.append([row.dataset, evaluation.place or "", row.classes, row.part, row.class_names])
        same = by_run[json.dumps(key, sort_keys=True)]
        earlier = same.get(id(evaluation.run))
        if earlier is not None and earlier.row.items != row.items:
            reason = f"on other images than a later evaluation of this run ({100 * earlier.row.top1:.2f} %); left out"
            problems.append(Problem(f"{evaluation.run.name}, {row.dataset} {row.classes}", reason))
        same[id(evaluation.run)] = evaluation
    kept = []
    for first, *others in (tuple(same.values()) for same in by_run.values()):
        kept.append(first)
        for other in others:
            row = other.row
            images = "" if row.items == first.row.items else ", on other images of this data set"
            accuracies = f"{100 * row.top1:.2f} % here, {100 * first.row.top1:.2f} % there"
            reason = f"{first.run.name} holds the same evaluation{images}: the settings and the seed are equal"
            place = f"{other.run.name}, {row.dataset} {row.classes}"
            problems.append(Problem(place, f"{reason} ({accuracies}); left out"))
    return kept


def _with_distinct_datasets(evaluations: list[EvaluationRecord]) -> list[EvaluationRecord]:
    """Mark data sets that share a name and differ: other folders, other class names, or fewer classes, than usual."""
    places: dict[str, set[str]] = defaultdict(set)
    names: dict[tuple[str, str, str], Counter[tuple[str, ...]]] = defaultdict(Counter)
    for evaluation in evaluations:
        row = evaluation.row
        names[row.dataset, row.classes, row.part][row.class_names] += 1
        if evaluation.place is not None:
            places[row.dataset].add(evaluation.place)
    marked = []
    for evaluation in evaluations:
        row, location, differing = evaluation.row, "", ""
        if evaluation.place and len(places[row.dataset]) > 1:
            location = f"in {PurePath(evaluation.place).parent}"
        counts = names[row.dataset, row.classes, row.part]
        usual = max(counts, key=lambda key: (counts[key], len(key)))
        if row.class_names != usual:
            renamed = len(row.class_names) == len(usual)
            similar = [other for other in counts if other != usual and (len(other) == len(usual)) == renamed]
            number = f" {similar.index(row.class_names) + 1}" if len(similar) > 1 else ""
            differing = f"({'other names' if renamed else f'{len(row.class_names)} classes'}{number})"
        marked.append(replace(evaluation, names=differing, location=location))
    return marked


def read_costs(folder: Path, problems: list[Problem]) -> tuple[CostRow, ...]:
    """The records in every folder named `complexity` below `folder`, or in `folder` itself if that is its name.

    Of two measurements of the same thing the later one counts. A damaged file is appended to `problems`.
    """
    rows: dict[str, CostRow] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [] if "config.json" in names else sorted(name for name in folders if not name.startswith("."))
        if Path(place).name != COSTS and not (Path(place) == folder and folder.resolve().name == COSTS):
            continue
        for path in (Path(place) / name for name in sorted(names) if name.endswith(".json") and name[0] != "."):
            try:
                row = CostRow.model_validate(read_json(path, object))
            except (CheckpointError, ValidationError) as error:
                reason = f"not a record of `maple efficiency`: {reason_of(error, path)}"
                problems.append(Problem(path.relative_to(folder).as_posix(), reason))
                continue
            earlier = rows.get(row.identity)
            if earlier is None or _started(earlier) <= _started(row):
                rows[row.identity] = row
    return tuple(rows.values())


def _started(row: CostRow) -> str:
    return str(row.environment.get("started", ""))
