"""Items of a data set as image files, to look at or to hand to another program."""

import io
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path

from maple import files
from maple.data.records import Dataset, Item
from maple.errors import ConfigError, DataError, one_of

_PARTS = ("train", "val", "test")


def write_images(
    dataset: Dataset, folder: Path, *, count: int = 10, part: str = "test", class_name: str | None = None
) -> list[Path]:
    """Write `count` items of one part as CLASS_NUMBER.png into `folder`: the first of every class, then the second ...

    The numbers of a class begin with 1. A file that is there already with the same content is left alone.

    Args:
        class_name: only items of this class.

    Returns:
        The paths, in the order of writing; fewer than `count` where the part has fewer items.

    Raises:
        ConfigError: `count` is below 1, or the part is unknown.
        DataError: no such class, no items, a file of another content in the way, or a folder that cannot be made.
        ImageError: an image cannot be read.
    """
    if count < 1:
        raise ConfigError(f"count is {count}; it must be at least 1")
    if part not in _PARTS:
        raise ConfigError(one_of("part", part, _PARTS))
    if class_name is not None and class_name not in dataset.class_names:
        raise DataError(one_of(f"class of {dataset.name}", class_name, dataset.class_names))
    items: tuple[Item, ...] = getattr(dataset, part)
    chosen = list(islice(_in_turn(item for item in items if class_name in (None, item.class_name)), count))
    if not chosen:
        found = ", ".join(f"{name} {len(getattr(dataset, name))}" for name in _PARTS)
        raise DataError(f"the {part} part of {dataset.name} has no such items (it has {found}); choose another part")
    store, numbers, written = dataset.store(max_bytes=0), Counter[str](), []
    for item in chosen:
        word = _file_word(item.class_name)
        numbers[word] += 1
        buffer = io.BytesIO()
        store.get(item.path).save(buffer, format="PNG")
        written.append(folder / f"{word}_{numbers[word]}.png")
        _write(written[-1], buffer.getvalue())
    return written


def _in_turn(items: Iterator[Item]) -> Iterator[Item]:
    """The first item of each label, the second of each ..."""
    classes: dict[int, list[Item]] = {}
    for item in items:
        classes.setdefault(item.label, []).append(item)
    for row in zip_longest(*(classes[label] for label in sorted(classes))):
        yield from (item for item in row if item is not None)


def _file_word(class_name: str) -> str:
    """A class name as a part of a file name: letters and digits of any script, the rest as single underscores."""
    return re.sub(r"[^\w-]+", "_", class_name).strip("_") or "class"


def _write(path: Path, content: bytes) -> None:
    try:
        if path.exists():
            if path.read_bytes() == content:
                return
            raise DataError(f"{path} exists with another content; choose another folder")
        files.write_with(path, lambda temporary: temporary.write_bytes(content))
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}); choose another folder") from error
