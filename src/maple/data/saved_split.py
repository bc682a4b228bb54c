"""The images of a run, written down with their division: what training and every later evaluation read."""

import json
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from maple import files
from maple.data.catalogue import load_dataset
from maple.data.records import Dataset, Item, items_hash
from maple.errors import DataError

SAVED_SPLIT = "images.json"
"""Its name in a run folder."""

_FORMAT = 1
_PARTS = ("train", "val", "test")


def write_saved_split(path: Path, dataset: Dataset, source: str) -> str:
    """Write the items of a data set, atomically, and return their hash.

    Args:
        source: how `load_dataset` opens the data set; used again where its images are drawn and not files.
    """
    content: dict[str, Any] = {
        "format": _FORMAT,
        "hash": saved_split_hash(dataset),
        "name": dataset.name,
        "source": source,
        "root": str(dataset.root.resolve()) if dataset.read is None else None,
        "drawn_split": dataset.drawn_split,
        "class_names": list(dataset.class_names),
    }
    for part in _PARTS:
        content[part] = [[item.path, item.label] for item in getattr(dataset, part)]
    files.write_json(path, content)
    return str(content["hash"])


def read_saved_split(path: Path, expected: str | None = None, *, look: bool = True) -> Dataset:
    """The data set that `write_saved_split` wrote down; the images themselves are not looked at, nor, without `look`,
    whether they are still there.

    Raises:
        DataError: the file is missing or damaged, is not the one with the `expected` hash, or its images' folder is
            gone.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); it belongs to the run and was written by it") from error
    try:
        if content["format"] != _FORMAT:
            raise DataError(f"{path} has format {content['format']!r}; this version of maple reads {_FORMAT}: upgrade")
        names = tuple(content["class_names"])
        train, val, test = (tuple(Item(path, label, names[label]) for path, label in content[part]) for part in _PARTS)
        root, drawn = content["root"], bool(content["drawn_split"])
        dataset = Dataset(content["name"], Path(root or "."), train, val, test, names, drawn_split=drawn)
        source = str(content["source"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{path} is damaged: {error!r}; it belongs to the run and was written by it") from error
    if expected is not None and saved_split_hash(dataset) != expected:
        raise DataError(f"{path} is not the list of images that this run was made with; put the original back")
    if not look:
        return dataset
    if root is None:
        return replace(dataset, read=load_dataset(source, None).read)
    if not dataset.root.is_dir():
        raise DataError(
            f"{dataset.root}: the folder with the images of this run is gone; put it back, or write where it is now "
            f'as "root" into {path}'
        )
    return dataset


def saved_split_hash(dataset: Dataset) -> str:
    """SHA-256 (hex) of class names and items, part by part; not of where the images lie."""
    parts: Sequence[tuple[Item, ...]] = (dataset.train, dataset.val, dataset.test)
    text = json.dumps([list(dataset.class_names), *(items_hash(part) for part in parts)])
    return sha256(text.encode()).hexdigest()
