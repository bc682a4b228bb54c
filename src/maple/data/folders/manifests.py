"""Tables of images: CSV, TSV or JSON lines with the columns `path`, `label` and, optionally, `split`."""

import csv
import io
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from maple.data.folders.class_folders import SPLIT_FOLDERS, assemble, check_fractions, draw_split, rename_classes
from maple.data.folders.class_lists import CLASS_NAMES, name_of_number, read_class_list
from maple.data.records import SPLIT_NAMES, Dataset
from maple.errors import ColumnError, DataError, one_of, pointer_problem, shortened_list
from maple.files import on_disk, parse_json, regular
from maple.names import has_lone_surrogate, nfc

SUFFIXES = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": ""}
"""The file names of manifests, and the delimiter of each unless its header shows another."""

_USUAL = {"path": ("path", "file_name"), "label": ("label",), "split": ("split",)}
"""The columns that are read, and the names by which each is recognised, where it is not given."""
_NUMBER = re.compile(r"-?\d{1,18}")
MISSING_VALUES = {"nan", "NaN", "NAN", "NaT", "None", "<NA>", "#N/A"}
"""Labels that pandas, Python and Excel write for a missing value."""
SPLIT_FORM = "it must be train, val or test, in every row or in none"


def is_manifest(path: Path) -> bool:
    """Return whether `path` is a file with the name of a manifest."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def load_manifest(
    path: Path,
    *,
    class_names: Mapping[str, str] | None = None,
    seed: int = 0,
    val_fraction: float = 0.0,
    test_fraction: float = 0.25,
    min_classes: int = 2,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Dataset:
    """Read a manifest as a data set: a header row (or JSON keys) `path`, `label` and, optionally, `split`.

    `image_column` and `label_column` name other columns to read in place of `path`, or else `file_name`, and `label`.
    Paths are relative to the folder of the manifest. Classes are the labels, sorted by code point after Unicode NFC
    normalisation; whole numbers are those of the names in a `classnames.txt` next to the manifest, if there is one, in
    the order of that; `class_names` maps them to the names to use. `split` is train, val or test in every row; if that
    column is missing or empty, each class is split by `seed` as in `load_folder`; `min_classes` is the fewest classes
    to accept. Other columns, blank lines, a byte order mark and the case of column names are ignored. Semicolons and
    tabs are recognised as delimiters.

    Raises:
        ConfigError: a fraction is negative, or they sum to 1 or more.
        DataError: the file is unreadable or not UTF-8, lacks a column, or the one that is named, or a row is malformed,
            repeated, leaves the folder, or names a missing file, an unknown split or a number with no name (the line
            is named); or there are fewer than two classes.

    Example:
        >>> load_manifest(Path("pets/images.csv"), seed=1).class_names
        ('cat', 'dog')
    """
    check_fractions(val_fraction, test_fraction)
    read = _read_table if SUFFIXES[path.suffix.lower()] else _read_json_lines
    folder = _Folder(path.parent)
    given = {"path": image_column, "label": label_column}
    rows = [_checked_row(path, folder, line, values) for line, values in read(path, given)]
    _check_rows(path, rows)
    if not rows:
        raise DataError(f"{path}: holds no rows below its header; give at least one image for each of two classes")
    labels = sorted({row.label for row in rows})
    if all(_NUMBER.fullmatch(label) for label in labels) and (names := read_class_list(path.parent, CLASS_NAMES)):
        named = [name_of_number(int(row.label), names, f"{path}: line {row.line}") for row in rows]
        rows = [replace(row, label=name) for row, name in zip(rows, named, strict=True)]
        position = {name: number for number, name in enumerate(names)}
        labels = sorted(set(named), key=position.__getitem__)
    if len(labels) < min_classes:
        raise DataError(f"{path}: has only one class, {labels[0]!r}, but a classifier needs at least two")
    images: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        images.setdefault(row.split, {name: [] for name in labels})[row.label].append(row.path)
    drawn = "" in images
    if drawn:
        images = draw_split(images[""], seed, val_fraction, test_fraction)
    elif "train" in images and "val" in images and "test" not in images:
        images["test"] = images.pop("val")
    return rename_classes(assemble(path.stem, path.parent, labels, images, drawn_split=drawn), class_names)


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    path: str
    label: str
    split: str


def _checked_row(manifest: Path, folder: "_Folder", line: int, values: Mapping[str, Any]) -> _Row:
    where = f"{manifest}: line {line}"
    path, label, split = (values.get(column) for column in _USUAL)
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    if not isinstance(path, str) or not path.strip():
        raise DataError(f"{where} has the path {path!r}; give the path of an image, relative to {manifest.parent}")
    if not isinstance(label, str) or not label.strip():
        raise DataError(f"{where} has the label {label!r}; give the name of the class of {path}")
    if has_lone_surrogate(label):
        raise DataError(f"{where} has the label {label!r}, which holds half a character; write the whole character")
    if split is not None and not isinstance(split, str):
        raise DataError(f"{where} has the split {split!r}; {SPLIT_FORM}")
    split = (split or "").strip()
    if split and split.casefold() not in SPLIT_FOLDERS:
        raise DataError(f"{where}: {one_of('split', split, SPLIT_NAMES)}")
    relative = folder.relative(path.strip())
    if relative is None:
        shown = path.strip().replace("\\", "/")
        reason = "is an address" if "://" in path else "leaves the folder of the manifest"
        raise DataError(
            f"{where}: path {shown!r} {reason}; put the manifest into a folder that holds all its images, and "
            f"write paths relative to it"
        )
    label = nfc(label.strip())
    if label in MISSING_VALUES and label not in relative.parts[:-1]:
        raise DataError(
            f"{where} has the label {label!r}, as software writes a missing value; give the name of the class of "
            f"{path}. If a class has this name, put its images into a folder {label!r}"
        )
    return _Row(line, relative.as_posix(), label, SPLIT_FOLDERS.get(split.casefold(), ""))


class _Folder:
    """The folder of a manifest; what was looked up in it is kept, since a manifest may have a million rows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listings: dict[Path, dict[str, list[str]]] = {}
        self._is_same: dict[Path, bool] = {}

    def relative(self, written: str) -> PurePosixPath | None:
        """The path of an image as it is on the disk, relative to the folder; None for one outside of it."""
        path = Path(written)
        if not os.path.lexists(self._path / path):
            if "://" in written or (PureWindowsPath(written).drive and os.name != "nt"):
                return None
            path = Path(os.path.expanduser(written.replace("\\", "/")))
        whole = on_disk(self._path / path, self._listings)
        if not path.is_absolute() and ".." not in path.parts:
            relative = whole.relative_to(self._path)
        else:
            # Links and ".." lead to a folder by many paths, so folders are compared, not their names.
            relative = next((whole.relative_to(parent) for parent in whole.parents if self._is(parent)), whole)
            if relative.is_absolute() or ".." in relative.parts:
                try:
                    parent = whole.parent.resolve().relative_to(self._path.resolve())
                except (ValueError, OSError, RuntimeError):
                    return None
                relative = parent / whole.name
        return PurePosixPath(relative.as_posix()) if relative.name not in ("", "..") else None

    def _is(self, folder: Path) -> bool:
        if folder not in self._is_same:
            try:
                self._is_same[folder] = os.path.samefile(folder, self._path)
            except (OSError, ValueError):
                self._is_same[folder] = False
        return self._is_same[folder]


