"""A pickle reader that cannot call anything: it knows tensors, numbers, strings and containers.

Published checkpoints pickle a live optimizer next to their tensors, so a list of allowed classes would refuse all of
them. This reader follows the opcodes itself, parsed by the standard library's `pickletools`, and has no instruction
that imports a module, looks up an attribute or calls a value: a global is a *name* here, and whatever the file would
build from it becomes a `Placeholder`.

The standard `pickle.Unpickler` with its `find_class` overridden is not enough, for three reasons. It hashes dictionary
keys in C without a depth check, so that a 3 MB file of nested tuples ends the process; BUILD calls or writes attributes
of whatever object it is given; and extension codes bypass `find_class` once cached.
"""

import pickletools
from dataclasses import dataclass
from typing import IO, Any, TypeGuard

import torch

from maple.errors import CheckpointError

MAX_OPCODES = 500_000  # a whole ViT-B/16 with its optimizer and scheduler needs about 25,000
MAX_ORIGIN = 120
# fmt: off
_STORED_TYPES = {
    "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Double": torch.float64,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}
# fmt: on
STORAGE_TYPES = {
    f"{module}.{name}Storage": dtype for module in ("torch", "torch.cuda") for name, dtype in _STORED_TYPES.items()
}
# fmt: off
_LITERALS = frozenset([
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
])
# fmt: on
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_SCALARS = (str, bytes, int, float, bool, type(None))


class Placeholder:
    """An inert stand-in for an object that only foreign code could build; `origin` names its class or function.

    Example:
        >>> read_checkpoint("model.pth.tar-5")["scheduler"]["successor"]
        Placeholder('torch.optim.lr_scheduler.CosineAnnealingLR')
    """

    __slots__ = ("origin",)

    def __init__(self, origin: str) -> None:
        self.origin = origin if len(origin) <= MAX_ORIGIN else origin[:MAX_ORIGIN] + "..."

    def __repr__(self) -> str:
        return f"Placeholder({self.origin!r})"


class ScriptObject(dict[Any, Any]):
    """The attributes of a TorchScript module, by name."""


