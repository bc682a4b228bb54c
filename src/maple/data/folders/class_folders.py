"""Image folders: one folder per class, optionally below train, val and test folders, or below folders of domains."""

import logging
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from maple.data.checks.findings import Finding
from maple.data.folders.listing import list_folder, walk_files
from maple.data.folders.unused import nested_classes, unread_images
from maple.data.images.formats import has_image_name, is_image_file
from maple.data.records import SPLIT_NAMES, Dataset, Item
from maple.errors import ConfigError, DataError, one_of, shortened_list
from maple.files import on_disk
from maple.names import has_lone_surrogate, nfc, words_of

logger = logging.getLogger(__name__)

SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The split of each word that stands for one, in lower case: as a folder name, in one, or in a column of a table."""
_PLAIN_NAMES = {"train", "val", "valid", "validation", "test"}
"""Folders of these names are the splits. Others that name one may also be classes: they must hold the same folders."""
_COLLECTION = "(?:data)?(?:set|data|images?|imgs?|pics|photos|split|part|folder)"
_SPLIT_WORD = re.compile(f"({'|'.join(SPLIT_FOLDERS)})(?:{_COLLECTION})?")

_LEVELS = {"warning": logging.WARNING, "note": logging.INFO}

_Paths = dict[str, list[str]]
"""The image paths of each class."""


def load_folder(
    root: Path,
    *,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    class_names: Mapping[str, str] | None = None,
    seed: int = 0,
    val_fraction: float = 0.0,
    test_fraction: float = 0.25,
    drop_empty: bool = False,
    min_classes: int = 2,
    on_finding: Callable[[Finding], None] | None = None,
) -> Dataset:
    """Read `root/CLASS/**/image` or `root/{train,val,test}/CLASS/**/image` as a data set, named as its folder.

    Classes are the folder names, sorted by code point after Unicode NFC normalisation, so that labels agree between
    file systems. Hidden files, system files and files that are not images are skipped and counted in the log. A train
    folder next to a test or val folder is used as it is divided; a val folder without a test folder is the test split.
    Otherwise each class is split by `seed`: the test and validation fractions rounded, at least one image for training,
    then one for test. With the sorted folder names `classes`, the folder may lack some of them. `class_names` maps
    folder names to the names to use; `drop_empty` leaves out classes without images instead of refusing them;
    `min_classes` is the fewest classes to accept; each finding about images that are not read is passed to
    `on_finding`, by default to the log.

    Raises:
        ConfigError: a fraction is negative, or they sum to 1 or more.
        DataError: the folder is missing or unreadable, has fewer than two classes, a class without images, a class in
            test or val that train lacks, or `class_names` names a class that does not exist.

    Example:
        >>> load_folder(Path("pets"), seed=1).class_names
        ('cat', 'dog')
    """
    check_fractions(val_fraction, test_fraction)
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; give a folder that holds one folder of images per class")
    divided = split_folders(root)
    unused: list[Path] = []
    images = {
        split: _list_classes(root, folder, classes, unused) for split, folder in (divided or {"train": root}).items()
    }
    findings = unread_images(root, unused)
    if any(folder.parent != root or folder.name.casefold() not in _PLAIN_NAMES for folder in divided.values()):
        taken = ", ".join(f"{folder.relative_to(root)} as {split}" for split, folder in divided.items())
        text = f"divided by folders: {taken}; the classes are {shortened_list(images['train'], 5)}"
        findings.append(Finding("split folders", "note", text, tuple(str(folder) for folder in divided.values())))
    listed = bool(images["train"])
    if drop_empty and classes is None:
        filled = {name for paths in images.values() for name in paths if paths[name]}
        images = {split: {name: paths[name] for name in paths if name in filled} for split, paths in images.items()}
    if divided and "test" not in images:
        images["test"] = images.pop("val")
        logger.info("%s has no test folder: its %s folder is the test split", root, divided["val"].name)
    try:
        _check_splits(
            root, divided.get("train", root), images, min_classes, listed=listed, may_lack=classes is not None
        )
    except DataError as error:
        raise DataError("; ".join([str(error), *(finding.text for finding in findings)])) from None
    for finding in (*findings, *nested_classes(_inner_folders(root, divided.get("train", root), images["train"]))):
        if on_finding is None:
            logger.log(_LEVELS[finding.level], "%s: %s", root, finding.text)
        else:
            on_finding(finding)
    if not divided:
        images = draw_split(images["train"], seed, val_fraction, test_fraction)
    names = list(classes or images["train"])
    dataset = assemble(name or root.resolve().name, root, names, images, drawn_split=not divided)
    return rename_classes(dataset, class_names)


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raise ConfigError unless the fractions leave images for training."""
    if val_fraction < 0 or test_fraction < 0 or not val_fraction + test_fraction < 1:
        raise ConfigError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} must not be negative and must sum to less "
            "than 1, so that images remain for training"
        )


