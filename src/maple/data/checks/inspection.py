"""A look at somebody's own images before anything is learned from them: what is there, what is wrong, what is left."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from maple.data.checks.class_name_checks import suspicious_names
from maple.data.checks.findings import Finding, number_of, some
from maple.data.checks.near_duplicates import ImageHash, image_hash, near_duplicate_groups
from maple.data.images.reading import read_image
from maple.data.records import Dataset, Item
from maple.errors import DataError, ImageError

_AT_ONCE = 256
_PARTS = ("train", "val", "test")
_TEST = _PARTS.index("test")
_FEW = 4
"""Images of a class below which it is called nearly empty."""


@dataclass(frozen=True)
class Inspection:
    """What a look at a data set found.

    Attributes:
        dataset: what is left to train and test on: readable, no image twice, none on both sides of the division.
        images: how many were looked at.
        findings: everything that was odd, and what was done about it.
    """

    dataset: Dataset
    images: int
    findings: tuple[Finding, ...]

    def lines(self) -> list[str]:
        """A few lines for people, the summary first."""
        return [self._summary(), *(f"{finding.level}: {finding.text}" for finding in self.findings)]

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "name": self.dataset.name,
            "root": str(self.dataset.root),
            "images": self.images,
            "counts": self.dataset.counts(),
            "classes": [dict(zip(("name", *_PARTS), row, strict=True)) for row in self.classes()],
            "findings": [finding.as_json() for finding in self.findings],
        }

    def classes(self) -> list[tuple[str, int, int, int]]:
        """(name, images in train, val and test) of every class."""
        counts = [Counter(item.label for item in getattr(self.dataset, part)) for part in _PARTS]
        return [(name, *(count[label] for count in counts)) for label, name in enumerate(self.dataset.class_names)]  # type: ignore[misc]

    def _summary(self) -> str:
        sizes = sorted(sum(row[1:]) for row in self.classes())
        each = f"{sizes[0]:,} each" if sizes[0] == sizes[-1] else _range(sizes)
        counts = self.dataset.counts()
        parts = ", ".join(f"{counts[part]:,} to {verb}" for part, verb in _VERBS.items() if counts[part])
        drawn = " (drawn by the seed)" if self.dataset.drawn_split else " (as divided by you)"
        return (
            f"{self.dataset.name}: {number_of(sum(sizes), 'image')} of {number_of(len(sizes), 'class', 'classes')} "
            f"({each}): {parts}{drawn}"
        )


_VERBS = {"train": "learn from", "val": "choose settings on", "test": "test on"}


def _range(sizes: Sequence[int]) -> str:
    middle = f", {median(sizes):,.0f} in the middle" if len(sizes) > 2 and sizes[-1] >= 4 * sizes[0] else ""
    return f"{sizes[0]:,} to {sizes[-1]:,} each{middle}"


@dataclass(frozen=True)
class _Seen:
    """A readable image: where it stands, a hash of its content, how it looks."""

    item: Item
    part: int
    digest: bytes
    look: ImageHash


def inspect_dataset(
    dataset: Dataset,
    *,
    remarks: Sequence[Finding] = (),
    keep_classes: bool = False,
    workers: int | None = None,
    on_images: Callable[[int, int], None] = lambda _done, _total: None,
) -> Inspection:
    """Decode every image of a data set, and say and mend what is wrong with it.

    Unreadable images are left out. Of images with the same content one is kept, on the training side if one of them is
    there; none, where they have different labels. Images that look the same (resized, converted, compressed again: see
    `likeness`) do not straddle the division: where it was drawn here they all go to the training side, where it is the
    user's own those of the test part, or of the validation part, are left out of it. Classes that end up without
    training images are left out.

    Args:
        remarks: what was found before; it comes first.
        keep_classes: keep classes without images, as possible answers.
        workers: how many threads decode; by default as many as there are cores, up to 16.
        on_images: called with (images looked at, images in all).

    Raises:
        DataError: fewer than two classes are left with an image to train on.
    """
    seen, unreadable = _look_at(dataset, workers, on_images)
    total = len(seen) + len(unreadable)
    findings = [*remarks, *suspicious_names(dataset.class_names), *_told_unreadable(unreadable)]
    seen, told = _without_copies(seen, drawn=dataset.drawn_split)
    findings += told
    if dataset.drawn_split:
        seen = _with_training_images(seen)
    groups = near_duplicate_groups([one.look for one in seen])
    seen, told = _without_likeness(seen, groups, drawn=dataset.drawn_split)
    findings += told
    if dataset.drawn_split:
        seen = _with_test_images(seen, {index for group in groups for index in group})
    left, told = _assembled(dataset, seen, keep_classes, findings)
    return Inspection(left, total, (*findings, *told, *_told_few(left)))


def _look_at(
    dataset: Dataset, workers: int | None, on_images: Callable[[int, int], None]
) -> tuple[list[_Seen], list[tuple[str, str]]]:
    """The readable images in their order, and (path, reason) of the others."""
    listed = [(item, number) for number, part in enumerate(_PARTS) for item in getattr(dataset, part)]
    seen: list[_Seen] = []
    unreadable: list[tuple[str, str]] = []

    def look(place: tuple[Item, int]) -> _Seen | tuple[str, str]:
        item, part = place
        try:
            return _Seen(item, part, *_content(dataset, item))
        except ImageError as error:
            return item.path, str(error)

    pool = ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 16))
    try:
        for begin in range(0, len(listed), _AT_ONCE):
            for found in pool.map(look, listed[begin : begin + _AT_ONCE]):
                if isinstance(found, _Seen):
                    seen.append(found)
                else:
                    unreadable.append(found)
            on_images(min(begin + _AT_ONCE, len(listed)), len(listed))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return seen, unreadable


def _content(dataset: Dataset, item: Item) -> tuple[bytes, ImageHash]:
    if dataset.read is not None:
        image = dataset.read(item.path)
        return hashlib.sha256(image.tobytes()).digest(), image_hash(image)
    path = dataset.file(item)
    image = read_image(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest(), image_hash(image)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror}); copy it again or remove it") from error


def _told_unreadable(unreadable: list[tuple[str, str]]) -> Iterator[Finding]:
    if unreadable:
        more = f"; and {len(unreadable) - 1:,} more" if len(unreadable) > 1 else ""
        text = f"{number_of(len(unreadable), 'file')} cannot be read and {_are(len(unreadable))} left out: "
        yield Finding("unreadable", "warning", text + unreadable[0][1] + more, tuple(unreadable))


def _without_copies(seen: list[_Seen], *, drawn: bool) -> tuple[list[_Seen], list[Finding]]:
    """One of each content; none of a content with several labels."""
    by_content: dict[bytes, list[_Seen]] = defaultdict(list)
    for one in seen:
        by_content[one.digest].append(one)
    groups = [sorted(group, key=lambda one: one.part) for group in by_content.values() if len(group) > 1]
    conflicts = [group for group in groups if len({one.item.label for one in group}) > 1]
    copies = [group for group in groups if len({one.item.label for one in group}) == 1]
    gone = {id(one) for group in conflicts for one in group} | {id(one) for group in copies for one in group[1:]}
    findings = []
    if conflicts:
        classes = [" = ".join(dict.fromkeys(one.item.class_name for one in group)) for group in conflicts]
        count = sum(map(len, conflicts))
        text = f"{number_of(count, 'file')} of the same content in different classes ({some(dict.fromkeys(classes))}) "
        findings.append(Finding("conflicts", "warning", f"{text}{_are(count)} left out", _paths(conflicts)))
    if copies:
        count = sum(len(group) - 1 for group in copies)
        text = f"{number_of(count, 'copy', 'copies')} of other images {_are(count)} left out"
        across = 0 if drawn else sum(len({one.part for one in group}) > 1 for group in copies)
        if across:
            text += f"; {number_of(across, 'image')} stood on both sides of your division, and {_are(across)} kept "
            text += "for training only"
        example = some([" = ".join(one.item.path for one in copies[0])], 1)
        findings.append(Finding("copies", "warning" if across else "note", f"{text} ({example})", _paths(copies)))
    return [one for one in seen if id(one) not in gone], findings


def _without_likeness(
    seen: list[_Seen], alike: Sequence[Sequence[int]], *, drawn: bool
) -> tuple[list[_Seen], list[Finding]]:
    """No images that look the same on both sides of the division."""
    if not alike:
        return seen, []
    groups = [[seen[index] for index in group] for group in alike]
    moved: dict[int, int] = {}
    for group in groups:
        first = min(one.part for one in group)
        moved.update({id(one): first for one in group if one.part > first})
    count = sum(map(len, groups))
    example = some([" ~ ".join(one.item.path for one in groups[0])], 1)
    text = f"{number_of(count, 'image')} in {number_of(len(groups), 'group')} look nearly the same ({example})"
    if moved:
        text += f"; {len(moved):,} of them would have tested what was trained on, and {_are(len(moved))} "
        text += "used for training instead" if drawn else "left out of the test"
    if crossing := sum(len({one.item.label for one in group}) > 1 for group in groups):
        text += (
            f"; {number_of(crossing, 'group')} {'has' if crossing == 1 else 'have'} several classes: check the labels"
        )
    finding = Finding("near copies", "warning" if moved or crossing else "note", text, _paths(groups))
    if drawn:
        return [replace(one, part=moved.get(id(one), one.part)) for one in seen], [finding]
    return [one for one in seen if id(one) not in moved], [finding]


def _with_training_images(seen: list[_Seen]) -> list[_Seen]:
    """A drawn division in which every class has an image to train on; what was drawn for it may have been left out."""
    result = list(seen)
    for places in _by_label(seen).values():
        if all(seen[place].part for place in places):
            result[places[0]] = replace(seen[places[0]], part=0)
    return result


def _with_test_images(seen: list[_Seen], alike: set[int]) -> list[_Seen]:
    """A drawn division in which every class with two images has one to test on, unless it looks like another one."""
    result = list(seen)
    for places in _by_label(seen).values():
        free = [place for place in places if place not in alike]
        if free and len(places) > 1 and not any(seen[place].part == _TEST for place in places):
            result[free[-1]] = replace(seen[free[-1]], part=_TEST)
    return result


def _by_label(seen: list[_Seen]) -> dict[int, list[int]]:
    places: dict[int, list[int]] = defaultdict(list)
    for place, one in enumerate(seen):
        places[one.item.label].append(place)
    return places


def _assembled(
    dataset: Dataset, seen: list[_Seen], keep_classes: bool, before: Sequence[Finding]
) -> tuple[Dataset, list[Finding]]:
    """The data set of these images, without the classes that nothing can be learned of."""
    trained = {one.item.label for one in seen if one.part == 0}
    if len(trained) < 2:
        others = Counter(_PARTS[one.part] for one in seen if one.part)
        divided = "; ".join(f"{count:,} images are for {part}" for part, count in others.items())
        held = some([dataset.class_names[label] for label in sorted(trained)]) or "none"
        raise DataError(
            f"{dataset.root}: of {number_of(dataset.num_classes, 'class', 'classes')} only {len(trained)} "
            f"({held}) can be trained on, but a classifier needs two"
            + (f"; {divided}, as the data set says" if divided and not dataset.drawn_split else "")
            + "".join(
                f"; {finding.text}" for finding in before if finding.kind in ("unreadable", "conflicts", "copies")
            )
        )
    labels = list(range(dataset.num_classes)) if keep_classes else sorted(trained)
    lacking = tuple(name for label, name in enumerate(dataset.class_names) if label not in trained)
    findings = []
    if lacking:
        stay = "stays a possible answer" if len(lacking) == 1 else "stay possible answers"
        how = f"{stay}, but {_are(len(lacking))} not trained on" if keep_classes else f"{_are(len(lacking))} left out"
        text = f"{number_of(len(lacking), 'class', 'classes')} without an image to train on ({some(lacking)}) {how}"
        findings.append(Finding("lacking classes", "warning", text, lacking))
    renumbered = {old: new for new, old in enumerate(labels)}
    parts: dict[str, list[Item]] = {part: [] for part in _PARTS}
    for one in seen:
        if one.item.label in renumbered:
            parts[_PARTS[one.part]].append(replace(one.item, label=renumbered[one.item.label]))
    names = tuple(dataset.class_names[label] for label in labels)
    if dataset.drawn_split:
        for items in parts.values():
            items.sort(key=lambda item: item.label)  # those that changed sides stand among their own class
    train, val, test = (tuple(parts[part]) for part in _PARTS)
    return replace(dataset, train=train, val=val, test=test, class_names=names), findings


def _told_few(dataset: Dataset) -> Iterator[Finding]:
    counts: dict[str, Counter[int]] = {part: Counter(item.label for item in getattr(dataset, part)) for part in _PARTS}
    names = list(enumerate(dataset.class_names))
    single = tuple(name for label, name in names if counts["train"][label] and not counts["test"][label])
    if single:
        verb = "has no image" if len(single) == 1 else "have no image"
        text = f"{number_of(len(single), 'class', 'classes')} ({some(single)}) {verb} to test on: trained, not tested"
        yield Finding("untested classes", "warning", text, single)
    few = tuple(name for label, name in names if 0 < sum(counts[part][label] for part in _PARTS) < _FEW)
    if few := tuple(name for name in few if name not in single):
        text = f"{number_of(len(few), 'class', 'classes')} ({some(few)}) with fewer than {_FEW} images: expect little"
        yield Finding("small classes", "warning", text, few)


def _paths(groups: Iterable[Sequence[_Seen]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(one.item.path for one in group) for group in groups)


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
