"""A user's own images: one folder per class, with or without train, val and test folders above them."""

import logging
import os
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from maple.data.images.reading import has_image_name, is_image_file
from maple.data.records import Dataset, Item
from maple.errors import ConfigError, DataError, one_of
from maple.names import has_lone_surrogate, words_of

logger = logging.getLogger(__name__)

_IGNORED = {"__macosx", "thumbs.db", "desktop.ini"}
PART_NAMES = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


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
) -> Dataset:
    """Read `root/CLASS/**/image` or `root/{train,val,test}/CLASS/**/image` as a data set.

    Classes are the folder names, sorted by code point after Unicode NFC normalisation, so that labels agree between
    file systems; `class_names` maps folder names to the names to use. Hidden files, system files and files that are
    no images are skipped and counted in the log. With a train folder beside a test or val folder these parts are
    used as they stand; a val folder without a test folder is the test part. Otherwise each class is split on its own
    by `seed`: the test and validation fractions rounded, at least one image for training, then one for test.
    `name` is what the data set is called, its folder's name by default; `classes` are the folder names to use, sorted,
    where they are known from elsewhere: the folder may then lack some of them. `drop_empty` leaves out classes without
    any image instead of refusing them.

    Raises:
        ConfigError: a fraction is negative, or they sum to 1 or more.
        DataError: the folder is missing or unreadable, has fewer than two classes, a class without images, a class in
            test or val that train lacks, or `class_names` names a class that does not exist.
    """
    check_fractions(val_fraction, test_fraction)
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; give a folder that holds one folder of images per class")
    parts = _part_folders(root)
    if parts:
        images = {part: _list_classes(root, folder, classes) for part, folder in parts.items()}
        if drop_empty and classes is None:
            images = _without_empty(images)
        if "test" not in images:
            images["test"] = images.pop("val")
            logger.info("%s has no test folder: its %s folder is the test part", root, parts["val"].name)
        _check_parts(parts["train"], images, may_lack=classes is not None)
    else:
        listed = _list_classes(root, root, classes)
        if drop_empty and classes is None:
            listed = _without_empty({"": listed})[""]
        _check_classes(root, listed, may_lack=classes is not None)
        images = draw_split(listed, seed, val_fraction, test_fraction)
    names = list(classes or images["train"])
    dataset = assemble(name or root.resolve().name, root, names, images, drawn_split=not parts)
    return rename_classes(dataset, class_names)


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raise ConfigError unless the fractions leave images for training."""
    if val_fraction < 0 or test_fraction < 0 or not val_fraction + test_fraction < 1:
        raise ConfigError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} must not be negative and must sum to less "
            "than 1, so that images remain for training"
        )


def rename_classes(dataset: Dataset, class_names: Mapping[str, str] | None) -> Dataset:
    """Return `dataset` with the classes of `class_names` (old name to new name) renamed, the others as they are.

    Raises:
        DataError: a key is no class of the data set, a new name is empty or no Unicode, or says the same words as
            another class.
    """
    if not class_names:
        return dataset
    mapping = {nfc(old): new for old, new in class_names.items()}
    unknown = sorted(set(mapping) - {nfc(name) for name in dataset.class_names})
    if unknown:
        raise DataError(
            f"class_names renames {', '.join(map(repr, unknown))}, which {dataset.name!r} does not have; "
            f"its classes are: {', '.join(dataset.class_names)}"
        )
    if broken := [name for name in mapping.values() if has_lone_surrogate(name)]:
        raise DataError(f"class_names gives the name {broken[0]!r}, which holds half a character; write the whole one")
    names = tuple(mapping.get(nfc(name), name) for name in dataset.class_names)
    _refuse_same_words(dataset.class_names, names)

    def renamed(items: tuple[Item, ...]) -> tuple[Item, ...]:
        return tuple(replace(item, class_name=names[item.label]) for item in items)

    return replace(
        dataset,
        train=renamed(dataset.train),
        val=renamed(dataset.val),
        test=renamed(dataset.test),
        class_names=names,
    )


def _refuse_same_words(old: Sequence[str], new: Sequence[str]) -> None:
    """Raise DataError where renaming gives several classes the same words; such a list cannot be asked for later."""
    alike: dict[str, list[int]] = defaultdict(list)
    for label, name in enumerate(new):
        alike[words_of(name)].append(label)
    for labels in alike.values():
        # Published lists have equal names, which stay equal.
        if len({words_of(old[label]) for label in labels}) > 1:
            raise DataError(
                f"class_names gives {' and '.join(repr(old[label]) for label in labels)} the same words, "
                f"{new[labels[0]]!r}; put their images into one folder, or give each class words of its own"
            )


def _part_folders(root: Path) -> dict[str, Path]:
    parts: dict[str, Path] = {}
    for folder in list_folder(root):
        part = PART_NAMES.get(folder.name.casefold())
        if part is None or not folder.is_dir():
            continue
        if part in parts:
            raise DataError(f"{root}: {parts[part].name} and {folder.name} both look like the {part} part; keep one")
        parts[part] = folder
    return parts if "train" in parts and len(parts) > 1 else {}


def class_folders(root: Path) -> set[str]:
    """The names of the classes that `root` has folders of, in any part if it is divided, in Unicode NFC."""
    folders = _part_folders(root).values() or [root]
    return {name for folder in folders for name in _class_folders(folder)}


def _class_folders(folder: Path) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for child in list_folder(folder):
        if child.is_dir():
            name = nfc(child.name)
            if name in folders:
                raise DataError(f"{child}: another class folder has the same name in another Unicode form; rename one")
            folders[name] = child
    return folders


def _list_classes(root: Path, folder: Path, classes: Sequence[str] | None) -> dict[str, list[str]]:
    """Return the image paths, relative to `root`, of each class in `folder`: of `classes`, or those that it has."""
    folders = _class_folders(folder)
    skipped = Counter({"outside a class folder": len(list_folder(folder)) - len(folders)})
    images: dict[str, list[str]] = {name: [] for name in classes or sorted(folders)}
    for name in sorted(folders):
        for file in walk_files(folders[name], within=(root, folder)):
            if is_image_file(file):
                images[name].append(file.relative_to(root).as_posix())
            else:
                skipped["no image"] += 1
        images[name].sort(key=lambda path: (nfc(path), path))
    for reason, count in skipped.items():
        if count:
            logger.info("%s: skipped %d files (%s)", folder, count, reason)
    return images


def _without_empty(parts: dict[str, dict[str, list[str]]]) -> dict[str, dict[str, list[str]]]:
    """The parts without the classes that have no image in any of them."""
    held = {name for images in parts.values() for name, paths in images.items() if paths}
    return {part: {name: paths for name, paths in images.items() if name in held} for part, images in parts.items()}


def walk_files(
    folder: Path,
    *,
    recursive: bool = True,
    on_unreadable: Callable[[DataError], None] | None = None,
    within: Sequence[Path] = (),
) -> Iterator[Path]:
    """Iterate over the files of a folder in the order of their names, without hidden files and system files.

    With `recursive` also over those of the folders below it, each in its place; links back to a folder above are not
    followed. Only the names of the open folders are kept in memory.

    Args:
        on_unreadable: told of a folder that cannot be listed, which is then left out.
        within: folders above, which links may not lead back to either.

    Raises:
        DataError: a folder cannot be listed, and there is no `on_unreadable`.
    """
    return _walk(folder, tuple(_identity(above) for above in within), recursive, on_unreadable)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _walk(
    folder: Path,
    parents: tuple[tuple[int, int], ...],
    recursive: bool,
    on_unreadable: Callable[[DataError], None] | None,
) -> Iterator[Path]:
    try:
        held = list_folder(folder)
        identity = _identity(folder)
    except DataError as error:
        if on_unreadable is None:
            raise
        on_unreadable(error)
        return
    if identity in parents:
        logger.warning("%s: links back to a folder above it; not followed", folder)
        return
    for child in held:
        if not child.is_dir():
            yield child
        elif recursive:
            yield from _walk(child, (*parents, identity), recursive, on_unreadable)


def list_folder(folder: Path) -> list[Path]:
    """What a folder holds, sorted by name, without hidden files and system files.

    Raises:
        DataError: it cannot be listed.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); make the folder readable") from error
    return [folder / name for name in sorted(names) if not is_ignored(name)]


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is hidden or a system's own, and never looked at."""
    return name.startswith(".") or name.casefold() in _IGNORED