def rename_classes(dataset: Dataset, class_names: Mapping[str, str] | None) -> Dataset:
    """Return `dataset` with the classes of `class_names` (old name to new name) renamed.

    Raises:
        DataError: a key is not a class of the data set, or a new name is empty, not valid Unicode, or equal to another
            class up to case and spaces.
    """
    if not class_names:
        return dataset
    mapping = {nfc(old): nfc(new) for old, new in class_names.items()}
    if unknown := sorted(set(mapping) - {nfc(name) for name in dataset.class_names}):
        raise DataError(
            f"class_names renames {', '.join(map(repr, unknown))}, which {dataset.name!r} does not have; "
            f"its classes are: {', '.join(dataset.class_names)}"
        )
    if broken := [name for name in mapping.values() if has_lone_surrogate(name)]:
        raise DataError(
            f"class_names gives the name {broken[0]!r}, which holds half a character; write the whole character"
        )
    names = tuple(mapping.get(nfc(name), name) for name in dataset.class_names)
    by_words: dict[str, list[int]] = defaultdict(list)
    for label, new in enumerate(names):
        by_words[words_of(new)].append(label)
    for labels in by_words.values():
        # Equal names are refused only if renaming made them so: published lists have some.
        if len({words_of(dataset.class_names[label]) for label in labels}) > 1:
            raise DataError(
                f"class_names gives {' and '.join(repr(dataset.class_names[label]) for label in labels)} the same "
                f"words, {names[labels[0]]!r}; put their images into one folder, or give each class its own words"
            )
    splits: dict[str, Any] = {
        split: tuple(replace(item, class_name=names[item.label]) for item in getattr(dataset, split))
        for split in SPLIT_NAMES
    }
    return replace(dataset, class_names=names, **splits)


def split_of(name: str) -> tuple[str, str] | None:
    """Return the split that a folder name stands for, and its other words: ("train", "seg") for "seg_train".

    Words such as "set" and "images", numbers, and how the words are separated do not matter. None if there is no word
    of a split, or more than one.
    """
    words = re.findall(r"[^\W\d_]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", nfc(name)).casefold())
    splits = [match[1] for word in words if (match := _SPLIT_WORD.fullmatch(word))]
    others = [word for word in words if not _SPLIT_WORD.fullmatch(word) and not re.fullmatch(_COLLECTION, word)]
    return (SPLIT_FOLDERS[splits[0]], " ".join(others)) if len(splits) == 1 else None


def split_folders(root: Path) -> dict[str, Path]:
    """Return the train, val and test folders of `root`; none unless train and another one are there.

    Folders with other names than these, such as Training or seg_train, must agree in the rest of the name and hold some
    of the same class folders. A split folder that holds only one of its own name, as archives unpack, is that one.
    """
    groups: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for folder in list_folder(root):
        if (parts := split_of(folder.name)) and os.path.isdir(folder):
            groups[parts[1]][parts[0]].append(folder)
    for _, group in sorted(groups.items()):
        if "train" not in group or len(group) < 2:
            continue
        plain = {
            split: [folder for folder in group[split] if folder.name.casefold() in _PLAIN_NAMES] for split in group
        }
        train = (plain["train"] or group["train"])[0]
        classes = set(map(words_of, _class_folders(_without_repetition(train))))
        splits: dict[str, Path] = {}
        for split in group:
            folders = plain[split] or group[split]
            if not (plain["train"] and plain[split]):
                inner = ((folder, map(words_of, _class_folders(_without_repetition(folder)))) for folder in folders)
                folders = [folder for folder, names in inner if len(classes) > 1 and not classes.isdisjoint(names)]
            if len(folders) > 1:
                both = " and ".join(folder.name for folder in folders[:2])
                raise DataError(f"{root}: {both} both look like the {split} split; keep one")
            if folders:
                splits[split] = _without_repetition(folders[0])
        if "train" in splits and len(splits) > 1:
            return splits
    return {}


