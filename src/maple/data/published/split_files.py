"""Published splits that name every image: CoOp's split files and FGVC-Aircraft's lists."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from maple.data.records import Item
from maple.errors import DataError

PARTS = ("train", "val", "test")
_ROW_FORM = '["path/of/image.jpg", label number, "class name"]'


class Contents(NamedTuple):
    """The items of a data set's three parts, and its class names by label."""

    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]
    class_names: tuple[str, ...]


def read_split(path: Path) -> Contents:
    """Read a CoOp-format split file.

    Raises:
        DataError: the file is missing or not JSON, a part or row is malformed, a label has two names, or the
            labels over all parts are not 0..C-1.

    Source: muzairkhattak/multimodal-prompt-learning@69bce21 datasets/oxford_pets.py `read_split`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: the split file is missing; put the published {path.name} there") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); fetch the published file again") from error
    if not isinstance(content, dict) or any(not isinstance(content.get(part), list) for part in PARTS):
        raise DataError(f'{path}: must be a JSON object with the lists "train", "val" and "test"')
    names: dict[int, str] = {}
    parts: dict[str, tuple[Item, ...]] = {}
    for part in PARTS:
        items = [_item(row, f"{path}: {part}[{index}]") for index, row in enumerate(content[part])]
        for index, item in enumerate(items):
            known = names.setdefault(item.label, item.class_name)
            if known != item.class_name:
                raise DataError(
                    f"{path}: {part}[{index}] calls class {item.label} {item.class_name!r}, an earlier row calls it "
                    f"{known!r}; give every label one name"
                )
        parts[part] = tuple(items)
    if not names:
        raise DataError(f"{path}: holds no images in any of its parts; fetch the published file again")
    absent = sorted(set(range(max(names) + 1)) - set(names))
    if absent:
        raise DataError(f"{path}: labels {absent[:10]} have no items; labels must be 0 to C-1 without gaps")
    return Contents(parts["train"], parts["val"], parts["test"], tuple(names[label] for label in sorted(names)))


def read_aircraft(names_file: Path) -> Contents:
    """Read FGVC-Aircraft: `variants.txt` names the classes, `images_variant_PART.txt` beside it the images.

    A line of a list is the number of an image (`0034309`, for `0034309.jpg`), a space and its variant. Labels follow
    the order of `variants.txt`, items that of the lists.

    Raises:
        DataError: a file is missing or not text, or a line is malformed; the line is named.

    Source: muzairkhattak/multimodal-prompt-learning@69bce21 datasets/fgvc_aircraft.py.
    """
    labels: dict[str, int] = {}
    for number, name in read_lines(names_file):
        if name in labels:
            raise DataError(f"{names_file}: line {number} repeats the variant {name!r}; fetch the published file again")
        labels[name] = len(labels)
    parts: dict[str, tuple[Item, ...]] = {}
    for part in PARTS:
        path = names_file.with_name(f"images_variant_{part}.txt")
        items = []
        for number, line in read_lines(path):
            image, _, name = line.partition(" ")
            if name not in labels:
                raise DataError(
                    f"{path}: line {number} is {line!r}; it must be an image number, a space and a variant of "
                    f"{names_file.name}"
                )
            items.append(Item(f"{image}.jpg", labels[name], name))
        parts[part] = tuple(items)
    return Contents(parts["train"], parts["val"], parts["test"], tuple(labels))


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a published text file that are not blank, stripped, with their numbers from 1.

    Raises:
        DataError: the file is missing, unreadable or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: the file is missing; put the published {path.name} there") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}); fetch the published file again") from error
    for number, line in enumerate(text.split("\n"), 1):
        if stripped := line.strip():
            yield number, stripped


def _item(row: Any, where: str) -> Item:
    match row:
        case [str(path), int(label), str(name)] if path and name and label >= 0 and not isinstance(label, bool):
            return Item(path, label, name)
    raise DataError(f"{where} is {row!r}; a row must be {_ROW_FORM}")
