"""The files of a run.
config.json           the resolved settings
items.json            the sampled training items and their hash
environment.json      versions, machine, command
metrics.jsonl         one line per epoch
resume.safetensors    the state after the last whole epoch; gone when the run has finished
prompts.safetensors   the result; its presence means the run has finished
rows.jsonl            one line per evaluation
predictions/          the predictions of each evaluation: runs/evaluation.py
tensorboard/          with --tracker: tracking.py
trained_images.json   the sizes and hashes of the images trained on: trained_images.py
.lock                 held by the process that trains
.rows.lock            held by a process while it adds a row
"""

import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from maple import files
from maple.checkpoint import versions, write_tensors
from maple.config import RunSettings
from maple.data import Item
from maple.data.catalogue import canonical_name, template_of
from maple.data.folders.class_folders import split_domain
from maple.data.folders.listing import is_ignored
from maple.data.records import items_hash
from maple.data.saved_split import SAVED_SPLIT
from maple.distributed import processor
from maple.errors import BusyError, CheckpointError, ConfigError, MapleError, output_error, shortened
from maple.locks import locked
from maple.methods import ZERO_SHOT
from maple.runs.spec import relevant
from maple.train import EpochReport, Trainer

TRAINED_IMAGES = "trained_images.json"
"""The file in a run folder: the size and the SHA-256 of each image or row of features, by its path in the data set."""

_LEARNED = ("metrics.jsonl", "resume.safetensors", "prompts.safetensors")
RUN_FILES = ("config.json", "items.json", "environment.json", "rows.jsonl", TRAINED_IMAGES, *_LEARNED)
"""The files that a run writes into its folder."""


def read_settings(folder: Path) -> RunSettings:
    """The settings of the run in a folder.

    Raises:
        CheckpointError: the folder is not a run.

    Example:
        >>> read_settings(Path("runs/first")).method["name"]
        'maple'
    """
    hint = ""
    if not folder.exists():
        hint = "; it does not exist: check the path"
    elif (folder / "maple-export.json").is_file():
        hint = "; it is an ONNX export, which `maple predict` and `maple serve` read: name the run that was exported"
    elif any((folder / name).is_file() for name in ("model.json", "zero_shot_head.json")):
        hint = "; it is an export for other programs: name the run that was exported"
    missing = f"{folder} is not a run folder: it has no config.json{hint}"
    content: dict[str, Any] = files.read_json(folder / "config.json", missing=missing)
    try:
        return RunSettings(**content)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'} does not hold the settings of a run ({error})") from error


def finished_prompts(folder: Path) -> Path:
    """The prompts file of a finished run.

    Raises:
        CheckpointError: the run has not finished.

    Example:
        >>> method = load_prompts(finished_prompts(Path("runs/first")))
    """
    path = folder / "prompts.safetensors"
    if not path.is_file():
        read_settings(folder)
        resume = "it was interrupted: repeat its `maple train` command to resume it"
        reason = resume if (folder / "resume.safetensors").exists() else "train first"
        raise CheckpointError(f"{folder} holds no prompts.safetensors; {reason}")
    return path


def refuse_other_run(settings: RunSettings, folder: Path) -> None:
    """Raise ConfigError unless a run with these settings can be in the folder.

    It must be new and outside of the data set's images, or hold a run with these settings or one without results.
    """
    with files.output_errors(f"{str(folder)!r:.80}", "cannot be a folder"):
        is_file = folder.exists() and not folder.is_dir()
    if is_file:
        raise output_error(f"{folder} is a file", ": the name of a folder, which need not exist")
    if not (folder / "config.json").exists():
        if (folder / "prompts.safetensors").exists():
            problem = f"{folder} holds a prompts.safetensors without a config.json, so it is not a run folder"
            raise output_error(problem, ", or remove the folder")
        source = settings.data.dataset
        domain = split_domain(source)
        images = (domain[0] if domain else Path(source).expanduser()).resolve()
        place = folder.expanduser().resolve()
        inside = images.is_dir() and place.is_relative_to(images)
        if inside and not any(map(is_ignored, place.relative_to(images).parts)):
            problem = f"the run folder {folder} is among the images of {source}, where it would be taken for a class"
            raise output_error(problem, ", outside of them")
        # They would be taken for parts of this run, and no report would show them. A fit that has begun may end there.
        others = () if (folder / SAVED_SPLIT).exists() else sorted(folder.glob("*/config.json"))
        if run := next(filter(_is_run, others), None):
            raise output_error(f"{folder} holds other runs, such as {run.parent.name}", f", or a folder in {folder}")
        return
    try:
        stored = relevant(read_settings(folder))
    except ConfigError as error:
        raise output_error(str(error)) from error
    wanted = relevant(settings)
    if stored != wanted and any((folder / name).exists() for name in _LEARNED):
        problem = f"{folder} belongs to a run with other settings ({differences(stored, wanted)})"
        raise output_error(problem, ", or remove the folder")


