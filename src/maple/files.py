"""Atomic files: a reader sees the old content or the new, never a part."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FAILURE = "failure.json"
"""Why a run of a sweep failed: a file of its folder, written by sweeps and read by reports."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; move it over `path` if the body succeeds.

    The data is flushed to the disk before the move, so that after a crash at any moment `path` holds
    either its previous content or the whole new one. On an exception the temporary file is removed; an OSError
    names `path`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        move(temporary, target)
    except OSError as error:
        if error.errno is not None and error.filename in (None, name):
            error.filename = str(target)
        raise
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) atomically; what stands for bytes of another encoding, in a file name, is escaped."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON atomically; NaN and infinity are refused with a ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_with(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let `write(temporary_path)` produce the file, atomically."""
    with replacing(path) as temporary:
        write(temporary)


def move(source: Path, target: Path) -> None:
    """Give a whole file its name: flushed to the disk first, so that the name never stands for less."""
    _flush(source)
    source.replace(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