def _check_classes(folder: Path, images: Mapping[str, list[str]], *, may_lack: bool) -> None:
    if len(images) < 2:
        found = f"only one class, {next(iter(images))!r}," if images else "no class folders"
        shown = folder.resolve().name
        raise DataError(
            f"{folder}: holds {found} but a classifier needs at least two; expected {shown}/CLASS/image.jpg "
            f"(or {shown}/train/CLASS/image.jpg with a test or val folder beside train)"
        )
    empty = [name for name, paths in images.items() if not paths]
    if empty and (not may_lack or len(empty) == len(images)):
        raise DataError(
            f"{folder}: no usable images in class {', '.join(map(repr, empty))}; add images to the folder or remove it"
        )


def _check_parts(train: Path, images: Mapping[str, dict[str, list[str]]], *, may_lack: bool) -> None:
    _check_classes(train, images["train"], may_lack=may_lack)
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
        if absent and not may_lack:
            logger.warning("%s: the %s part has no images of %s", train.parent, part, ", ".join(map(repr, absent)))


def draw_split(
    images: Mapping[str, list[str]], seed: int, val_fraction: float, test_fraction: float
) -> dict[str, dict[str, list[str]]]:
    """Split each class on its own: part to class to paths. A class of one image keeps it for training."""
    parts: dict[str, dict[str, list[str]]] = {"train": {}, "val": {}, "test": {}}
    for name, paths in images.items():
        total = len(paths)
        # A small class keeps one image for training first, one for test second.
        test_count = min(max(round(total * test_fraction), int(test_fraction > 0)), max(total - 1, 0))
        val_count = min(round(total * val_fraction), max(total - 1 - test_count, 0))
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


