"""`maple report` and `maple efficiency`."""

import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from maple.cli import options
from maple.errors import ConfigError, MapleError, visible

if TYPE_CHECKING:
    from maple.data import ImageStore
    from maple.report import Table, ThumbnailLoader

_THUMBNAIL = 96  # pixels of the longer side of an image on the page
_WIDE = 160  # columns of text in a file or a pipe, where nothing has to be cut to fit a screen


def report_command(
    folder: Annotated[
        Path,
        Argument(
            metavar="DIR",
            help="A folder that holds run folders, at any depth; or `last`: the newest finished run in runs/.",
            callback=options.newest_run,
        ),
    ],
    output: Annotated[
        Path | None, Option(help="A folder, or the file of a single format. Default: report.* in DIR.")
    ] = None,
    formats: Annotated[
        list[str] | None,
        Option(
            "--format",
            help="html, markdown, latex, csv; repeatable, or several with commas. Default: that of --output, or html.",
        ),
    ] = None,
    data_root: options.DataRoot = None,
) -> None:
    """Compare evaluated runs: tables, and a page with curves, images, class changes and embeddings."""
    from rich.console import Console
    from rich.text import Text

    from maple.methods import describe_methods
    from maple.report import write_report

    kinds = [kind for given in formats for kind in options.comma_list(given) or []] if formats else None
    loader = thumbnail_loader(data_root)
    report, written = write_report(folder, kinds, output, methods=describe_methods(), load_thumbnail=loader)
    console = Console()
    console.print(Text(visible(report.headline), style="bold"))
    for table in report.tables:
        show_table(table)
    for problem in (*report.collection.without_evaluation, *report.collection.problems):
        options.echo(f"left out: {problem.place}: {problem.reason}", err=True)
    for path in written:
        options.echo(f"written: {path}")


def efficiency_command(
    backbone: options.MeasuredBackbone = "ViT-B-16",
    pretrained: options.Pretrained = None,
    precision: options.Precision = "fp32",
    methods: Annotated[str | None, Option(help="As for `maple sweep`, or all. Default: sweep `complexity`.")] = None,
    classes: Annotated[int, Option(help="How many classes an image is compared with.")] = 50,
    batch: Annotated[str, Option(help="Batch sizes to time: 1,4,100.")] = "1,4,100",
    seconds: Annotated[float, Option(help="How long to time each mode at each batch size.")] = 1.0,
    output: Annotated[Path | None, Option(help="A folder of runs; `maple report` shows the results there.")] = None,
    device: options.Device = None,
) -> None:
    """Count and time methods: learned parameters, operations, images per second in training and inference."""
    from maple.clip.load import load_backbone
    from maple.config import preset_names, read_preset, resolve
    from maple.distributed import choose_device
    from maple.efficiency import measure_cost, write_cost
    from maple.methods import describe_methods
    from maple.report import cost_tables
    from maple.report.collect import COSTS
    from maple.report.records import CostRow
    from maple.sweeps import read_sweep
    from maple.sweeps.plan import recipe_of

    if output is not None and (output.suffix == ".json" or output.is_file()):
        raise ConfigError(
            f"--output {output} must be a folder, as in --output runs/b2n; each method gets a file in its complexity/, "
            "and `maple report` makes a table of them"
        )
    batch_sizes = options.number_list(batch, "--batch") or []
    names = options.method_names(methods) or read_sweep("complexity")["methods"]
    if names == ["all"]:
        ending = "_base-to-novel"
        names = [name.removesuffix(ending) for name in preset_names() if name.endswith(ending)]
    layer = {"backbone": {"name": backbone}}
    recipes = {name: resolve([read_preset(recipe_of(name, "base-to-novel")), layer]) for name in names}
    weights = options.needs_no_weights(backbone, pretrained)
    clip = load_backbone(backbone, weights, precision=precision or "fp32", device=choose_device(device))
    rows: list[CostRow] = []
    for name, settings in recipes.items():

        def on_step(step: str, name: str = name) -> None:
            options.echo(f"{name}: {step}", err=True)

        recipe = Path(name).stem
        try:
            rows.append(
                measure_cost(
                    settings,
                    clip,
                    classes=classes,
                    recipe=recipe,
                    batches=batch_sizes,
                    seconds=seconds,
                    on_step=on_step,
                )
            )
        except MapleError as error:
            if len(recipes) == 1:
                raise
            options.echo(f"{name} is left out: {error}", err=True)
            continue
        # Written one by one, so that an interruption loses only the current measurement.
        if output is not None:
            write_cost(rows[-1], output)
    for table in cost_tables(rows, describe_methods()):
        show_table(table)
    if output is not None and rows:
        options.echo(f"written: {len(rows)} files in {output / COSTS}")
        options.echo(f"next: maple report {output}")


def show_table(table: "Table") -> None:
    """Print a table of a report."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    console.print(Text(visible(table.caption), style="bold"))
    for section in table.sections:
        shown = RichTable(title=Text(visible(section.title)) if section.title else None, title_justify="left")
        for number, column in enumerate(section.columns):
            shown.add_column(Text(visible(column)), justify="right" if number else "left")
        for label, cells in section.rows:
            shown.add_row(
                Text(visible(label)), *(Text(visible(cell.plain), style="bold" if cell.best else "") for cell in cells)
            )
        console.print(shown)
    for note in table.notes:
        console.print(Text(visible(note), style="dim"))


def thumbnail_loader(data_root: str | None) -> "ThumbnailLoader":
    """Thumbnails of the images of any data set that can be read; None for other images."""
    from maple.data import load_dataset

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