def _without_repetition(folder: Path) -> Path:
    """The folder itself, or the last of those that are alone in one of the same name, as in seg_train/seg_train."""
    children = list_folder(folder)
    while (
        len(children) == 1
        and split_of(children[0].name) == split_of(folder.name)
        and os.path.isdir(children[0])
        and not children[0].samefile(folder)
    ):
        folder = children[0]
        children = list_folder(folder)
    return folder


def class_folder_names(root: Path) -> set[str]:
    """The names, in Unicode NFC, of the class folders of `root`, in all its splits if it has any."""
    return {name for folder in split_folders(root).values() or [root] for name in _class_folders(folder)}


def _class_folders(folder: Path) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for child in list_folder(folder):
        if os.path.isdir(child):
            name = nfc(child.name)
            if name in folders:
                raise DataError(f"{child}: another class folder has the same name in another Unicode form; rename one")
            folders[name] = child
    return folders


def _list_classes(root: Path, folder: Path, classes: Sequence[str] | None, unused: list[Path]) -> _Paths:
    """The image paths, relative to `root`, of each of `classes`, or of each class folder in `folder`.

    Other files are added to `unused`.
    """
    folders = _class_folders(folder)
    outside = [child for child in list_folder(folder) if not os.path.isdir(child)]
    skipped = Counter({"outside a class folder": len(outside)})
    unused += [child for child in outside if not is_image_file(child)]
    images: _Paths = {name: [] for name in classes or sorted(folders)}
    for name in sorted(folders):
        for file in walk_files(folders[name], within=(root, folder)):
            if is_image_file(file):
                images[name].append(file.relative_to(root).as_posix())
            else:
                skipped["not an image"] += 1
                unused.append(file)
        images[name].sort(key=lambda path: (nfc(path), path))
    for reason, count in skipped.items():
        if count:
            logger.info("%s: skipped %d files (%s)", folder, count, reason)
    return images


def _inner_folders(root: Path, train: Path, images: _Paths) -> dict[str, list[str]]:
    """For each class, the folder inside the class folder that each of its images is in; "" for none."""
    depth = len(train.relative_to(root).parts) + 1
    return {name: ["".join(path.split("/")[depth:-1][:1]) for path in paths] for name, paths in images.items() if paths}


def _check_splits(
    root: Path, train: Path, images: Mapping[str, _Paths], min_classes: int, *, listed: bool, may_lack: bool
) -> None:
    """Raise DataError unless train has enough classes with images, and every other split images of these classes."""
    classes = images["train"]
    if len(classes) < min_classes:
        held = "no image in a class folder" if listed else "no class folders"
        held = f"images of only one class, {next(iter(classes))!r}," if classes else held
        shown = f"{root.resolve().name}/"
        form = f"{shown}CLASS/image.jpg (or {shown}train/CLASS/image.jpg and a test or val folder next to train)"
        if train != root:
            form = (
                f"{shown}{train.relative_to(root)}/CLASS/image.jpg; if {train.name} is a class, give a table of path "
            )
            form += "and label (.csv)"
        raise DataError(f"{train}: holds {held} but a classifier needs at least two; expected {form}")
    empty = [name for name, paths in classes.items() if not paths]
    if empty and (not may_lack or len(empty) == len(classes)):
        raise DataError(
            f"{train}: no usable images in class {', '.join(map(repr, empty))}; add images to the folder or remove it"
        )
    for split in sorted(set(images) - {"train"}):
        held_out = {name for name, paths in images[split].items() if paths}
        if extra := sorted(held_out - set(classes)):
            raise DataError(
                f"{train}: lacks classes of the {split} split: {', '.join(map(repr, extra))}; add them to {train.name} "
                f"or remove them from {split}"
            )
        if not held_out:
            raise DataError(f"{root}: the {split} split holds no images; fill its class folders or remove it")
        absent = sorted(set(classes) - held_out)
        if absent and not may_lack:
            logger.warning("%s: the %s split has no images of %s", root, split, ", ".join(map(repr, absent)))


