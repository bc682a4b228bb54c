"""A user's own images: one folder per class, with or without train, val and test folders above them."""

import logging
import os
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from maple.data.images import is_image_file
from maple.data.records import Dataset, Item
from maple.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_IGNORED = {"__macosx", "thumbs.db", "desktop.ini"}
_SPLIT_NAMES = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


def load_folder(
    root: Path,
    *,
    class_names: Mapping[str, str] | None = None,
    seed: int = 0,
    val_fraction: float = 0.0,
    test_fraction: float = 0.25,
) -> Dataset:
    """Read `root/CLASS/**/image` or `root/{train,val,test}/CLASS/**/image` as a data set.

    Classes are the folder names, sorted by code point after Unicode NFC normalisation, so that labels agree between
    file systems; `class_names` maps folder names to the names to use. Hidden files, system litter and files that are
    no images are skipped and counted in the log. With a train folder beside a test or val folder these parts are
    used as they stand; a val folder without a test folder is the test part. Otherwise each class is split on its own
    by `seed`: the test and validation fractions rounded, at least one image for training, then one for test.

    Raises:
        ConfigError: a fraction is negative, or they sum to 1 or more.
        DataError: the folder is missing or unreadable, has fewer than two classes, a class without images, a class in
            test or val that train lacks, or `class_names` names a class that does not exist.
    """
    if val_fraction < 0 or test_fraction < 0 or not val_fraction + test_fraction < 1:
        raise ConfigError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} must not be negative and must sum to less "
            "than 1, so that images remain for training"
        )
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; give a folder that holds one folder of images per class")
    parts = _part_folders(root)
    if parts:
        images = {part: _list_classes(root, folder) for part, folder in parts.items()}
        if "test" not in images:
            images["test"] = images.pop("val")
            logger.info("%s has no test folder: its %s folder is the test part", root, parts["val"].name)
        _check_parts(parts["train"], images)
    else:
        classes = _list_classes(root, root)
        _check_classes(root, classes)
        images = _split(classes, seed, val_fraction, test_fraction)
    return rename_classes(_dataset(root, images), class_names)


def rename_classes(dataset: Dataset, class_names: Mapping[str, str] | None) -> Dataset:
    """Return `dataset` with the classes of `class_names` (old name to new name) renamed, the others as they are.

    Raises:
        DataError: a key is no class of the data set, or a new name is empty.
    """
    if not class_names:
        return dataset
    mapping = {_nfc(old): new for old, new in class_names.items()}
    unknown = sorted(set(mapping) - {_nfc(name) for name in dataset.class_names})
    if unknown:
        raise DataError(
            f"class_names renames {', '.join(map(repr, unknown))}, which {dataset.name!r} does not have; "
            f"its classes are: {', '.join(dataset.class_names)}"
        )
    names = tuple(mapping.get(_nfc(name), name) for name in dataset.class_names)

    def renamed(items: tuple[Item, ...]) -> tuple[Item, ...]:
        return tuple(replace(item, class_name=names[item.label]) for item in items)

    return replace(
        dataset,
        train=renamed(dataset.train),
        val=renamed(dataset.val),
        test=renamed(dataset.test),
        class_names=names,
    )


def has_own_split(root: Path) -> bool:
    """Whether the user divided the folder: `train` and `test` (or `val`) inside."""
    return bool(_part_folders(root))


def _part_folders(root: Path) -> dict[str, Path]:
    parts: dict[str, Path] = {}
    for folder in _children(root):
        part = _SPLIT_NAMES.get(folder.name.casefold())
        if part is None or not folder.is_dir():
            continue
        if part in parts:
            raise DataError(f"{root}: {parts[part].name} and {folder.name} both look like the {part} part; keep one")
        parts[part] = folder
    return parts if "train" in parts and len(parts) > 1 else {}


def _list_classes(root: Path, folder: Path) -> dict[str, list[str]]:
    """Return the image paths, relative to `root`, of each class folder in `folder`, classes in code-point order."""
    folders: dict[str, Path] = {}
    skipped: Counter[str] = Counter()
    for child in _children(folder):
        if not child.is_dir():
            skipped["outside a class folder"] += 1
            continue
        name = _nfc(child.name)
        if name in folders:
            raise DataError(f"{child}: another class folder has the same name in another Unicode form; rename one")
        folders[name] = child
    images: dict[str, list[str]] = {}
    for name in sorted(folders):
        paths = []
        for file in walk_files(folders[name]):
            if is_image_file(file):
                paths.append(file.relative_to(root).as_posix())
            else:
                skipped["no image"] += 1
        images[name] = sorted(paths, key=lambda path: (_nfc(path), path))
    for reason, count in skipped.items():
        logger.info("%s: skipped %d files (%s)", folder, count, reason)
    return images


