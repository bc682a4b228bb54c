"""Encoded images from many files at any fsspec place: image files, Parquet tables and WebDataset shards.

`list_units` lists what there is to read, without reading it; `read_unit` reads a part of it on a worker. An image that
cannot be read is an `EncodedImage` with an error, so one broken file among millions ends nothing.
"""

import os
import tarfile
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from glob import has_magic
from typing import Any

from maple.data.folders.listing import is_ignored
from maple.data.images.formats import has_image_name
from maple.errors import ConfigError, first_line, shortened_list
from maple.inference.sources.image_sources import MAX_BYTES
from maple.names import escape_lone_surrogates

FILES_PER_UNIT = 64
"""How many image files are read by one task."""
_ROWS_AT_ONCE = 64
"""How many rows of a table are decompressed at once."""
_IMAGE_COLUMNS = ("image", "img", "bytes", "jpg", "jpeg", "png", "webp", "content")
_PATH_COLUMNS = ("path", "file_name", "filename", "file", "image_path", "image", "uri", "url")


@dataclass(frozen=True)
class Unit:
    """What one reading task reads: image files, or one row group of a Parquet file, or a shard.

    Attributes:
        kind: images, parquet or tar.
        files: places as the filesystem knows them, and the name that the answers give each.
        row_group: that of the Parquet file.
        first_row: the number of the first row of the group in its file, from 0.
    """

    kind: str
    filesystem: Any
    files: tuple[tuple[str, str], ...]
    row_group: int = 0
    first_row: int = 0


@dataclass(frozen=True)
class EncodedImage:
    """One image: encoded bytes, or the reason why there are none.

    Attributes:
        source: identifies the image among all sources: its file, or FILE#ROW of a table, or FILE#KEY of a shard.
        path: what a table calls the image; elsewhere the source.
    """

    source: str
    path: str
    content: bytes = b""
    error: str | None = None


def list_units(sources: Sequence[str], *, recursive: bool = False) -> list[Unit]:
    """List the image files, Parquet files and shards (.tar) of files, folders and patterns at any fsspec place.

    Hidden files, system files and other files of a folder are skipped. A file that is named twice is read once.

    Args:
        sources: paths and URLs, as in photos, /data/*.parquet, s3://bucket/shards.

    Raises:
        ConfigError: no sources, one that does not exist, cannot be reached or holds nothing to read, or a Parquet file
            without a column of images.

    Example:
        >>> [unit.kind for unit in list_units(["photos", "s3://bucket/rows.parquet"])]
        ['images', 'parquet']
    """
    if not sources or not all(sources):
        raise ConfigError("give image files, folders, Parquet files or WebDataset shards, as paths or fsspec URLs")
    units: list[Unit] = []
    seen: set[tuple[str, str]] = set()
    for source in sources:
        filesystem, files = _files_of(source, recursive)
        images: list[tuple[str, str]] = []
        for place, name in files:
            if (identity := (str(filesystem.protocol), place)) in seen:
                continue
            seen.add(identity)
            kind = _kind_of(place)
            if kind == "parquet":
                units += _row_groups(filesystem, place, name)
            elif kind == "tar":
                units.append(Unit("tar", filesystem, ((place, name),)))
            else:
                images.append((place, name))
        parts = range(0, len(images), FILES_PER_UNIT)
        units += [Unit("images", filesystem, tuple(images[start : start + FILES_PER_UNIT])) for start in parts]
    return units


def read_unit(unit: Unit, skip: Container[str] = frozenset()) -> Iterator[EncodedImage]:
    """Read the images of a unit, except for those whose `source` is in `skip`.

    Example:
        >>> for unit in list_units(["photos"]):
        ...     for image in read_unit(unit):
        ...         print(image.source, len(image.content), image.error)
    """
    readers = {"images": _read_files, "parquet": _read_rows, "tar": _read_members}
    yield from readers[unit.kind](unit, skip)


