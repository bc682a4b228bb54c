"""`maple data`: what data sets there are, what is in one, how to get it, and whether it is whole."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maple.cli.options import DataRoot

if TYPE_CHECKING:
    from maple.data import Dataset
    from maple.data.published.prepare import PublishedFile, Recipe

Name = Annotated[str, typer.Argument(metavar="NAME", help="A data set, or the path of your own images.")]

_ROOM = 115
"""How wide a terminal must be for the templates."""
_WIDE = 200
"""How wide a table in a file or pipe may be."""

data_app = typer.Typer(
    name="data",
    help="List, show, fetch and check data sets.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@data_app.command("list")
def list_command(data_root: DataRoot = None) -> None:
    """List the data sets: kind, published numbers of images and classes, template, and whether they are there."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from maple.data import CATALOGUE, known_names, load_dataset, template_of
    from maple.data.checks.verify import published_statistics
    from maple.data.published.prepare import recipes

    table = Table(pad_edge=False)
    for column in ("name", "kind", "classes", "train", "val", "test"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("name", "kind") else "right")
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    with_template = console.width >= _ROOM
    if with_template:
        table.add_column("template", overflow="fold")
    table.add_column("found", overflow="fold")
    for name in known_names():
        if name in CATALOGUE:
            counts = published_statistics()[name].counts
            kind = "evaluation" if CATALOGUE[name].evaluation_only else "published"
            found = _state(recipes()[name], data_root) if data_root else "?"
        else:
            counts, kind, found = dict(load_dataset(name, None).counts()), "bundled", "yes"
        numbers = ("?" if counts[key] is None else f"{counts[key]:,}" for key in ("classes", "train", "val", "test"))
        template = [Text(template_of(name) or "")] if with_template else []
        table.add_row(name, kind, *numbers, *template, found)
    console.print(table)
    if not data_root:
        typer.echo("found ?: no --data-root is given, nor MAPLE_DATA set, to look for it in.")
    if not with_template:
        typer.echo("`maple data show NAME` tells a template; there is no room for them here.")
    typer.echo("Your own: a folder of class-named folders, FOLDER:DOMAIN, or a .csv or .jsonl of path and label.")


