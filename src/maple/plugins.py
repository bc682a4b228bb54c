"""Classes and descriptions from outside the package: of installed packages, and of single files.

An installed package was chosen by whoever installed it; its entry points are imported when they are named. A file is
run only if this user has named it, or has accepted it: `trust_code` keeps its content under a hash in
`$XDG_STATE_HOME/maple/code`, which may be deleted at any time, and returns a name with this hash, FILE.py:CLASS@HASH.
Wherever such a name is read from, it can only refer to code that was accepted.
"""

import logging
import re
import sys
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from maple import files
from maple.errors import ConfigError, MapleError, UntrustedCodeError, first_line, one_of, shortened
from maple.places import state_folder

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

logger = logging.getLogger(__name__)

T = TypeVar("T")

_DIGITS = 32  # of SHA-256, in hex: 128 bits
_CODE_NAME = re.compile(rf"(?P<file>\w[\w.-]*\.py):(?P<attribute>[A-Za-z_]\w*)@(?P<digest>[0-9a-f]{{{_DIGITS}}})")
_LARGEST = 1024**2
_accepted: dict[str, bytes] = {}
"""The content of files that were accepted in this process, by hash; also where nothing can be written."""
_modules: dict[str, ModuleType] = {}


class Registry(MutableMapping[str, T], Generic[T]):
    """What a package has by name; what installed packages add by entry points; what is added by assignment.

    Names of the package itself come first, and no entry point replaces them. An entry point is imported when its name
    is looked up; in `items` and `values`, those that cannot be imported are left out, with a warning.

    Args:
        group: of the entry points.
        noun: what messages call one of these.
        builtin: those of the package.
        check: returns what an entry point, or the class of an accepted file, has to be; ConfigError for anything else.

    Example:
        >>> METHODS = Registry("maple.methods", "method", {"coop": CoOp}, check_method_class)
        >>> METHODS["acme_prompts"].title  # of an installed package
        'Acme prompts'
    """

    def __init__(self, group: str, noun: str, builtin: Mapping[str, T], check: Callable[[str, object], T]) -> None:
        self.group, self.noun = group, noun
        self._known = dict(builtin)
        self._check = check
        self._warned: set[str] = set()

    def __getitem__(self, name: str) -> T:
        if name not in self._known:
            if (entry := _entry_points(self.group).get(name)) is not None:
                source = f"the {self.noun} {name!r} of the package {entry.dist.name if entry.dist else entry.module}"
                try:
                    loaded = entry.load()
                except Exception as error:
                    raise ConfigError(
                        f"{source} cannot be imported: {type(error).__name__}: {first_line(error)}; repair or remove "
                        "the package"
                    ) from error
            elif is_code_name(name):
                source, loaded = f"the {self.noun} {short_code_name(name)}", load_code(name)
            elif is_code_path(name):
                raise UntrustedCodeError(
                    f"{shortened(name)!r} names code without a hash of its content, so that it could be any; name the "
                    f"file yourself: {self.noun}=PATH/FILE.py:CLASS"
                )
            else:
                raise KeyError(name)
            self._known[name] = self._check(source, loaded)
        return self._known[name]

    def __setitem__(self, name: str, value: T) -> None:
        self._known[name] = self._check(f"the {self.noun} {name}", value)

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._known or name in _entry_points(self.group)

    def __iter__(self) -> Iterator[str]:
        known = [name for name in self._known if not is_code_name(name)]
        return iter([*known, *(name for name in _entry_points(self.group) if name not in self._known)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def items(self) -> ItemsView[str, T]:
        loaded: dict[str, T] = {}
        for name in self:
            try:
                loaded[name] = self[name]
            except ConfigError as error:
                if name not in self._warned:
                    self._warned.add(name)
                    logger.warning("%s", error)
        return loaded.items()

    def values(self) -> Any:
        return dict(self.items()).values()

    def name_of(self, value: T) -> str | None:
        """The name of one of these, also of a class of an accepted file; None if it has none."""
        return next((name for name, known in self._known.items() if known is value), None)

    def find(self, name: object, also: str = "") -> T:
        """The one of this name; ConfigError, with all names and `also`, if there is none."""
        named = self.get(name) if isinstance(name, str) else None
        if named is None:
            raise ConfigError(one_of(self.noun, name, self, also))
        return named


@lru_cache
def _entry_points(group: str) -> "dict[str, EntryPoint]":
    """The entry points of a group by name; of several with one name, the first by its place."""
    from importlib.metadata import entry_points  # slow to import, and not needed for what the package has itself

    entries: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=group), key=lambda entry: (entry.name, entry.value)):
        if not re.fullmatch(r"\w[\w-]*", entry.name):
            logger.warning("the entry point %r of %s is not of letters, digits, - and _ alone", entry.name, group)
        elif entry.name in entries:
            logger.warning("%s of %s is an entry point of several packages; the first is used", entry.name, group)
        else:
            entries[entry.name] = entry
    return entries