def _files_of(source: str, recursive: bool) -> tuple[Any, list[tuple[str, str]]]:
    """The filesystem of a source, and the place and name of each file of it that can be read, sorted."""
    from fsspec.core import url_to_fs

    source = os.path.expanduser(source)
    try:
        filesystem, root = url_to_fs(source)
        if has_magic(source) and not filesystem.exists(root):
            places = [place for place in filesystem.glob(root) if _kind_of(place)]
        elif filesystem.isdir(root):
            places = [
                place
                for place in filesystem.find(root, maxdepth=None if recursive else 1)
                if _kind_of(place) and not any(map(is_ignored, _below(root, place).split("/")))
            ]
        elif filesystem.exists(root):
            # A file that is named is read whatever it is called.
            return filesystem, [(root, escape_lone_surrogates(source))]
        else:
            raise ConfigError(f"{source}: there is no such file or folder; check the path or the URL")
    except ConfigError:
        raise
    except Exception as error:
        # Filesystems raise whatever their libraries do, here and below.
        raise ConfigError(
            f"{source}: cannot be opened ({first_line(error)}); give a path, or an fsspec URL such as "
            "s3://bucket/folder, and install the package of its protocol (s3fs, gcsfs, adlfs, aiohttp)"
        ) from error
    if not places:
        hint = "" if recursive or has_magic(source) else "; recursive=True also looks into the folders below it"
        raise ConfigError(f"{source}: holds no images, Parquet files or shards (.tar){hint}")
    if has_magic(source):
        names = ((place, _named(filesystem, source, place)) for place in sorted(places))
    else:
        names = ((place, f"{source.rstrip('/')}/{_below(root, place)}") for place in sorted(places))
    # Arrow's text cannot hold names that are not UTF-8.
    return filesystem, [(place, escape_lone_surrogates(name)) for place, name in names]


def _kind_of(place: str) -> str | None:
    suffix = os.path.splitext(place)[1].lower()
    if suffix in (".parquet", ".pq"):
        return "parquet"
    return "tar" if suffix == ".tar" else "images" if has_image_name(place) else None


def _below(root: str, place: str) -> str:
    return place.removeprefix(root.rstrip("/")).lstrip("/")


def _named(filesystem: Any, source: str, place: str) -> str:
    """The name of a place that a pattern has matched: with the protocol of the pattern, if it has one."""
    if "://" in source:
        return str(filesystem.unstrip_protocol(place))
    return place if os.path.isabs(source) else os.path.relpath(place)


def _row_groups(filesystem: Any, place: str, name: str) -> Iterator[Unit]:
    import pyarrow.parquet as pq

    try:
        with filesystem.open(place, "rb") as file:
            parquet = pq.ParquetFile(file)
            _columns(parquet.schema_arrow, name)
            first = 0
            for group in range(parquet.num_row_groups):
                yield Unit("parquet", filesystem, ((place, name),), group, first)
                first += parquet.metadata.row_group(group).num_rows
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{name}: cannot be read as a Parquet file ({first_line(error)})") from error


def _columns(schema: Any, name: str) -> tuple[str | None, str | None]:
    """The names of the column of encoded images, and of that of paths; ConfigError where there is neither.

    Images are bytes, or a struct of bytes and a path, as `datasets` writes it.
    """
    import pyarrow.types as types

    def holds_images(kind: Any) -> bool:
        if types.is_struct(kind):
            kind = next((field.type for field in kind if field.name == "bytes"), None)
        return kind is not None and (types.is_binary(kind) or types.is_large_binary(kind))

    images = [field.name for field in schema if holds_images(field.type)]
    texts = [field.name for field in schema if types.is_string(field.type) or types.is_large_string(field.type)]
    named = [column for column in _IMAGE_COLUMNS if column in images]
    image = named[0] if named else images[0] if len(images) == 1 else None
    path = next((column for column in _PATH_COLUMNS if column in texts), None)
    if image is None and (images or path is None):
        problem = f"its columns are {shortened_list(schema.names, 8)}"
        raise ConfigError(
            f"{name}: no column of images was recognised; {problem}: name that of the encoded images image or bytes, "
            "or that of their paths path"
        )
    return image, path


