"""Torch's file formats: the zip archive, its TorchScript variant, and the plain stream of pickles before torch 1.6."""

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
from torch import Tensor

from maple import files
from maple.archives.unpickle import Placeholder, RestrictedUnpickler, StorageRef, TensorRef
from maple.errors import CheckpointError, UnsafeCheckpointError, pointer_problem

_ZIP_START = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_DEPTH = 60
_MAX_ATTRIBUTES = 100_000  # of the modules of a TorchScript archive; a large CLIP has a few thousand
_MOST_RECORDS = 50_000  # of an archive; the largest CLIP with its optimizer has a tenth of it
_LARGEST_PART = 64 * 1024**2
_ENCRYPTED = 0x1
_BLOCK = 1024**2
_HINT = "give a file written by torch.save"

_MALFORMED = (
    zipfile.BadZipFile,
    struct.error,
    ValueError,  # includes UnicodeDecodeError
    TypeError,
    LookupError,
    OverflowError,
    MemoryError,
    EOFError,
    RuntimeError,  # torch's, zipfile's for encryption, RecursionError and NotImplementedError
    AttributeError,
    DeprecationWarning,  # a bad escape in a name, where warnings are errors
)


def _zip_bytes(path: str | os.PathLike[str]) -> files.ZipBytes:
    return files.ZipBytes(path, records=_MOST_RECORDS, largest=_LARGEST_PART)


class _Storages(Protocol):
    def read(self, key: str) -> Tensor:
        """The bytes of a whole storage, uint8."""


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a torch checkpoint without running anything that it contains.

    Tensors keep their dtype and come to the CPU, sharing storages as they did in the file. Numbers, strings, bytes,
    lists, tuples and dictionaries are rebuilt. Every other object (an optimizer, a scheduler, a NumPy scalar, a set)
    becomes a `Placeholder`; the module that it names is neither imported nor looked up.

    The file is a zip archive of `torch.save`, or of its format before torch 1.6.

    Raises:
        CheckpointError: the file cannot be read, is damaged, is not a torch checkpoint, or has a tensor that does not
            fit its storage.
        UnsafeCheckpointError: the whole content would come from running code that the file names.

    Example:
        >>> read_checkpoint("model.pth.tar-5").keys()
        dict_keys(['state_dict', 'epoch', 'optimizer', 'scheduler', 'val_result'])

    Source: KaiyangZhou/Dassl.pytorch@c61a1b5:dassl/utils/torchtools.py (`save_checkpoint`); departs from its
        `torch.load`, which runs whatever the file names.
    """
    return read_with_ignored(path)[0]


def read_with_ignored(path: str | os.PathLike[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`read_checkpoint`, and the sorted names of the classes and functions left out."""
    with _errors_named(Path(path)):
        return _read(Path(path), torchscript=False)


