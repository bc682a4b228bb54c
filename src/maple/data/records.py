"""Data sets: labelled items in three splits, and the names of the classes."""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path

from PIL import Image

from maple import files
from maple.data.images.store import STORE_BYTES, Features, ImageStore
from maple.errors import ConfigError, DataError, one_of
from maple.names import words_of

SPLIT_NAMES = ("train", "val", "test")
"""The splits of a data set, as attributes of `Dataset` and as keys of saved splits."""
DRAWN = " (drawn split)"
"""Ends the name of a published data set that is read with a split drawn in place of the published one."""


@dataclass(frozen=True, slots=True)
class Item:
    """One labelled image.

    `path` is relative to the root of the data set, with forward slashes; `label` is in 0..C-1; `class_name` is the name
    as published, with its underscores.

    Example:
        >>> Item("cat/1.jpg", label=0, class_name="cat").path
        'cat/1.jpg'
    """

    path: str
    label: int
    class_name: str


@dataclass(frozen=True)
class Dataset:
    """The training, validation and test items of a data set, and its C class names.

    Splits may be empty, but not all of them: without training items it is for evaluation only. Two classes may share
    a name, as in published lists. `read` returns the image of a path, for images that are rendered instead of stored,
    and `identify` a text that is equal for equal ones, or None; otherwise `root / item.path` is the file. `features`
    returns the features [n, D] of paths, for items that are rows of features; `identify` is then the SHA-256 (hex) of a
    row. `drawn_split`: the splits were drawn at random, from undivided images. `near_copies`: the paths of training
    images that look nearly the same, group by group; no later division separates those of a group.

    Raises:
        DataError: no class names, no items at all, a label outside 0..C-1, an item whose name differs from that
            of its label, or a path that leaves the root.

    Example:
        >>> train = (Item("cat/1.jpg", 0, "cat"), Item("dog/1.jpg", 1, "dog"))
        >>> dataset = Dataset("pets", Path("pets"), train, val=(), test=(), class_names=("cat", "dog"))
        >>> dataset.num_classes
        2
    """

    name: str
    root: Path
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]
    class_names: tuple[str, ...]
    read: Callable[[str], Image.Image] | None = None
    drawn_split: bool = False
    identify: Callable[[str], str | None] | None = None
    features: Features | None = None
    near_copies: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.class_names:
            raise DataError(f"data set {self.name!r} has no classes; give at least one class name")
        for label, class_name in enumerate(self.class_names):
            if not words_of(class_name):
                raise DataError(
                    f"data set {self.name!r}: class {label} is named {class_name!r}, without a word; give its "
                    "folder, or its label, a name with one"
                )
        if not (self.train or self.val or self.test):
            raise DataError(f"data set {self.name!r} has no items in any of its splits; add images")
        for split in SPLIT_NAMES:
            where = f"data set {self.name!r}, {split} item"
            for item in getattr(self, split):
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
                # Without pathlib, which is slow for a million items: an empty or absolute path, or one with "..".
                if item.path[:1] in ("", "/") or (".." in item.path and ".." in item.path.split("/")):
                    raise DataError(
                        f"{where}: path {item.path!r} must be inside the root; write it relative to {self.root}, "
                        "without '..'"
                    )

    def require_training(self) -> None:
        """Raise DataError if there are no training images."""
        if not self.train:
            raise DataError(
                f"data set {self.name!r} has no training images (val {len(self.val)}, test {len(self.test)}): it is "
                "for evaluation only; train on another one, and evaluate the run on this one"
            )

    @property
    def num_classes(self) -> int:
        """Return C."""
        return len(self.class_names)

    def store(self, max_bytes: int = STORE_BYTES, *, least_side: int | None = None) -> ImageStore:
        """Return a store that keeps up to `max_bytes` of its images decoded; `least_side` as for `read_image`."""
        access = {"read": self.read, "identify": self.identify, "features": self.features}
        return ImageStore(self.root, max_bytes, least_side=least_side, **access)  # type: ignore[arg-type]

    def file(self, item: Item) -> Path:
        """Return the image file of `item`."""
        return self.root / item.path

    @property
    def has_rows(self) -> bool:
        """Whether the items are rows of features: they have no pixels, and a path such as "train/17" is but a number.

        All that treats rows in another way than images does so where this is true.
        """
        return self.features is not None

    def size_of(self, item: Item) -> int | None:
        """A number that differs if the content does, without reading an image: the size of its file in bytes.

        Of a row of features it is a part of its hash. None for a file or row that is gone, and for a rendered image.
        """
        try:
            if self.has_rows:
                return int(str(self.digest_of(item))[:12], 16)
            return None if self.read else self.file(item).stat().st_size
        except (OSError, DataError):
            return None

    def digest_of(self, item: Item) -> str | None:
        """The SHA-256 (hex) of the image file, or of the row of features; None for a rendered image.

        Raises:
            OSError: the file cannot be read.
            DataError: there is no such row.
        """
        if self.has_rows and self.identify is not None:
            return self.identify(item.path)
        return None if self.read else files.sha256_of(self.file(item))

    def content_hash(self, items: Sequence[Item]) -> str | None:
        """The SHA-256 (hex) of the content of rows of features; None for images, for which their paths stand."""
        if not self.has_rows:
            return None
        return hashlib.sha256(json.dumps([self.digest_of(item) for item in items]).encode()).hexdigest()

    def counts(self) -> dict[str, int]:
        """Return the number of items of each split and of classes."""
        return {**{split: len(getattr(self, split)) for split in SPLIT_NAMES}, "classes": self.num_classes}


