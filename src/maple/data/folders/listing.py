"""The files of a folder, in the order of their names, without what is hidden or belongs to the system."""

import glob
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from maple.errors import DataError

logger = logging.getLogger(__name__)

_SYSTEM_NAMES = {
    *("__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "lost+found"),
    *("@eadir", "@tmp", "#recycle", "@recycle", "@__thumb"),  # of network drives of Synology and QNAP
}


def walk_files(
    folder: Path,
    *,
    recursive: bool = True,
    on_unreadable: Callable[[DataError], None] | None = None,
    within: Sequence[Path] = (),
) -> Iterator[Path]:
    """Iterate over the files of a folder in order of their names, without hidden files and system files.

    With `recursive`, subfolders are included, each in its place in the order; links back to a parent folder, or to one
    of `within`, are not followed. Only the names of the open folders are kept in memory. `on_unreadable` is called with
    the DataError of a folder that cannot be listed, which is then skipped; without it, the error is raised.
    """

    def identity(path: Path) -> tuple[int, int]:
        status = path.stat()
        return status.st_dev, status.st_ino

    def walk(folder: Path, parents: tuple[tuple[int, int], ...]) -> Iterator[Path]:
        try:
            children = list_folder(folder)
        except DataError as error:
            if on_unreadable is None:
                raise
            on_unreadable(error)
            return
        if identity(folder) in parents:
            logger.warning("%s: links back to a parent folder; not followed", folder)
            return
        for child in children:
            if not os.path.isdir(child):
                yield child
            elif recursive:
                yield from walk(child, (*parents, identity(folder)))

    return walk(folder, tuple(identity(parent) for parent in within))


def list_names(folder: Path) -> list[str]:
    """Return the sorted names in a folder, without hidden and system files; DataError if it cannot be listed."""
    try:
        return sorted(name for name in os.listdir(folder) if not is_ignored(name))
    except FileNotFoundError as error:
        raise DataError(f"{folder}: the folder is missing; put or link the images there") from error
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); make the folder readable") from error


def list_folder(folder: Path) -> list[Path]:
    """Return the paths of `list_names`."""
    return [folder / name for name in list_names(folder)]


def is_ignored(name: str) -> bool:
    """Return whether a file or folder of this name is hidden or belongs to the system, and is always skipped."""
    return name.startswith(".") or name.casefold() in _SYSTEM_NAMES


def expand_pattern(pattern: str, *, recursive: bool = False) -> list[str]:
    """Return the sorted paths that a pattern of `*`, `?`, `[...]` and, if `recursive`, `**` matches.

    What exists under the very name is taken as it is: a file, and the folders that a pattern begins with. A text with
    no other pattern is returned unchanged, whether that is there or not.

    Example:
        >>> expand_pattern("scans [v2]/*.png")
        ['scans [v2]/1.png', 'scans [v2]/2.png']
    """
    if os.path.lexists(pattern):
        return [pattern]
    ends = [position + 1 for position, mark in enumerate(pattern) if mark in (os.sep, os.altsep)]
    start = next((end for end in reversed(ends) if os.path.isdir(pattern[:end])), 0)
    if not glob.has_magic(pattern[start:]):
        return [pattern]
    return sorted(glob.glob(glob.escape(pattern[:start]) + pattern[start:], recursive=recursive))