def read_torchscript(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the parameters and buffers of a TorchScript archive on the CPU; its code is neither run nor compiled.

    The names are those of `torch.jit.load(path).state_dict()`.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or is not a TorchScript archive.

    Example:
        >>> read_torchscript("ViT-B-16.pt")["visual.conv1.weight"].shape
        torch.Size([768, 3, 16, 16])
    """
    with _errors_named(Path(path)):
        modules: list[tuple[str, dict[str, Any]]] = [("", _read(Path(path), torchscript=True)[0])]
        state: dict[str, Tensor] = {}
        count = 0
        while modules:
            prefix, attributes = modules.pop()
            state |= {f"{prefix}{name}": value for name, value in attributes.items() if isinstance(value, Tensor)}
            modules += [(f"{prefix}{name}.", value) for name, value in attributes.items() if isinstance(value, dict)]
            # Modules may be shared, so a small file can describe an exponentially large tree.
            count += 1 + len(attributes)
            if count > _MAX_ATTRIBUTES:
                raise CheckpointError(f"its modules have more than {_MAX_ATTRIBUTES:,} attributes")
        return state


def is_torchscript(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a TorchScript archive, the form in which OpenAI publishes its models."""
    try:
        with _zip_bytes(path) as file, zipfile.ZipFile(file) as archive:
            return any(PurePosixPath(name).parts[1:] == ("constants.pkl",) for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Raise whatever goes wrong as a CheckpointError that begins with `path`."""
    try:
        yield
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); {_HINT}") from error
    except _MALFORMED as error:
        reason = f"{type(error).__name__}: {error!s:.200}"
        raise CheckpointError(f"{path}: damaged or not a torch checkpoint ({reason}); {_HINT}") from error


def _read(path: Path, *, torchscript: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The dictionary in the file, and the sorted names of what was left out of it."""
    with _zip_bytes(path) as file:
        start = file.read(512)
        if start.startswith(_ZIP_START):
            with zipfile.ZipFile(file) as archive:
                zipped = _ZipStorages(archive, path.stat().st_size)
                if zipped.is_torchscript != torchscript:
                    given, wanted = ("checkpoint", "TorchScript program")[:: -1 if zipped.is_torchscript else 1]
                    raise CheckpointError(f"this is a {given}, not a {wanted}; {_HINT}")
                unpickler = RestrictedUnpickler(io.BytesIO(zipped.pickle()))
                return _Builder(zipped).build(_checked_root(unpickler.load())), tuple(sorted(unpickler.ignored))
        if not start:
            raise CheckpointError(f"the file is empty; {_HINT}")
        if problem := pointer_problem(start):
            raise CheckpointError(f"it is {problem}")
        if start[:1] != b"\x80":
            problem = f"is not a torch checkpoint (it begins with {start[:16]!r})"
            raise CheckpointError(f"{problem}: was an error page saved? {_HINT}")
        # Mapped, not read from the file: a length that a hostile pickle claims is then never allocated.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
            _check_legacy_header(stream)
            unpickler = RestrictedUnpickler(stream)  # type: ignore[arg-type]  # mmap has read, readline and tell
            root = _checked_root(unpickler.load())
            legacy = _LegacyStorages(stream, unpickler.storages)
            return _Builder(legacy).build(root), tuple(sorted(unpickler.ignored))


def _checked_root(value: object) -> dict[str, Any]:
    if isinstance(value, Placeholder):
        raise UnsafeCheckpointError(f"its content would come from running {value.origin}; nothing was run. {_HINT}")
    if not isinstance(value, dict):
        raise CheckpointError(f"holds a value of type {type(value).__name__}; a checkpoint is a dictionary; {_HINT}")
    return value


class _Builder:
    """Replaces the references of an unpickled value by tensors; what the file shares stays shared."""

    def __init__(self, storages: _Storages) -> None:
        self._storages = storages
        self._bytes: dict[str, Tensor] = {}
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
            if isinstance(value, dict):
                self._done[id(value)] = {key: self.build(item, depth + 1) for key, item in value.items()}
            else:
                self._done[id(value)] = type(value)(self.build(item, depth + 1) for item in value)
            self._open.remove(id(value))
        return self._done[id(value)]

    def _tensor(self, ref: TensorRef) -> Tensor:
        storage = ref.storage
        if 0 in ref.size:
            return torch.empty(ref.size, dtype=storage.dtype)
        if storage.key not in self._bytes:
            self._bytes[storage.key] = self._storages.read(storage.key)
        raw, width = self._bytes[storage.key], storage.dtype.itemsize
        end = (storage.start + storage.numel) * width
        if end > len(raw):
            problem = f"storage {storage.key:.50} has {len(raw)} bytes"
            raise CheckpointError(f"{problem}, but {end} are needed; copy the file again")
        part = raw[storage.start * width : end]
        flat = part.ne(0) if storage.dtype is torch.bool else part.view(storage.dtype)
        stride = tuple(step if length > 1 else 1 for length, step in zip(ref.size, ref.stride, strict=True))
        return flat.as_strided(ref.size, stride, flat.storage_offset() + ref.offset)


class _ZipStorages:
    """The records `NAME/data.pkl` and `NAME/data/KEY` of a torch archive; nothing is extracted to disk."""

    def __init__(self, archive: zipfile.ZipFile, file_size: int) -> None:
        self._archive = archive
        self._records: dict[str, zipfile.ZipInfo] = {}
        for record in archive.infolist():
            name = record.filename
            if name.startswith("/") or "\\" in name or "\0" in name or ".." in PurePosixPath(name).parts:
                problem = f"the archive has a record named {name!r:.100}"
                raise CheckpointError(f"{problem}, which no torch checkpoint has; {_HINT}")
            if PurePosixPath(name).parts[1:2] == ("code",):
                continue  # of a TorchScript archive; never read
            # Torch stores tensors as they are; a zip bomb needs compression, or records that overlap.
            if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
                raise CheckpointError(f"the record {name!r:.100} is compressed; torch never compresses; {_HINT}")
            if record.flag_bits & _ENCRYPTED:
                raise CheckpointError(f"the record {name!r:.100} is encrypted; {_HINT}")
            if name in self._records:
                raise CheckpointError(f"the archive has two records {name!r:.100}; {_HINT}")
            self._records[name] = record
        total = sum(record.file_size for record in self._records.values())
        if total > file_size:
            raise CheckpointError(f"its records claim {total} bytes, but the file has {file_size}")
        roots = [name.partition("/")[0] for name in self._records if PurePosixPath(name).parts[1:] == ("data.pkl",)]
        if len(roots) != 1:
            raise CheckpointError(f"a torch archive has one NAME/data.pkl, this one has {len(roots)}; {_HINT}")
        self._root = roots[0]
        self.is_torchscript = f"{self._root}/constants.pkl" in self._records
        order = self._records.get(f"{self._root}/byteorder")
        if order is not None and archive.read(order) != b"little":
            raise CheckpointError("was written on a big-endian machine; save it again on a little-endian one")

    def pickle(self) -> bytes:
        return self._archive.read(self._records[f"{self._root}/data.pkl"])

    def read(self, key: str) -> Tensor:
        record = self._records.get(f"{self._root}/data/{key}")
        if record is None:
            raise CheckpointError(f"storage {key:.50} is missing; the file is incomplete, copy it again")
        # Block by block into memory that torch aligned: a model can keep the tensor, and no second copy exists.
        data = torch.empty(record.file_size, dtype=torch.uint8)
        view, done = data.numpy().data, 0
        with self._archive.open(record) as file:
            while block := file.read(_BLOCK):
                view[done : done + len(block)] = block
                done += len(block)
        return data


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

    def read(self, key: str) -> Tensor:
        if key not in self._places:
            raise CheckpointError(f"storage {key:.50} is missing; the file is incomplete, copy it again")
        start, end = self._places[key]
        data = torch.empty(end - start, dtype=torch.uint8)
        with memoryview(self._stream) as whole, whole[start:end] as part:
            data.numpy().data[:] = part
        return data


def _check_legacy_header(stream: mmap.mmap) -> None:
    magic = _plain(stream)
    if magic != _LEGACY_MAGIC:
        made = f" (it would run {magic.origin}; nothing was run)" if isinstance(magic, Placeholder) else ""
        raise CheckpointError(f"is a pickle, but not one written by torch.save{made}; {_HINT}")
    protocol, system = _plain(stream), _plain(stream)
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise CheckpointError(f"has an unknown header; allowed is the protocol {_LEGACY_PROTOCOL}")
    if system.get("little_endian") is not True:
        raise CheckpointError("was written on a big-endian machine; save it again on a little-endian one")


def _plain(stream: mmap.mmap) -> Any:
    return RestrictedUnpickler(stream).load()  # type: ignore[arg-type]  # mmap has read, readline and tell
