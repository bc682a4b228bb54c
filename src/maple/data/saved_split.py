"""The images and splits of a run, saved in its folder: training and every later evaluation read them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from maple import files
from maple.data.catalogue import load_dataset
from maple.data.checks.findings import number_of
from maple.data.records import SPLIT_NAMES, Dataset, Item, items_hash
from maple.data.sources.opening import names_source
from maple.errors import ConfigError, DataError, shortened
from maple.names import nfc

SAVED_SPLIT = "images.json"
"""The file name in a run folder."""

_FORMAT = 1
_LEFT_OUT = "left out"
_ADVICE = "it belongs to the run and was written by it"


def write_saved_split(path: Path, dataset: Dataset, source: str, left_out: Iterable[str] = ()) -> str:
    """Write the items of a data set atomically, and return their hash.

    Args:
        source: the name or path for `load_dataset`; needed to read images that are rendered and not files.
        left_out: the paths of other images that the data set has, which are not used.
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
    content["left_out"] = sorted(left_out)
    if dataset.near_copies:
        content["near_copies"] = [list(group) for group in dataset.near_copies]
    content["sizes"] = _sizes(dataset)
    files.write_json(path, content)
    return str(content["hash"])


def read_saved_split(
    path: Path,
    expected: str | None = None,
    *,
    look: bool = True,
    restore: bool = True,
    columns: Mapping[str, str | None] | None = None,
) -> Dataset:
    """Read a data set that `write_saved_split` wrote; its images are not opened, and without `look` not looked for.

    With `restore`, images that were unpacked into the cache and have been removed from it are unpacked again; `columns`
    are the arguments of `load_dataset` for these.

    Raises:
        DataError: the file is missing or damaged, has another hash than `expected`, or its image folder is gone.
    """
    content: dict[str, Any] = files.read_json(path, error=DataError, advice=_ADVICE)
    try:
        if content["format"] != _FORMAT:
            raise DataError(
                f"{path} has format {shortened(repr(content['format']))}; this version reads {_FORMAT}: upgrade maple"
            )
        names = tuple(content["class_names"])
        splits: dict[str, Any] = {
            split: tuple(Item(path, label, names[label]) for path, label in content[split]) for split in SPLIT_NAMES
        }
        if not all(
            isinstance(item.path, str) and isinstance(item.label, int) for items in splits.values() for item in items
        ):
            raise TypeError("an image is not a path and a label")
        if not all(isinstance(text, str) for text in (*names, content["name"], content["root"] or "")):
            raise TypeError("a name or the folder is not a text")
        near_copies = tuple(tuple(group) for group in content.get("near_copies", ()))  # earlier versions have none
        if not all(isinstance(image, str) for group in near_copies for image in group):
            raise TypeError("a near copy is not a path")
        root, drawn = content["root"], bool(content["drawn_split"])
        options: dict[str, Any] = {"class_names": names, "drawn_split": drawn, "near_copies": near_copies, **splits}
        dataset = Dataset(content["name"], Path(root or "."), **options)
        source = str(content["source"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{path} is damaged: {error!r}; {_ADVICE}") from error
    if expected is not None and saved_split_hash(dataset) != expected:
        raise DataError(f"{path} is not the list of images that this run was made with; put the original back")
    if not look:
        return dataset
    if root is None:
        rendered = load_dataset(source, None)
        return replace(dataset, read=rendered.read, identify=rendered.identify, features=rendered.features)
    if restore and not dataset.root.is_dir() and (restored := _unpacked_again(source, columns or {})) is not None:
        dataset = replace(dataset, root=restored)
    if not dataset.root.is_dir():
        raise DataError(
            f"{dataset.root}: the folder with the images of this run is gone; put it back, or write where it is now "
            f'as "root" into {path}; or evaluate the run on it, with dataset=FOLDER'
        )
    return dataset


def _unpacked_again(source: str, columns: Mapping[str, str | None]) -> Path | None:
    """The folder of a source's images, unpacked into the cache once more; None for any other source."""
    options: dict[str, Any] = dict(columns)
    try:
        return load_dataset(source, None, **options).root if names_source(source) else None
    except (DataError, ConfigError):
        return None  # the folder that is gone is reported


def saved_split_hash(dataset: Dataset) -> str:
    """Return the SHA-256 (hex) of class names and items, split by split; not of the images' folder."""
    hashes = [items_hash(getattr(dataset, split)) for split in SPLIT_NAMES]
    text = json.dumps([list(dataset.class_names), *hashes])
    return sha256(text.encode()).hexdigest()


def _sizes(dataset: Dataset) -> dict[str, int]:
    """The size of each image (`Dataset.size_of`); none of rendered images, and of those that are gone."""
    items = [*dataset.train, *dataset.val, *dataset.test]
    return {item.path: size for item in items if (size := dataset.size_of(item)) is not None}


@dataclass(frozen=True)
class SavedImages:
    """What a saved split says of each image by its path: its split, or "left out", and the size of its file."""

    splits: dict[str, str]
    sizes: dict[str, int]

    @property
    def left_out(self) -> list[str]:
        """The images that are not used."""
        return [image for image, split in self.splits.items() if split == _LEFT_OUT]


def read_saved_images(path: Path) -> SavedImages:
    """Read the images of a saved split, as `keep_division` and `changes_since` need them.

    Raises:
        DataError: the file is missing or damaged.
    """
    content: dict[str, Any] = files.read_json(path, error=DataError, advice=_ADVICE)
    try:
        splits = {str(image): split for split in SPLIT_NAMES for image, _ in content[split]}
        left_out = dict.fromkeys(map(str, content.get("left_out", ())), _LEFT_OUT)
        sizes = content.get("sizes") or {}
        if not isinstance(sizes, dict):
            raise TypeError("the sizes are not an object")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error!r}; {_ADVICE}") from error
    return SavedImages({**left_out, **splits}, sizes)


def keep_division(saved: SavedImages, dataset: Dataset) -> Dataset:
    """Return `dataset`, divided at random now, with the division that was saved: new images join the test split.

    An image that was left out stays left out.
    """
    splits: dict[str, list[Item]] = {split: [] for split in (*SPLIT_NAMES, _LEFT_OUT)}
    for item in [*dataset.train, *dataset.val, *dataset.test]:
        splits[saved.splits.get(item.path, "test")].append(item)
    for items in splits.values():
        items.sort(key=lambda item: (item.label, nfc(item.path), item.path))  # as they were listed
    train, val, test = (tuple(splits[split]) for split in SPLIT_NAMES)
    return replace(dataset, train=train, val=val, test=test)


def changes_since(saved: SavedImages, dataset: Dataset) -> str:
    """Describe how the images of `dataset` differ from those that were saved; "" if they do not.

    Files are compared by path and size, classes by name: "1 class more, 15 images more, 2 images with other content".
    """
    items = [*dataset.train, *dataset.val, *dataset.test]
    images = {item.path for item in items}
    used = {image for image, split in saved.splits.items() if split != _LEFT_OUT}
    new_images = images - saved.splits.keys()
    new_classes = {item.label for item in items} - {item.label for item in items if item.path not in new_images}
    sizes = _sizes(dataset).items()
    replaced = [image for image, size in sizes if image in used and saved.sizes.get(image, size) != size]
    changes = [
        number_of(len(new_classes), "class", "classes") + " more" if new_classes else "",
        number_of(len(new_images), "image") + " more" if new_images else "",
        number_of(len(used - images), "image") + " gone" if used - images else "",
        number_of(len(replaced), "image") + " with other content" if replaced else "",
    ]
    return ", ".join(filter(None, changes))