@dataclass(frozen=True, eq=False, slots=True)
class StorageRef:
    """Numbers stored elsewhere in the file: `numel` of `dtype`, from element `start` of storage `key`."""

    key: str
    dtype: torch.dtype
    numel: int
    start: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class TensorRef:
    """A strided view that has been checked to stay inside its storage."""

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class RestrictedUnpickler:
    """Reads one pickle from `stream` (protocols 0 to 5) and leaves the stream just after it.

    Attributes:
        storages: every storage the pickle refers to, by key.
        ignored: the dotted names that were replaced by placeholders.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self.storages: dict[str, StorageRef] = {}
        self.ignored: set[str] = set()
        self._stream = stream
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # the stacks below each MARK
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Return the pickled value, with `TensorRef` for tensors and `Placeholder` for objects.

        Raises:
            CheckpointError: the pickle is malformed or too long.
        """
        for count, (opcode, arg, _) in enumerate(pickletools.genops(self._stream)):
            if count >= MAX_OPCODES:
                raise CheckpointError(f"its pickle has more than {MAX_OPCODES:,} instructions: not a checkpoint")
            if opcode.name == "STOP":
                return self._pop()
            self._follow(opcode.name, arg)
        raise CheckpointError("its pickle has no end; the file is incomplete, copy it again")

    def _follow(self, name: str, arg: Any) -> None:
        """Follow one opcode: here those that push, move or memoize a value."""
        stack = self._stack
        match name:
            case _ if name in _LITERALS:
                stack.append(bytes(arg) if isinstance(arg, bytearray) else arg)
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_SET":
                stack.append(Placeholder("builtins.set"))
            case "GLOBAL":
                stack.append(_global(*str(arg).split(" ", 1)))
            case "EXT1" | "EXT2" | "EXT4":
                stack.append(Placeholder(f"copyreg extension {arg}"))
            case "GET" | "BINGET" | "LONG_BINGET":
                if arg not in self._memo:
                    raise CheckpointError(f"its pickle reads memo entry {arg}, which was never written")
                stack.append(self._memo[arg])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[arg] = self._top()
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._top()
            case "MARK":
                self._outer.append(stack)
                self._stack = []
            case "POP_MARK":
                self._pop_mark()
            case "POP":
                self._pop() if stack else self._pop_mark()
            case "DUP":
                stack.append(self._top())
            case "PROTO":
                if arg > 5:
                    raise CheckpointError(f"its pickle has protocol {arg}; allowed are 0 to 5")
            case "FRAME":
                pass
            case _:
                self._push(self._combine(name, arg))

    def _combine(self, name: str, arg: Any) -> Any:
        """Make a value from others on the stack. Nothing is called: objects become placeholders."""
        match name:
            case "TUPLE":
                return tuple(self._pop_mark())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                return tuple([self._pop() for _ in range(_TUPLES[name])][::-1])
            case "LIST":
                return self._pop_mark()
            case "FROZENSET":
                self._pop_mark()
                return Placeholder("builtins.frozenset")
            case "DICT":
                return _with_items({}, self._pop_mark())
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = [self._pop()] if name == "APPEND" else self._pop_mark()
                return _extended(self._pop(), items)
            case "SETITEM" | "SETITEMS":
                items = [self._pop(), self._pop()][::-1] if name == "SETITEM" else self._pop_mark()
                return _with_items(self._pop(), items)
            case "BUILD":
                state, target = self._pop(), self._pop()
                # Attributes are never set, except that those of a TorchScript module are its parameters.
                if isinstance(target, ScriptObject) and isinstance(state, dict):
                    target.update(state)
                return target
            case "STACK_GLOBAL":
                attribute, module = self._pop(), self._pop()
                return _global(module, attribute)
            case "BINPERSID":
                return self._storage(self._pop())
            case "REDUCE":
                args, function = self._pop(), self._pop()
                return self._reduce(function, args)
            case "NEWOBJ" | "NEWOBJ_EX":
                for _ in range(1 if name == "NEWOBJ" else 2):
                    self._pop()
                return self._object(self._pop())
            case "INST":
                self._pop_mark()
                return self._object(_global(*str(arg).split(" ", 1)))
            case "OBJ":
                return self._object(next(iter(self._pop_mark()), None))
        raise CheckpointError(f"its pickle uses the instruction {name}, which torch.save never writes")

    def _storage(self, pid: object) -> object:
        """The storage that a persistent id `("storage", type, key, location, numel[, view])` refers to.

        The location ("cpu", "cuda:0") is not used: everything is read to the CPU. Before torch 1.6 the view could be a
        part of the storage, `(key, offset, size)`.
        """
        if isinstance(pid, tuple) and len(pid) >= 2 and pid[0] == "module":
            return self._object(pid[1])
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise CheckpointError(f"unknown persistent id {_brief(pid)}; a torch checkpoint refers to storages only")
        _, kind, key, _, numel, *view = pid
        if not isinstance(kind, Placeholder) or kind.origin not in STORAGE_TYPES:
            return self._object(kind)
        if not isinstance(key, str | int) or not _is_count(numel):
            raise CheckpointError(f"storage {_brief(key)} has the size {_brief(numel)}; a count is needed")
        dtype, known = STORAGE_TYPES[kind.origin], self.storages.get(str(key))
        if known is not None and (known.dtype, known.numel) != (dtype, numel):
            raise CheckpointError(f"storage {_brief(key)} is described in two ways")
        whole = self.storages.setdefault(str(key), StorageRef(str(key), dtype, numel))
        match view:
            case [] | [None]:
                return whole
            case [(_, start, count)] if _is_count(start) and _is_count(count) and start + count <= numel:
                return StorageRef(whole.key, dtype, count, start)
        raise CheckpointError(f"the view {_brief(view[0])} reaches beyond its storage of {numel} numbers")

    def _reduce(self, function: object, args: object) -> object:
        """The result of a call: of the few functions of torch that rebuild tensors, and a placeholder of any other."""
        origin = function.origin if isinstance(function, Placeholder) else None
        if not isinstance(args, tuple):
            raise CheckpointError(f"its pickle calls {_brief(function)} with {_brief(args)}; a tuple is needed")
        match origin, args:
            case (
                "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2",
                (StorageRef() as storage, offset, size, stride, *_),
            ):
                return _tensor_view(storage, offset, size, stride)
            case "torch._utils._rebuild_parameter", (TensorRef() as data, *_):
                return data
            case "torch._utils._rebuild_parameter_with_state", (TensorRef() as data, *_):
                return data
            case "collections.OrderedDict", ():
                return {}
            case "torch.Size", (tuple(size),):
                return size
        return self._object(function)

    def _object(self, source: object) -> Placeholder | ScriptObject:
        if not isinstance(source, Placeholder):
            raise CheckpointError(f"its pickle makes an object of {_brief(source)}; a class is needed")
        if source.origin.startswith("__torch__."):
            return ScriptObject()
        self.ignored.add(source.origin)
        return Placeholder(source.origin)

    def _push(self, value: Any) -> None:
        self._stack.append(value)  # not through a local name: `_pop_mark` replaces the stack

    def _top(self) -> Any:
        if not self._stack:
            raise CheckpointError("its pickle takes a value from an empty stack; the file is damaged")
        return self._stack[-1]

    def _pop(self) -> Any:
        self._top()
        return self._stack.pop()

    def _pop_mark(self) -> list[Any]:
        if not self._outer:
            raise CheckpointError("its pickle closes a group it never opened; the file is damaged")
        items, self._stack = self._stack, self._outer.pop()
        return items