def walk_files(
    folder: Path, *, recursive: bool = True, on_unreadable: Callable[[DataError], None] | None = None
) -> Iterator[Path]:
    """Iterate over the files of a folder in the order of their names, without hidden files and system litter.

    With `recursive` also over those of the folders below it, each in its place; links back to a folder above are not
    followed. Only the names of the open folders are kept in memory.

    Args:
        on_unreadable: told of a folder that cannot be listed, which is then left out.

    Raises:
        DataError: a folder cannot be listed, and there is no `on_unreadable`.
    """
    return _walk(folder, (), recursive, on_unreadable)


def _walk(
    folder: Path,
    parents: tuple[tuple[int, int], ...],
    recursive: bool,
    on_unreadable: Callable[[DataError], None] | None,
) -> Iterator[Path]:
    try:
        children = _children(folder)
        status = folder.stat()
    except DataError as error:
        if on_unreadable is None:
            raise
        on_unreadable(error)
        return
    identity = (status.st_dev, status.st_ino)
    if identity in parents:
        logger.warning("%s: links back to a folder above it; not followed", folder)
        return
    for child in children:
        if not child.is_dir():
            yield child
        elif recursive:
            yield from _walk(child, (*parents, identity), recursive, on_unreadable)


def _children(folder: Path) -> list[Path]:
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); make the folder readable") from error
    return [folder / name for name in sorted(names) if not name.startswith(".") and name.casefold() not in _IGNORED]


def _check_classes(folder: Path, images: Mapping[str, list[str]]) -> None:
    if len(images) < 2:
        found = f"only one class, {next(iter(images))!r}," if images else "no class folders"
        raise DataError(
            f"{folder}: holds {found} but a classifier needs at least two; expected {folder.name}/CLASS/image.jpg "
            f"(or {folder.name}/train/CLASS/image.jpg with a test or val folder beside train)"
        )
    empty = [name for name, paths in images.items() if not paths]
    if empty:
        raise DataError(
            f"{folder}: no usable images in class {', '.join(map(repr, empty))}; add images to the folder or remove it"
        )


def _check_parts(train: Path, images: Mapping[str, dict[str, list[str]]]) -> None:
    _check_classes(train, images["train"])
    for part in sorted(set(images) - {"train"}):
        held_out = {name for name, paths in images[part].items() if paths}
        extra = sorted(held_out - set(images["train"]))
        if extra:
            raise DataError(
                f"{train}: lacks classes of the {part} part: {', '.join(map(repr, extra))}; add them to {train.name} "
                f"or remove them from {part}"
            )
        if not held_out:
            raise DataError(f"{train.parent}: the {part} part holds no images; fill its class folders or remove it")
        absent = sorted(set(images["train"]) - held_out)
        if absent:
            logger.warning("%s: the %s part has no images of %s", train.parent, part, ", ".join(map(repr, absent)))


def _split(
    images: Mapping[str, list[str]], seed: int, val_fraction: float, test_fraction: float
) -> dict[str, dict[str, list[str]]]:
    parts: dict[str, dict[str, list[str]]] = {"train": {}, "val": {}, "test": {}}
    for name, paths in images.items():
        total = len(paths)
        # A small class keeps one image for training first, one for test second.
        test_count = min(max(round(total * test_fraction), int(test_fraction > 0)), total - 1)
        val_count = min(round(total * val_fraction), total - 1 - test_count)
        # A generator per class: adding a class leaves the split of the others alone.
        order = list(range(total))
        random.Random(f"{seed}/{name}".encode("utf-8", "surrogateescape")).shuffle(order)
        cuts = {
            "test": order[:test_count],
            "val": order[test_count : test_count + val_count],
            "train": order[test_count + val_count :],
        }
        for part, chosen in cuts.items():
            parts[part][name] = [paths[index] for index in sorted(chosen)]
    return parts


def _dataset(root: Path, images: Mapping[str, Mapping[str, list[str]]]) -> Dataset:
    names = tuple(images["train"])

    def items(part: str) -> tuple[Item, ...]:
        listing = images.get(part, {})
        return tuple(Item(path, label, name) for label, name in enumerate(names) for path in listing.get(name, []))

    return Dataset(root.resolve().name, root, items("train"), items("val"), items("test"), names)


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)
