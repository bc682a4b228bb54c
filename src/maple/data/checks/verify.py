"""Is a data set on this disk the published one, and is every image of it there and readable?"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from maple.data.checks.statistics import COUNTED, Statistics, names_hash, published_statistics
from maple.data.images.reading import read_image
from maple.data.records import Dataset, Item
from maple.data.sampling import base_novel_classes
from maple.errors import ImageError

_AT_ONCE = 512


def count(dataset: Dataset) -> dict[str, int]:
    """The numbers that a paper prints of a data set: `statistics.COUNTED`."""
    base = set(base_novel_classes(range(dataset.num_classes))[0])
    in_base = sum(item.label in base for item in dataset.test)
    return {**dataset.counts(), "test_base": in_base, "test_new": len(dataset.test) - in_base}


def verify_counts(dataset: Dataset, published: Statistics | None = None) -> list[str]:
    """What differs from the published numbers and class names, in words; nothing for a user's own images.

    `published` is what to compare with, by default the shipped numbers of a data set of that name.
    """
    published = published or published_statistics().get(dataset.name)
    if published is None:
        return []
    found = count(dataset)
    problems = [
        f"{name}: {found[name]} found, {published.counts[name]} published ({published.source})"
        for name in COUNTED
        if published.counts[name] is not None and published.counts[name] != found[name]
    ]
    if published.class_names is not None and published.class_names != names_hash(dataset.class_names):
        problems.append(
            f"class names: not the published ones ({published.source}); the first are "
            + ", ".join(map(repr, dataset.class_names[:5]))
        )
    return problems


def verify_images(
    dataset: Dataset,
    *,
    quick: bool = False,
    workers: int | None = None,
    on_images: Callable[[int, int], None] = lambda _done, _total: None,
) -> Iterator[str]:
    """Yield what is wrong with each image that is missing, empty or unreadable, as it is found, in order.

    Args:
        quick: look only whether each file is there and not empty; else every image is decoded.
        workers: how many threads look; by default as many as there are cores, up to 16.
        on_images: called with (images looked at, images in all).
    """
    items = list(chain(dataset.train, dataset.val, dataset.test))
    read = dataset.read or (lambda path: read_image(dataset.root / path))

    def problem(item: Item) -> str | None:
        if quick and dataset.read is None:
            return _absent(dataset, item)
        try:
            read(item.path)
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 16)) as pool:
        for begin in range(0, len(items), _AT_ONCE):
            some: Sequence[Item] = items[begin : begin + _AT_ONCE]
            yield from filter(None, pool.map(problem, some))
            on_images(begin + len(some), len(items))


def _absent(dataset: Dataset, item: Item) -> str | None:
    file = dataset.file(item)
    try:
        size = file.stat().st_size if file.is_file() else None
    except OSError as error:
        return f"{file}: cannot be reached ({error.strerror})"
    if size is None:
        return f"{file}: there is no such file"
    return f"{file}: is empty (0 bytes)" if size == 0 else None
