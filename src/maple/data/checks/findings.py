"""What was found in somebody's images, in words for people and in full for programs."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

_SHOWN = 3
_LONGEST = 60


@dataclass(frozen=True)
class Finding:
    """One remark about a data set.

    Attributes:
        kind: a fixed word for it, such as `unreadable`.
        level: `warning` where the result may suffer, `note` otherwise.
        text: a line for people, with a few examples.
        items: everything that it is about: paths, groups of paths, or class names.
    """

    kind: str
    level: Literal["note", "warning"]
    text: str
    items: tuple[Any, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def some(items: Sequence[str] | Iterable[str], most: int = _SHOWN) -> str:
    """The first few of many, long ones cut in the middle: "a, b, c and 4 more"."""
    items = list(items)
    shown = ", ".join(_cut(item) for item in items[:most])
    return f"{shown} and {len(items) - most:,} more" if len(items) > most else shown


def number_of(count: int, word: str, words: str = "") -> str:
    """ "1 image", "1,200 images"."""
    return f"{count:,} {word if count == 1 else words or word + 's'}"


def _cut(text: str) -> str:
    half = (_LONGEST - 3) // 2
    return text if len(text) <= _LONGEST else f"{text[:half]}...{text[-half:]}"
