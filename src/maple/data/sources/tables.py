"""Parquet and Arrow files, folders of them, and folders that `datasets.Dataset.save_to_disk` writes."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maple.data.folders.class_folders import split_of
from maple.data.folders.class_lists import checked_class_names, read_class_list
from maple.data.folders.listing import walk_files
from maple.data.sources.rows import (
    Columns,
    Row,
    Source,
    choose_image_column,
    choose_label_column,
    choose_split_column,
    file_state,
    no_labels,
    read_label,
    read_split,
)
from maple.errors import DataError, pointer_in, shortened_list
from maple.files import on_disk, parse_json, read_json

SUFFIXES = (".parquet", ".pq", ".arrow", ".feather")
_BATCH = 32
_SAVED = ("dataset_dict.json", "state.json")
"""What `save_to_disk` writes for several splits, and for one."""


def is_table(path: Path) -> bool:
    """Whether the name is that of a Parquet or Arrow file."""
    return path.name.lower().endswith(SUFFIXES)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of the library datasets has written this folder."""
    return any((folder / name).is_file() for name in _SAVED)


class TableSource(Source):
    """Tables with a column of images: encoded, as structs of bytes and path, or as paths relative to the file.

    Files that are named after splits (`train-00000-of-00004.parquet`, `test/0.parquet`) are these splits; so is a
    column `split`, where they are not.

    Example:
        >>> [row.name for row in TableSource("pets.parquet", Path("pets.parquet")).rows(Columns(), labelled=True)]
        ['pets.parquet#0', 'pets.parquet#1']
    """

    def __init__(self, text: str, path: Path) -> None:
        self.text, self.path = text, path
        self._splits = _files_by_split(path)

    def identity(self) -> Mapping[str, Any]:
        files = [[str(file.resolve()), *file_state(file)] for each in self._splits.values() for file in each]
        listed = read_class_list(self._folder)
        return {"files": files, **({"class_names": listed} if listed else {})}

    @property
    def copies_files(self) -> bool:
        file = next(file for files in self._splits.values() for file in files)
        with _damage(file):
            kinds, _, _ = _open(file)
        return not {"image", "encoded", "bytes"} & set(kinds.values())

    @property
    def _folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def rows(self, columns: Columns, *, labelled: bool) -> Iterator[Row]:
        listed = read_class_list(self._folder) if labelled else None
        first: tuple[Sequence[str] | None, bool] | None = None
        listings: dict[Path, dict[str, list[str]]] = {}
        for split, files in self._splits.items():
            for file in files:
                name = self.text if file == self.path else f"{self.text}/{file.relative_to(self.path).as_posix()}"
                with _damage(file):
                    kinds, own_names, batches = _open(file)
                    image = choose_image_column(kinds, columns, name)
                    label = choose_label_column(kinds, image, columns, name) if labelled else None
                    if labelled and label is None and columns.label is None and split != "test":
                        raise no_labels(kinds, columns, name)
                    names = own_names.get(label or "") or listed
                    if names is not None:
                        names = checked_class_names(names, name)
                    if first is not None and label is not None and first != (names, True):
                        raise DataError(f"{name}: names other classes than the files before it; give each in one form")
                    first = first or (None if label is None else (names, True))
                    self.class_names = names if label is not None else self.class_names
                    column = choose_split_column(kinds, image, label) if labelled and not split else None
                    wanted = [image, *([label] if label else []), *([column] if column else [])]
                    number = 0
                    for batch in batches(wanted):
                        for values in zip(*(batch[column] for column in wanted), strict=True):
                            row, where = dict(zip(wanted, values, strict=True)), f"{name}#{number}"
                            number += 1
                            content: bytes | Path | DataError | None
                            try:
                                content = read_content(row[image], file.parent, where, listings)
                            except DataError as error:
                                content = error
                            yield Row(
                                where,
                                read_split(row[column], own_names.get(column), where) if column else split,
                                read_label(row[label], names, where) if label else None,
                                content,
                            )


