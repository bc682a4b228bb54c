"""Inspect a user's images before training: find and remove what is unreadable, duplicated or leaks into the test."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from maple.data.checks.findings import Finding, number_of, suspicious_names
from maple.data.checks.near_duplicates import ImageHash, image_hash, near_duplicate_groups
from maple.data.images.formats import CAMERA_RAW, SIXTEEN_BITS
from maple.data.images.prefetch import map_with_progress
from maple.data.images.reading import read_image
from maple.data.records import SPLIT_NAMES, Dataset, Item
from maple.data.sources.unpacked import name_row
from maple.errors import DataError, ImageError, shortened_list
from maple.files import sha256_of

_TRAIN, _TEST = SPLIT_NAMES.index("train"), SPLIT_NAMES.index("test")
_NO_PIXELS = (
    "features in place of images: equal rows are found, but not images that look nearly the same, are damaged or dark"
)
_FEW = 4
"""A class with fewer images is reported."""
_SHADES = {10: 4, 12: 16, 14: 64}
"""The brightest of 255 shades that values of this number of bits take in a file of 16 bits."""


@dataclass(frozen=True)
class Inspection:
    """The result of inspecting `images` images: everything odd, what was done about it, and what remains.

    `dataset` has only readable images, none twice, none in both training and test; it knows which training images look
    nearly the same.

    Example:
        >>> dataset, remarks = open_source("pets")
        >>> print(*inspect_dataset(dataset, remarks=remarks).lines(), sep="\\n")
        pets: 16 images of 2 classes (8 each): 12 to learn from, 4 to test on (drawn by the seed)
    """

    dataset: Dataset
    images: int
    findings: tuple[Finding, ...]

    def lines(self) -> list[str]:
        """Return a few lines for people, the summary first."""
        sizes = sorted(sum(row[1:]) for row in self.classes())
        each = f"{sizes[0]:,} each"
        if sizes[0] != sizes[-1]:
            middle = f", median {median(sizes):,.0f}" if len(sizes) > 2 and sizes[-1] >= 4 * sizes[0] else ""
            each = f"{sizes[0]:,} to {sizes[-1]:,} each{middle}"
        counts = self.dataset.counts()
        uses = {"train": "learn from", "val": "choose settings on", "test": "test on"}
        splits = ", ".join(f"{counts[split]:,} to {use}" for split, use in uses.items() if counts[split])
        division = "drawn by the seed" if self.dataset.drawn_split else "as divided by you"
        summary = (
            f"{self.dataset.name}: {number_of(sum(sizes), 'image')} of {number_of(len(sizes), 'class', 'classes')} "
            f"({each}): {splits} ({division})"
        )
        return [summary, *(f"{finding.level}: {finding.text}" for finding in self.findings)]

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "name": self.dataset.name,
            "root": str(self.dataset.root),
            "images": self.images,
            "counts": self.dataset.counts(),
            "classes": [dict(zip(("name", *SPLIT_NAMES), row, strict=True)) for row in self.classes()],
            "findings": [finding.as_json() for finding in self.findings],
        }

    def classes(self) -> list[tuple[str, int, int, int]]:
        """Return (name, images in train, val and test) of every class."""
        train, val, test = (Counter(item.label for item in getattr(self.dataset, split)) for split in SPLIT_NAMES)
        names = enumerate(self.dataset.class_names)
        return [(name, train[label], val[label], test[label]) for label, name in names]


@dataclass(frozen=True)
class _Image:
    """A readable image: its item, the index of its split in SPLIT_NAMES, and the hashes of its content and look."""

    item: Item
    split: int
    digest: str
    hash: ImageHash
    size: tuple[int, int]
    brightest: int
    info: frozenset[object]


def inspect_dataset(
    dataset: Dataset,
    *,
    remarks: Sequence[Finding] = (),
    keep_classes: bool = False,
    keep_near_copies: bool = False,
    workers: int | None = None,
    on_images: Callable[[int, int], None] = lambda _done, _total: None,
) -> Inspection:
    """Decode every image of a data set; report what is wrong, and return the data set without it.

    Rows of features have no pixels: of these only equal ones, as copies are, and those of zeros are found.

    Unreadable images are left out. Of images with the same content one is kept, for training if one of them is there;
    none if their labels differ. Near duplicates (resized, converted, recompressed: see `near_duplicates`) do not end up
    in both training and test: in a drawn split they all go to training, in the user's own split those of the test or
    validation split are left out; and later divisions of the training images do not separate them. The split stays as
    it is with `keep_near_copies`, and where most images are alike and most of the test would be lost, as with a fixed
    camera; such near copies are then divided later, too. Classes that lose all their training images are left out,
    or, with `keep_classes`, kept as possible predictions.

    Args:
        remarks: earlier findings; they come first.
        workers: the number of decoding threads; by default one per core, up to 16.
        on_images: called with (images inspected, images in all).

    Raises:
        DataError: fewer than two classes have an image to train on.

    Example:
        >>> inspect_dataset(load_dataset("pets", None)).dataset.counts()
        {'train': 12, 'val': 0, 'test': 4, 'classes': 2}
    """
    images, unreadable = _read_all(dataset, workers, on_images)
    total = len(images) + len(unreadable)
    # The text features of rows are given, whatever the names are.
    no_pixels = Finding("no pixels", "note", _NO_PIXELS)
    findings = [*remarks, *([no_pixels] if dataset.has_rows else suspicious_names(dataset.class_names))]
    if unreadable:
        more = f"; and {len(unreadable) - 1:,} more" if len(unreadable) > 1 else ""
        kind, be = ("row", "used") if dataset.has_rows else ("file", "read")
        text = f"{number_of(len(unreadable), kind)} cannot be {be} and {_are(len(unreadable))} left out: "
        findings.append(Finding("unreadable", "warning", text + unreadable[0][1] + more, tuple(unreadable)))
    findings += _misread(images)
    images = _drop_copies(images, findings, drawn=dataset.drawn_split)
    if dataset.drawn_split:
        images = _refill(images, _TRAIN)
    kept, groups = _separate_near_duplicates(images, findings, drawn=dataset.drawn_split, keep=keep_near_copies)
    remaining = _remaining_dataset(dataset, kept, keep_classes, findings)
    training = {item.path for item in remaining.train}
    together = tuple(group for group in groups if sum(path in training for path in group) > 1)
    remaining = replace(remaining, near_copies=together)
    return Inspection(remaining, total, (*findings, *_small_classes(remaining)))


def _read_all(
    dataset: Dataset, workers: int | None, on_images: Callable[[int, int], None]
) -> tuple[list[_Image], list[tuple[str, str]]]:
    """The readable images in order, and (path, error) of the others."""
    listed = [(item, index) for index, split in enumerate(SPLIT_NAMES) for item in getattr(dataset, split)]
    if dataset.features is not None:
        unseen = ImageHash(b"", b"", plain=True)
        on_images(len(listed), len(listed))
        has_values = dataset.features([item.path for item, _ in listed]).any(dim=1).tolist()
        return [
            _Image(item, split, str(dataset.digest_of(item)), unseen, (0, 0), 255, frozenset())
            for (item, split), usable in zip(listed, has_values, strict=True)
            if usable
        ], [
            (item.path, f"{item.path} has only zeros")
            for (item, _), usable in zip(listed, has_values, strict=True)
            if not usable
        ]

    def read(entry: tuple[Item, int]) -> _Image | tuple[str, str]:
        item, split = entry
        path = dataset.file(item)
        try:
            if dataset.read is not None:
                image = dataset.read(item.path)
                digest = hashlib.sha256(image.tobytes()).hexdigest()
            else:
                image = read_image(path)
                digest = sha256_of(path)
            brightest = int(np.asarray(image.getextrema()).max())
            return _Image(item, split, digest, image_hash(image), image.size, brightest, frozenset(image.info))
        except ImageError as error:
            return item.path, str(name_row(error, path))
        except OSError as error:
            return item.path, f"{path}: cannot be read ({error.strerror}); copy it again or remove it"

    results = list(map_with_progress(read, listed, workers, on_images))
    images = [result for result in results if isinstance(result, _Image)]
    return images, [result for result in results if not isinstance(result, _Image)]


def _misread(images: Sequence[_Image]) -> list[Finding]:
    """Report images that are read, but not as they were meant: as previews, or nearly black."""
    findings = []
    if previews := [image for image in images if CAMERA_RAW in image.info]:
        width, height = max(image.size for image in previews)
        text = (
            f"{number_of(len(previews), 'camera RAW file')} {_are(len(previews))} read as a preview of at most "
            f"{width} x {height} pixels: convert to JPEG ({_shown(previews)})"
        )
        findings.append(Finding("previews", "warning", text, tuple(image.item.path for image in previews)))
    # By class: most of those with 16 bits use at most 14 of them, or all of the others next to nothing of their 8.
    deep: dict[int, list[_Image]] = defaultdict(list)
    plain: dict[int, list[_Image]] = defaultdict(list)
    for image in images:
        (deep if SIXTEEN_BITS in image.info else plain)[image.item.label].append(image)
    dark: list[_Image] = []
    for members in deep.values():
        dim = [image for image in members if image.brightest <= _SHADES[14]]
        dark += dim if 2 * len(dim) > len(members) else []
    if dark:
        most = max(image.brightest for image in dark)
        bits = next(bits for bits, shades in _SHADES.items() if most <= shades)
        text = (
            f"{number_of(len(dark), 'image')} with 16 bits for each colour {_are(len(dark))} seen nearly black, 0 to "
            f"{most} of 255: {bits}-bit values in 16-bit files? Multiply them by {2 ** (16 - bits)}, or save 8-bit "
            f"images ({_shown(dark)})"
        )
        findings.append(Finding("dark images", "warning", text, tuple(image.item.path for image in dark)))
    black = [each for each in plain.values() if len(each) > 1 and max(image.brightest for image in each) <= _SHADES[12]]
    if dim := [image for each in black for image in each if image.brightest > 0]:
        text = (
            f"{number_of(len(dim), 'image')} {_are(len(dim))} seen nearly black, 0 to "
            f"{max(image.brightest for image in dim)} of 255: are these labels or masks, or is the brightness to be "
            f"scaled? ({_shown(dim)})"
        )
        findings.append(Finding("dark images", "warning", text, tuple(image.item.path for image in dim)))
    return findings


def _shown(images: Sequence[_Image]) -> str:
    return shortened_list(image.item.path for image in images)


def _drop_copies(images: list[_Image], findings: list[Finding], *, drawn: bool) -> list[_Image]:
    """Keep one image of each content, none of a content with several labels."""
    by_content: dict[str, list[_Image]] = defaultdict(list)
    for image in images:
        by_content[image.digest].append(image)
    groups = [sorted(group, key=lambda image: image.split) for group in by_content.values() if len(group) > 1]
    conflicts = [group for group in groups if len({image.item.label for image in group}) > 1]
    copies = [group for group in groups if len({image.item.label for image in group}) == 1]
    if conflicts:
        classes = dict.fromkeys(
            " = ".join(dict.fromkeys(image.item.class_name for image in group)) for group in conflicts
        )
        count = sum(map(len, conflicts))
        text = f"{number_of(count, 'image')} of the same content in different classes ({shortened_list(classes)}) "
        findings.append(Finding("conflicts", "warning", f"{text}{_are(count)} left out", _paths(conflicts)))
    if copies:
        count = sum(len(group) - 1 for group in copies)
        text = f"{number_of(count, 'copy', 'copies')} of other images {_are(count)} left out"
        across = 0 if drawn else sum(len({image.split for image in group}) > 1 for group in copies)
        if across:
            text += f"; {number_of(across, 'image')} {'was' if across == 1 else 'were'} in several of your splits, and "
            text += f"{_are(across)} kept for training only"
        text += f" ({_example(copies, ' = ')})"
        findings.append(Finding("copies", "warning" if across else "note", text, _paths(copies)))
    dropped = {id(image) for group in conflicts for image in group}
    dropped |= {id(image) for group in copies for image in group[1:]}
    return [image for image in images if id(image) not in dropped]


def _separate_near_duplicates(
    images: list[_Image], findings: list[Finding], *, drawn: bool, keep: bool
) -> tuple[list[_Image], tuple[tuple[str, ...], ...]]:
    """Let no near duplicates be in different splits, unless `keep`, or unless most images are such.

    With the paths of those that no later division may separate either, group by group.
    """
    groups = near_duplicate_groups([image.hash for image in images])
    if not groups:
        return (_refill(images, _TEST) if drawn else images), ()
    members = [[images[index] for index in group] for group in groups]
    moved: dict[int, int] = {}
    for group in members:
        first = min(image.split for image in group)
        moved.update({id(image): first for image in group if image.split > first})
    if drawn:
        separated = [replace(image, split=moved.get(id(image), image.split)) for image in images]
        separated = _refill(separated, _TEST, excluded={index for group in groups for index in group})
    else:
        separated = [image for image in images if id(image) not in moved]
    text = f"{number_of(sum(map(len, members)), 'image')} in {number_of(len(members), 'group')} look nearly the same "
    text += f"({_example(members, ' ~ ')})"
    tested, left = (sum(image.split == _TEST for image in each) for each in (images, separated))
    leaking = sum(image.split == _TEST and id(image) in moved for image in images)
    # Of a fixed camera or a video: most images are alike, and without them next to nothing would be measured.
    hardly_testable = 2 * left < tested and 2 * sum(map(len, members)) > len(images)
    mixed = sum(len({image.item.label for image in group}) > 1 for group in members)
    labels = f"; {number_of(mixed, 'group')} {'has' if mixed == 1 else 'have'} several classes: check the labels"
    stays_divided = bool(leaking and (keep or hardly_testable))
    if stays_divided:
        which = f"all {tested:,}" if leaking == tested else f"{leaking:,} of {tested:,}"
        text += f"; {which} test images look like training images"
        if not keep:
            text += ", as those of a fixed camera or a video do. The division is kept, so the accuracy is one on such "
            text += "images, and says nothing about new scenes: to measure that, divide them by scene or by day"
        else:
            text += ", and are kept, so the accuracy is too high for images that are new"
        text += "; the same holds for the choice of a method and for the temperature of the probabilities"
        separated, labels = images, ""
    elif keep:
        separated = images
    elif moved:
        text += f"; {len(moved):,} of them would have tested what was trained on, and {_are(len(moved))} "
        text += "used for training instead" if drawn else "left out of the test (--keep-near-copies keeps them)"
    text += labels if mixed else ""
    findings.append(Finding("near copies", "warning" if moved or mixed else "note", text, _paths(members)))
    return separated, (() if keep or stays_divided else _paths(members))


def _refill(images: list[_Image], split: int, excluded: Set[int] = frozenset()) -> list[_Image]:
    """Give each class of a drawn split an image in `split` if it has none: those drawn for it may have been left out.

    The only image of a class stays in training, and near duplicates, `excluded` by their indices, stay together.
    """
    by_label: dict[int, list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        by_label[image.item.label].append(index)
    result = list(images)
    for members in by_label.values():
        free = [index for index in members if index not in excluded]
        if any(images[index].split == split for index in members) or not free:
            continue
        if split == _TRAIN:
            result[free[0]] = replace(images[free[0]], split=split)
        elif len(members) > 1:
            result[free[-1]] = replace(images[free[-1]], split=split)
    return result


def _remaining_dataset(dataset: Dataset, images: list[_Image], keep_classes: bool, findings: list[Finding]) -> Dataset:
    """The data set of these images, without the classes that have no image to train on."""
    trained = {image.item.label for image in images if image.split == _TRAIN}
    if len(trained) < 2:
        others = Counter(SPLIT_NAMES[image.split] for image in images if image.split != _TRAIN)
        divided = "; ".join(f"{count:,} images are for {split}" for split, count in others.items())
        held = shortened_list(dataset.class_names[label] for label in sorted(trained)) or "none"
        raise DataError(
            f"{dataset.root}: of {number_of(dataset.num_classes, 'class', 'classes')} only {len(trained)} "
            f"({held}) can be trained on, but a classifier needs two"
            + (f"; {divided}, as the data set says" if divided and not dataset.drawn_split else "")
            + "".join(
                f"; {finding.text}" for finding in findings if finding.kind in ("unreadable", "conflicts", "copies")
            )
        )
    labels = list(range(dataset.num_classes)) if keep_classes else sorted(trained)
    if lacking := tuple(name for label, name in enumerate(dataset.class_names) if label not in trained):
        be, count = _are(len(lacking)), number_of(len(lacking), "class", "classes")
        action = f"can still be predicted, but {be} not trained on" if keep_classes else f"{be} left out"
        text = f"{count} without an image to train on ({shortened_list(lacking)}) {action}"
        findings.append(Finding("lacking classes", "warning", text, lacking))
    renumbered = {old: new for new, old in enumerate(labels)}
    splits: dict[str, list[Item]] = {split: [] for split in SPLIT_NAMES}
    for image in images:
        if image.item.label in renumbered:
            splits[SPLIT_NAMES[image.split]].append(replace(image.item, label=renumbered[image.item.label]))
    if dataset.drawn_split:
        for items in splits.values():
            items.sort(key=lambda item: item.label)  # images that changed splits join their own class
    names = tuple(dataset.class_names[label] for label in labels)
    train, val, test = (tuple(splits[split]) for split in SPLIT_NAMES)
    return replace(dataset, train=train, val=val, test=test, class_names=names)


def _small_classes(dataset: Dataset) -> list[Finding]:
    train, val, test = (Counter(item.label for item in getattr(dataset, split)) for split in SPLIT_NAMES)
    names = list(enumerate(dataset.class_names))
    findings = []
    if untested := tuple(name for label, name in names if train[label] and not test[label]):
        have = "has" if len(untested) == 1 else "have"
        text = f"{number_of(len(untested), 'class', 'classes')} ({shortened_list(untested)}) {have} no image to test on"
        findings.append(Finding("untested classes", "warning", f"{text}: trained, not tested", untested))
    sizes = train + val + test
    if small := tuple(name for label, name in names if 0 < sizes[label] < _FEW and name not in untested):
        count = number_of(len(small), "class", "classes")
        text = f"{count} ({shortened_list(small)}) with fewer than {_FEW} images: low accuracy is likely"
        findings.append(Finding("small classes", "warning", text, small))
    return findings


def _paths(groups: Sequence[Sequence[_Image]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(image.item.path for image in group) for group in groups)


def _example(groups: Sequence[Sequence[_Image]], separator: str) -> str:
    return shortened_list([separator.join(_paths(groups)[0])])


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
