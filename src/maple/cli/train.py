"""`maple train`."""

import os
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from maple.cli import options
from maple.descriptions import DEFAULT_METHOD
from maple.errors import ConfigError


def train_command(
    dataset: Annotated[
        str | None,
        Option(
            help="A data set (`maple data list`), a folder of class-named folders, FOLDER:DOMAIN, or a .csv. "
            "Default: emoji-animals."
        ),
    ] = None,
    data_root: options.DataRoot = None,
    method: options.MethodName = None,
    preset: Annotated[str | None, Option(help="A preset, or a TOML file. Default: METHOD_base-to-novel.")] = None,
    backbone: options.Backbone = None,
    pretrained: options.Pretrained = None,
    precision: options.Precision = None,
    shots: options.Shots = None,
    classes: Annotated[str | None, Option(help="The classes to train on: all, base or novel.")] = None,
    class_names: options.ClassNamesFile = None,
    seed: options.Seed = None,
    overrides: options.Overrides = None,
    output: options.RunOutput = None,
    device: options.Device = None,
    tracker: options.Tracker = None,
    print_config: Annotated[bool, Option("--print-config", help="Print the settings, and stop.")] = False,
) -> None:
    """Learn prompts from a few images per class. Repeat the same command to resume an interrupted run."""
    from contextlib import ExitStack

    from maple.config import options_layer, preset_names, read_preset, resolve, setting_layer
    from maple.runs import Tracked, complete, content_name, train_run

    names = options.read_names_file(class_names)
    layer = options_layer(
        backbone={"name": backbone, "pretrained": pretrained, "precision": precision},
        data={"dataset": dataset, "root": data_root, "classes": classes, "class_names": names},
        seed=seed,
    )
    if preset is None:
        preset = f"{method or DEFAULT_METHOD}_base-to-novel"
        if preset not in preset_names():
            from maple.methods import METHODS, method_settings

            method_settings({"name": method})  # an unknown method is an error of its own
            raise ConfigError(f"{method} has no preset {preset}; name one with --preset ({', '.join(METHODS)})")
    layers = [read_preset(preset), *([] if method is None else [{"method": {"name": method}}]), layer]
    if shots is not None:
        layers.append(setting_layer("data.shots", options.parse_shots(shots)))
    settings = complete(resolve(layers, overrides or []))
    if print_config:
        typer.echo(settings.model_dump_json(indent=1))
        return
    folder = options.run_folder(output, Path("runs") / content_name(settings))

    from maple.cli.progress import TrainBar

    is_main = os.environ.get("RANK", "0") == "0"
    with ExitStack() as stack:
        bar = stack.enter_context(TrainBar(settings, folder, quiet=not is_main))
        tracked = None
        if tracker is not None and is_main:
            tracked = stack.enter_context(Tracked(tracker, folder, settings, bar))
        result = train_run(settings, folder, device=device, progress=tracked or bar, on_ready=bar.ready)
    if not is_main:
        return
    if result.was_finished:
        typer.echo(f"already finished: {folder}")
    else:
        last = f"last epoch: loss {result.history[-1].loss:.4f}" if result.history else "no epochs"
        typer.echo(f"finished: {folder} ({last})")
    typer.echo(f"next: maple evaluate {folder}")
