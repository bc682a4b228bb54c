"""What a restricted unpickler returns in place of objects, storages and tensors, and the checks on them."""

from dataclasses import dataclass
from typing import TypeGuard

import torch

from maple.errors import CheckpointError

MAX_ORIGIN = 120

DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
STORAGE_TYPES = {f"{module}.{name}": dtype for module in ("torch", "torch.cuda") for name, dtype in DTYPES.items()}

_SCALARS = (str, bytes, int, float, bool, type(None))


class Placeholder:
    """Stands, inert, for an object that only foreign code could build.

    Attributes:
        origin: the dotted name of the class or function that the file asked for.
    """

    __slots__ = ("origin",)

    def __init__(self, origin: str) -> None:
        self.origin = origin if len(origin) <= MAX_ORIGIN else origin[:MAX_ORIGIN] + "..."

    def __repr__(self) -> str:
        return f"Placeholder({self.origin!r})"


@dataclass(frozen=True, eq=False, slots=True)
class StorageRef:
    """Numbers kept elsewhere in the file: `numel` of `dtype`, from element `start` of storage `key`."""

    key: str
    dtype: torch.dtype
    numel: int
    start: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class TensorRef:
    """A strided view, checked to lie inside its storage."""

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def plain_key(value: object) -> object:
    """A dictionary key that is cheap to hash, whatever the file says."""
    if _is_plain(value) or (isinstance(value, tuple) and len(value) <= 8 and all(map(_is_plain, value))):
        return value
    if isinstance(value, Placeholder | TensorRef):  # an optimizer's state is keyed by its parameters
        return Placeholder("torch.Tensor") if isinstance(value, TensorRef) else value
    raise CheckpointError(f"its pickle has a dictionary key {brief(value)}; use strings or numbers")


def _is_plain(value: object) -> bool:
    return isinstance(value, _SCALARS) and not (isinstance(value, int) and abs(value) >= 2**64)


def tensor_view(storage: StorageRef, offset: object, size: object, stride: object) -> TensorRef:
    """A view of `storage`, or CheckpointError when any element of it would lie outside."""
    what = f"a tensor of storage {brief(storage.key)} with offset {brief(offset)}, size {brief(size)}"
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride) or len(size) > 64:
        raise CheckpointError(f"{what} and stride {brief(stride)} is malformed")
    if not all(is_count(number) for number in (offset, *size, *stride)):
        raise CheckpointError(f"{what} and stride {brief(stride)} has a number that is not a count")
    start = int(offset) if isinstance(offset, int) else 0
    numel, last = 1, start
    for length, step in zip(size, stride, strict=True):
        numel, last = numel * length, last + (length - 1) * step
    fits = numel <= storage.numel and last < storage.numel if numel else start <= storage.numel
    if not fits or max(size, default=0) > max(storage.numel, 2**31):
        raise CheckpointError(f"{what} and stride {brief(stride)} reaches beyond the {storage.numel} numbers stored")
    return TensorRef(storage, start, size, stride)


def storage_part(whole: StorageRef, view: object) -> StorageRef:
    """The part of a storage that a legacy file names `(key, offset, size)`."""
    match view:
        case (_, start, numel) if is_count(start) and is_count(numel) and start + numel <= whole.numel:
            return StorageRef(whole.key, whole.dtype, numel, start)
    raise CheckpointError(f"the view {brief(view)} reaches beyond its storage of {whole.numel} numbers")


def is_count(value: object) -> TypeGuard[int]:
    """Whether `value` is an integer (no bool) from 0 that torch can count with."""
    return type(value) is int and 0 <= value < 2**62


def brief(value: object) -> str:
    """A short text for an error; containers by their type, since their repr may be endless."""
    if isinstance(value, tuple) and len(value) <= 8 and all(type(item) is int for item in value):
        return f"{value!r:.100}"
    if _is_plain(value):
        return f"{value[:50] if isinstance(value, str | bytes) else value!r}"
    return repr(value) if isinstance(value, Placeholder) else f"a {type(value).__name__}"
