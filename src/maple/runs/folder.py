"""The files of a run.
config.json           the resolved settings
items.json            the sampled training items and their hash
environment.json      versions, machine, command
metrics.jsonl         one line per epoch
resume.safetensors    the state after the last whole epoch; gone when the run has finished
prompts.safetensors   the result; its presence means the run has finished
rows.jsonl            one line per evaluation
"""

import json
import platform
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from maple import files
from maple.checkpoint import versions, write_tensors
from maple.config import RunSettings
from maple.data import Item, items_hash
from maple.errors import CheckpointError, ConfigError
from maple.runs.spec import relevant
from maple.train import EpochReport, Trainer


def read_settings(folder: Path) -> RunSettings:
    """The settings a run folder was made with.

    Raises:
        CheckpointError: the folder is not a run.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a run folder: it has no config.json") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return RunSettings(**values)


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
    if not (folder / "config.json").exists():
        return
    stored = relevant(read_settings(folder))
    wanted = relevant(settings)
    if stored != wanted:
        changed = [
            f"{section}: {stored[section]} there, {wanted[section]} now"
            for section in wanted
            if stored.get(section) != wanted[section]
        ]
        raise ConfigError(
            f"{folder} belongs to a run with other settings ({'; '.join(changed)}); "
            "choose another --output, or remove the folder"
        )


def write_beginning(folder: Path, settings: RunSettings, items: list[Item]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "items.json", {"hash": items_hash(items), "items": [asdict(item) for item in items]})
    environment = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    files.write_json(folder / "environment.json", environment)
    # Last, because its presence makes the folder a run.
    files.write_json(folder / "config.json", settings.model_dump(mode="json"))


def write_epoch(trainer: Trainer, folder: Path, identity: dict[str, Any]) -> None:
    tensors, values = trainer.state()
    write_tensors(folder / "resume.safetensors", tensors, {"identity": identity, "trainer": values})
    lines = [json.dumps(report.as_json()) + "\n" for report in trainer.history]
    files.write_text(folder / "metrics.jsonl", "".join(lines))


def read_history(folder: Path) -> list[EpochReport]:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [EpochReport(**{**row, "losses": tuple(row["losses"])}) for row in rows]


def append_row(folder: Path, row: dict[str, Any]) -> None:
    """Add a row, or replace the one that answered the same question."""
    path = folder / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    row = json.loads(json.dumps(row))

    def question(candidate: dict[str, Any]) -> list[Any]:
        return [candidate[key] for key in ("dataset", "classes", "part", "class_names")]

    rows = [other for other in rows if question(other) != question(row)] + [row]
    files.write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rows))
