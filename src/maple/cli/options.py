"""Options that several commands share."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from maple.errors import visible

Device = Annotated[
    str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps. Default: a GPU if there is one.")
]
DataRoot = Annotated[
    str | None,
    typer.Option("--data-root", envvar="MAPLE_DATA", help="The folder that holds the data sets' folders."),
]
Tracker = Annotated[
    str | None, typer.Option(help="Tell another program too: tensorboard (in the run folder), wandb or mlflow.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as `maple train` makes them.")]

_MOST = 10_000
"""How many numbers a range may have."""


def comma_list(text: str | None) -> list[str] | None:
    """Split "a, b" at the commas; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",")]


def number_list(text: str | None, option: str) -> list[int] | None:
    """Whole numbers with commas, and ranges such as 1-3; None stays None.

    Raises:
        ConfigError: a part is neither, or a range is longer than anybody means.
    """
    from maple.errors import ConfigError

    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and (not last.isdecimal() or int(last) < int(first))):
            raise ConfigError(f"{option} {text!r}: {part!r} must be a whole number, or a range such as 1-3")
        numbers = range(int(first), int(last if dash else first) + 1)
        if len(numbers) > _MOST:
            raise ConfigError(f"{option} {text!r}: {part!r} are {len(numbers):,} numbers; give at most {_MOST:,}")
        found += numbers
    return found


def shots_of(text: str) -> int | None:
    """Training images per class: a number, or None for `all`.

    Raises:
        ConfigError: something else.
    """
    from maple.errors import ConfigError

    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--shots {text!r} must be a whole number from 1, or all")
    return int(text)


def visible_lines(lines: Iterable[str]) -> str:
    """Lines of text, without what a terminal would obey."""
    return "\n".join(map(visible, lines))


def read_mapping(path: Path | None) -> dict[str, str] | None:
    """Read a JSON object of strings.

    Raises:
        ConfigError: unreadable, or something else.
    """
    import json

    from maple.errors import ConfigError

    if path is None:
        return None

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
            raise ConfigError(f"{path} names {', '.join(map(repr, twice))} more than once; keep one line of each")
        return dict(pairs)

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise ConfigError(f'{path} must hold a JSON object of strings, as in {{"n02123045": "tabby cat"}}')
    return content
