"""The images and splits of a run, saved in its folder: training and every later evaluation read them."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from maple import files
from maple.data.catalogue import load_dataset
from maple.data.records import SPLIT_NAMES, Dataset, Item, items_hash
from maple.errors import DataError

SAVED_SPLIT = "images.json"
"""The file name in a run folder."""

_FORMAT = 1


def write_saved_split(path: Path, dataset: Dataset, source: str) -> str:
    """Write the items of a data set atomically, and return their hash.

    `source` is the name or path for `load_dataset`, needed to read images that are rendered and not files.
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
    for split in SPLIT_NAMES:
        content[split] = [[item.path, item.label] for item in getattr(dataset, split)]
    files.write_json(path, content)
    return str(content["hash"])


def read_saved_split(path: Path, expected: str | None = None, *, look: bool = True) -> Dataset:
    """Read a data set that `write_saved_split` wrote; its images are not opened, and without `look` not looked for.

    Raises:
        DataError: the file is missing or damaged, has another hash than `expected`, or its image folder is gone.
    """
    advice = "it belongs to the run and was written by it"
    content: dict[str, Any] = files.read_json(path, error=DataError, advice=advice)
    try:
        if content["format"] != _FORMAT:
            raise DataError(f"{path} has format {content['format']!r}; this version of maple reads {_FORMAT}: upgrade")
        names = tuple(content["class_names"])
        splits: dict[str, Any] = {
            split: tuple(Item(path, label, names[label]) for path, label in content[split]) for split in SPLIT_NAMES
        }
        root, drawn = content["root"], bool(content["drawn_split"])
        dataset = Dataset(content["name"], Path(root or "."), class_names=names, drawn_split=drawn, **splits)
        source = str(content["source"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{path} is damaged: {error!r}; {advice}") from error
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
    """Return the SHA-256 (hex) of class names and items, split by split; not of the images' folder."""
    hashes = [items_hash(getattr(dataset, split)) for split in SPLIT_NAMES]
    text = json.dumps([list(dataset.class_names), *hashes])
    return sha256(text.encode()).hexdigest()
