"""`maple cache`: show and clear the features and unpacked images that are kept on disk."""

from datetime import datetime
from typing import Annotated, Any

import typer
from typer import Option

from maple.cli import options
from maple.errors import ConfigError

_NONE = "nothing is kept: MAPLE_CACHE is off, or there is no home folder"

cache_app = typer.Typer(
    name="cache",
    help="Show and clear the image features and the unpacked images that are kept on disk.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@cache_app.command("list")
def list_command(as_json: options.AsJson = False) -> None:
    """List what is kept, with its size and last use: features of which images and backbone, and unpacked sources."""
    import json

    from maple.data.sources.unpacked import unpacked_sources
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
        sources = []
        for each in unpacked_sources():
            about: dict[str, Any] = {"source": each.description.get("source"), "images": each.description.get("files")}
            sources.append({"folder": str(each.path), "size": each.size, "used": _time(each.used), **about})
        typer.echo(json.dumps({"cache": place, "entries": rows, "sources": sources}, indent=1))
    elif cache is None:
        options.echo(_NONE)
    else:
        if entries:
            table = []
            for entry in entries:
                texts = {key: str(value) for key, value in entry.description.items()}
                described = [texts.get(key, "damaged") for key in ("images", "root", "view", "backbone", "precision")]
                table.append((*described, size_text(entry.size), _time(entry.used)))
            columns = ("images", "of", "view", "backbone", "precision", "size", "last used")
            options.print_table(columns, table, right=("images", "size"), soft_wrap=True)
        options.echo(f"{len(entries)} in {cache.folder}: {size_text(total)} of at most {size_text(cache.limit)}")
        if unpacked := unpacked_sources():
            lines: list[tuple[Any, ...]] = []
            for each in unpacked:
                words = [each.description.get(key, "damaged") for key in ("source", "files")]
                lines.append((*words, size_text(each.size), _time(each.used)))
            options.print_table(
                ("source", "images", "size", "last used"), lines, right=("images", "size"), soft_wrap=True
            )
            kept = sum(each.size for each in unpacked)
            options.echo(f"{len(unpacked)} in {unpacked[0].path.parent}: {size_text(kept)}, which count to no limit")


@cache_app.command("clear")
def clear_command(
    older_than: Annotated[
        float, Option("--older-than", metavar="DAYS", help="Only what was not used within this number of days.")
    ] = 0.0,
) -> None:
    """Remove the kept features and unpacked sources; they are made again when they are needed.

    Unpacked sources are made again from the files, or the data set of the hub, that they were unpacked from.
    """
    from maple.data.sources.unpacked import clear_sources
    from maple.runs.feature_cache import FeatureCache

    if not 0 <= older_than < float("inf"):
        raise ConfigError(f"--older-than is {older_than:g}; give a number of days, 0 or more")
    cache = FeatureCache.open()
    if cache is None:
        options.echo(_NONE)
        return
    count, size = cache.clear(older_than)
    options.echo(f"{cache.folder}: removed {count} ({size_text(size)})")
    count, size = clear_sources(older_than)
    if count:
        options.echo(f"unpacked sources: removed {count} ({size_text(size)})")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def size_text(size: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000  # type: ignore[assignment]
    return f"{size:,.1f} {unit}" if unit != "bytes" else f"{size} bytes"