def _check_rows(manifest: Path, rows: list[_Row]) -> None:
    """Raise DataError unless the rows agree with each other and with the disk."""
    by_path: dict[str, _Row] = {}
    for row in rows:
        first = by_path.setdefault(row.path, row)
        if first is not row:
            same = (first.label, first.split) == (row.label, row.split)
            differing = "" if same else f", with {(first.label, first.split)} there and {(row.label, row.split)} here"
            raise DataError(
                f"{manifest}: line {row.line} repeats {row.path!r} of line {first.line}{differing}; "
                "an image must be in one row only"
            )
    undivided = next((row for row in rows if not row.split), None)
    divided = next((row for row in rows if row.split), None)
    if undivided and divided:
        raise DataError(
            f"{manifest}: line {undivided.line} has no split, but line {divided.line} has {divided.split!r}; "
            + SPLIT_FORM
        )
    absent = []
    for row in rows:
        path = manifest.parent / row.path
        try:
            if path.is_file():
                continue
        except OSError:  # a name that the file system refuses
            pass
        absent.append(f"line {row.line}: {path}" + (f", a link to {os.readlink(path)}" if os.path.islink(path) else ""))
    if absent:
        raise DataError(
            f"{manifest}: {len(absent)} of {len(rows)} images are missing "
            f"({shortened_list(absent, 5, separator='; ', longest=300)}); paths are relative to {manifest.parent}"
        )