def read_content(
    value: Any, folder: Path, where: str, listings: dict[Path, dict[str, list[str]]] | None = None
) -> bytes | Path | None:
    """Return the image of a cell: encoded bytes, or a path, which is relative to `folder`; None if it is missing.

    `listings` is that of `on_disk`, which finds a name in another Unicode form.

    Raises:
        DataError: the cell holds something else.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if not text.strip():
            return None
        if "://" in text:
            raise DataError(f"{where} names the address {text!r:.120}; download its images, and give their paths")
        path = folder / os.path.expanduser(text)
        return on_disk(path if path.exists() or "\\" not in text else folder / text.replace("\\", "/"), listings)
    raise DataError(
        f"{where} holds {type(value).__name__}, not an image; an image column holds encoded images (bytes), structs of "
        "bytes and path, or paths"
    )


def splits_of_names(paths: Sequence[Path], root: Path, text: str) -> dict[str, list[Path]]:
    """Divide files by the splits that they, or their folders, are named after; all under "" if that divides nothing.

    Raises:
        DataError: some are named after a split, and others are not.
    """
    by_split: dict[str, list[Path]] = {}
    for path in paths:
        parts = reversed(path.relative_to(root).with_suffix("").parts)
        by_split.setdefault(next((named[0] for part in parts if (named := split_of(part))), ""), []).append(path)
    if len(by_split) > 1 and "" in by_split:
        divided = next(each for split, each in by_split.items() if split)[0]
        raise DataError(
            f"{text}: {by_split[''][0].name} names no split, but {divided.name} does; name every file after train, "
            "validation or test, or none"
        )
    return by_split if len(by_split) > 1 else {"": list(paths)}


def _files_by_split(path: Path) -> dict[str, list[Path]]:
    if not path.is_dir():
        return {"": [path]}
    if (path / _SAVED[0]).is_file():
        content: dict[str, Any] = read_json(path / _SAVED[0], error=DataError, foreign=True)
        names = content.get("splits") or []
        if not names or not all(isinstance(name, str) and (path / name / _SAVED[1]).is_file() for name in names):
            raise DataError(
                f"{path}: names splits in {_SAVED[0]} that are not there ({shortened_list(names)}); copy it again"
            )
        by_split: dict[str, list[Path]] = {}
        for name in names:
            split = named[0] if (named := split_of(name)) else ""
            by_split.setdefault(split, []).extend(_saved_files(path / name))
        if "" in by_split and len(by_split) > 1:
            raise DataError(f"{path}: has the splits {', '.join(names)}; give one of them, as in {path / names[0]}")
        return by_split if len(by_split) > 1 else {"": next(iter(by_split.values()))}
    if (path / _SAVED[1]).is_file():
        return {"": _saved_files(path)}
    found_files = [file for file in walk_files(path) if is_table(file)]
    return splits_of_names(found_files, path, str(path))


def _saved_files(folder: Path) -> list[Path]:
    content: dict[str, Any] = read_json(folder / _SAVED[1], error=DataError, foreign=True)
    listed = [each for each in content.get("_data_files") or () if isinstance(each, Mapping)]
    files = [folder / str(each.get("filename")) for each in listed]
    if absent := [file.name for file in files if not file.is_file()]:
        raise DataError(f"{folder}: lacks {shortened_list(absent)}, which its {_SAVED[1]} lists; copy the folder again")
    return files


@contextmanager
def _damage(file: Path) -> Iterator[None]:
    """Report a file that pyarrow cannot read as damaged."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        if problem := pointer_in(file):
            raise DataError(f"{file}: is {problem}") from error
        reason = " ".join(str(error).split())
        raise DataError(
            f"{file}: cannot be read ({reason:.200}); it is damaged, or not a Parquet or Arrow file"
        ) from error


def _open(file: Path) -> tuple[dict[str, str], dict[str, list[str]], Any]:
    """The kinds of the columns of a file, the class names of columns, and a function that iterates over its batches."""
    arrow = require_pyarrow(str(file))
    if file.stat().st_size == 0:
        raise DataError(f"{file}: is empty (0 bytes); write it again")
    if file.name.lower().endswith((".parquet", ".pq")):
        from pyarrow.parquet import ParquetFile

        table = ParquetFile(file, memory_map=True)
        schema = table.schema_arrow

        def batches(columns: list[str]) -> Iterator[dict[str, list[Any]]]:
            for batch in table.iter_batches(_BATCH, columns=columns):
                yield {column: batch.column(column).to_pylist() for column in columns}
    else:
        source = arrow.memory_map(str(file))
        try:
            reader = arrow.ipc.open_stream(source)
        except arrow.ArrowInvalid:
            source.seek(0)
            opened = arrow.ipc.open_file(source)
            schema, parts = opened.schema, (opened.get_batch(index) for index in range(opened.num_record_batches))
        else:
            schema, parts = reader.schema, iter(reader)

        def batches(columns: list[str]) -> Iterator[dict[str, list[Any]]]:
            for part in parts:
                for start in range(0, part.num_rows, _BATCH):
                    piece = part.slice(start, _BATCH)
                    yield {column: piece.column(column).to_pylist() for column in columns}

    if repeated := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise DataError(f"{file}: has the column {repeated[0]!r} more than once; give each its own name")
    features = _features(schema.metadata or {})
    kinds = {field.name: _kind(arrow.types, field.type, features.get(field.name)) for field in schema}
    names = {
        name: [str(each) for each in feature["names"]]
        for name, feature in features.items()
        if isinstance(feature, Mapping) and isinstance(feature.get("names"), list) and kinds.get(name) == "class"
    }
    return kinds, names, batches


def _features(metadata: Mapping[bytes, bytes]) -> Mapping[str, Any]:
    """The types that the library datasets has noted in a file, by column."""
    try:
        features = parse_json(metadata[b"huggingface"], foreign=True)["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, Mapping) else {}


def _kind(types: Any, kind: Any, feature: Any) -> str:
    """The kind of a column, as in `choose_image_column`."""
    if types.is_dictionary(kind):
        kind = kind.value_type
    noted = feature.get("_type") if isinstance(feature, Mapping) else None
    if types.is_integer(kind):
        return "class" if noted == "ClassLabel" and feature.get("names") else "integer"
    if types.is_struct(kind):
        fields = {kind.field(index).name for index in range(kind.num_fields)}
        return (
            "image" if noted == "Image" else "encoded" if fields & {"bytes", "path"} and len(fields) <= 2 else "struct"
        )
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return "image" if noted == "Image" else "bytes"
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    return str(kind)


def require_pyarrow(where: str) -> Any:
    """Return the module pyarrow; DataError, which says how to install it, without it."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise DataError(f"{where}: Parquet and Arrow files need pyarrow; pip install 'maple-clip[datasets]'") from error
    return pyarrow