def items_hash(items: Sequence[Item]) -> str:
    """Return the SHA-256 (hex) of the paths, labels and class names of `items`, in order; equal on any machine."""
    rows = [[item.path, item.label, item.class_name] for item in items]
    # ASCII escapes keep file names that are not valid Unicode hashable.
    canonical = json.dumps(rows, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def write_images(
    dataset: Dataset, folder: Path, *, count: int = 10, part: str = "test", class_name: str | None = None
) -> list[Path]:
    """Write `count` items of one split as CLASS_NUMBER.png into `folder`: the first of every class, then the second ...

    The numbers of a class begin with 1. Existing files with the same content are kept. With `class_name`, only items of
    this class are written. Returns the paths, in the order of writing; fewer if the split `part` has fewer items.

    Raises:
        ConfigError: `count` is below 1, or the split is unknown.
        DataError: the class is unknown, there are no items, a file with other content exists, or the folder cannot be
            made.
        ImageError: an image cannot be read.

    Example:
        >>> write_images(load_dataset("emoji-animals", None), Path("images"), count=2)
        [PosixPath('images/monkey_face_1.png'), PosixPath('images/monkey_1.png')]
    """
    if count < 1:
        raise ConfigError(f"count is {count}; it must be at least 1")
    if part not in SPLIT_NAMES:
        raise ConfigError(one_of("part", part, SPLIT_NAMES))
    if class_name is not None and class_name not in dataset.class_names:
        raise DataError(one_of(f"class of {dataset.name}", class_name, dataset.class_names))
    by_label: dict[int, list[Item]] = {}
    for item in getattr(dataset, part):
        if class_name in (None, item.class_name):
            by_label.setdefault(item.label, []).append(item)
    rows = zip_longest(*(by_label[label] for label in sorted(by_label)))
    chosen = list(islice((item for row in rows for item in row if item is not None), count))
    if not chosen:
        counts = ", ".join(f"{name} {len(getattr(dataset, name))}" for name in SPLIT_NAMES)
        raise DataError(f"the {part} split of {dataset.name} has no such items (it has {counts}); choose another split")
    store, numbers, paths = dataset.store(max_bytes=0), Counter[str](), []
    for item in chosen:
        # Letters and digits of any script; everything else becomes an underscore.
        word = re.sub(r"[^\w-]+", "_", item.class_name).strip("_") or "class"
        numbers[word] += 1
        path, buffer = folder / f"{word}_{numbers[word]}.png", io.BytesIO()
        store.get(item.path).save(buffer, format="PNG")
        try:
            if not path.exists():
                with files.replacing(path) as temporary:
                    temporary.write_bytes(buffer.getvalue())
            elif path.read_bytes() != buffer.getvalue():
                raise DataError(f"{path} exists with other content; choose another folder")
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error.strerror}); choose another folder") from error
        paths.append(path)
    return paths