def assemble(
    name: str,
    root: Path,
    classes: Sequence[str],
    images: Mapping[str, Mapping[str, list[str]]],
    *,
    drawn_split: bool,
) -> Dataset:
    """A data set from part to class to paths; labels follow `classes`."""

    def items(part: str) -> tuple[Item, ...]:
        listing = images.get(part, {})
        return tuple(Item(path, label, cls) for label, cls in enumerate(classes) for path in listing.get(cls, []))

    return Dataset(name, root, items("train"), items("val"), items("test"), tuple(classes), drawn_split=drawn_split)


def nfc(name: str) -> str:
    """The Unicode form that names are compared in: file systems differ in theirs."""
    return unicodedata.normalize("NFC", name)


def split_domain(text: str) -> tuple[Path, str] | None:
    """Take `root:DOMAIN` apart; None where the text is no such thing: no colon, or no folder before it."""
    root, colon, domain = text.rpartition(":")
    folder = Path(root).expanduser()
    if not colon or Path(text).expanduser().exists() or not folder.is_dir():
        return None
    return folder, domain


def warn_of_domains(root: Path) -> None:
    """Warn if `root` looks like a folder of domains that is about to be read as one of classes."""
    if found := detect_domains(root):
        domains, common = found
        logger.warning(
            "%s: all its folders hold the same folders (%s). If these are the classes, and %s domains, "
            "give the data set as %s:%s",
            root,
            ", ".join(common),
            ", ".join(domains),
            root,
            domains[0],
        )


def detect_domains(root: Path) -> tuple[list[str], list[str]] | None:
    """The folders of `root` and the folders that all of these hold, if it looks like a folder of domains.

    It does if it has at least two folders, other than train, val and test, which share at least two and hold no image
    beside them.

    Raises:
        DataError: a folder cannot be listed.
    """
    common: set[str] | None = None
    folders = [child for child in list_folder(root) if child.is_dir()]
    if all(folder.name.casefold() in PART_NAMES for folder in folders):
        return None
    for folder in folders:
        inside = set()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        inside.add(entry.name)
                    elif has_image_name(entry.name):
                        return None
        except OSError as error:
            raise DataError(f"{folder}: cannot be listed ({error.strerror}); make the folder readable") from error
        common = inside if common is None else common & inside
    if common and len(folders) > 1 and len(common) > 1:
        return [folder.name for folder in folders], sorted(common)
    return None


def load_domain(
    root: Path,
    domain: str,
    *,
    class_names: Mapping[str, str] | None = None,
    seed: int = 0,
    val_fraction: float = 0.0,
    test_fraction: float = 0.25,
) -> Dataset:
    """Read one domain of a folder of domains, as `load_folder` does, but over the classes of all domains.

    So labels agree between domains, and a class that a domain lacks is still a possible answer there. The data set is
    called ROOT/DOMAIN.

    Raises:
        ConfigError: a fraction is negative, or they sum to 1 or more.
        DataError: no such domain, or whatever `load_folder` refuses in it.
    """
    domains = {child.name: child for child in list_folder(root) if child.is_dir()}
    if domain not in domains:
        raise DataError(f"{root}: {one_of('domain', domain, domains or ['(the folder holds no folders)'])}")
    classes = {name: sorted(class_folders(folder)) for name, folder in domains.items()}
    shared = sorted({name for names in classes.values() for name in names})
    for name, own in classes.items():
        if absent := sorted(set(shared) - set(own)):
            logger.warning("%s: domain %s has no folders of %s", root, name, ", ".join(absent))
    return load_folder(
        domains[domain],
        name=f"{root.resolve().name}/{domain}",
        classes=shared,
        class_names=class_names,
        seed=seed,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
    )
