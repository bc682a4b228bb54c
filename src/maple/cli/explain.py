"""`maple explain`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maple.cli.options import Device
from maple.errors import visible
from maple.names import names_in

if TYPE_CHECKING:
    from maple.explain import LayerWords
    from maple.inference import TorchPredictor


def explain_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, a prompts file, or hf-hub:OWNER/NAME.")],
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="PICTURE...", help="Image files, folders, http(s) addresses, or - for standard input."),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help='Class names, new ones too: "red car,blue car"; one with a comma in double quotes. Default: the '
            "trained ones."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--for", metavar="NAME", help="The class the maps are about. Default: the trained first answer."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The folder to write to. Default: explanation/ in RUN, where reports find it.")
    ] = None,
    words: Annotated[bool, typer.Option("--words", help="List the words nearest to the learned text tokens.")] = False,
    top: Annotated[int, typer.Option(help="How many words to list for a token.", min=1)] = 5,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: a line for the words, one for each map.")
    ] = False,
    recursive: Annotated[bool, typer.Option("--recursive", help="Look into the folders of a folder too.")] = False,
    device: Device = None,
) -> None:
    """Draw where the image tower finds a class, before and after training; or list the words near learned tokens.

    Exit status: 0 all pictures were read, 1 some were not, 2 none was, or wrong use.
    """
    from maple.errors import ConfigError
    from maple.explain import FOLDER
    from maple.inference import TorchPredictor, find_images

    if not sources and not words:
        raise ConfigError("there is nothing to explain: name pictures, or give --words")
    if not sources and (target is not None or recursive):
        raise ConfigError("--for and --recursive are about pictures; name some")
    pictures = find_images(sources, recursive=recursive, stdin=getattr(sys.stdin, "buffer", None)) if sources else None
    folder = output or (Path(run).expanduser() / FOLDER if Path(run).expanduser().is_dir() else None)
    if pictures is not None and folder is None:
        raise ConfigError(f"{run} is no run folder to keep maps in; say with --output FOLDER where to write them")
    predictor = TorchPredictor.load(run, zero_shot=True, device=device)
    if classes is not None and (note := predictor.set_class_names(names_in(classes))):
        typer.echo(visible(f"maple: note: {note}"), err=True)
    if words:
        _words(predictor, top, folder, as_json, output is not None)
    if pictures is not None and folder is not None:
        raise typer.Exit(_maps(predictor, pictures, target, folder, as_json))


def _maps(predictor: "TorchPredictor", pictures: Any, target: str | None, folder: Path, as_json: bool) -> int:
    """Write the maps, tell what was written, and return the exit status."""
    from maple.explain import Explainer, write_maps
    from maple.inference import Unreadable

    explainer = Explainer(predictor, target)
    answered = failed = 0
    for record, png in write_maps(folder, explainer.explain(pictures)):
        if isinstance(record, Unreadable):
            failed += 1
            typer.echo(visible(f"maple: {record.reason}"), err=True)
            continue
        answered += 1
        if as_json:
            typer.echo(json.dumps(record))
        else:
            before, after = (record[side]["best"][0] for side in ("zero_shot", "trained"))
            said = f"{after['class']} ({100 * after['probability']:.0f} %); zero-shot CLIP: {before['class']}"
            typer.echo(visible(f"{record['source']}: {said}; maps for {record['class']} in {png}"))
    if not failed:
        return 0
    return 1 if answered else 2


def _words(predictor: "TorchPredictor", top: int, folder: Path | None, as_json: bool, asked: bool) -> None:
    """List the words, and keep them; a run folder that cannot be written is no fault where none was asked for."""
    from maple.errors import ConfigError
    from maple.explain import nearest_words, write_words
    from maple.explain.write import words_record

    found = nearest_words(predictor.method, top)
    if as_json:
        typer.echo(json.dumps(words_record(found)))
    else:
        _show(found)
    if folder is None:
        return
    try:
        write_words(folder, found)
    except ConfigError as error:
        if asked:
            raise
        typer.echo(visible(f"maple: note: not kept for reports: {error}"), err=True)


def _show(found: "LayerWords") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from maple.explain.words import WARNING
    from maple.explain.write import notes

    console = Console()
    for name, tokens in found.sets.items():
        table = Table(title=Text(f"Nearest words{f' of {name}' if name else ''}"), title_justify="left")
        for column in ("token", "length", "by Euclidean distance", "by cosine"):
            table.add_column(column)
        for number, token in enumerate(tokens, start=1):
            listed = (
                ", ".join(f"{one.word} {one.value:.3f}" for one in kind)
                for kind in (token.by_distance, token.by_cosine)
            )
            table.add_row(str(number), f"{token.norm:.3f}", *(Text(visible(text)) for text in listed))
        console.print(table)
    for line in (*notes(found), WARNING):
        console.print(Text(line), highlight=False)
