"""A table of images: CSV, TSV or JSON lines with the columns `path`, `label` and, optionally, `split`."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from maple.data.folders.class_folders import PART_NAMES, assemble, check_fractions, draw_split, nfc, rename_classes
from maple.data.records import Dataset
from maple.errors import DataError, one_of
from maple.names import has_lone_surrogate

SUFFIXES = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": ""}
"""The files that are taken for manifests, and the delimiter each has unless its header shows another."""

_COLUMNS = ("path", "label", "split")
_SHOWN = 5
_LONGEST = 300
_SPLIT_FORM = "it must be train, val or test, in every row or in none"


def is_manifest(path: Path) -> bool:
    """Whether `path` is a file with the name of a manifest."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def load_manifest(
    path: Path,
    *,
    class_names: Mapping[str, str] | None = None,
    seed: int = 0,
    val_fraction: float = 0.0,
    test_fraction: float = 0.25,
) -> Dataset:
    """Read a manifest as a data set: a header row (or JSON keys) `path`, `label` and, optionally, `split`.

    Paths are relative to the folder of the manifest. Classes are the labels, sorted by code point after Unicode NFC
    normalisation; `class_names` maps them to the names to use. `split` is train, val or test in every row; without that
    column, or with nothing in it, each class is split by `seed` as in `load_folder`. Other columns are ignored; so are
    blank lines, a byte order mark, and the case of column names. A delimiter of semicolons or tabs is recognised.

    Raises:
        ConfigError: a fraction is negative, or they sum to 1 or more.
        DataError: the file is unreadable or not UTF-8, lacks a column, or a row is malformed, repeated, leaves the
            folder, names a missing file or an unknown split; the line is named. Or there are fewer than two classes.
    """
    check_fractions(val_fraction, test_fraction)
    rows = _checked(path, [_Row.read(path, line, values) for line, values in _read(path)])
    if not rows:
        raise DataError(f"{path}: holds no rows below its header; give at least one image for each of two classes")
    labels = sorted({row.label for row in rows})
    if len(labels) < 2:
        raise DataError(f"{path}: has only one class, {labels[0]!r}, but a classifier needs at least two")
    listed: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        listed.setdefault(row.split, {name: [] for name in labels})[row.label].append(row.path)
    drawn = "" in listed
    images = draw_split(listed[""], seed, val_fraction, test_fraction) if drawn else listed
    if "train" in images and "val" in images and "test" not in images:
        images["test"] = images.pop("val")
    return rename_classes(assemble(path.stem, path.parent, labels, images, drawn_split=drawn), class_names)


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    path: str
    label: str
    split: str

    @staticmethod
    def read(manifest: Path, line: int, values: Mapping[str, Any]) -> "_Row":
        """Check the values of one line."""
        where = f"{manifest}: line {line}"
        path, label, split = (values.get(column) for column in _COLUMNS)
        if isinstance(label, int) and not isinstance(label, bool):
            label = str(label)
        if not isinstance(path, str) or not path.strip():
            raise DataError(f"{where} has the path {path!r}; give the path of an image, relative to {manifest.parent}")
        if not isinstance(label, str) or not label.strip():
            raise DataError(f"{where} has the label {label!r}; give the name of the class of {path}")
        if has_lone_surrogate(label):
            raise DataError(f"{where} has the label {label!r}, which holds half a character; write the whole one")
        if split is not None and not isinstance(split, str):
            raise DataError(f"{where} has the split {split!r}; {_SPLIT_FORM}")
        part = (split or "").strip()
        if part and part.casefold() not in PART_NAMES:
            raise DataError(f"{where}: {one_of('split', part, ('train', 'val', 'test'))}")
        return _Row(
            line, _inside(manifest, path.strip(), where), nfc(label.strip()), PART_NAMES.get(part.casefold(), "")
        )