def _global(module: object, name: object) -> Placeholder:
    """The name of a global, which is never looked up."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise CheckpointError(f"its pickle names a global {module!r:.50}.{name!r:.50}; names are strings")
    return Placeholder(f"{module}.{name}")


def _extended(target: object, items: list[Any]) -> object:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Placeholder):
        raise CheckpointError(f"its pickle appends to {_brief(target)}; only lists grow")
    return target


def _with_items(target: object, items: list[Any]) -> object:
    if len(items) % 2:
        raise CheckpointError("its pickle sets a dictionary key without a value")
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_plain_key(key)] = value
    elif not isinstance(target, Placeholder):
        raise CheckpointError(f"its pickle sets items of {_brief(target)}; only dictionaries have keys")
    return target


def _plain_key(value: object) -> object:
    """A dictionary key that is cheap to hash: nested tuples would overflow the C stack."""
    if _is_plain(value) or (isinstance(value, tuple) and len(value) <= 8 and all(map(_is_plain, value))):
        return value
    if isinstance(value, Placeholder | TensorRef):  # an optimizer's state is keyed by its parameters
        return Placeholder("torch.Tensor") if isinstance(value, TensorRef) else value
    raise CheckpointError(f"its pickle has a dictionary key {_brief(value)}; use strings or numbers")


def _is_plain(value: object) -> bool:
    return isinstance(value, _SCALARS) and not (isinstance(value, int) and abs(value) >= 2**64)


def _tensor_view(storage: StorageRef, offset: object, size: object, stride: object) -> TensorRef:
    """A view of `storage`; CheckpointError if any element of it would be outside."""
    view = f"a tensor of storage {_brief(storage.key)} with offset {_brief(offset)}, size {_brief(size)}"
    view += f" and stride {_brief(stride)}"
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride) or len(size) > 64:
        raise CheckpointError(f"{view} is malformed")
    if not _is_count(offset) or not all(map(_is_count, (*size, *stride))):
        raise CheckpointError(f"{view} has a number that is not a count")
    numel, last = 1, offset
    for length, step in zip(size, stride, strict=True):
        numel, last = numel * length, last + (length - 1) * step
    fits = numel <= storage.numel and last < storage.numel if numel else offset <= storage.numel
    if not fits or max(size, default=0) > max(storage.numel, 2**31):
        raise CheckpointError(f"{view} reaches beyond the {storage.numel} numbers stored")
    return TensorRef(storage, offset, size, stride)


def _is_count(value: object) -> TypeGuard[int]:
    """Whether `value` is an integer (not a bool) from 0 that torch can count with."""
    return type(value) is int and 0 <= value < 2**62


def _brief(value: object) -> str:
    """A short text for an error; containers by their type, since their repr may be endless."""
    if isinstance(value, tuple) and len(value) <= 8 and all(type(item) is int for item in value):
        return f"{value!r:.100}"
    if _is_plain(value):
        return f"{value[:50] if isinstance(value, str | bytes) else value!r}"
    return repr(value) if isinstance(value, Placeholder) else f"a {type(value).__name__}"
