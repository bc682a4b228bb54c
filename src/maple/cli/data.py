"""`maple data`: commands about data sets."""

from pathlib import Path
from typing import Annotated

import typer

from maple.cli.options import DataRoot

data_app = typer.Typer(help="Look at data sets.", no_args_is_help=True)


@data_app.command("draw")
def draw_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A data set of the catalogue, or a folder.")],
    output: Annotated[Path, typer.Option(help="The folder to write into.", file_okay=False)],
    count: Annotated[int, typer.Option(help="How many pictures, in turn from every class.", min=1)] = 10,
    part: Annotated[str, typer.Option(help="Which items: test, val or train.")] = "test",
    class_name: Annotated[str | None, typer.Option("--class", help='Only this class: "red apple".')] = None,
    data_root: DataRoot = None,
) -> None:
    """Write some pictures of a data set as files, CLASS_NUMBER.png; the bundled emoji scenes are drawn."""
    from maple.data import load_dataset, write_pictures

    dataset = load_dataset(name, None if data_root is None else Path(data_root))
    for path in write_pictures(dataset, output, count=count, part=part, class_name=class_name):
        typer.echo(path)
