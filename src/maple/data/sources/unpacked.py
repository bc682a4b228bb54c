"""The cache of unpacked sources: each is unpacked once, as the encoded bytes it holds, into a folder that is then read.

A folder is named by what identifies its source, is renamed when it is complete, and is never changed. A lock lets one
of several processes unpack while the others wait. Removing a folder loses nothing as long as its source is there.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from maple import files
from maple.data.folders.manifests import SPLIT_FORM
from maple.data.images.formats import HEAD_BYTES, extension_of, format_of, has_image_name
from maple.data.sources.archives import ArchiveSource
from maple.data.sources.rows import Columns, Row, Source, file_state
from maple.errors import ConfigError, DataError, ImageError, shortened_list
from maple.locks import locked
from maple.places import CACHE_VARIABLE, cache_folder

logger = logging.getLogger(__name__)

DESCRIPTION = "source.json"
IMAGES = "images"
_COPIED = "copied.jsonl"
_FORMAT = 1
_PER_FOLDER = 1000
_EXTENSIONS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "TIFF": ".tif", "AVIF": ".avif"}
_DEPTH = 3
"""The number of folders between an unpacked image and the folder of its source."""
_LEAST_SPACE = 64 * 1024**2
"""The bytes that unpacking leaves free on the disk."""
_CHECK_SPACE = 256
"""The number of images after which the free space is looked up again."""
_ALL_DIFFERENT = 10
"""From this number of images on, labels that are all different are taken for something else."""


@dataclass(frozen=True)
class Unpacked:
    """One folder of the cache: its size in bytes, when it was last used (seconds since 1970), and its description.

    The description is empty where the folder is damaged.
    """

    path: Path
    size: int
    used: float
    description: dict[str, Any]


def sources_folder() -> Path:
    """The folder of all unpacked sources; ConfigError without a cache."""
    home = cache_folder()
    if home is None:
        raise ConfigError(
            f"this source is unpacked before it is used, but there is no cache: {CACHE_VARIABLE} is off, or there is "
            f"no home folder; set {CACHE_VARIABLE} to a folder, or unpack the source into class folders yourself"
        )
    return home / "sources"


def is_unpacked(folder: Path) -> bool:
    """Whether a folder is one of unpacked images, as `unpack_source` makes them."""
    return (folder / DESCRIPTION).is_file() and (folder / IMAGES).is_dir()


def unpack_source(source: Source, columns: Columns) -> Path:
    """Return the folder of an unpacked source, which is made now if it is not there or not complete.

    Raises:
        ConfigError: there is no cache.
        DataError: the source is damaged, has no labels, or there is no room for it on the disk.
    """
    parent = sources_folder()
    identity = {"format": _FORMAT, **source.identity(), "image": columns.image, "label": columns.label}
    key = identity
    while _is_complete(folder := parent / _hash_of(key)):
        changed = _changed_files(folder, source)
        if changed is None or changed == key.get("copied"):
            return folder
        # Into another folder, since other processes may still read this one.
        key = {**identity, "copied": changed}
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with locked(parent / f"{folder.name}.lock"):
            if not _is_complete(folder):
                if folder.exists():
                    shutil.rmtree(folder)
                logger.warning("%s: is unpacked into %s, once", source.text, folder)
                with files.temporary_path(parent, folder=True) as temporary:
                    _write(source, columns, temporary)
                    _rename(temporary, folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"{source.text}: cannot be unpacked into {parent} ({reason}); make room there, or set {CACHE_VARIABLE} to "
            "another folder"
        ) from error
    return folder


def store_rows(source: Source) -> Path:
    """Unpack a source that only this process has, such as a data set in memory; the folder is named by the content.

    Raises:
        ConfigError, DataError: as `unpack_source`.
    """
    parent = sources_folder()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with files.temporary_path(parent, folder=True) as temporary:
            folder = parent / _write(source, Columns(), temporary)[:32]
            with locked(parent / f"{folder.name}.lock"):
                if not _is_complete(folder):
                    if folder.exists():
                        shutil.rmtree(folder)
                    _rename(temporary, folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"the images cannot be kept in {parent} ({reason}); make room there") from error
    return folder


def read_description(folder: Path) -> dict[str, Any]:
    """Read what an unpacked folder holds.

    Raises:
        DataError: it is damaged.
    """
    advice = "remove the folder, and repeat the command"
    content: dict[str, Any] = files.read_json(folder / DESCRIPTION, error=DataError, advice=advice)
    if content.get("format") != _FORMAT:
        raise DataError(f"{folder} is of another version of maple; {advice}")
    return content


def unpacked_sources(*, describe: bool = True) -> list[Unpacked]:
    """Return what the cache holds, the most recently used first."""
    home = cache_folder()
    folders = []
    with suppress(OSError):
        for folder in (home / "sources").iterdir() if home else ():
            with suppress(OSError):
                if not is_unpacked(folder):
                    continue
                try:
                    description = read_description(folder) if describe else {}
                except DataError:
                    description = {}
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                folders.append(Unpacked(folder, size, (folder / DESCRIPTION).stat().st_mtime, description))
    return sorted(folders, key=lambda each: (-each.used, each.path.name))


def clear_sources(older_than: float = 0.0) -> tuple[int, int]:
    """Remove what was not used within `older_than` days; return how many sources, and their size in bytes.

    What processes that were killed have left is removed, too.

    Raises:
        ConfigError: a folder cannot be removed.
    """
    count = size = 0
    if (home := cache_folder()) is not None:
        files.remove_stale(home / "sources")
    for each in unpacked_sources(describe=False):
        if each.used > time.time() - older_than * 86400 and older_than:
            continue
        try:
            with files.temporary_path(each.path.parent, folder=True) as temporary:
                # Renamed first, so that no other process finds a part of it.
                os.rename(each.path, temporary / each.path.name)
        except FileNotFoundError:
            continue  # another process has removed it
        except OSError as error:
            raise ConfigError(f"{each.path} cannot be removed ({error.strerror}); change its permissions") from error
        (each.path.parent / f"{each.path.name}.lock").unlink(missing_ok=True)
        count, size = count + 1, size + each.size
    return count, size


def name_row(error: ImageError, file: Path) -> ImageError:
    """Return the error of an image; of one that was copied from a path of a table it names the row and that path."""
    folder = file.parents[_DEPTH] if len(file.parents) > _DEPTH else file
    if not is_unpacked(folder) or not file.is_relative_to(folder / IMAGES):
        return error
    origin = _origins(folder).get(file.relative_to(folder / IMAGES).as_posix())
    return error if origin is None else ImageError(str(error).replace(str(file), origin, 1))


@lru_cache(maxsize=1)
def _origins(folder: Path) -> dict[str, str]:
    """The row and the file that each image was copied from, by its path in the folder."""
    return {copied.target: f"{copied.row} ({copied.path})" for copied in _read_copied(folder) if copied.target}


class _Copied(NamedTuple):
    """A file that a row names: where it was copied to, if it was there, and its size and time then."""

    target: str | None
    row: str
    path: str
    state: list[int] | None


def _read_copied(folder: Path) -> Iterator[_Copied]:
    """The files that the images of an unpacked folder were copied from; none, if its source held the images."""
    with suppress(OSError, ValueError, TypeError), (folder / _COPIED).open(encoding="utf-8") as lines:
        for line in lines:
            yield _Copied(*json.loads(line))


def _changed_files(folder: Path, source: Source) -> list[list[int] | None] | str | None:
    """The states of the files that the images were copied from; None if they are as they were then.

    "noted" in their place if an earlier version, which did not note them, has copied files.
    """
    if not (folder / _COPIED).exists():
        return "noted" if source.copies_files else None
    listings: dict[Path, dict[str, list[str]]] = {}
    copied = list(_read_copied(folder))
    states = [_state(files.on_disk(Path(each.path), listings)) for each in copied]
    return None if states == [each.state for each in copied] else states


def _hash_of(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _state(path: str | Path) -> list[int] | None:
    """The size and the time of a file; None if it is not there."""
    with suppress(OSError, ValueError):
        return file_state(path)
    return None


def _is_complete(folder: Path) -> bool:
    """Whether a folder holds all that was unpacked into it; its use is then noted."""
    if not is_unpacked(folder):
        return False
    try:
        content = read_description(folder)
        items = (item for items in content["splits"].values() for item in items)
        if not all((folder / IMAGES / path).stat().st_size == size for path, _label, size in items):
            return False
        if content["layout"] == "folders" and content["files"] != sum(1 for _ in _walk(folder / IMAGES)):
            return False
    except (OSError, DataError, KeyError, TypeError, ValueError):
        return False
    with suppress(OSError):  # the cache of another user
        os.utime(folder / DESCRIPTION)
    return True


def _rename(temporary: Path, folder: Path) -> None:
    files.make_public(temporary)
    os.rename(temporary, folder)


def _walk(folder: Path) -> Iterator[Path]:
    return (Path(place) / name for place, _, names in os.walk(folder) for name in names)


def _write(source: Source, columns: Columns, folder: Path) -> str:
    """Write the images and the description of a source into an empty folder; return the SHA-256 (hex) of the images."""
    content: dict[str, Any] = {"format": _FORMAT, "source": source.text, "name": source.name}
    if isinstance(source, ArchiveSource):
        root = source.unpack_into(folder / IMAGES)
        size = sum(file.stat().st_size for file in _walk(folder / IMAGES))
        content |= {"layout": "folders", "root": root.relative_to(folder).as_posix(), "splits": {}}
        content |= {"findings": source.findings()}
        content |= {"files": sum(1 for _ in _walk(folder / IMAGES)), "bytes": size, "class_names": None}
        digest = ""
    else:
        writer = _Writer(folder / IMAGES)
        for row in source.rows(columns, labelled=True):
            writer.add(row)
        content |= {"layout": "rows", "root": IMAGES, **writer.result(source)}
        digest = writer.digest
        # A file of its own: there may be millions, and few readers of the description need them.
        files.write_text(folder / _COPIED, "".join(f"{json.dumps(each)}\n" for each in writer.copied))
    files.write_json(folder / DESCRIPTION, content)
    return digest


class _Writer:
    """Writes the images of rows, and notes their labels and what is left out."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self._items: dict[str, list[tuple[str, str | int, int]]] = defaultdict(list)
        self._left_out: dict[str, list[str]] = {"no label": [], "no image": [], "an image that is not there": []}
        self._numbers: dict[str, int] = defaultdict(int)
        self.copied: list[_Copied] = []
        self._first: dict[str, str] = {}  # the name of a row of each split
        self._bytes = self._count = 0
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def add(self, row: Row) -> None:
        number = self._numbers[row.split]
        self._numbers[row.split] += 1
        content = row.content
        if isinstance(content, DataError):
            raise content
        if row.label is None or content is None:
            self._left_out["no label" if row.label is None else "no image"].append(row.name)
            return
        file = os.path.abspath(content) if isinstance(content, Path) else None
        state = None if file is None else _state(file)  # before it is read, so that no later change is missed
        if isinstance(content, Path):
            if not os.path.isfile(content):
                self.copied.append(_Copied(None, row.name, os.path.abspath(content), state))
                self._left_out["an image that is not there"].append(f"{row.name} ({content})")
                return
            extension = extension_of(content.name) if has_image_name(content.name) else ""
            try:
                content = files.regular(content).read_bytes()
            except OSError as error:
                reason = error.strerror or str(error)
                raise DataError(
                    f"{row.name}: its image {file} cannot be read ({reason}); make it readable, or leave out the row"
                ) from error
        else:
            extension = ""
        extension = extension or _EXTENSIONS.get(format_of(content[:HEAD_BYTES], short=True), ".img")
        if self._count % _CHECK_SPACE == 0:
            free = shutil.disk_usage(self._folder).free
            if free < _LEAST_SPACE + len(content):
                raise OSError(28, f"only {free / 1e6:,.0f} MB are free")
        path = f"{row.split or 'all'}/{number // _PER_FOLDER:04d}/{number:07d}{extension}"
        target = self._folder / path
        if not target.parent.exists():
            target.parent.mkdir(parents=True)
        target.write_bytes(content)
        for part in (path, str(row.label)):
            self._hash.update(part.encode("utf-8", "surrogateescape") + b"\0")
        self._hash.update(hashlib.sha256(content).digest())
        self._first.setdefault(row.split, row.name)
        self._items[row.split].append((path, row.label, len(content)))
        if file is not None:
            self.copied.append(_Copied(path, row.name, file, state))
        self._bytes, self._count = self._bytes + len(content), self._count + 1

    def result(self, source: Source) -> dict[str, Any]:
        """The rest of the description; DataError if nothing can be trained on."""
        unlabelled, total = self._left_out["no label"], sum(self._numbers.values())
        if not self._count:
            if absent := self._left_out["an image that is not there"]:
                raise DataError(
                    f"{source.text}: {len(absent):,} rows name images that are not there (first: {absent[0]}), and no "
                    "other row has an image and a label; put them there, or correct their paths"
                )
            if unlabelled:
                where = ", ".join(unlabelled[:2])
                raise DataError(
                    f"{source.text}: none of its {total:,} images has a label (as {where}); give images with labels, "
                    "such as a column of class names, or KEY.cls next to KEY.jpg in shards; `maple predict` needs none"
                )
            raise DataError(
                f"{source.text}: holds no images" + (f" in its {total:,} rows" if total else "; it is empty")
            )
        if "" in self._first and len(self._first) > 1:
            split, divided = next((split, name) for split, name in self._first.items() if split)
            raise DataError(f"{self._first['']} has no split, but {divided} has {split!r}; {SPLIT_FORM}")
        labels = {label for items in self._items.values() for _, label, _ in items}
        kinds = {isinstance(label, str) for label in labels}
        if len(kinds) > 1:
            raise DataError(
                f"{source.text}: some labels are names, others numbers ({shortened_list(labels)}); give one kind"
            )
        if len(labels) == self._count >= _ALL_DIFFERENT:
            raise DataError(
                f"{source.text}: all {self._count:,} images have different labels ({shortened_list(sorted(labels))}), "
                "which are not classes; name the column, or the key of .json, that holds the classes"
            )
        order = [name for name in source.class_names or () if name in labels]
        names = [*order, *sorted(labels - set(order))]
        findings = []
        for problem, rows in self._left_out.items():
            if rows:
                findings.append(
                    [
                        problem,
                        "warning",
                        f"{len(rows):,} of {total:,} rows have {problem} and are left out: "
                        f"{shortened_list(rows, longest=120)}",
                    ]
                )
        unused = [name for name in source.class_names or () if name not in labels]
        if unused:
            text = f"{len(unused):,} class names have no image and are left out: {shortened_list(unused)}"
            findings.append(["empty classes", "warning", text])
        if not kinds.pop():
            advice = (
                "give their names in a classnames.txt next to the images, one a line, the first for 0, or with "
                '--class-names names.json, as in {"0": "words"}'
            )
            findings.append(["numbered classes", "warning", f"the classes are numbers without names; {advice}"])
        index = {name: number for number, name in enumerate(names)}
        splits = {
            split: [[path, index[label], size] for path, label, size in items] for split, items in self._items.items()
        }
        return {
            "class_names": [str(name) for name in names],
            "splits": splits,
            "findings": findings,
            "files": self._count,
            "bytes": self._bytes,
        }
