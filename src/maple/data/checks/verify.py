"""Verify a data set on this disk: the published counts and class names, and that every image is readable."""

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import chain

from maple.data.images.prefetch import map_with_progress
from maple.data.images.reading import read_image
from maple.data.records import DRAWN, SPLIT_NAMES, Dataset, Item
from maple.data.sampling import base_novel_classes
from maple.errors import ImageError
from maple.names import names_hash

COUNTED = ("train", "val", "test", "test_base", "test_new", "classes")
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Statistics:
    """Published numbers of one data set; None is a number that is not published, or that could not be checked.

    `counts` has the keys of `COUNTED`; `class_names` is the `names_hash` of the list of class names.
    """

    counts: dict[str, int | None]
    class_names: str | None
    source: str


@cache
def published_statistics() -> dict[str, Statistics]:
    """Return the shipped statistics by name of the catalogue."""
    text = resources.files("maple").joinpath("assets", "datasets", "statistics.csv").read_text(encoding="utf-8")
    return {
        row["dataset"]: Statistics(
            {name: int(row[name]) if row[name] else None for name in COUNTED},
            row["class_names_sha256"] or None,
            row["source"],
        )
        for row in csv.DictReader(text.splitlines())
    }


def count(dataset: Dataset) -> dict[str, int]:
    """Return the numbers that papers print of a data set, with the keys of `COUNTED`."""
    base = set(base_novel_classes(range(dataset.num_classes))[0])
    in_base = sum(item.label in base for item in dataset.test)
    return {**dataset.counts(), "test_base": in_base, "test_new": len(dataset.test) - in_base}


def verify_counts(dataset: Dataset, published: Statistics | None = None) -> list[str]:
    """Describe the differences from the numbers and names `published`, by default the shipped ones of this name."""
    published = published or published_statistics().get(dataset.name)
    if published is None:
        return []
    counts = count(dataset)
    problems = [
        f"{name}: {counts[name]} found, {published.counts[name]} published ({published.source})"
        for name in COUNTED
        if published.counts[name] not in (None, counts[name])
    ]
    if published.class_names is not None and published.class_names != names_hash(dataset.class_names):
        problems.append(
            f"class names: not the published ones ({published.source}); the first are "
            + ", ".join(map(repr, dataset.class_names[:5]))
        )
    return problems


def missing_images(dataset: Dataset, items: Iterable[Item] | None = None) -> list[Item]:
    """Return the items (by default all) without a file, from one listing of each of their folders; none is opened."""
    if dataset.read is not None:
        return []
    names: dict[str, set[str]] = {}
    missing = []
    for item in chain(dataset.train, dataset.val, dataset.test) if items is None else items:
        folder, _, name = item.path.rpartition("/")
        if folder not in names:
            try:
                names[folder] = set(os.listdir(dataset.root / folder))
            except OSError:
                names[folder] = set()
        # A file system may know the file by another spelling than that of its listing.
        if name not in names[folder] and not dataset.file(item).exists():
            missing.append(item)
    return missing


def describe_missing(dataset: Dataset, items: Sequence[Item] | None = None) -> str:
    """Say how many images are missing and name the first; "" if all are there."""
    items = [*dataset.train, *dataset.val, *dataset.test] if items is None else items
    if not (missing := missing_images(dataset, items)):
        return ""
    return f"images: {len(missing)} of {len(items)} are missing in {dataset.root} (the first is {missing[0].path})"


def differences(dataset: Dataset) -> list[str]:
    """Say how a published data set on this disk differs from what was published; empty for a complete one.

    Images are counted, not opened. It is empty for a data set of which no numbers are published.
    """
    published = published_statistics().get(dataset.name.removesuffix(DRAWN))
    if published is None:
        return []
    problems = verify_counts(dataset)
    if dataset.name.endswith(DRAWN):  # its splits may have other sizes
        images = [sum(counts[part] or 0 for part in SPLIT_NAMES) for counts in (dataset.counts(), published.counts)]
        if images[0] < images[1] or dataset.num_classes != published.counts["classes"]:
            classes = f"{dataset.num_classes} and {published.counts['classes']} classes"
            problems = [f"{images[0]} images found, {images[1]} published ({classes})"]
    missing = describe_missing(dataset)
    return [*problems, *([missing] if missing else [])]


def verify_images(
    dataset: Dataset,
    *,
    quick: bool = False,
    workers: int | None = None,
    on_images: Callable[[int, int], None] = lambda _done, _total: None,
) -> Iterator[str]:
    """Yield what is wrong with each image that is missing, empty or unreadable, in order.

    With `quick`, only that each file exists and is not empty; otherwise every image is decoded, by one thread per core
    up to 16, or by `workers`. `on_images` is called with (images verified, images in all).
    """
    items = list(chain(dataset.train, dataset.val, dataset.test))
    read = dataset.read or (lambda path: read_image(dataset.root / path))

    def problem(item: Item) -> str | None:
        file = dataset.file(item)
        try:
            if not quick or dataset.read is not None:
                read(item.path)
            elif not file.is_file():
                return f"{file}: there is no such file"
            elif file.stat().st_size == 0:
                return f"{file}: is empty (0 bytes)"
        except ImageError as error:
            return str(error)
        except OSError as error:
            return f"{file}: cannot be reached ({error.strerror})"
        return None

    yield from filter(None, map_with_progress(problem, items, workers, on_images, _CHUNK))
