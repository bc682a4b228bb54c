"""A pickle reader that cannot call anything: it knows tensors, numbers, strings and containers.

The published checkpoints pickle a live optimizer beside their tensors, so a list of allowed classes refuses
all of them. This reader follows the opcodes itself, parsed by the standard library's `pickletools`, and has
no instruction that imports a module, looks up an attribute or calls a value: a global is a *name* here, and
whatever the file would build from it becomes a `Placeholder`.

The standard `pickle.Unpickler` with its `find_class` overridden is not enough, for three reasons. It hashes
dictionary keys in C without a depth check, so that a 3 MB file of nested tuples ends the process; BUILD
calls or writes attributes of whatever object it is given; and extension codes bypass `find_class` once cached.
"""

import pickletools
from typing import IO, Any

from maple.archives.refs import (
    STORAGE_TYPES,
    Placeholder,
    StorageRef,
    TensorRef,
    brief,
    is_count,
    plain_key,
    storage_part,
    tensor_view,
)
from maple.errors import CheckpointError

MAX_OPCODES = 5_000_000  # a whole ViT-B/16 with its optimizer and scheduler needs about 25,000

# fmt: off
_LITERALS = frozenset([
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
])
# fmt: on
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class RestrictedUnpickler:
    """Reads one pickle from `stream` (protocols 0 to 5) and leaves the stream just behind it.

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
        """The pickled value, with `TensorRef` for tensors and `Placeholder` for objects.

        Raises:
            CheckpointError: the pickle is malformed or too long.
        """
        for count, (opcode, arg, _) in enumerate(pickletools.genops(self._stream)):
            if count >= MAX_OPCODES:
                raise CheckpointError(f"its pickle has more than {MAX_OPCODES:,} instructions: not a checkpoint")
            if opcode.name == "STOP":
                return self._pop()
            if not (self._push(opcode.name, arg) or self._rearrange(opcode.name, arg)):
                self._build(opcode.name, arg)
        raise CheckpointError("its pickle has no end; the file is incomplete, copy it again")

    def _push(self, name: str, arg: Any) -> bool:
        """Opcodes that put a value on the stack."""
        if name in _LITERALS:
            self._stack.append(bytes(arg) if isinstance(arg, bytearray) else arg)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name == "EMPTY_DICT":
            self._stack.append({})
        elif name == "EMPTY_LIST":
            self._stack.append([])
        elif name == "EMPTY_SET":
            self._stack.append(Placeholder("builtins.set"))
        elif name == "GLOBAL":
            module, _, attribute = str(arg).partition(" ")
            self._stack.append(self.find_class(module, attribute))
        elif name in ("EXT1", "EXT2", "EXT4"):
            self._stack.append(Placeholder(f"copyreg extension {arg}"))
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            if arg not in self._memo:
                raise CheckpointError(f"its pickle reads memo entry {arg}, which was never written")
            self._stack.append(self._memo[arg])
        else:
            return False
        return True

    def _rearrange(self, name: str, arg: Any) -> bool:
        """Opcodes that move values, or write them into the memo."""
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[arg] = self._top()
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif name == "MARK":
            self._outer.append(self._stack)
            self._stack = []
        elif name == "POP_MARK" or (name == "POP" and not self._stack):
            self._pop_mark()
        elif name == "POP":
            self._pop()
        elif name == "DUP":
            self._stack.append(self._top())
        elif name == "PROTO":
            if arg > 5:
                raise CheckpointError(f"its pickle has protocol {arg}; allowed are 0 to 5")
        elif name != "FRAME":
            return False
        return True

    def _build(self, name: str, arg: Any) -> None:
        """Opcodes that make a value of others. None of them calls anything."""
        if name == "TUPLE":
            items = self._pop_mark()  # replaces the stack, so it comes before the append
            self._stack.append(tuple(items))
        elif name in _TUPLES:
            items = [self._pop() for _ in range(_TUPLES[name])]
            self._stack.append(tuple(reversed(items)))
        elif name in ("LIST", "FROZENSET"):
            items = self._pop_mark()
            self._stack.append(items if name == "LIST" else Placeholder("builtins.frozenset"))
        elif name == "DICT":
            items = self._pop_mark()
            self._stack.append({})
            self._set_items(items)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            self._extend([self._pop()] if name == "APPEND" else self._pop_mark())
        elif name in ("SETITEM", "SETITEMS"):
            self._set_items([self._pop(), self._pop()][::-1] if name == "SETITEM" else self._pop_mark())
        elif name == "BUILD":
            self._pop()  # a state: attributes are never set
            self._top()
        elif name == "STACK_GLOBAL":
            attribute, module = self._pop(), self._pop()
            self._stack.append(self.find_class(module, attribute))
        elif name == "BINPERSID":
            self._stack.append(self.persistent_load(self._pop()))
        else:
            self._construct(name, arg)

    def _construct(self, name: str, arg: Any) -> None:
        """Opcodes by which a pickle runs code: a few names of torch are understood, the rest stays inert."""
        if name == "REDUCE":
            args, function = self._pop(), self._pop()
            self._stack.append(self._reduce(function, args))
        elif name in ("NEWOBJ", "NEWOBJ_EX"):
            for _ in range(1 if name == "NEWOBJ" else 2):
                self._pop()
            self._stack.append(self._inert(self._pop()))
        elif name == "INST":
            self._pop_mark()
            self._stack.append(self._inert(self.find_class(*str(arg).split(" ", 1))))
        elif name == "OBJ":
            items = self._pop_mark()
            self._stack.append(self._inert(items[0] if items else None))
        else:
            raise CheckpointError(f"its pickle uses the instruction {name}, which no torch checkpoint has")

    def find_class(self, module: object, name: object) -> Placeholder:
        """The name of a global. It is never looked up."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise CheckpointError(f"its pickle names a global {module!r:.50}.{name!r:.50}; names are strings")
        return Placeholder(f"{module}.{name}")

    def persistent_load(self, pid: object) -> object:
        """The storage that a persistent id `("storage", type, key, location, numel[, view])` refers to.

        The location ("cpu", "cuda:0") is not used: everything is read to the CPU.
        """
        if isinstance(pid, tuple) and len(pid) >= 2 and pid[0] == "module":
            return self._inert(pid[1])
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise CheckpointError(f"unknown persistent id {brief(pid)}; a torch checkpoint refers to storages only")
        _, kind, key, _, numel, *view = pid
        if not isinstance(kind, Placeholder) or kind.origin not in STORAGE_TYPES:
            return self._inert(kind)
        if not isinstance(key, str | int) or not is_count(numel):
            raise CheckpointError(f"storage {brief(key)} has the size {brief(numel)}; a count is needed")
        dtype, known = STORAGE_TYPES[kind.origin], self.storages.get(str(key))
        if known is not None and (known.dtype, known.numel) != (dtype, numel):
            raise CheckpointError(f"storage {brief(key)} is described in two ways")
        whole = self.storages.setdefault(str(key), StorageRef(str(key), dtype, numel))
        return whole if not view or view[0] is None else storage_part(whole, view[0])

    def _reduce(self, function: object, args: object) -> object:
        origin = function.origin if isinstance(function, Placeholder) else None
        if not isinstance(args, tuple):
            raise CheckpointError(f"its pickle calls {brief(function)} with {brief(args)}; a tuple is needed")
        match origin, args:
            case (
                ("torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2"),
                (
                    StorageRef() as storage,
                    offset,
                    size,
                    stride,
                    *_,
                ),
            ):
                return tensor_view(storage, offset, size, stride)
            case (
                ("torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state"),
                (
                    TensorRef() as data,
                    *_,
                ),
            ):
                return data
            case "collections.OrderedDict", ():
                return {}
            case "torch.Size", (tuple(size),):
                return size
            case _:
                return self._inert(function)

    def _inert(self, source: object) -> Placeholder:
        if not isinstance(source, Placeholder):
            raise CheckpointError(f"its pickle makes an object of {brief(source)}; a class is needed")
        self.ignored.add(source.origin)
        return Placeholder(source.origin)

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Placeholder):
            raise CheckpointError(f"its pickle appends to {brief(target)}; only lists grow")

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        if len(items) % 2:
            raise CheckpointError("its pickle sets a dictionary key without a value")
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[plain_key(key)] = value
        elif not isinstance(target, Placeholder):
            raise CheckpointError(f"its pickle sets items of {brief(target)}; only dictionaries have keys")

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