def is_code_name(name: str) -> bool:
    """Whether this is the name of a class in an accepted file, FILE.py:CLASS@HASH."""
    return _CODE_NAME.fullmatch(name) is not None


def is_code_path(name: str) -> bool:
    """Whether this names a class in a file of Python, PATH/FILE.py:CLASS, with or without a hash.

    Example:
        >>> is_code_path("methods/shift.py:Shift"), is_code_path("maple")
        (True, False)
    """
    path, _, attribute = name.rpartition(":")
    return path.endswith(".py") and attribute.partition("@")[0].isidentifier()


def code_files(settings: Mapping[str, Any]) -> dict[str, str]:
    """{FILE.py:CLASS@HASH: FILE.py} of a method's settings: of its own name, and of methods whose prompts it trains.

    Example:
        >>> code_files({"name": "dept", "base_method": "shift.py:Shift@5f0a6c1d8be24d0c9a77e1f20f6a3b52"})
        {'shift.py:Shift@5f0a6c1d8be24d0c9a77e1f20f6a3b52': 'shift.py'}
    """
    names, tables = set(), [settings]
    while tables:  # files of others may nest them deeper than Python calls may be
        for value in tables.pop().values():
            if isinstance(value, Mapping):
                tables.append(value)
            elif isinstance(value, str) and is_code_name(value):
                names.add(value)
    return {name: name.partition(":")[0] for name in sorted(names)}


def require_distinct_files(settings: Mapping[str, Any]) -> None:
    """Require that the files of a method's settings can be kept in one folder, next to its prompts.

    Raises:
        ConfigError: two of them have the same name and other content.
    """
    kept: dict[str, str] = {}
    for name, file in code_files(settings).items():
        first = kept.setdefault(file.casefold(), name)
        if first.partition("@")[2] != name.partition("@")[2]:
            raise ConfigError(
                f"{short_code_name(first)} and {short_code_name(name)} are from different files of one name, and both "
                "are kept next to the prompts; rename one of them"
            )


def short_code_name(name: str) -> str:
    """FILE.py:CLASS of FILE.py:CLASS@HASH; any other name as it is."""
    return name.partition("@")[0] if is_code_name(name) else name


def code_title(name: str) -> str:
    """How reports call a class that they do not load, "Shift (shift.py)"; any other name as it is."""
    file, _, attribute = short_code_name(name).rpartition(":")
    return f"{attribute} ({file})" if file else name


def trust_code(name: str) -> str:
    """Accept the file of PATH/FILE.py:CLASS, so that it may be run from now on, and return FILE.py:CLASS@HASH.

    Nothing is run yet. Any other name, also one with a hash, is returned as it is.

    Raises:
        ConfigError: there is no such file, or it is not Python text, or too large.

    Example:
        >>> trust_code("methods/shift.py:Shift")
        'shift.py:Shift@5f0a6c1d8be24d0c9a77e1f20f6a3b52'
    """
    path_text, _, attribute = name.rpartition(":")
    if "@" in attribute or not is_code_path(name):
        return name
    path = Path(path_text).expanduser()
    try:
        content = files.regular(path).read_bytes()
        content.decode()
    except FileNotFoundError as error:
        raise ConfigError(f"{name}: there is no file {path}; give PATH/FILE.py:CLASS") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {path} cannot be read as Python text: {error}") from error
    if len(content) > _LARGEST:
        raise ConfigError(f"{name}: {path} has {len(content):,} bytes; give a file of at most {_LARGEST:,}")
    named = f"{path.name}:{attribute}@{_digest(content)}"
    if not is_code_name(named):
        raise ConfigError(f"{name}: the name {path.name!r} must be of letters, digits, points, - and _")
    accept_code(content)
    return named


