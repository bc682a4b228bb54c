"""The package's errors: each message names the value, what is allowed, and what to do."""

import difflib
import os
import re
from collections.abc import Iterable
from contextlib import suppress

_FEW_NAMES = 6


class MapleError(Exception):
    """Base of every error that maple raises on purpose; the command line prints it without a traceback.

    Example::

        try:
            fit(fit_settings("flowers"), Path("runs/flowers"))
        except MapleError as error:
            print(error)
    """


class ConfigError(MapleError):
    """A setting is unknown, of the wrong type, or outside its range."""


class BusyError(ConfigError):
    """Another process is working in the same folder."""


class BackboneError(MapleError):
    """A CLIP cannot be found, read or recognised."""


class UntrustedBackboneError(BackboneError):
    """A file names a CLIP that is neither published nor was ever given by the user; it was not loaded."""


class UntrustedCodeError(MapleError):
    """A file needs code from outside the package that the user has never named or accepted; it was not run."""


class BackboneDownloadError(BackboneError):
    """The weights of a CLIP cannot be downloaded."""


class UnsupportedTowerError(BackboneError):
    """A method needs prompts in a tower that cannot take them (a ResNet, a timm tower)."""


class ClassNamesError(MapleError):
    """A list of class names is empty, malformed, too long for the text tower, or does not fit the method."""


class UnlearnedClassesError(ClassNamesError):
    """A method is given a class that it was not trained on, and cannot predict such classes."""


class DataError(MapleError):
    """A data set, split file, folder or item list is missing or malformed."""


class ColumnError(DataError):
    """A table does not have the column that was named."""


class ImageError(DataError):
    """One image cannot be used; the message begins with its path."""


class DownloadError(DataError):
    """A file cannot be downloaded, differs from the published one, or its archive is unsafe."""


class CheckpointError(MapleError):
    """A prompts file is unreadable, incomplete, or belongs to another backbone or configuration."""


class UnsafeCheckpointError(CheckpointError):
    """A pickle refers to code that a checkpoint of tensors never needs; nothing of it was executed."""


class ExportError(MapleError):
    """A method cannot be exported to a format, or the export does not compute the same."""


class TrainingDivergedError(MapleError):
    """The loss or a gradient stopped being finite."""


def one_of(kind: str, value: object, allowed: Iterable[object], also: str = "") -> str:
    """The message that `value` is not a known one of this kind, with the known ones and the nearest of many."""
    names = [str(item) for item in allowed]
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(str(value)[:100].casefold(), folded, n=2) if len(names) > _FEW_NAMES else []
    hint = f" (did you mean {' or '.join(folded[name] for name in near)}?)" if near else ""
    return f"unknown {kind} {shortened(repr(value))}; choose one of: {', '.join(names)}{also}{hint}"


def output_error(problem: str, also: str = "") -> ConfigError:
    """The error for an output folder or file that cannot be used; it advises to choose another output."""
    return ConfigError(f"{problem}; choose another output{also}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class if that is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def visible(text: str, instead: str | None = None) -> str:
    """An untrusted text with `instead`, or else their escape sequences, for characters that cannot be printed."""

    def escaped(character: str) -> str:
        return character.encode("unicode_escape").decode("ascii") if instead is None else instead

    return "".join(character if character.isprintable() else escaped(character) for character in text)


def shortened(text: str, most: int = 120) -> str:
    """A text for a message: its first `most` characters, if there are more."""
    return text if len(text) <= most else text[:most] + "..."


def shortened_list(items: Iterable[object], most: int = 3, *, separator: str = ", ", longest: int = 60) -> str:
    """The first `most` items for a message, long ones cut in the middle: "a, b, c and 4 more"."""
    texts = [str(item) for item in items]
    half = (longest - 3) // 2
    shown = (text if len(text) <= longest else f"{text[:half]}...{text[-half:]}" for text in texts[:most])
    return separator.join(shown) + (f" and {len(texts) - most:,} more" if len(texts) > most else "")


DVC_POINTER = "a DVC pointer; fetch the file itself with `dvc pull`"


def pointer_problem(start: bytes) -> str | None:
    """What a file is, and how to fetch its content, if its first bytes say that it only names content kept elsewhere.

    The message completes "is ..."; None for all other files.
    """
    if start.startswith((b"version https://git-lfs", b"version https://hawser", b"version http://git-media")):
        return "a git-lfs pointer; fetch the file itself with `git lfs pull`"
    if re.match(rb"[./\\]*(\.git[/\\])?annex[/\\]objects[/\\]", start):
        return "a git-annex pointer; fetch the file itself with `git annex get`"
    if re.search(rb"^outs:\s*$", start, re.MULTILINE) and re.search(
        rb"^[\s-]*(md5|etag|hash|path): ", start, re.MULTILINE
    ):
        return DVC_POINTER
    return None


def pointer_in(path: str | os.PathLike[str]) -> str | None:
    """Return what `pointer_problem` says of the file at `path`; None if it cannot be read."""
    with suppress(OSError):
        if os.path.isfile(path):  # and no pipe, from which reading might never end
            with open(path, "rb") as file:
                return pointer_problem(file.read(512))
    return None
