"""What every kind of source gives: rows of an encoded image and its label; and which columns these are in."""

import logging
import numbers
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maple.data.folders.class_folders import SPLIT_FOLDERS, split_of
from maple.data.folders.class_lists import name_of_number
from maple.data.folders.manifests import MISSING_VALUES, SPLIT_FORM
from maple.errors import ColumnError, DataError, one_of, shortened, shortened_list
from maple.names import has_lone_surrogate, nfc, words_of

logger = logging.getLogger(__name__)

MAX_IMAGE_BYTES = 512 * 1024**2
"""The most bytes of one encoded image."""

_IMAGE_NAMES = ("image", "images", "img", "jpg", "jpeg", "png", "webp", "photo", "pixel_values", "bytes")
_PATH_NAMES = ("path", "image_path", "img_path", "filepath", "file_path", "file", "file_name", "filename", "image_file")
_LABEL_NAMES = ("label", "labels", "class", "class_name", "classname", "category", "target", "cls", "y")
_LABEL_KINDS = ("class", "text", "integer")
SPLIT_COLUMN = "split"

Label = str | int | None
"""The name of a class; its number, where nothing names the classes; None where it is missing."""


@dataclass(frozen=True)
class Columns:
    """The columns of images and labels that the user names; None for those that are to be recognised.

    `advice` says how to name one: by `{column}`, "image_column" or "label_column".
    """

    image: str | None = None
    label: str | None = None
    advice: str = "name it, as in --set data.{column}=NAME"


@dataclass(frozen=True, slots=True)
class Row:
    """One image: its name for people, such as `photos.parquet#17`, its split or "", its label, and its content.

    The content is the encoded bytes, the path of the file with them, the error of an image that cannot be read, or None
    where there is no image.
    """

    name: str
    split: str
    label: Label
    content: bytes | Path | DataError | None


class Source(ABC):
    """A collection of images that is read row by row, and unpacked once to be trained on.

    Attributes:
        text: as the user named it.
        class_names: those of numbered labels, in their order, once `rows` has begun; None where nothing names them.
        has_labels: whether there is any place for labels, once `rows` has begun.
        note: how its classes are read, where another reading is possible; to be reported.
    """

    text: str
    note: str = ""
    class_names: Sequence[str] | None = None
    has_labels: bool = True

    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """What changes if the content does, as plain values, without reading the content."""

    @abstractmethod
    def rows(self, columns: Columns, *, labelled: bool) -> Iterator[Row]:
        """Iterate over the rows in their order; labels may be missing unless `labelled`.

        Raises:
            DataError: the source is damaged, or it is unclear which column is meant.
        """

    @property
    def copies_files(self) -> bool:
        """Whether the images are files that the source only names, and which may change without it."""
        return False

    @property
    def name(self) -> str:
        """A short name, for reports."""
        return Path(self.text).stem


def choose_image_column(kinds: Mapping[str, str], columns: Columns, where: str) -> str:
    """Return the column of images.

    Args:
        kinds: of each column: "image" (typed as such), "encoded" (a struct of bytes and path), "bytes", "text", "class"
            (numbers with names), "integer", or another word.

    Raises:
        DataError: there is no such column, or more than one may be meant; the columns are listed.
    """
    if columns.image is not None:
        return _given(columns.image, kinds, where)
    for kind in ("image", "encoded", "bytes"):
        if fitting := [name for name, each in kinds.items() if each == kind]:
            named = [name for name in fitting if name.casefold() in _IMAGE_NAMES]
            if len(fitting) == 1 or len(named) == 1:
                return fitting[0] if len(fitting) == 1 else named[0]
            break
    else:
        texts = [name for name, kind in kinds.items() if kind in ("text", "other")]
        for names in (_PATH_NAMES, _IMAGE_NAMES):
            fitting = [name for name in texts if name.casefold() in names]
            if len(fitting) == 1:
                return fitting[0]
    raise DataError(_unclear("images", "image_column", kinds, columns, where))


def choose_label_column(kinds: Mapping[str, str], image: str, columns: Columns, where: str) -> str | None:
    """Return the column of labels, or None if there is no column that could be one; arguments and errors as above."""
    if columns.label is not None:
        return _given(columns.label, kinds, where)
    others = {name: kind for name, kind in kinds.items() if name != image and name.casefold() != SPLIT_COLUMN}
    classes = [name for name, kind in others.items() if kind == "class"]
    if len(classes) == 1:
        return classes[0]
    for name in _LABEL_NAMES:
        if fitting := [column for column in others if column.casefold() == name]:
            return fitting[0]
    fitting = classes or [name for name, kind in others.items() if kind in _LABEL_KINDS]
    if len(fitting) > 1:
        raise DataError(_unclear("labels", "label_column", kinds, columns, where))
    return fitting[0] if fitting else None


