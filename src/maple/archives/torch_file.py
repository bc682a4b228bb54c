"""Checkpoint files: torch's zip archive, and the plain stream of pickles that torch wrote before 1.6."""

import io
import mmap
import os
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch

from maple.archives.refs import Placeholder, StorageRef, TensorRef
from maple.archives.unpickle import RestrictedUnpickler
from maple.errors import CheckpointError, UnsafeCheckpointError

_ZIP_START = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_DEPTH = 60
_ENCRYPTED = 0x1
_HINT = "give a `model.pth.tar-N` written by the reference code"

_MALFORMED = (
    zipfile.BadZipFile,
    struct.error,
    ValueError,  # of which UnicodeDecodeError is one
    TypeError,
    LookupError,
    OverflowError,
    MemoryError,
    EOFError,
    RuntimeError,  # torch's, zipfile's for encryption, RecursionError and NotImplementedError
    AttributeError,
    DeprecationWarning,  # a bad escape in a name, where warnings are errors
)


class _Storages(Protocol):
    def read(self, key: str) -> bytearray:
        """The bytes of a whole storage."""


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a torch checkpoint without running anything that it contains.

    Tensors keep their dtype and come to the CPU, sharing storages as they did in the file. Numbers, strings,
    bytes, lists, tuples and dictionaries are rebuilt. Every other object (an optimizer, a scheduler, a NumPy
    scalar, a set) becomes a `Placeholder`; the module that it names is neither imported nor looked up.

    Args:
        path: a zip archive of `torch.save`, or its format before torch 1.6.

    Returns:
        The dictionary that was saved, for the published files with the keys `state_dict`, `epoch`,
        `optimizer`, `scheduler` and `val_result`.

    Raises:
        CheckpointError: the file cannot be read, is damaged, is not a torch checkpoint, or has a tensor that
            does not fit its storage.
        UnsafeCheckpointError: the whole content would come from running code that the file names.

    Source: KaiyangZhou/Dassl.pytorch@c61a1b5:dassl/utils/torchtools.py (`save_checkpoint`); departs from its
        `torch.load`, which runs whatever the file names.
    """
    return read_with_ignored(path)[0]


def read_with_ignored(path: str | os.PathLike[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`read_checkpoint`, and the sorted names of the classes and functions left out."""
    try:
        value, ignored = _read(Path(path))
    except CheckpointError as error:
        raise type(error)(f"{os.fspath(path)}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{os.fspath(path)}: cannot be read ({error.strerror or error}); {_HINT}") from error
    except _MALFORMED as error:
        reason = f"{type(error).__name__}: {error!s:.200}"
        raise CheckpointError(f"{os.fspath(path)}: damaged or no torch checkpoint ({reason}); {_HINT}") from error
    return value, ignored


