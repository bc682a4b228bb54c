"""The files of a run.
config.json           the resolved settings
items.json            the sampled training items and their hash
environment.json      versions, machine, command
metrics.jsonl         one line per epoch
resume.safetensors    the state after the last whole epoch; gone when the run has finished
prompts.safetensors   the result; its presence means the run has finished
rows.jsonl            one line per evaluation
predictions/          what each evaluation said of every image: runs/predictions.py
tensorboard/          with --tracker: tracking.py
.lock                 held by the process that trains
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from maple import files
from maple.checkpoint import write_tensors
from maple.config import RunSettings
from maple.data import Item
from maple.data.folders.class_folders import is_ignored, split_domain
from maple.data.records import items_hash
from maple.errors import BusyError, CheckpointError, ConfigError
from maple.runs.environment import environment
from maple.runs.spec import relevant
from maple.train import EpochReport, Trainer

_WRITTEN = (
    "config.json",
    "items.json",
    "environment.json",
    "metrics.jsonl",
    "resume.safetensors",
    "prompts.safetensors",
    "rows.jsonl",
)
_LEARNED = ("metrics.jsonl", "resume.safetensors", "prompts.safetensors")


def read_settings(folder: Path) -> RunSettings:
    """The settings a run folder was made with.

    Raises:
        CheckpointError: the folder is not a run.
    """
    missing = f"{folder} is not a run folder: it has no config.json{_what_else(folder)}"
    return RunSettings(**files.read_json(folder / "config.json", missing=missing))


def _what_else(folder: Path) -> str:
    """What a path is that was taken for a run folder, where that can be told."""
    if not folder.exists():
        return "; nothing of this name is there: check the path"
    if (folder / "maple-export.json").is_file():
        return "; it is an export to ONNX, which `maple predict` and `maple serve` read: name the run that it is of"
    if any((folder / name).is_file() for name in ("model.json", "zero_shot_head.json")):
        return "; it is an export for other programs: name the run that it is of"
    return ""


def finished_prompts(folder: Path) -> Path:
    """The prompts file of a finished run.

    Raises:
        CheckpointError: the run has not finished.
    """
    path = folder / "prompts.safetensors"
    if not path.is_file():
        read_settings(folder)
        resume = "it was interrupted: repeat its `maple train` command to go on"
        reason = resume if (folder / "resume.safetensors").exists() else "train first"
        raise CheckpointError(f"{folder} holds no prompts.safetensors; {reason}")
    return path


def refuse_other_run(settings: RunSettings, folder: Path) -> None:
    """Raise ConfigError unless `folder` is new, or holds a run with these settings or one that has learned nothing.

    A new one may not lie among the images of the data set.
    """
    try:
        taken = folder.exists() and not folder.is_dir()
    except OSError as error:
        raise ConfigError(
            f"{str(folder)!r:.80} cannot be a folder ({error.strerror}); choose another --output"
        ) from error
    if taken:
        raise ConfigError(f"{folder} is a file; choose another --output: the name of a folder, which need not exist")
    if not (folder / "config.json").exists():
        if (folder / "prompts.safetensors").exists():
            raise ConfigError(
                f"{folder} holds a prompts.safetensors without a config.json, so it is no run of ours; "
                "choose another --output, or remove the folder"
            )
        _refuse_among_images(settings.data.dataset, folder)
        return
    try:
        stored = relevant(read_settings(folder))
    except ConfigError as error:
        raise ConfigError(
            f"{folder / 'config.json'} is not that of a run ({error}); choose another --output"
        ) from error
    wanted = relevant(settings)
    if stored != wanted and any((folder / name).exists() for name in _LEARNED):
        raise ConfigError(
            f"{folder} belongs to a run with other settings ({differences(stored, wanted)}); "
            "choose another --output, or remove the folder"
        )


def _refuse_among_images(source: str, folder: Path) -> None:
    """Refuse a new run folder among the class folders of `source`, where it would be taken for a class.

    Raises:
        ConfigError: it lies there.
    """
    domain = split_domain(source)
    images = (domain[0] if domain else Path(source).expanduser()).resolve()
    place = folder.expanduser().resolve()
    if images.is_dir() and place.is_relative_to(images) and not any(map(is_ignored, place.relative_to(images).parts)):
        raise ConfigError(
            f"the run folder {folder} lies among the images of {source}, where its files would be taken for a class; "
            "choose another --output, outside of them"
        )


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What differs between the settings of a folder and those wanted now, as "seed: 1 there, 2 now"."""
    stored, wanted = _flat(stored), _flat(wanted)
    return "; ".join(
        f"{key}: {stored.get(key)!r} there, {wanted.get(key)!r} now"
        for key in sorted(stored.keys() | wanted.keys())
        if stored.get(key) != wanted.get(key)
    )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings as {"section.key": value}."""
    return {
        f"{section}.{key}" if isinstance(values, dict) else section: value
        for section, values in settings.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    }


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of a process that was killed while it wrote."""
    for name in _WRITTEN:
        for leftover in folder.glob(f".{name}.*.tmp"):
            leftover.unlink(missing_ok=True)


def write_beginning(folder: Path, settings: RunSettings, items: list[Item]) -> None:
    """Make the folder a run: what is trained, on what, where."""
    remove_leftovers(folder)
    files.write_json(folder / "items.json", {"hash": items_hash(items), "items": [asdict(item) for item in items]})
    files.write_json(folder / "environment.json", environment())
    # Last, because its presence makes the folder a run.
    files.write_json(folder / "config.json", settings.model_dump(mode="json"))


def write_epoch(trainer: Trainer, folder: Path, identity: dict[str, Any]) -> None:
    """Keep the state after a whole epoch, then its report: a crash in between leaves a report to be written later."""
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
    """
    path = folder / "metrics.jsonl"
    try:
        return [EpochReport.from_json(row) for row in files.read_json_lines(path, advice="move it away").values()]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: a line is no report of an epoch ({error})") from error


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Let no other process train in `folder` meanwhile; the lock ends with the process, however that ends.

    Raises:
        BusyError: another process is training in it.
        ConfigError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made ({error.strerror}); choose another --output") from error
    try:
        with FileLock(folder / ".lock", blocking=False):
            yield
    except Timeout as error:
        raise BusyError(f"another process is training in {folder}; wait for it, or choose another --output") from error


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's evaluations; none where there was none.

    Raises:
        CheckpointError: rows.jsonl is damaged.
    """
    return list(files.read_json_lines(folder / "rows.jsonl", advice="move it away").values())


def question(row: dict[str, Any]) -> list[Any]:
    """What tells one evaluation of a run from another."""
    return [row.get(key) for key in ("dataset", "classes", "part", "class_names", "items")]


def append_row(folder: Path, row: dict[str, Any]) -> None:
    """Add a row, or replace the one that answered the same question."""
    path = folder / "rows.jsonl"
    row = json.loads(json.dumps(row))
    rows = [other for other in read_rows(folder) if question(other) != question(row)] + [row]
    files.write_text(path, "".join(json.dumps(entry) + "\n" for entry in rows))
