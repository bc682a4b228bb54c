"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Device = Annotated[
    str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps. Default: a GPU if there is one.")
]
DataRoot = Annotated[
    str | None,
    typer.Option("--data-root", envvar="MAPLE_DATA", help="The folder that holds the data sets' folders."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as `maple train` makes them.")]


def comma_list(text: str | None) -> list[str] | None:
    """Split "a, b" at the commas; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",")]


def read_mapping(path: Path | None) -> dict[str, str] | None:
    """Read a JSON object of strings.

    Raises:
        ConfigError: unreadable, or something else.
    """
    import json

    from maple.errors import ConfigError

    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise ConfigError(f'{path} must hold a JSON object of strings, as in {{"n02123045": "tabby cat"}}')
    return content