def _read_files(unit: Unit, skip: Container[str]) -> Iterator[EncodedImage]:
    for place, name in unit.files:
        if name not in skip:
            yield _read_file(unit.filesystem, place, name, name)


def _read_file(filesystem: Any, place: str, source: str, path: str) -> EncodedImage:
    try:
        with filesystem.open(place, "rb") as file:
            return _checked(source, path, file.read(MAX_BYTES + 1))
    except FileNotFoundError:
        return EncodedImage(source, path, error=f"{path}: there is no such file")
    except Exception as error:  # noqa: BLE001 - a row of the result
        return EncodedImage(source, path, error=f"{path}: cannot be read ({first_line(error)})")


def _checked(source: str, path: str, content: bytes | None) -> EncodedImage:
    if not content:
        return EncodedImage(source, path, error=f"{path}: is empty (0 bytes)")
    if len(content) > MAX_BYTES:
        return EncodedImage(source, path, error=f"{path}: has more than the allowed {MAX_BYTES:,} bytes")
    return EncodedImage(source, path, content)


def _read_rows(unit: Unit, skip: Container[str]) -> Iterator[EncodedImage]:
    import pyarrow.parquet as pq

    ((place, name),) = unit.files
    row = unit.first_row
    try:
        with unit.filesystem.open(place, "rb") as file:
            parquet = pq.ParquetFile(file)
            image_column, path_column = _columns(parquet.schema_arrow, name)
            columns = [column for column in (image_column, path_column) if column is not None]
            for batch in parquet.iter_batches(_ROWS_AT_ONCE, row_groups=[unit.row_group], columns=columns):
                for values in batch.to_pylist():
                    source, row = f"{name}#{row}", row + 1
                    if source not in skip:
                        image, path = values.get(image_column), values.get(path_column)
                        yield _read_row(unit.filesystem, place, source, image, path)
    except Exception as error:  # noqa: BLE001 - a row of the result
        # The rows that were not reached have no answer of their own; one row of the result reports them.
        source = f"{name}#{row}-"
        if source not in skip:
            yield EncodedImage(source, source, error=f"{source}: cannot be read ({first_line(error)})")


def _read_row(filesystem: Any, table: str, source: str, image: Any, path: str | None) -> EncodedImage:
    content = image
    if isinstance(image, dict):
        content = image.get("bytes")
        path = path or image.get("path")
    if content or not path:
        return _checked(source, path or source, content)
    # Only a path: below the folder of the table, unless it is absolute.
    place = path if os.path.isabs(path) else f"{os.path.dirname(table)}/{path}"
    return _read_file(filesystem, place, source, path)


def _read_members(unit: Unit, skip: Container[str]) -> Iterator[EncodedImage]:
    """Read the images of a tar archive from its beginning to its end; nothing is extracted.

    The source of a further image with the same key has the whole name of its member.
    """
    ((place, name),) = unit.files
    last = None
    try:
        with unit.filesystem.open(place, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as archive:
            for member in archive:
                folder, basename = os.path.split(member.name)
                if not member.isfile() or basename.startswith(".") or not has_image_name(basename):
                    continue
                key = os.path.join(folder, basename.partition(".")[0])
                source, last = escape_lone_surrogates(f"{name}#{member.name if key == last else key}"), key
                if source in skip:
                    continue
                content = archive.extractfile(member)
                yield _checked(source, source, content.read(MAX_BYTES + 1) if content else None)
    except Exception as error:  # noqa: BLE001 - a row of the result
        source = f"{name}#"
        if source not in skip:
            yield EncodedImage(source, name, error=f"{name}: cannot be read to its end ({first_line(error)})")
