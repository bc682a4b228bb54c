"""`maple predict` to a file, and on a Ray cluster."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer

from maple.cli import options
from maple.errors import ConfigError, one_of

_REPORT_INTERVAL = 10.0
"""Seconds between two lines of progress."""


def check_executor(
    executor: str,
    output: Path | None,
    ray_options: Mapping[str, Any],
    printing: Mapping[str, bool],
    *,
    has_features: bool,
) -> None:
    """Refuse options of `maple predict` that exclude each other.

    Args:
        ray_options: those of --executor ray by name, None where they were not given.
        printing: options that print predictions, and whether they were given.
    """
    if executor not in ("local", "ray"):
        raise ConfigError(one_of("executor", executor, ("local", "ray")))
    given = [f"--{name}" for name, value in ray_options.items() if value is not None]
    if given and executor == "local":
        raise ConfigError(f"{', '.join(given)} without --executor ray has no effect; add it, or leave them out")
    if used := [name for name, is_given in printing.items() if is_given and output is not None]:
        raise ConfigError(f"{' and '.join(used)} cannot be used with --output, which writes the predictions to a file")
    if executor == "ray":
        if output is None or output.suffix != ".parquet":
            name = "" if output is None else f", not {output}"
            raise ConfigError(f"--executor ray needs the folder of its results{name}: --output NAME.parquet")
        if has_features:
            raise ConfigError("--executor ray reads images; classify --features with --executor local")
    elif output is not None:
        from maple.inference.prediction_tables import check_output

        check_output(output)


def predict_on_cluster(
    run: str, sources: Sequence[str], output: Path, settings: dict[str, Any], ray_options: Mapping[str, Any]
) -> NoReturn:
    """Classify images on a Ray cluster, report the progress on standard error, and exit with the status of `predict`.

    Args:
        settings: other arguments of `maple.inference.predict_on_ray`.
        ray_options: as for `check_executor`.
    """
    from maple.inference import predict_on_ray

    began = last = time.monotonic()

    def report(images: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _REPORT_INTERVAL:
            last = now
            typer.echo(f"{images:,} images, {images / (now - began):,.0f} per second", err=True)

    arguments = {name.removeprefix("ray-").replace("-", "_"): value for name, value in ray_options.items()}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    sys.stdout.flush()
    result = predict_on_ray(run, sources, output, **settings, **arguments, on_images=report, on_note=options.echo_note)
    counts = f"{result.images:,} images, of which {result.unreadable:,} could not be read"
    if result.new:
        options.echo(f"{output} is finished: {counts}; {result.new:,} of them are new")
    else:
        options.echo(f"{output} was finished already: {counts}; for other images, give another --output")
    raise typer.Exit(options.exit_status(result.images - result.unreadable, result.unreadable))