def draw_split(images: _Paths, seed: int, val_fraction: float, test_fraction: float) -> dict[str, _Paths]:
    """Split each class at random: split to class to paths. A class of one image keeps it for training."""
    splits: dict[str, _Paths] = {split: {} for split in SPLIT_NAMES}
    for name, paths in images.items():
        total = len(paths)
        # A small class keeps one image for training first, one for test second.
        test_count = min(max(round(total * test_fraction), int(test_fraction > 0)), max(total - 1, 0))
        val_count = min(round(total * val_fraction), max(total - 1 - test_count, 0))
        # A generator per class: adding a class does not change the split of the others.
        order = list(range(total))
        random.Random(f"{seed}/{name}".encode("utf-8", "surrogateescape")).shuffle(order)
        cuts = {
            "train": order[test_count + val_count :],
            "val": order[test_count : test_count + val_count],
            "test": order[:test_count],
        }
        for split, chosen in cuts.items():
            splits[split][name] = [paths[index] for index in sorted(chosen)]
    return splits


def assemble(
    name: str, root: Path, classes: Sequence[str], images: Mapping[str, Mapping[str, list[str]]], *, drawn_split: bool
) -> Dataset:
    """Build a data set from split to class to paths; labels follow `classes`."""
    splits: dict[str, Any] = {
        split: tuple(
            Item(path, label, class_name)
            for label, class_name in enumerate(classes)
            for path in images.get(split, {}).get(class_name, [])
        )
        for split in SPLIT_NAMES
    }
    return Dataset(name, root, class_names=tuple(classes), drawn_split=drawn_split, **splits)


def split_domain(text: str) -> tuple[Path, str] | None:
    """Parse `root:DOMAIN`; None if there is no colon or no folder before it."""
    root, colon, domain = text.rpartition(":")
    folder = on_disk(Path(root).expanduser())
    if not colon or Path(text).expanduser().exists() or not folder.is_dir():
        return None
    return folder, domain


def detect_domains(root: Path) -> tuple[list[str], list[str]] | None:
    """The folders of `root` and the folder names that they share, if it looks like a folder of domains.

    It does if it is not divided into splits, and has at least two folders that hold no image and share at least two
    folder names.
    """
    folders = [child for child in list_folder(root) if os.path.isdir(child)]
    if split_folders(root):
        return None
    shared: set[str] | None = None
    for folder in folders:
        inner = set()
        for child in list_folder(folder):
            if os.path.isdir(child):
                inner.add(child.name)
            elif has_image_name(child.name):
                return None
        shared = inner if shared is None else shared & inner
    if shared and len(folders) > 1 and len(shared) > 1:
        return [folder.name for folder in folders], sorted(shared)
    return None


def load_domain(
    root: Path,
    domain: str,
    *,
    class_names: Mapping[str, str] | None = None,
    seed: int = 0,
    val_fraction: float = 0.0,
    test_fraction: float = 0.25,
    on_finding: Callable[[Finding], None] | None = None,
) -> Dataset:
    """Read one domain of `root/DOMAIN/CLASS/image` as `load_folder` does, over the classes of all domains.

    So labels agree between domains, and a class that a domain lacks can still be predicted there. The data set is
    named ROOT/DOMAIN. Raises as `load_folder`, and DataError if there is no such domain.
    """
    domains = {child.name: child for child in list_folder(root) if os.path.isdir(child)}
    if domain not in domains:
        raise DataError(f"{root}: {one_of('domain', domain, domains or ['(the folder holds no folders)'])}")
    classes = {name: class_folder_names(folder) for name, folder in domains.items()}
    shared = sorted(set().union(*classes.values()))
    for name, names in classes.items():
        if absent := sorted(set(shared) - names):
            logger.warning("%s: domain %s has no folders of %s", root, name, ", ".join(absent))
    return load_folder(
        domains[domain],
        name=f"{root.resolve().name}/{domain}",
        classes=shared,
        class_names=class_names,
        seed=seed,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        on_finding=on_finding,
    )