def _read_text(path: Path) -> str:
    try:
        content = regular(path).read_bytes()
        if problem := pointer_problem(content[:512]):
            raise DataError(f"{path}: is {problem}")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make the file readable") from error
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise DataError(f"{path}: is not UTF-8 text ({where}); save it as CSV UTF-8") from error


def _choose_columns(names: Collection[str], given: Mapping[str, str | None], where: str) -> dict[str, str]:
    """Return which of the columns (names in lower case) hold the path, the label and the split, if they are there."""
    chosen: dict[str, str] = {}
    for role, usual in _USUAL.items():
        name = given.get(role)
        if name is not None and name.strip().casefold() not in names:
            raise ColumnError(f"{where}: {one_of('column', name, names)}")
        wanted = usual if name is None else (name.strip().casefold(),)
        column = next((each for each in wanted if each in names), None)
        if column is not None and (role != "split" or column not in chosen.values()):
            chosen[role] = column
    return chosen


def _read_table(path: Path, given: Mapping[str, str | None]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the line number and the values of each row, by what they are: path, label and split."""
    text = _read_text(path)
    head = text.split("\n", 1)[0]
    usual = SUFFIXES[path.suffix.lower()]
    delimiter = max((usual, ";", "\t", ","), key=lambda mark: (head.count(mark), mark == usual))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    chosen: dict[str, str] = {}
    # A quoted value may hold line breaks, so a row begins after the last line of the one before.
    next_line = 1
    try:
        for row in reader:
            line, next_line = next_line, reader.line_num + 1
            if not any(value.strip() for value in row):
                continue
            if not header:
                header = [name.strip().casefold() for name in row]
                chosen = _choose_columns(header, given, str(path))
                if absent := [name for name in given if name not in chosen]:
                    raise DataError(
                        f"{path}: the first line must name the columns path, label and, optionally, split; it has no "
                        f"{' and no '.join(absent)} but {', '.join(map(repr, row))}; or name them as "
                        "data.image_column and data.label_column"
                    )
                if repeated := [name for name in chosen.values() if header.count(name) > 1]:
                    count = header.count(repeated[0])
                    raise DataError(f"{path}: the first line names the column {repeated[0]} {count} times; keep one")
            elif len(row) != len(header):
                raise DataError(
                    f"{path}: line {line} has {len(row)} values, but there are {len(header)} columns "
                    f"({', '.join(header)}); put values that hold {delimiter!r} in double quotes"
                )
            else:
                values = dict(zip(header, row, strict=True))
                yield line, {role: values[name] for role, name in chosen.items()}
    except csv.Error as error:
        raise DataError(f"{path}: line {next_line} cannot be read ({error}); check its quotes") from error
    if not header:
        raise DataError(f"{path}: is empty; its first line must name the columns path, label and, optionally, split")


def _read_json_lines(path: Path, given: Mapping[str, str | None]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # Not splitlines, which also splits at characters that JSON leaves unescaped in a string.
    for line, content in enumerate(_read_text(path).split("\n"), 1):
        if not content.strip():
            continue
        try:
            values = parse_json(content)
        except ValueError as error:
            raise DataError(f"{path}: line {line} is not JSON ({error}); every line must be one object") from error
        by_name = {key.casefold(): value for key, value in values.items()} if isinstance(values, dict) else {}
        chosen = _choose_columns(by_name, given, f"{path}: line {line}") if by_name else {}
        if not given.keys() <= chosen.keys():
            raise DataError(f'{path}: line {line} must be an object such as {{"path": "cat/1.jpg", "label": "cat"}}')
        yield line, {role: by_name[name] for role, name in chosen.items()}
