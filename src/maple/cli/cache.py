"""`maple cache`: show and clear the features that are kept on disk."""

from datetime import datetime
from typing import Annotated

import typer
from typer import Option

from maple.cli import options
from maple.errors import ConfigError

_NONE = "no features are kept: MAPLE_CACHE is off, or there is no home folder"

cache_app = typer.Typer(
    name="cache",
    help="Show and clear the image features that are kept on disk.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@cache_app.command("list")
def list_command(as_json: options.AsJson = False) -> None:
    """List the kept features: of which images, by which backbone, their size, and when they were last used."""
    import json

    from maple.runs.feature_cache import FeatureCache

    cache = FeatureCache.open()
    entries = [] if cache is None else cache.entries()
    total = sum(entry.size for entry in entries)
    if as_json:
        rows = [
            {"key": entry.path.stem, "size": entry.size, "used": _time(entry.used), **entry.description}
            for entry in entries
        ]
        place = None if cache is None else {"folder": str(cache.folder), "size": total, "limit": cache.limit}
        typer.echo(json.dumps({"cache": place, "entries": rows}, indent=1))
    elif cache is None:
        options.echo(_NONE)
    else:
        if entries:
            columns = ("images", "of", "view", "backbone", "precision", "size", "last used")
            table = []
            for entry in entries:
                about = {key: str(value) for key, value in entry.description.items()}
                described = [about.get(key, "damaged") for key in ("images", "root", "view", "backbone", "precision")]
                table.append((*described, size_text(entry.size), _time(entry.used)))
            options.print_table(columns, table, right=("images", "size"), soft_wrap=True)
        options.echo(f"{len(entries)} in {cache.folder}: {size_text(total)} of at most {size_text(cache.limit)}")


@cache_app.command("clear")
def clear_command(
    older_than: Annotated[
        float, Option("--older-than", metavar="DAYS", help="Only what was not used within this number of days.")
    ] = 0.0,
) -> None:
    """Remove the kept features; they are computed again when they are needed."""
    from maple.runs.feature_cache import FeatureCache

    if not 0 <= older_than < float("inf"):
        raise ConfigError(f"--older-than is {older_than:g}; give a number of days, 0 or more")
    cache = FeatureCache.open()
    if cache is None:
        options.echo(_NONE)
        return
    count, size = cache.clear(older_than)
    options.echo(f"{cache.folder}: removed {count} ({size_text(size)})")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def size_text(size: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000  # type: ignore[assignment]
    return f"{size:,.1f} {unit}" if unit != "bytes" else f"{size} bytes"
