"""`maple report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maple.cli.options import DataRoot, comma_list

if TYPE_CHECKING:
    from maple.data import ImageStore
    from maple.report import Table, ThumbnailLoader

_THUMBNAIL = 96  # pixels of the longer side of an image on the page
_WIDE = 160  # columns of text in a file or a pipe, where nothing has to be cut to fit a screen


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
    """Compare evaluated runs: tables, and a page with curves, images, class changes and embeddings."""
    from rich.console import Console
    from rich.text import Text

    from maple.methods import describe_methods
    from maple.report import write_report

    kinds = [kind for given in formats or ["html"] for kind in comma_list(given) or []]
    loader = thumbnail_loader(data_root)
    report, written = write_report(folder, kinds, output, methods=describe_methods(), load_thumbnail=loader)
    console = Console()
    console.print(Text(report.headline, style="bold"))
    for table in report.tables:
        show_table(table)
    for problem in (*report.collection.without_evaluation, *report.collection.problems):
        typer.echo(f"left out: {problem.place}: {problem.reason}", err=True)
    for path in written:
        typer.echo(f"written: {path}")


def show_table(table: "Table") -> None:
    """Print a table of a report."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    console.print(Text(table.caption, style="bold"))
    for section in table.sections:
        shown = RichTable(title=Text(section.title) if section.title else None, title_justify="left")
        for number, column in enumerate(section.columns):
            shown.add_column(Text(column), justify="right" if number else "left")
        for label, cells in section.rows:
            shown.add_row(Text(label), *(Text(cell.plain, style="bold" if cell.best else "") for cell in cells))
        console.print(shown)
    for note in table.notes:
        console.print(Text(note, style="dim"))


def thumbnail_loader(data_root: str | None) -> "ThumbnailLoader":
    """Thumbnails of the images of any data set that can be read; None for other images."""
    import io
    from functools import cache

    from maple.data import load_dataset
    from maple.errors import MapleError

    @cache
    def open_dataset(dataset: str, root: str | None) -> "tuple[ImageStore, frozenset[str]] | None":
        # With the paths that belong to the data set, because a file of predictions may name any.
        try:
            opened = load_dataset(dataset, None if root is None else Path(root))
        except MapleError:
            return None
        items = (*opened.train, *opened.val, *opened.test)
        return opened.store(max_bytes=0), frozenset(item.path for item in items)

    def load_thumbnail(dataset: str, root: str | None, path: str) -> bytes | None:
        opened = open_dataset(dataset, root or data_root)
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

    return load_thumbnail