def code_of(name: str) -> bytes | None:
    """The content of the file of FILE.py:CLASS@HASH, if it was accepted here; None for other names and content."""
    matched = _CODE_NAME.fullmatch(name)
    if matched is None:
        return None
    digest = matched["digest"]
    if digest not in _accepted and (folder := _folder()) is not None:
        with suppress(OSError):
            content = files.regular(folder / f"{digest}.py").read_bytes()
            if _digest(content) == digest:
                _accepted[digest] = content
    return _accepted.get(digest)


def accepted_code(methods: Iterable[Mapping[str, Any]]) -> tuple[bytes, ...]:
    """The files that methods with these settings need, as far as they were accepted here, for another process.

    Example:
        >>> for content in accepted_code([settings.method]):  # there
        ...     accept_code(content)
    """
    names = sorted({name for settings in methods for name in code_files(settings)})
    return tuple(content for content in map(code_of, names) if content is not None)


def require_code(name: str, folder: Path, source: str, *, trust: bool) -> None:
    """Require that the code of FILE.py:CLASS@HASH was accepted; with `trust`, accept the file in `folder`.

    Raises:
        UntrustedCodeError: it was not; the message has the ways to continue.
    """
    matched = _CODE_NAME.fullmatch(name)
    if matched is None or code_of(name) is not None:
        return
    path = folder / matched["file"]
    try:
        content: bytes | None = files.regular(path).read_bytes()
    except OSError:
        content = None
    if content is None:
        raise UntrustedCodeError(
            f"{source} needs the code {shortened(name)!r}, and there is no {path}; get the file from whoever made "
            "this, and put it there"
        )
    if _digest(content) != matched["digest"]:
        raise UntrustedCodeError(
            f"{source} needs the code {shortened(name)!r}, but {path} has other content (hash {_digest(content)}); get "
            "the file that it was made with"
        )
    if not trust:
        raise UntrustedCodeError(
            f"{source} needs code that was never named here: {path}; read it, since it can do whatever you can, and "
            "accept it with trust_code=True"
        )
    accept_code(content)


def load_code(name: str) -> object:
    """The class FILE.py:CLASS@HASH; its file is run the first time.

    Raises:
        UntrustedCodeError: the file was never accepted here.
        ConfigError: it cannot be run, or has no such class.
    """
    content, matched = code_of(name), _CODE_NAME.fullmatch(name)
    if content is None or matched is None:
        raise UntrustedCodeError(
            f"the code {shortened(name)!r} was never named here; name its file: method=PATH/FILE.py:CLASS"
        )
    module_name = f"maple_code_{matched['digest']}"
    if module_name not in _modules:
        folder = _folder()
        module = ModuleType(module_name)
        module.__file__ = str((folder or Path()) / f"{matched['digest']}.py")
        sys.modules[module_name] = module  # where pydantic looks for the names in annotations
        try:
            exec(compile(content, module.__file__, "exec"), module.__dict__)
        except Exception as error:
            del sys.modules[module_name]
            advice = "; a file is imported alone: for several modules, make a package with an entry point"
            raise ConfigError(
                f"{matched['file']} cannot be imported: {type(error).__name__}: {first_line(error)}"
                + (advice if isinstance(error, ImportError) else "")
            ) from error
        _modules[module_name] = module
    value: object = getattr(_modules[module_name], matched["attribute"], None)
    if value is None:
        kinds = [key for key, kind in vars(_modules[module_name]).items() if _is_defined_in(kind, module_name)]
        raise ConfigError(one_of(f"class of {matched['file']}", matched["attribute"], kinds))
    return value


def _is_defined_in(value: object, module: str) -> bool:
    return isinstance(value, type) and value.__module__ == module


def accept_code(content: bytes) -> None:
    """Accept the content of a file, for a process that works on behalf of one that has accepted it."""
    digest = _digest(content)
    _accepted[digest] = content
    # Without a home that can be written to, it counts in this process alone.
    with suppress(OSError, MapleError):
        if (folder := _folder()) is not None and not (folder / f"{digest}.py").exists():
            folder.mkdir(parents=True, exist_ok=True)
            with files.replacing(folder / f"{digest}.py") as temporary:
                temporary.write_bytes(content)


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()[:_DIGITS]


def _folder() -> Path | None:
    state = state_folder()
    return None if state is None else state / "code"