def _inside(manifest: Path, path: str, where: str) -> str:
    """A path as an item has it: relative to the folder of the manifest, with forward slashes."""
    if "\\" in path and not (manifest.parent / path).exists():
        path = path.replace("\\", "/")
    pure = PurePosixPath(path)
    if pure.is_absolute():
        folder = PurePosixPath(manifest.parent.resolve().as_posix())
        if pure.is_relative_to(folder):
            pure = pure.relative_to(folder)
    if pure.is_absolute() or ".." in pure.parts or not pure.name:
        raise DataError(
            f"{where}: path {path!r} leaves the folder of the manifest; put the manifest into a folder that holds all "
            f"its images, and write paths relative to it"
        )
    return pure.as_posix()


def _checked(manifest: Path, rows: list[_Row]) -> list[_Row]:
    """The rows, if they agree with each other and with the disk."""
    seen: dict[str, _Row] = {}
    for row in rows:
        first = seen.setdefault(row.path, row)
        if first is not row:
            same = (first.label, first.split) == (row.label, row.split)
            differing = "" if same else f", with {(first.label, first.split)} there and {(row.label, row.split)} here"
            raise DataError(
                f"{manifest}: line {row.line} repeats {row.path!r} of line {first.line}{differing}; "
                "an image must stand in one row only"
            )
    if undivided := [row for row in rows if not row.split]:
        divided = next((row for row in rows if row.split), None)
        if divided is not None:
            raise DataError(
                f"{manifest}: line {undivided[0].line} has no split, but line {divided.line} has {divided.split!r}; "
                + _SPLIT_FORM
            )
    absent = [row for row in rows if not _is_file(manifest.parent / row.path)]
    if absent:
        shown = "; ".join(f"line {row.line}: {str(manifest.parent / row.path)[:_LONGEST]}" for row in absent[:_SHOWN])
        more = f"; and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
        raise DataError(
            f"{manifest}: {len(absent)} of {len(rows)} images are missing ({shown}{more}); paths are relative to "
            f"{manifest.parent}"
        )
    return rows


def _is_file(path: Path) -> bool:
    """Whether there is such a file; no name that the file system refuses is one."""
    try:
        return path.is_file()
    except OSError:
        return False


def _read(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a manifest with their line numbers; keys are in lower case."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make the file readable") from error
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise DataError(f"{path}: is not UTF-8 text ({where}); save it as CSV UTF-8") from error
    if SUFFIXES[path.suffix.lower()]:
        return _read_table(path, text)
    return _read_json_lines(path, text)


def _read_table(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    head = text.split("\n", 1)[0]
    usual = SUFFIXES[path.suffix.lower()]
    delimiter = max((usual, ";", "\t", ","), key=lambda mark: (head.count(mark), mark == usual))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    began = 1
    try:
        for row in reader:
            line, began = began, reader.line_num + 1
            if not any(value.strip() for value in row):
                continue
            if not header:
                header = _header(path, row)
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{path}: line {line} has {len(row)} values, but there are {len(header)} columns "
                    f"({', '.join(header)}); put values that hold {delimiter!r} in double quotes"
                )
            yield line, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}: line {began} cannot be read ({error}); check its quotes") from error
    if not header:
        raise DataError(f"{path}: is empty; its first line must name the columns path, label and, optionally, split")


def _header(path: Path, row: list[str]) -> list[str]:
    header = [name.strip().casefold() for name in row]
    absent = [name for name in _COLUMNS[:2] if name not in header]
    if absent:
        raise DataError(
            f"{path}: the first line must name the columns path, label and, optionally, split; it has no "
            f"{' and no '.join(absent)} but {', '.join(map(repr, row))}"
        )
    twice = [name for name in _COLUMNS if header.count(name) > 1]
    if twice:
        raise DataError(f"{path}: the first line names the column {twice[0]} {header.count(twice[0])} times; keep one")
    return header


def _read_json_lines(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # Not splitlines, which also cuts at characters that JSON leaves as they are in a string.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {line} is no JSON ({error}); every line must be one object") from error
        if not isinstance(values, dict) or not {"path", "label"} <= {key.casefold() for key in values}:
            raise DataError(f'{path}: line {line} must be an object such as {{"path": "cat/1.jpg", "label": "cat"}}')
        yield line, {key.casefold(): value for key, value in values.items()}
