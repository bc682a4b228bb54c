"""`maple train`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maple.cli.options import DataRoot, Device, read_mapping, shots_of

if TYPE_CHECKING:
    from maple.config import RunSettings


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
    print_config: Annotated[bool, typer.Option("--print-config", help="Show what would run, and stop.")] = False,
) -> None:
    """Learn prompts from a few images per class. Repeat the same command to resume an interrupted run."""
    chosen: dict[str, Any] = {
        "backbone": {"name": backbone, "pretrained": pretrained, "precision": precision},
        "data": {
            "dataset": dataset,
            "root": data_root,
            "classes": classes,
            "class_names": read_mapping(class_names),
        },
    }
    settings = _resolve(chosen, method, preset, shots, seed, overrides or [])

    from maple.errors import ConfigError
    from maple.runs import complete, content_name, train_run

    settings = complete(settings)
    if print_config:
        typer.echo(settings.model_dump_json(indent=1))
        return
    if output is not None and str(output) == ".":
        raise ConfigError("--output names the current folder; give a folder of its own, as in --output runs/first")
    folder = output or Path("runs") / content_name(settings)

    from maple.cli.progress import TrainBar

    is_main = os.environ.get("RANK", "0") == "0"
    with TrainBar(settings, folder, quiet=not is_main) as bar:
        result = train_run(settings, folder, device=device, progress=bar, on_ready=bar.ready)
    if not is_main:
        return
    if result.was_finished:
        typer.echo(f"already finished: {folder}")
    else:
        last = f"last epoch: loss {result.history[-1].loss:.4f}" if result.history else "no epochs"
        typer.echo(f"finished: {folder} ({last})")
    typer.echo(f"next: maple evaluate {folder}")


def _resolve(
    chosen: dict[str, Any],
    method: str | None,
    preset: str | None,
    shots: str | None,
    seed: int | None,
    overrides: list[str],
) -> "RunSettings":
    from maple.config import preset_names, read_preset, resolve
    from maple.errors import ConfigError

    if preset is None:
        preset = f"{method or 'maple'}_base-to-novel"
        if preset not in preset_names():
            from maple.methods import METHODS, method_settings

            method_settings({"name": method})
            raise ConfigError(f"{method} has no preset {preset}; name one with --preset ({', '.join(METHODS)})")
    layers = [read_preset(preset)]
    if method is not None:
        layers.append({"method": {"name": method}})
    given: dict[str, Any] = {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in chosen.items()
    }
    if "name" in given["backbone"]:
        given["backbone"].setdefault("pretrained", None)
    if shots is not None:
        given["data"]["shots"] = shots_of(shots)
    if seed is not None:
        given["seed"] = seed
    return resolve([*layers, given], overrides)
