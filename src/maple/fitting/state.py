"""What an earlier call of `fit` left in its folder, and how far it came."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maple.checkpoint import read_prompts
from maple.config import RunSettings
from maple.data import SAVED_SPLIT, Item, items_hash, read_saved_split
from maple.errors import CheckpointError, ConfigError
from maple.methods import ZERO_SHOT
from maple.runs import differences, read_rows, relevant

FOUND = "data.json"
FORMAT = 1


def load_previous(settings: RunSettings, folder: Path) -> dict[str, Any] | None:
    """What an earlier call found in the images; None if this is the first.

    Raises:
        ConfigError: the earlier call was another one.
    """
    if not (folder / FOUND).exists() or not (folder / SAVED_SPLIT).exists():
        return None
    found = read_found(folder)
    wanted = json.loads(json.dumps(relevant(settings)))
    if found["request"] != wanted:
        raise ConfigError(
            f"{folder} belongs to a `maple fit` with other settings ({differences(found['request'], wanted)}); choose "
            "another --output, or remove the folder"
        )
    return found


def read_found(folder: Path) -> dict[str, Any]:
    path = folder / FOUND
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no {FOUND}: it was not made by `maple fit`") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is unreadable or damaged ({error}); remove {folder} to start again") from error
    right = isinstance(found, dict) and found.get("format") == FORMAT and isinstance(found.get("request"), dict)
    if not right or not isinstance(found.get("lines"), list):
        raise CheckpointError(f"{path} is damaged, or of another version; remove {folder} to start again")
    return found  # type: ignore[no-any-return]


def is_evaluated(run: Path, test: Sequence[Item]) -> bool:
    wanted = items_hash(test)
    return any(
        row.get("items") == wanted
        and (row.get("classes"), row.get("part")) == ("all", "test")
        and not (row.get("asked") or {}).get("names")
        and (run / str(row.get("predictions"))).is_file()
        for row in read_rows(run)
    )


def is_finished(settings: RunSettings, folder: Path) -> bool:
    prompts = folder / "prompts.safetensors"
    if not prompts.is_file():
        return False
    try:
        read_prompts(prompts)  # a damaged file is told now, not by the next command
    except CheckpointError as error:
        raise CheckpointError(f"{error}; remove the file and repeat the command to train again") from error
    test = read_saved_split(folder / SAVED_SPLIT, look=False).test
    runs = [folder] if settings.method["name"] == ZERO_SHOT else [folder, folder / ZERO_SHOT]
    return not test or all(is_evaluated(run, test) for run in runs)
