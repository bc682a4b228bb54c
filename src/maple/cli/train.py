"""`maple train`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from maple.cli.options import DataRoot, Device, Tracker, read_mapping, shots_of


def train_command(
    dataset: Annotated[
        str | None,
        typer.Option(
            help="A data set (`maple data list`), a folder of class-named folders, FOLDER:DOMAIN, or a .csv. "
            "Default: emoji-animals."
        ),
    ] = None,
    data_root: DataRoot = None,
    method: Annotated[str | None, typer.Option(help="What to learn; `maple methods` lists them.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="A recipe: METHOD_PROTOCOL, or a TOML file. Default: METHOD_base-to-novel.")
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="An open_clip architecture, hf-hub:org/model, a folder, or a file. Default: the packaged maple-small "
            "on emoji, else ViT-B-16."
        ),
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="For an architecture: an open_clip tag, a file, or random[:SEED].")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; prompts are always fp32.")] = None,
    shots: Annotated[str | None, typer.Option(help="Training images per class, or `all`.")] = None,
    classes: Annotated[str | None, typer.Option(help="Train on all classes, or on base or novel ones only.")] = None,
    class_names: Annotated[
        Path | None, typer.Option(help="JSON: other words for class or folder names.", dir_okay=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides the sample, the prompts' start and the order.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override any setting: section.key=value; repeatable.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run folder. Default: a name by content in runs/.")] = None,
    device: Device = None,
    tracker: Tracker = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show what would run, and stop.")] = False,
) -> None:
    """Learn prompts from a few images per class. Repeat the same command to resume an interrupted run."""
    from contextlib import ExitStack

    from maple.config import options_layer, resolve, setting_layer
    from maple.errors import ConfigError
    from maple.runs import Tracked, complete, content_name, train_run

    words = read_mapping(class_names)
    options = options_layer(
        backbone={"name": backbone, "pretrained": pretrained, "precision": precision},
        data={"dataset": dataset, "root": data_root, "classes": classes, "class_names": words},
        seed=seed,
    )
    layers = [*_preset_layers(method, preset), options]
    if shots is not None:
        layers.append(setting_layer("data.shots", shots_of(shots)))
    settings = complete(resolve(layers, overrides or []))
    if print_config:
        typer.echo(settings.model_dump_json(indent=1))
        return
    if output is not None and str(output) == ".":
        raise ConfigError("--output names the current folder; give a folder of its own, as in --output runs/first")
    folder = output or Path("runs") / content_name(settings)

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


def _preset_layers(method: str | None, preset: str | None) -> list[dict[str, Any]]:
    """The layers of `--preset` and `--method`."""
    from maple.config import preset_names, read_preset
    from maple.errors import ConfigError

    if preset is None:
        preset = f"{method or 'maple'}_base-to-novel"
        if preset not in preset_names():
            from maple.methods import METHODS, method_settings

            method_settings({"name": method})
            raise ConfigError(f"{method} has no preset {preset}; name one with --preset ({', '.join(METHODS)})")
    return [read_preset(preset)] + ([] if method is None else [{"method": {"name": method}}])
