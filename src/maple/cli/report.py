"""`maple report`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maple.cli.options import DataRoot, comma_list

if TYPE_CHECKING:
    from maple.data import ImageStore
    from maple.report import Table

_THUMBNAIL = 96
"""Pixels of the longer side of a picture on the page."""

_WIDE = 160
"""Columns of text in a file or a pipe, where nothing need be cut to fit a screen."""


def report_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that holds run folders, at any depth.")],
    output: Annotated[
        Path | None, typer.Option(help="A folder, or the file of a single format. Default: report.* in DIR.")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="html, markdown, latex, csv; repeatable, or several with commas. Default: html."),
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """Compare evaluated runs: tables, and a page with curves, pictures, class changes and embeddings."""
    from rich.console import Console
    from rich.text import Text

    from maple.report import write_report

    kinds = [kind for given in formats or ["html"] for kind in comma_list(given) or []]
    report, written = write_report(folder, kinds, output, pictures(data_root))
    console = Console()
    console.print(Text(report.headline, style="bold"))
    for table in report.tables:
        show_table(table)
    for problem in (*report.collection.silent, *report.collection.problems):
        typer.echo(f"left out: {problem.place}: {problem.reason}", err=True)
    for path in written:
        typer.echo(f"written: {path}")


def show_table(table: "Table") -> None:
    """Print a table of a report."""
    from rich.console import Console
    from rich.table import Table as Shown
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    console.print(Text(table.caption, style="bold"))
    for section in table.sections:
        shown = Shown(title=Text(section.title) if section.title else None, title_justify="left")
        for number, column in enumerate(section.columns):
            shown.add_column(Text(column), justify="right" if number else "left")
        for label, cells in section.rows:
            shown.add_row(Text(label), *(Text(cell.plain, style="bold" if cell.best else "") for cell in cells))
        console.print(shown)
    for note in table.notes:
        console.print(Text(note, style="dim"))


def pictures(data_root: str | None) -> Callable[[str, str | None, str], bytes | None]:
    """Thumbnails of images of any data set that can be read; None for the others."""
    stores: dict[tuple[str, str | None], tuple[ImageStore, frozenset[str]] | None] = {}

    def picture(dataset: str, root: str | None, path: str) -> bytes | None:
        import io

        from maple.errors import MapleError

        key = (dataset, root)
        if key not in stores:
            stores[key] = _open(dataset, root or data_root)
        opened = stores[key]
        if opened is None or path not in opened[1]:
            return None
        try:
            image = opened[0].get(path).copy()
        except MapleError:
            return None
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()

    return picture


def _open(dataset: str, root: str | None) -> "tuple[ImageStore, frozenset[str]] | None":
    """The data set's images, and the paths that are its own (a file of predictions may name any)."""
    from maple.data import load_dataset
    from maple.errors import MapleError

    try:
        found = load_dataset(dataset, None if root is None else Path(root))
    except MapleError:
        return None
    items = (*found.train, *found.val, *found.test)
    return found.store(max_bytes=0), frozenset(item.path for item in items)
