"""`maple data`: list, show, fetch and verify data sets."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from maple.cli import options
from maple.errors import ConfigError, DataError

if TYPE_CHECKING:
    from maple.data import Dataset
    from maple.data.published.prepare import PublishedFile

Name = Annotated[str, Argument(metavar="NAME", help="A data set, or the path of your own images.")]
PublishedName = Annotated[str, Argument(metavar="NAME", help="A published data set (`maple data list`).")]

_TEMPLATE_WIDTH = 115
"""How wide a terminal must be for the templates."""
_PIPE_WIDTH = 200
"""How wide a table is in a file or pipe."""

data_app = typer.Typer(
    name="data",
    help="List, show, fetch and verify data sets.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@data_app.command("list")
def list_command(data_root: options.DataRoot = None) -> None:
    """List the data sets: kind, published numbers of images and classes, template, and whether they are present."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from maple.data import CATALOGUE, known_names, load_dataset, template_of
    from maple.data.catalogue import place_of_absent
    from maple.data.checks.verify import published_statistics
    from maple.data.published.prepare import recipes

    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    with_template = console.width >= _TEMPLATE_WIDTH
    table = Table(pad_edge=False)
    for column in ("name", "kind", "classes", "train", "val", "test"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("name", "kind") else "right")
    for column in (["template"] if with_template else []) + ["found"]:
        table.add_column(column, overflow="fold")
    for name in known_names():
        if name in CATALOGUE:
            published, recipe = published_statistics().get(name), recipes().get(name)
            counts: dict[str, Any] = dict(published.counts) if published else {}
            kind = "evaluation" if CATALOGUE[name].evaluation_only else "published"
            state = "?"
            if data_root and recipe is None:  # of an installed package
                state = "no" if place_of_absent(name, Path(data_root)) else _state(name, data_root)
            elif data_root and recipe is not None:
                missing = recipe.missing(Path(data_root).expanduser())
                state = f"lacks {', '.join(missing)}" if missing else _state(name, data_root)
                if len(missing) == len(recipe.needs):
                    state = "no"
        else:
            counts, kind, state = dict(load_dataset(name, None).counts()), "bundled", "yes"
        numbers = (
            "?" if counts.get(key) is None else f"{counts[key]:,}" for key in ("classes", "train", "val", "test")
        )
        table.add_row(name, kind, *numbers, *([Text(template_of(name) or "")] if with_template else []), state)
    console.print(table)
    if not data_root:
        options.echo("found ?: unknown, since neither --data-root nor MAPLE_DATA is given")
    else:
        options.echo("found differs, unreadable: not as published; `maple data verify NAME --quick` says why")
    if not with_template:
        options.echo("the terminal is too narrow for the templates; `maple data show NAME` prints one")
    options.echo(
        "Your own images: a folder of class-named folders, FOLDER:DOMAIN, a .csv or .jsonl of path and label, "
        "Parquet, an archive, shards, or hf:OWNER/NAME."
    )


@data_app.command("show")
def show_command(name: Name, data_root: options.DataRoot = None) -> None:
    """Show the content of a data set: numbers of images, classes, an image of each, and its template."""
    from maple.data import template_of

    dataset = _open(name, data_root)
    counts = dataset.counts()
    options.echo(f"{dataset.name}: {counts['classes']} classes in {dataset.root}")
    random_split = ", split at random, as the data set has no split" if dataset.drawn_split else ""
    options.echo(f"images: train {counts['train']:,}, val {counts['val']:,}, test {counts['test']:,}{random_split}")
    options.echo(f"zero-shot template: {template_of(name) or 'none of its own'}")
    rows: list[list[Any]] = [[label, name, 0, 0, 0, ""] for label, name in enumerate(dataset.class_names)]
    for column, items in enumerate((dataset.train, dataset.val, dataset.test), start=2):
        for item in items:
            rows[item.label][column] += 1
            rows[item.label][5] = rows[item.label][5] or item.path
    options.print_table(("label", "class", "train", "val", "test", "an image"), rows, soft_wrap=True)


@data_app.command("draw")
def draw_command(
    name: Name,
    output: Annotated[Path, Option(help="The folder to write into.", file_okay=False)],
    count: Annotated[int, Option(help="How many images, from every class in turn.", min=1)] = 10,
    part: Annotated[str, Option(help="The part of the data set: test, val or train.")] = "test",
    class_name: Annotated[str | None, Option("--class", help='Only this class: "red apple".')] = None,
    data_root: options.DataRoot = None,
) -> None:
    """Write some images of a data set as files, CLASS_NUMBER.png; the bundled emoji and icons are rendered."""
    from maple.data import write_images

    for path in write_images(_open(name, data_root), output, count=count, part=part, class_name=class_name):
        options.echo(path)


