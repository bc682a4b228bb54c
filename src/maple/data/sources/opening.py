"""Recognise a source by its name, and open it: as rows to predict, or, unpacked, as a data set to train on."""

import logging
import os
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from maple.data.checks.findings import Finding
from maple.data.folders.class_folders import assemble, check_fractions, draw_split, load_folder, rename_classes
from maple.data.folders.listing import list_folder, walk_files
from maple.data.folders.manifests import is_manifest, load_manifest
from maple.data.images.formats import has_image_name
from maple.data.published.unpack import is_archive
from maple.data.records import Dataset
from maple.data.sources.archives import ArchiveSource
from maple.data.sources.hub import PREFIX, HubSource
from maple.data.sources.rows import Columns, Source
from maple.data.sources.shards import (
    ShardSource,
    holds_samples,
    is_pattern,
    is_shard_name,
    shards_in,
    shards_of_pattern,
)
from maple.data.sources.tables import TableSource, is_saved_dataset, is_table
from maple.data.sources.unpacked import IMAGES, is_unpacked, read_description, unpack_source
from maple.errors import DataError
from maple.files import on_disk

logger = logging.getLogger(__name__)

_LOOKED_AT = 500
"""The number of files by which the kind of a folder is recognised."""


def find_source(text: str, label_column: str | None = None) -> Source | None:
    """Return the source that a text names; None for a folder of images, and for what is not a source.

    `hf:OWNER/NAME`, a Parquet or Arrow file, a folder of these or of `save_to_disk`, a zip or tar archive, tar shards
    by a pattern such as `shards/{0000..0012}.tar`, or a folder of these. `label_column` is the key of labels in .json
    files, by which shards differ from archives of class folders.

    Raises:
        DataError: it is one, but cannot be read, or lacks shards.

    Example:
        >>> find_source("pets.parquet").name
        'pets'
    """
    if text.startswith(PREFIX):
        return HubSource(text)
    if is_pattern(text):
        return ShardSource(text, shards_of_pattern(text))
    path = on_disk(Path(text).expanduser())
    if os.path.isfile(path):
        if is_table(path):
            return TableSource(text, path)
        is_samples, note = holds_samples(path, label_column) if is_shard_name(path.name) else (False, "")
        if is_samples:
            return ShardSource(text, [path], note)
        return ArchiveSource(text, path, note) if is_archive(path) else None
    if not os.path.isdir(path) or is_unpacked(path):
        return None
    if is_saved_dataset(path):
        return TableSource(text, path)
    kinds = set()
    for file in islice(walk_files(path, on_unreadable=lambda _error: None), _LOOKED_AT):
        if has_image_name(file.name):
            return None
        kinds |= {"table"} if is_table(file) else {"shard"} if is_shard_name(file.name) else set()
    if "table" in kinds:
        return TableSource(text, path)
    return ShardSource(text, shards_in(path)) if "shard" in kinds else None


def names_source(text: str) -> bool:
    """Whether a text names something that is unpacked before it is used, or that was: `load_source` reads it."""
    if text.startswith(PREFIX) or is_pattern(text):
        return True
    path = on_disk(Path(text).expanduser())
    return (os.path.isdir(path) and is_unpacked(path)) or find_source(text) is not None


def warn_of_columns(columns: Columns, text: str) -> None:
    """Warn if a column is named for a source that has none: runs of earlier versions may name some."""
    named = {"image_column": columns.image, "label_column": columns.label}
    for setting, column in named.items():
        if column is not None:
            logger.warning(
                "%s: is not read as a table, and has no column %r: data.%s is not used; give the table that has this "
                "column",
                *(text, column, setting),
            )


def absent_part(text: str) -> str | None:
    """The first shard that is not there, of a source that names several; None if all are, or for any other source."""
    if not is_pattern(text):
        return None
    shards = shards_of_pattern(text)
    return next((str(shard) for shard in shards if not shard.exists()), None) if shards else text


def absolute_source(text: str) -> str | None:
    """The same text for the same source of the hub or pattern, an absolute one; None for any other source."""
    if text.startswith(PREFIX):
        return text
    return os.path.abspath(os.path.expanduser(text)) if is_pattern(text) else None


def load_source(
    text: str,
    *,
    columns: Columns,
    class_names: Mapping[str, str] | None = None,
    seed: int = 0,
    val_fraction: float = 0.0,
    test_fraction: float = 0.25,
    drop_empty: bool = False,
    min_classes: int = 2,
    on_finding: Callable[[Finding], None] | None = None,
) -> Dataset | None:
    """Read a source as a data set; it is unpacked first, unless it was. Options as for `load_dataset`.

    None for a text that does not name a source.

    Raises:
        DataError: as `find_source` and `unpack_source`, or there are fewer than `min_classes` classes.

    Example:
        >>> load_source("pets.parquet", columns=Columns()).counts()
        {'train': 30, 'val': 0, 'test': 10, 'classes': 2}
    """
    folder = on_disk(Path(text).expanduser())
    source = find_source(text, columns.label)
    if source is None and not is_unpacked(folder):
        return None
    check_fractions(val_fraction, test_fraction)
    if source is not None:
        folder = unpack_source(source, columns)
        if source.note:
            _report(Finding("reading", "note", source.note), text, on_finding)
    content = read_description(folder)
    for kind, level, finding in content["findings"]:
        if kind != "numbered classes" or not class_names:
            _report(Finding(kind, level, finding), text, on_finding)
    fractions: dict[str, Any] = {"seed": seed, "val_fraction": val_fraction, "test_fraction": test_fraction}
    if content["layout"] == "folders":
        root = folder / content["root"]
        options = {**fractions, "min_classes": min_classes, "class_names": class_names}
        try:
            tables = [child for child in list_folder(root) if is_manifest(child)]
            if len(tables) == 1 and not _has_class_folders(root):
                return load_manifest(tables[0], **options, image_column=columns.image, label_column=columns.label)
            if (inner := find_source(str(root))) is not None:
                return load_source(inner.text, columns=columns, drop_empty=drop_empty, on_finding=on_finding, **options)
            warn_of_columns(columns, text)
            return load_folder(root, name=content["name"], drop_empty=drop_empty, on_finding=on_finding, **options)
        except DataError as error:
            # The user knows the archive, and not the folder of the cache.
            shown = str(error).replace(str(root), text)
            raise DataError(shown.replace(f"{IMAGES}/", "") if root.name == IMAGES else shown) from error
    names: list[str] = content["class_names"]
    if len(names) < min_classes:
        raise DataError(f"{text}: has only one class, {names[0]!r}, but a classifier needs at least two")
    images: dict[str, dict[str, list[str]]] = {}
    for split, items in content["splits"].items():
        images[split] = {name: [] for name in names}
        for path, label, _ in items:
            images[split][names[label]].append(path)
    drawn = len(images) == 1
    if drawn:
        images = draw_split(next(iter(images.values())), **fractions)
    elif "train" in images and "val" in images and "test" not in images:
        images["test"] = images.pop("val")
    dataset = assemble(content["name"], folder / IMAGES, names, images, drawn_split=drawn)
    return rename_classes(dataset, class_names)


def _has_class_folders(root: Path) -> bool:
    """Whether more than one folder holds images, as class folders do; a table has its images in one, mostly."""
    return sum(1 for child in list_folder(root) if child.is_dir()) > 1


def _report(finding: Finding, text: str, on_finding: Callable[[Finding], None] | None) -> None:
    if on_finding is not None:
        on_finding(finding)
    else:
        logger.warning("%s: %s", text, finding.text)
