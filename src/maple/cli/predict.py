"""`maple predict`."""

import csv
import gc
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.cells import cell_len
from typer import Option

from maple.cli import options
from maple.cli.predict_output import check_executor, predict_on_cluster
from maple.errors import ClassNamesError, ConfigError, visible
from maple.machine import usable_cores
from maple.names import names_in

if TYPE_CHECKING:
    from maple.inference import ImageSource, Prediction

_BAR_WIDTH = 20


def predict_command(
    run: options.AnyModel,
    sources: options.ImageSources = None,
    features: options.Features = None,
    classes: options.ClassNames = None,
    ask: Annotated[bool, Option("--ask", help="Ask for class names repeatedly; classify each time.")] = False,
    top: Annotated[int, Option(help="How many classes to show per image.", min=1)] = 5,
    zero_shot: Annotated[bool, Option("--zero-shot", help="Show those of zero-shot CLIP, too.")] = False,
    reject: Annotated[
        float | None,
        Option(help='Answer "none of these" where the greatest probability is below this, as in 0.6.'),
    ] = None,
    as_json: options.AsJson = False,
    as_csv: Annotated[bool, Option("--csv", help="Print CSV: one line per image and class.")] = False,
    recursive: options.Recursive = False,
    draft: options.Draft = False,
    batch_size: Annotated[
        int | None, Option(help="How many images are computed at once. Default: 32, of small ones up to 100.", min=1)
    ] = None,
    output: Annotated[
        Path | None,
        Option(help="Write one row per image to this file instead: .parquet, .csv or .jsonl; ray: a .parquet folder."),
    ] = None,
    executor: Annotated[
        str, Option(help="local, or ray: the actors of a cluster; IMAGES are folders, Parquet, shards, fsspec URLs.")
    ] = "local",
    ray_address: Annotated[str | None, Option(help="HOST:6379, ray://HOST:10001, auto. Default: RAY_ADDRESS.")] = None,
    actors: Annotated[
        int | None, Option(help="ray: at most this many processes. Default: all there is room for.")
    ] = None,
    gpus_per_actor: Annotated[float | None, Option(help="ray: GPUs, or a fraction of one. Default: 1.")] = None,
    cpus_per_actor: Annotated[float | None, Option(help="ray: cores of each actor. Default: 1.")] = None,
    device: options.Device = None,
    precision: Annotated[
        str | None,
        Option(
            help="fp32, bf16 or fp16. Default: that of training, or bf16 on a processor with units for it, if safe."
        ),
    ] = None,
    backbone: options.TrainedBackbone = None,
    pretrained: options.Pretrained = None,
    trust_backbone: options.TrustBackbone = False,
    trust_code: options.TrustCode = False,
) -> None:
    """Classify images. Any class names may be given, including ones that were not trained.

    Images are sorted by name. Unreadable ones are reported and skipped.

    Exit status: 0 all were read, 1 some were not, 2 none was, or wrong use.
    """
    from maple.inference import UnreadableImage, find_images, load_predictor
    from maple.inference.manifest import is_export
    from maple.inference.prediction_tables import write_predictions
    from maple.inference.predictor import check_reject
    from maple.inference.sources.image_sources import STDIN, cache_downloads

    check_reject(reject)
    if as_json and as_csv:
        raise ConfigError("--json and --csv exclude each other; choose one")
    if ask and STDIN in (sources or ()):
        raise ConfigError("--ask reads class names from standard input, so an image cannot be read from it, too")
    if not sources and features is None:
        raise typer.BadParameter("give images, or their features with --features FILE", param_hint="IMAGES...")
    if features is not None and (sources or recursive or draft):
        excess = sources[0] if sources else "--recursive" if recursive else "--draft"
        raise ConfigError(f"--features takes the place of images: leave out {excess}")
    ray_options: dict[str, Any] = {
        "ray-address": ray_address,
        "actors": actors,
        "gpus-per-actor": gpus_per_actor,
        "cpus-per-actor": cpus_per_actor,
    }
    printing = {"--ask": ask, "--json": as_json, "--csv": as_csv}
    check_executor(executor, output, ray_options, printing, has_features=features is not None)
    clip = {**options.load_arguments(backbone, pretrained, trust_backbone, trust_code), "precision": precision}
    if executor == "ray":
        scalars: dict[str, Any] = {"top": top, "reject": reject, "batch_size": batch_size or 32}
        names = None if classes is None else names_in(classes)
        settings = {**scalars, **clip, "classes": names, "zero_shot": zero_shot, "recursive": recursive, "draft": draft}
        predict_on_cluster(run, sources or [], output or Path(), {**settings, "device": device}, ray_options)
    # Before a backbone is loaded, so that malformed sources are refused at once.
    images: Iterable[ImageSource] = ()
    rows = None
    if features is not None:
        from maple.feature_files import read_rows

        rows = read_rows(options.feature_files(features))
    else:
        find = partial(find_images, sources or [], recursive=recursive, stdin=getattr(sys.stdin, "buffer", None))
        images = find()
    load = partial(load_predictor, run, zero_shot=zero_shot, device=device)
    # What is imported and loaded leaves nothing to collect, and looking for it takes a tenth of the time.
    gc.disable()
    try:
        predictor = load(**clip)
    finally:
        gc.enable()
    if draft:
        images = find(least_side=predictor.preprocess.least_side)
    if classes is not None:
        options.echo_note(predictor.set_class_names(names_in(classes)))
    if precision is None and not ask and rows is None and not is_export(run):
        from maple.inference.precision import in_fastest_precision

        predictor, images, note = in_fastest_precision(
            predictor, partial(load, **{**clip, "precision": "bf16"}), images
        )
        options.echo_note(note)
    show = _show_json if as_json else _csv_printer(zero_shot, reject is not None) if as_csv else _show_text
    workers = min(4, usable_cores())
    read = unreadable = 0

    def classify(images: "Iterable[ImageSource]") -> None:
        nonlocal read, unreadable
        numbers: dict[str, Any] = {"top": top, "batch_size": batch_size, "reject": reject}
        results: Iterable[Prediction | UnreadableImage]
        if rows is not None:
            results = predictor.stream_features(rows, **{**numbers, "batch_size": batch_size or 32})
        else:
            results = predictor.stream(images, **numbers, workers=workers)
        if output is not None:
            shown = min(top, len(predictor.class_names))
            results = write_predictions(output, results, top=shown, zero_shot=zero_shot, reject=reject is not None)
        for result in results:
            if isinstance(result, UnreadableImage):
                unreadable += 1
                typer.echo(visible(options.in_options(f"maple: {result.reason}")), err=True)
            else:
                read += 1
                if output is None:
                    show(result)

    if ask:
        fetched = list(cache_downloads(iter(images)))
        if classes is not None:
            classify(fetched)
        for line in _lines_from_terminal():
            try:
                options.echo_note(predictor.set_class_names(names_in(line)))
            except ClassNamesError as error:
                typer.echo(visible(f"maple: {error}"), err=True)
            else:
                classify(fetched)
    else:
        classify(images)
    raise typer.Exit(options.exit_status(read, unreadable))