def file_state(path: str | os.PathLike[str]) -> list[int]:
    """Return the size and the time of a file, by which a source is identified, and a change is noticed."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def choose_split_column(columns: Iterable[str], *used: str | None) -> str | None:
    """Return the column of splits among those that are not used for images or labels; None if there is none."""
    return next((name for name in columns if name not in used and name.casefold() == SPLIT_COLUMN), None)


def no_labels(kinds: Mapping[str, str], columns: Columns, where: str) -> DataError:
    """The error for a source of images that have no labels, where labels are needed."""
    return DataError(_unclear("labels", "label_column", kinds, columns, where))


def _given(column: str, kinds: Mapping[str, str], where: str) -> str:
    if column not in kinds:
        raise ColumnError(f"{where}: {one_of('column', column, kinds)}")
    return column


def _unclear(role: str, column: str, kinds: Mapping[str, str], columns: Columns, where: str) -> str:
    listed = shortened_list((f"{name} ({kind})" for name, kind in kinds.items()), 20, longest=60)
    advice = columns.advice.format(column=column)
    return f"{where}: which column holds the {role} is not clear; {advice}. Its columns: {listed or 'none'}"


def is_missing(value: Any) -> bool:
    """Whether a cell holds no value: None, NaN, or what pandas has in their place."""
    is_nan = isinstance(value, numbers.Real) and value != value
    return value is None or is_nan or type(value).__name__ in ("NAType", "NaTType")


def read_label(value: Any, class_names: Sequence[str] | None, where: str) -> Label:
    """Return the label of one row: a name, or its number where there are no `class_names`; None if it is missing.

    Numbers below zero, as collections write them for labels that are not published, are missing ones.

    Raises:
        DataError: it is not a name or a number, or a number without a name.
    """
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
    if is_missing(value):
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where} has the label {value!r:.80}, which is not UTF-8 text; write it as UTF-8"
            ) from error
    if isinstance(value, str):
        return _name(value, where)
    if isinstance(value, float) and value.is_integer():  # pandas turns whole numbers with missing ones into floats
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        shown = shortened(repr(value))
        raise DataError(
            f"{where} has the label {shown}, {type(value).__name__}; give the name or the number of one class"
        )
    number = int(value)
    if number < 0:
        return None
    if class_names is None:
        return number
    return name_of_number(number, class_names, where)


def _name(text: str, where: str) -> str | None:
    name = nfc(text.strip())
    if has_lone_surrogate(name):
        raise DataError(f"{where} has the label {name!r}, which holds half a character; write the whole character")
    if name in MISSING_VALUES:
        raise DataError(
            f"{where} has the label {name!r}, as software writes a missing value; leave it empty, or, if a class has "
            "this name, write it another way"
        )
    if name and not words_of(name):
        raise DataError(f"{where} has the label {name!r}, which holds no word; give the name of the class")
    return name or None


def read_split(value: Any, names: Sequence[str] | None, where: str) -> str:
    """Return the split ("train", "val", "test") that a value, or the name of its number, stands for; "" if missing.

    Raises:
        DataError: it is something else.
    """
    if names is not None and isinstance(value, int):
        value = names[value] if 0 <= value < len(names) else None
    if not isinstance(value, str) and not is_missing(value):
        raise DataError(f"{where} has the split {shortened(repr(value))}; {SPLIT_FORM}")
    text = value.strip() if isinstance(value, str) else ""
    if text and text.casefold() not in SPLIT_FOLDERS:
        raise DataError(f"{where}: {one_of('split', text, ('train', 'val', 'test'))}")
    return SPLIT_FOLDERS.get(text.casefold(), "")


def named_splits(names: Iterable[str], where: str) -> dict[str, list[str]]:
    """Group the splits of a data set by what their names stand for; all under "" if that divides nothing.

    Others next to those of the usual names, such as "unsupervised" and "extra", are not used, which is logged.
    """
    by_split: dict[str, list[str]] = {}
    for name in names:
        by_split.setdefault(named[0] if (named := split_of(str(name))) else "", []).append(name)
    if len(by_split) > 1 and (others := by_split.pop("", None)):
        logger.warning(
            "%s: %s is not used: it is not named after train, validation or test", where, shortened_list(others)
        )
    return by_split if len(by_split) > 1 else {"": [name for group in by_split.values() for name in group]}
