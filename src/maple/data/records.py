"""What a data set is: items, their labels, and the names of the classes."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from maple.data.images.reading import STORE_BYTES, ImageStore
from maple.errors import DataError
from maple.names import words_of

SPLIT_NAMES = ("train", "val", "test")
"""The splits of a data set, as attributes of `Dataset` and as keys of saved splits."""


@dataclass(frozen=True, slots=True)
class Item:
    """One labelled image.

    `path` is relative to the root of the data set, with forward slashes; `label` is in 0..C-1;
    `class_name` is the name as published, underscores kept.
    """

    path: str
    label: int
    class_name: str


@dataclass(frozen=True)
class Dataset:
    """The training, validation and test items of a data set, and its C class names.

    `root / item.path` is the image file. `class_names[label]` is the name of a class; two classes may share a
    name, as published data sets have such pairs. Parts may be empty, but not all of them: without training items it
    is for evaluation only. `read`, where there is one, draws the image of a path instead: there are no files then.
    `drawn_split` says that the parts were drawn at random here, from images that nobody had divided.

    Raises:
        DataError: no class names, no items at all, a label outside 0..C-1, an item whose name differs from that
            of its label, or a path that leaves the root.
    """

    name: str
    root: Path
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]
    class_names: tuple[str, ...]
    read: Callable[[str], Image.Image] | None = None
    drawn_split: bool = False

    def __post_init__(self) -> None:
        if not self.class_names:
            raise DataError(f"data set {self.name!r} has no classes; give at least one class name")
        for label, class_name in enumerate(self.class_names):
            if not words_of(class_name):
                raise DataError(
                    f"data set {self.name!r}: class {label} is named {class_name!r}, without a word; give it a name"
                )
        if not (self.train or self.val or self.test):
            raise DataError(f"data set {self.name!r} has no items in any of its parts; add images")
        for part in SPLIT_NAMES:
            self._check_part(part, getattr(self, part))

    def require_training(self) -> None:
        """Raise DataError if there is nothing to train on."""
        if not self.train:
            raise DataError(
                f"data set {self.name!r} has no training images (val {len(self.val)}, test {len(self.test)}): it is "
                f"for evaluation only. Train on another one, then `maple evaluate RUN --dataset {self.name}`"
            )

    @property
    def num_classes(self) -> int:
        """Return C."""
        return len(self.class_names)

    def store(self, max_bytes: int = STORE_BYTES) -> ImageStore:
        """Return a store of its images, which keeps up to `max_bytes` of them decoded."""
        return ImageStore(self.root, max_bytes, read=self.read)

    def file(self, item: Item) -> Path:
        """Return the image file of `item`."""
        return self.root / item.path

    def counts(self) -> dict[str, int]:
        """Return the number of items of each part and of classes, for reports."""
        return {
            "train": len(self.train),
            "val": len(self.val),
            "test": len(self.test),
            "classes": self.num_classes,
        }

    def _check_part(self, part: str, items: tuple[Item, ...]) -> None:
        where = f"data set {self.name!r}, {part} item"
        for item in items:
            if not 0 <= item.label < self.num_classes:
                raise DataError(
                    f"{where} {item.path!r} has label {item.label}; labels must be 0 to {self.num_classes - 1}, "
                    "one for each class name"
                )
            if item.class_name != self.class_names[item.label]:
                raise DataError(
                    f"{where} {item.path!r} calls class {item.label} {item.class_name!r}, but its name is "
                    f"{self.class_names[item.label]!r}; give every label one name"
                )
            # By hand, since there may be a million of them: an empty or absolute path, or one with "..".
            if item.path[:1] in ("", "/") or (".." in item.path and ".." in item.path.split("/")):
                raise DataError(
                    f"{where}: path {item.path!r} must lie inside the root; write it relative to {self.root}, "
                    "without '..'"
                )


def items_hash(items: Sequence[Item]) -> str:
    """Return the SHA-256 (hex) of the paths, labels and class names of `items`, in their order.

    Equal hashes mean the same list on any machine, since the paths are relative.
    """
    rows = [[item.path, item.label, item.class_name] for item in items]
    # ASCII escapes keep file names that are not valid Unicode hashable.
    canonical = json.dumps(rows, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