@data_app.command("show")
def show_command(name: Name, data_root: DataRoot = None) -> None:
    """Show what a data set holds: images of each part, classes, a few items, and its template."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from maple.data import template_of

    dataset = _open(name, data_root)
    counts = dataset.counts()
    typer.echo(f"{dataset.name}: {counts['classes']} classes in {dataset.root}")
    drawn = ", drawn at random from an undivided whole" if dataset.drawn_split else ""
    typer.echo(f"images: train {counts['train']:,}, val {counts['val']:,}, test {counts['test']:,}{drawn}")
    typer.echo(f"zero-shot template: {template_of(name) or 'none of its own'}")
    table = Table("label", "class", "train", "val", "test", "an image", pad_edge=False)
    for label, row in enumerate(_per_class(dataset)):
        table.add_row(str(label), Text(dataset.class_names[label]), *map(str, row[:3]), Text(row[3]))
    Console(soft_wrap=True).print(table)


@data_app.command("draw")
def draw_command(
    name: Name,
    output: Annotated[Path, typer.Option(help="The folder to write into.", file_okay=False)],
    count: Annotated[int, typer.Option(help="How many pictures, in turn from every class.", min=1)] = 10,
    part: Annotated[str, typer.Option(help="Which items: test, val or train.")] = "test",
    class_name: Annotated[str | None, typer.Option("--class", help='Only this class: "red apple".')] = None,
    data_root: DataRoot = None,
) -> None:
    """Write some pictures of a data set as files, CLASS_NUMBER.png; the bundled emoji scenes are drawn."""
    from maple.data import write_images

    for path in write_images(_open(name, data_root), output, count=count, part=part, class_name=class_name):
        typer.echo(path)


@data_app.command("prepare")
def prepare_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A published data set; `maple data list` names them.")],
    data_root: DataRoot = None,
    mirror: Annotated[
        str | None,
        typer.Option(help="Fetch every file from this address instead: URL/FILE, as `prepare` calls the files."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the archives in DATA_ROOT/downloads.")] = False,
) -> None:
    """Fetch a published data set into CoOp's folder layout; repeat the command to go on after an interruption.

    What cannot be fetched is said, with where to get it and where to put it.
    """
    from maple.cli.progress import FileBars
    from maple.data.checks.verify import verify_counts
    from maple.data.published.prepare import prepare, published_address

    root = _required(data_root)

    def mirrored(source: "PublishedFile") -> str:
        return f"{(mirror or '').rstrip('/')}/{source.file}"

    with FileBars() as bars:
        added = prepare(name, root, locate=mirrored if mirror else published_address, progress=bars, keep=keep)
    dataset = _open(name, str(root))
    problems = verify_counts(dataset)
    for problem in problems:
        typer.echo(f"maple: {name}: {problem}", err=True)
    counts = ", ".join(f"{key} {number:,}" for key, number in dataset.counts().items())
    typer.echo(f"{name}: {'ready' if added else 'was there already'} ({counts})")
    typer.echo(f"next: maple data verify {name}")
    if problems:
        raise typer.Exit(1)


@data_app.command("split")
def split_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="caltech101, food101, dtd or eurosat.")],
    data_root: DataRoot = None,
    seed: Annotated[int, typer.Option(help="Which split.", min=0)] = 1,
) -> None:
    """Draw a split where the published one cannot be had: half for training, a fifth for validation, the rest to test.

    Classes and names are the published ones, the images in the parts are not: results are not those of papers.
    """
    from maple.data.catalogue import draw_published_split

    path = draw_published_split(name, _required(data_root), seed)
    dataset = _open(name, data_root)
    counts = ", ".join(f"{key} {number:,}" for key, number in dataset.counts().items())
    typer.echo(f"written: {path} ({counts})")
    typer.echo(f"{name} is now read with it, and called {dataset.name!r} in results")


@data_app.command("verify")
def verify_command(
    name: Name,
    data_root: DataRoot = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only look whether the files exist; decode nothing.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that decode. Default: one per core.")] = None,
) -> None:
    """Check counts and class names against the published ones, and every image; exit with 1 if anything is wrong."""
    from maple.cli.progress import FileBars
    from maple.data.checks.verify import published_statistics, verify_counts, verify_images

    dataset = _open(name, data_root)
    problems = 0
    for problem in verify_counts(dataset):
        typer.echo(problem)
        problems += 1
    with FileBars() as bars:

        def seen(done: int, total: int) -> None:
            bars.advance("images", done, total)

        for problem in verify_images(dataset, quick=quick, workers=workers, on_images=seen):
            typer.echo(problem)
            problems += 1
    total = sum(dataset.counts()[part] for part in ("train", "val", "test"))
    statistics = published_statistics().get(dataset.name)
    against = "no published numbers to compare with" if statistics is None else f"compared with: {statistics.source}"
    looked = "looked for" if quick else "decoded"
    typer.echo(f"{dataset.name}: {total:,} images {looked}, {problems or 'no'} problems; {against}")
    if problems:
        raise typer.Exit(1)


def _open(name: str, data_root: str | None) -> "Dataset":
    from maple.data import load_dataset

    return load_dataset(name, None if data_root is None else Path(data_root))


def _required(data_root: str | None) -> Path:
    from maple.errors import ConfigError

    if data_root is None:
        raise ConfigError("nowhere to put it: give --data-root, or set MAPLE_DATA, to the folder for data sets")
    return Path(data_root).expanduser()


def _state(recipe: "Recipe", data_root: str) -> str:
    missing = recipe.missing(Path(data_root).expanduser())
    if missing:
        return "no" if len(missing) == len(recipe.needs) else f"lacks {', '.join(missing)}"
    return "yes"


def _per_class(dataset: "Dataset") -> list[list[Any]]:
    """Per class: images in train, val and test, and the path of the first one."""
    rows: list[list[Any]] = [[0, 0, 0, ""] for _ in dataset.class_names]
    for position, items in enumerate((dataset.train, dataset.val, dataset.test)):
        for item in items:
            rows[item.label][position] += 1
            rows[item.label][3] = rows[item.label][3] or item.path
    return rows