def _lines_from_terminal() -> Iterator[str]:
    """Prompt for lists of class names until an empty line or the end of the input."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        typer.echo("class names, separated by commas; an empty line ends: ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            typer.echo(err=True)
        if not line.strip():
            return
        yield line.strip()


def _show_json(prediction: "Prediction") -> None:
    from maple.inference.predictor import classes_to_json

    row: dict[str, Any] = {"source": prediction.source, "best": classes_to_json(prediction.best)}
    if prediction.rejected is not None:
        row["rejected"] = prediction.rejected
    if prediction.zero_shot is not None:
        row["zero_shot"] = classes_to_json(prediction.zero_shot)
    typer.echo(json.dumps(row))


def _csv_printer(zero_shot: bool, reject: bool) -> "Callable[[Prediction], None]":
    """Print a header; return a function that prints one line per class of a prediction."""

    def write(*values: Any) -> None:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerow(values)
        typer.echo(buffer.getvalue(), nl=False)

    def show(prediction: "Prediction") -> None:
        for rank, ranked in enumerate(prediction.best):
            values = [prediction.source, rank + 1, ranked.name, ranked.probability]
            values += [] if prediction.zero_shot_of_best is None else [prediction.zero_shot_of_best[rank]]
            write(*values, *([str(prediction.rejected).lower()] if reject else []))

    further = [*(["zero_shot_probability"] if zero_shot else []), *(["rejected"] if reject else [])]
    write("source", "rank", "class", "probability", *further)
    return show


def _show_text(prediction: "Prediction") -> None:
    """Print percentages and bars, next to those of zero-shot CLIP if requested."""
    names = [visible(ranked.name) for ranked in prediction.best]
    width = max(map(cell_len, names))
    typer.echo(visible(prediction.source) + (": none of these" if prediction.rejected else ""))
    if prediction.zero_shot is not None:
        typer.echo(f"  {_padded('', width)}  {_padded('trained', 9 + _BAR_WIDTH)}  zero-shot")
    for rank, (name, ranked) in enumerate(zip(names, prediction.best, strict=True)):
        line = f"  {_padded(name, width)}  {_bar(ranked.probability)}"
        if prediction.zero_shot_of_best is not None:
            line += f"  {_bar(prediction.zero_shot_of_best[rank])}"
        typer.echo(line.rstrip())
    if prediction.zero_shot is not None and (first := prediction.zero_shot[0]).name != prediction.best[0].name:
        typer.echo(f"  zero-shot CLIP predicts {visible(first.name)}, {100 * first.probability:.1f} %")


def _bar(probability: float) -> str:
    block = "█" if "█".encode(sys.stdout.encoding or "ascii", "ignore") else "#"
    return f"{100 * probability:5.1f} %  {_padded(block * round(_BAR_WIDTH * probability), _BAR_WIDTH)}"


def _padded(text: str, width: int) -> str:
    """Pad text to a width in terminal columns, of which some characters take two."""
    return text + " " * (width - cell_len(text))
