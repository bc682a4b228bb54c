"""`maple explain`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from maple.cli import options
from maple.errors import ConfigError, visible
from maple.names import names_in

if TYPE_CHECKING:
    from maple.explain import LearnedWords


def explain_command(
    run: options.TrainedModel,
    sources: options.ImageSources = None,
    classes: options.ClassNames = None,
    target: Annotated[str | None, Option("--for", help="The class to explain. Default: the predicted one.")] = None,
    output: Annotated[Path | None, Option(help="A folder. Default: explanation/ in RUN, for reports.")] = None,
    words: Annotated[bool, Option("--words", help="List the words nearest to the learned text tokens.")] = False,
    top: Annotated[int, Option(help="How many words to list per token.", min=1)] = 5,
    as_json: options.AsJson = False,
    recursive: options.Recursive = False,
    device: options.Device = None,
    backbone: options.TrainedBackbone = None,
    pretrained: options.Pretrained = None,
    trust_backbone: options.TrustBackbone = False,
    trust_code: options.TrustCode = False,
) -> None:
    """Draw which parts of an image support a class, before and after training; or list the words near learned tokens.

    Exit status: 0 all images were read, 1 some were not, 2 none was, or wrong use.
    """
    from maple.explain import Explainer, nearest_words, write_maps, write_words
    from maple.explain.heat_maps import FOLDER
    from maple.inference import TorchPredictor, UnreadableImage, find_images

    if not sources and not words:
        raise ConfigError("there is nothing to explain: name images, or give --words")
    if not sources and (target is not None or recursive):
        raise ConfigError("--for and --recursive concern images; name some")
    images = find_images(sources, recursive=recursive, stdin=getattr(sys.stdin, "buffer", None)) if sources else None
    run_folder = Path(run).expanduser()
    folder = output or (run_folder / FOLDER if run_folder.is_dir() else None)
    if images is not None and folder is None:
        raise ConfigError(f"{run} is not a run folder where maps can be kept; name a folder with --output FOLDER")
    clip = options.load_arguments(backbone, pretrained, trust_backbone, trust_code)
    predictor = TorchPredictor.load(run, zero_shot=True, device=device, **clip)
    if classes is not None:
        options.echo_note(predictor.set_class_names(names_in(classes)))
    if words:
        nearest = nearest_words(predictor.method, top)
        if as_json:
            typer.echo(json.dumps(nearest.to_json()))
        else:
            _print_words(nearest)
        try:
            if folder is not None:
                write_words(folder, nearest)
        except ConfigError as error:
            if output is not None:
                raise
            # An unwritable run folder is not an error where no output was requested.
            options.echo_note(f"not kept for reports: {error}")
    if images is None or folder is None:
        return
    read = unreadable = 0
    for record, png in write_maps(folder, Explainer(predictor, target).explain(images)):
        if isinstance(record, UnreadableImage):
            unreadable += 1
            typer.echo(visible(f"maple: {record.reason}"), err=True)
            continue
        read += 1
        if as_json:
            typer.echo(json.dumps(record))
        else:
            before, after = (record[side]["best"][0] for side in ("zero_shot", "trained"))
            predicted = f"{after['class']} ({100 * after['probability']:.0f} %); zero-shot CLIP: {before['class']}"
            typer.echo(visible(f"{record['source']}: {predicted}; maps for {record['class']} in {png}"))
    raise typer.Exit(options.exit_status(read, unreadable))


def _print_words(nearest: "LearnedWords") -> None:
    from rich.console import Console

    from maple.explain.words import WARNING

    for name, tokens in nearest.sets.items():
        rows = []
        for number, token in enumerate(tokens, start=1):
            rankings = (token.by_distance, token.by_cosine)
            cells = (visible(", ".join(f"{word.word} {word.value:.3f}" for word in ranking)) for ranking in rankings)
            rows.append([number, f"{token.norm:.3f}", *cells])
        title = f"Nearest words{f' of {name}' if name else ''}"
        options.print_table(("token", "length", "by Euclidean distance", "by cosine"), rows, title=title)
    for line in (*nearest.notes(), WARNING):
        Console().print(line, highlight=False, markup=False)