@data_app.command("prepare")
def prepare_command(
    name: PublishedName,
    data_root: options.DataRoot = None,
    mirror: Annotated[str | None, Option(help="Fetch every file from this address instead: URL/FILE.")] = None,
    keep: Annotated[bool, Option("--keep", help="Keep the archives in DATA_ROOT/downloads.")] = False,
) -> None:
    """Fetch a published data set into CoOp's folder layout; repeat the command to resume it.

    For a file that cannot be fetched, it prints where to get it and where to put it.
    """
    from maple.cli.progress import FileBars
    from maple.data.catalogue import completion_advice
    from maple.data.checks.verify import differences
    from maple.data.published.prepare import prepare, published_address

    root = _required_root(data_root)

    def mirrored(source: "PublishedFile") -> str:
        return f"{(mirror or '').rstrip('/')}/{source.file}"

    with FileBars() as bars:
        added = prepare(name, root, locate=mirrored if mirror else published_address, progress=bars, keep=keep)
    dataset = _open(name, str(root), warn=False)
    problems = differences(dataset)
    for problem in problems:
        options.echo(f"maple: {name}: {problem}", err=True)
    if problems and not added:
        options.echo(f"{name}: differs from the published data set ({_counts(dataset)}); {completion_advice(name)}")
    else:
        options.echo(f"{name}: {'ready' if added else 'was present already'} ({_counts(dataset)})")
        options.echo(f"next: maple data verify {name}")
    if problems:
        raise typer.Exit(1)


@data_app.command("split")
def split_command(
    name: Annotated[str, Argument(metavar="NAME", help="caltech101, food101, dtd or eurosat.")],
    data_root: options.DataRoot = None,
    seed: Annotated[int, Option(help="The seed of the split.", min=0)] = 1,
) -> None:
    """Draw a split where the published one is not available: 50 % for training, 20 % for validation, the rest for test.

    Classes and names are the published ones, but the split is not: results are not comparable with papers.
    """
    from maple.data.catalogue import draw_published_split

    path = draw_published_split(name, _required_root(data_root), seed)
    dataset = _open(name, data_root)
    options.echo(f"written: {path} ({_counts(dataset)})")
    options.echo(f"{name} now uses this split, and is called {dataset.name!r} in results")


@data_app.command("verify")
def verify_command(
    name: Name,
    data_root: options.DataRoot = None,
    quick: Annotated[bool, Option("--quick", help="Only check that the files exist; decode nothing.")] = False,
    workers: Annotated[int | None, Option(min=1, help="Decoding threads. Default: one per core.")] = None,
) -> None:
    """Check counts and class names against the published ones, and decode every image; exit with 1 on any problem."""
    from maple.cli.progress import FileBars
    from maple.data.checks.verify import published_statistics, verify_counts, verify_images

    dataset = _open(name, data_root, warn=False)
    problems = 0
    for problem in verify_counts(dataset):
        options.echo(problem)
        problems += 1
    with FileBars() as bars:

        def on_images(done: int, total: int) -> None:
            bars.advance("images", done, total)

        for problem in verify_images(dataset, quick=quick, workers=workers, on_images=on_images):
            options.echo(problem)
            problems += 1
    total = sum(dataset.counts()[part] for part in ("train", "val", "test"))
    statistics = published_statistics().get(dataset.name)
    source = "no published numbers to compare with" if statistics is None else f"compared with: {statistics.source}"
    check = "checked for existence" if quick else "decoded"
    options.echo(f"{dataset.name}: {total:,} images {check}, {problems or 'no'} problems; {source}")
    if problems:
        raise typer.Exit(1)


def _open(name: str, data_root: str | None, *, warn: bool = True) -> "Dataset":
    from maple.data import CATALOGUE, load_dataset
    from maple.data.catalogue import load_published

    root = None if data_root is None else Path(data_root)
    return load_dataset(name, root) if warn or name not in CATALOGUE else load_published(name, root)


def _state(name: str, data_root: str) -> str:
    """Whether a data set whose files are there is the published one."""
    from maple.data.checks.verify import differences

    try:
        return "differs" if differences(_open(name, data_root, warn=False)) else "yes"
    except DataError:
        return "unreadable"


def _required_root(data_root: str | None) -> Path:
    if data_root is None:
        raise ConfigError("no data root is given; set --data-root, or MAPLE_DATA, to the folder for data sets")
    return Path(data_root).expanduser()


def _counts(dataset: "Dataset") -> str:
    return ", ".join(f"{key} {number:,}" for key, number in dataset.counts().items())