def _read(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    with path.open("rb") as file:
        start = file.read(4)
    if start == _ZIP_START:
        with zipfile.ZipFile(path) as archive:
            storages = _ZipStorages(archive, path.stat().st_size)
            unpickler = RestrictedUnpickler(io.BytesIO(storages.pickle()))
            value: dict[str, Any] = _Builder(storages).build(_root(unpickler))
            return value, tuple(sorted(unpickler.ignored))
    if not start:
        raise CheckpointError(f"the file is empty; {_HINT}")
    if start[:1] != b"\x80":
        raise CheckpointError(f"begins with {start!r}, which is no torch checkpoint; {_HINT}")
    with _mapped(path) as stream:
        _legacy_header(stream)
        unpickler = RestrictedUnpickler(stream)  # type: ignore[arg-type]  # mmap has read, readline and tell
        root = _root(unpickler)
        value = _Builder(_LegacyStorages(stream, unpickler.storages)).build(root)
        return value, tuple(sorted(unpickler.ignored))


def _root(unpickler: RestrictedUnpickler) -> dict[str, Any]:
    value = unpickler.load()
    if isinstance(value, Placeholder):
        raise UnsafeCheckpointError(f"its content would come from running {value.origin}; nothing was run. {_HINT}")
    if not isinstance(value, dict):
        raise CheckpointError(f"holds a value of type {type(value).__name__}; a checkpoint is a dictionary; {_HINT}")
    return value


class _Builder:
    """Replaces the references of an unpickled value by tensors; what the file shares stays shared."""

    def __init__(self, storages: _Storages) -> None:
        self._storages = storages
        self._bytes: dict[str, torch.Tensor] = {}
        self._done: dict[int, Any] = {}
        self._open: set[int] = set()

    def build(self, value: Any, depth: int = 0) -> Any:
        if isinstance(value, TensorRef):
            return self._tensor(value)
        if not isinstance(value, dict | list | tuple):
            return value
        if depth > _MAX_DEPTH or id(value) in self._open:
            raise CheckpointError(f"its containers contain themselves or nest deeper than {_MAX_DEPTH}")
        if id(value) not in self._done:
            self._open.add(id(value))
            self._done[id(value)] = self._container(value, depth + 1)
            self._open.remove(id(value))
        return self._done[id(value)]

    def _container(self, value: dict[Any, Any] | list[Any] | tuple[Any, ...], depth: int) -> Any:
        if isinstance(value, dict):
            return {key: self.build(item, depth) for key, item in value.items()}
        return type(value)(self.build(item, depth) for item in value)

    def _tensor(self, ref: TensorRef) -> torch.Tensor:
        if 0 in ref.size:
            return torch.empty(ref.size, dtype=ref.storage.dtype)
        flat = self._flat(ref.storage)
        stride = tuple(step if length > 1 else 1 for length, step in zip(ref.size, ref.stride, strict=True))
        return flat.as_strided(ref.size, stride, flat.storage_offset() + ref.offset)

    def _flat(self, storage: StorageRef) -> torch.Tensor:
        """The numbers [storage.numel] of a storage, of its dtype."""
        if storage.key not in self._bytes:
            self._bytes[storage.key] = _bytes_tensor(self._storages.read(storage.key))
        width = storage.dtype.itemsize
        end = (storage.start + storage.numel) * width
        raw = self._bytes[storage.key]
        if end > len(raw):
            raise CheckpointError(
                f"storage {storage.key:.50} has {len(raw)} bytes, but {end} are needed; copy the file again"
            )
        part = raw[storage.start * width : end]
        return part.ne(0) if storage.dtype is torch.bool else part.view(storage.dtype)


class _ZipStorages:
    """The records `NAME/data.pkl` and `NAME/data/KEY` of a torch archive; nothing is extracted to disk."""

    def __init__(self, archive: zipfile.ZipFile, file_size: int) -> None:
        self._archive = archive
        self._records: dict[str, zipfile.ZipInfo] = {}
        for record in archive.infolist():
            _check_record(record)
            if record.filename in self._records:
                raise CheckpointError(f"the archive has two records {record.filename!r:.100}; {_HINT}")
            self._records[record.filename] = record
        total = sum(record.file_size for record in self._records.values())
        if total > file_size:
            raise CheckpointError(f"its records claim {total} bytes, but the file has {file_size}")
        roots = [name.partition("/")[0] for name in self._records if PurePosixPath(name).parts[1:] == ("data.pkl",)]
        if len(roots) != 1:
            raise CheckpointError(f"a torch archive has one NAME/data.pkl, this one has {len(roots)}; {_HINT}")
        self._root = roots[0]
        if f"{self._root}/constants.pkl" in self._records:
            raise CheckpointError(f"this is a TorchScript program, not a checkpoint; {_HINT}")
        order = self._records.get(f"{self._root}/byteorder")
        if order is not None and archive.read(order) != b"little":
            raise CheckpointError("was written on a big-endian machine; save it again on a little-endian one")

    def pickle(self) -> bytes:
        return self._archive.read(self._records[f"{self._root}/data.pkl"])

    def read(self, key: str) -> bytearray:
        record = self._records.get(f"{self._root}/data/{key}")
        if record is None:
            raise CheckpointError(f"storage {key:.50} is missing; the file is incomplete, copy it again")
        return bytearray(self._archive.read(record))


def _check_record(record: zipfile.ZipInfo) -> None:
    """Torch stores plain records with plain names; a path trick or a zip bomb needs something else."""
    name = record.filename
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in PurePosixPath(name).parts:
        raise CheckpointError(f"the archive has a record named {name!r:.100}, which no torch checkpoint has; {_HINT}")
    if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
        raise CheckpointError(f"the record {name!r:.100} is compressed; torch never compresses; {_HINT}")
    if record.flag_bits & _ENCRYPTED:
        raise CheckpointError(f"the record {name!r:.100} is encrypted; {_HINT}")


class _LegacyStorages:
    """The storages that follow the pickles: for each key, in the listed order, a count (int64) and the numbers."""

    def __init__(self, stream: mmap.mmap, described: dict[str, StorageRef]) -> None:
        self._stream = stream
        keys = _plain(stream)
        if not isinstance(keys, list) or not all(isinstance(key, str | int) for key in keys):
            raise CheckpointError("its list of storages is damaged; copy the file again")
        self._places: dict[str, tuple[int, int]] = {}
        position = stream.tell()
        for key in map(str, keys):
            if key not in described:
                raise CheckpointError(f"storage {key:.50} has a type that is not supported, or is never used")
            if position + 8 > len(stream):
                raise CheckpointError("ends before its storages do; the file is incomplete, copy it again")
            (numel,) = struct.unpack_from("<q", stream, position)
            storage = described[key]
            size = storage.dtype.itemsize * storage.numel
            if numel != storage.numel or position + 8 + size > len(stream):
                raise CheckpointError(
                    f"storage {key:.50} should have {storage.numel} numbers, has {numel}, and {len(stream) - position}"
                    " bytes are left; the file is incomplete, copy it again"
                )
            self._places[key] = position + 8, position + 8 + size
            position += 8 + size

    def read(self, key: str) -> bytearray:
        if key not in self._places:
            raise CheckpointError(f"storage {key:.50} is missing; the file is incomplete, copy it again")
        start, end = self._places[key]
        return bytearray(self._stream[start:end])


def _bytes_tensor(data: bytearray) -> torch.Tensor:
    """`data` as uint8 [len(data)], without a copy."""
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _legacy_header(stream: mmap.mmap) -> None:
    magic = _plain(stream)
    if magic != _LEGACY_MAGIC:
        raise CheckpointError(f"is a pickle, but not one written by torch.save; {_HINT}")
    protocol, system = _plain(stream), _plain(stream)
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise CheckpointError(f"has an unknown header; allowed is the protocol {_LEGACY_PROTOCOL}")
    if system.get("little_endian") is not True:
        raise CheckpointError("was written on a big-endian machine; save it again on a little-endian one")


def _plain(stream: mmap.mmap) -> Any:
    return RestrictedUnpickler(stream).load()  # type: ignore[arg-type]  # mmap has read, readline and tell


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        yield stream