def _is_run(config: Path) -> bool:
    """Whether a config.json is that of a run of its own: not of zero-shot CLIP of a fit, nor of another program."""
    if config.parent.name == ZERO_SHOT or is_ignored(config.parent.name):
        return False
    with suppress(MapleError):
        return bool(read_settings(config.parent).method)
    return False


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The differences between the settings of a folder and those wanted now, as "seed: 1 there, 2 now"."""
    stored, wanted = flatten(stored), flatten(wanted)
    changed = [key for key in sorted(stored.keys() | wanted.keys()) if stored.get(key) != wanted.get(key)]
    values = ((key, *(shortened(repr(settings.get(key))) for settings in (stored, wanted))) for key in changed)
    return "; ".join(f"{key}: {there} there, {now} now" for key, there, now in values)


def flatten(settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings as {"section.key": value}."""
    return {
        f"{section}.{key}" if isinstance(values, dict) else section: value
        for section, values in settings.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    }


def write_beginning(folder: Path, settings: RunSettings, items: list[Item]) -> None:
    """Make the folder a run: its settings, its training items, its environment; one that is resumed keeps its start."""
    for name in RUN_FILES:  # temporary files of a process that was killed while it wrote
        for leftover in folder.glob(f".{name}.*.tmp"):
            leftover.unlink(missing_ok=True)
    files.write_json(folder / "items.json", {"hash": items_hash(items), "items": [asdict(item) for item in items]})
    described = environment()
    if (folder / "resume.safetensors").exists():
        with suppress(MapleError, LookupError):  # of a damaged file nothing is kept
            described["started"] = files.read_json(folder / "environment.json")["started"]
    files.write_json(folder / "environment.json", described)
    # Last, because its presence makes the folder a run.
    files.write_json(folder / "config.json", settings.model_dump(mode="json"))


def write_epoch(trainer: Trainer, folder: Path, identity: dict[str, Any]) -> None:
    """Write the state after a whole epoch, then its report: after a crash in between, the report is written later."""
    tensors, values = trainer.state()
    write_tensors(folder / "resume.safetensors", tensors, {"identity": identity, "trainer": values})
    write_history(trainer, folder)


def write_history(trainer: Trainer, folder: Path) -> None:
    """Write the reports of all finished epochs."""
    lines = [json.dumps(report.as_json()) + "\n" for report in trainer.history]
    files.write_text(folder / "metrics.jsonl", "".join(lines))


def read_history(folder: Path) -> list[EpochReport]:
    """The reports of a run's epochs; none where nothing was trained.

    Raises:
        CheckpointError: metrics.jsonl is damaged.

    Example:
        >>> [report.loss for report in read_history(Path("runs/first"))]
        [1.0986, 0.8721]
    """
    path = folder / "metrics.jsonl"
    try:
        return [EpochReport.from_json(row) for row in files.read_json_lines(path, advice="move it away").values()]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: a line is not the report of an epoch ({error})") from error


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make `folder`, and keep other processes from training in it; the lock ends with the process, however that ends.

    Raises:
        BusyError: another process is training in it.
        ConfigError: the folder cannot be made.
    """
    with files.output_errors(folder, "cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    busy = BusyError(f"another process is training in {folder}; wait for it, or choose another output")
    with locked(folder / ".lock", busy):
        yield


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's evaluations; none where there was none.

    Raises:
        CheckpointError: rows.jsonl is damaged.

    Example:
        >>> [(row["dataset"], row["top1"]) for row in read_rows(Path("runs/first"))]
        [('emoji-animals/noto', 0.8125)]
    """
    return list(files.read_json_lines(folder / "rows.jsonl", advice="move it away").values())


def start_of(folder: Path) -> float | None:
    """When a run was started, in seconds since 1970; None where that is not recorded.

    Example:
        >>> start_of(Path("runs/first"))
        1764301234.0
    """
    try:
        return datetime.fromisoformat(files.read_json(folder / "environment.json")["started"]).timestamp()
    except (MapleError, LookupError, TypeError, ValueError):
        return None


def evaluation_key(row: dict[str, Any]) -> list[Any]:
    """The entries of a row that identify an evaluation of a run: one with an equal key replaces it.

    The images are not among them: an evaluation after some were added replaces the one before. The root that was given
    is: a data set may be there in two versions.
    """
    place, asked = row.get("place"), row.get("asked")
    if place is None and isinstance(asked, dict):  # of an earlier version
        place = place_of(str(asked.get("dataset", "")))
    key = [row.get(entry) for entry in ("dataset", "classes", "part", "class_names")]
    root = asked.get("root") if isinstance(asked, dict) else None
    return [*key, *([place] if place else []), *([root] if root else [])]


def place_of(dataset: str) -> str:
    """Where the images of a data set are from, as an absolute path or hf:OWNER/NAME; "" for one of the catalogue.

    Folders in two places may share their name, and their images' names too.
    """
    return "" if template_of(dataset) is not None else canonical_name(dataset)


def append_row(folder: Path, row: dict[str, Any]) -> None:
    """Add a row, or replace the row of the same evaluation."""
    row = json.loads(json.dumps(row))
    with locked(folder / ".rows.lock"):
        rows = [other for other in read_rows(folder) if evaluation_key(other) != evaluation_key(row)] + [row]
        files.write_text(folder / "rows.jsonl", "".join(json.dumps(entry) + "\n" for entry in rows))


def environment() -> dict[str, Any]:
    """The environment of this process as JSON, for a run folder or a measurement."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
