"""`maple efficiency`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maple.cli.options import Device, comma_list, number_list

if TYPE_CHECKING:
    from maple.clip import Backbone
    from maple.config import RunSettings
    from maple.efficiency import Cost, Published

_METHODS = "zero_shot,coop,cocoop,deep_language,vpt,independent_vl,maple-shallow,maple-unified,maple"
_NOTES = (
    "Operations of one image against all classes, in GFLOPs with a multiply-add counted as one, as papers do (torch's "
    "counter, and --output, say twice as much). whole: every sentence at full length, as papers count. here: as this "
    "package computes it. cached: the classes are encoded beforehand.",
    "Images per second, median, random images, without reading files. train: a whole step. encode: every batch encodes "
    "all classes again. cached: the classes are encoded once, beforehand.",
)


def efficiency_command(
    backbone: Annotated[str, typer.Option(help="The CLIP to measure on; weights are not needed.")] = "ViT-B-16",
    pretrained: Annotated[
        str | None, typer.Option(help="Which weights. They do not matter: random, for an architecture's name.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    methods: Annotated[str, typer.Option(help="First parts of presets' names, or files.")] = _METHODS,
    classes: Annotated[int, typer.Option(help="How many classes an image is held against.")] = 50,
    batch: Annotated[str, typer.Option(help="Batch sizes to time: 1,4,100.")] = "1,4,100",
    seconds: Annotated[float, typer.Option(help="How long to time each way at each batch size.")] = 1.0,
    output: Annotated[Path | None, typer.Option(help="Write everything as JSON, too.", dir_okay=False)] = None,
    device: Device = None,
) -> None:
    """Count and time methods: learned parameters, operations, images per second in training and inference."""
    import torch

    from maple import files
    from maple.clip import load_clip
    from maple.distributed import this_process
    from maple.efficiency import measure_cost, published_cost
    from maple.errors import MapleError

    sizes = number_list(batch, "--batch") or []
    recipes = {name: _settings(name, backbone) for name in comma_list(methods) or []}
    if pretrained is None and "/" not in backbone and not Path(backbone).exists():
        pretrained = "random" if backbone != "maple-small" else None
    place = this_process(device).device
    clip = load_clip(backbone, pretrained, precision=precision, device=place)
    costs: dict[str, Cost] = {}
    published: dict[str, Published] = {}
    for name, settings in recipes.items():
        try:
            costs[name] = measure_cost(
                settings, clip, classes=classes, batches=sizes, seconds=seconds, on_step=_teller(name)
            )
        except MapleError as error:
            if len(recipes) == 1:
                raise
            typer.echo(f"{name} is left out: {error}", err=True)
            continue
        if found := published_cost(name, settings, clip):
            published[name] = found
    machine = torch.cuda.get_device_name(place) if place.type == "cuda" else f"{torch.get_num_threads()} threads"
    where = {"device": str(place), "machine": machine, "classes": classes, **_identity(clip)}
    if output is not None:
        told = {name: {**asdict(cost), "published": _plain(published.get(name))} for name, cost in costs.items()}
        files.write_json(output, {**where, "methods": told})
    _show(costs, published, where)


def _settings(name: str, backbone: str) -> "RunSettings":
    from maple.config import read_preset, resolve
    from maple.protocols import recipe_of

    return resolve([read_preset(recipe_of(name, "base-to-novel")), {"backbone": {"name": backbone}}])


def _identity(clip: "Backbone") -> dict[str, Any]:
    return {"backbone": clip.name, "precision": clip.precision, "image_size": clip.preprocessing.size}


def _plain(published: "Published | None") -> dict[str, Any] | None:
    return None if published is None else asdict(published)


def _teller(name: str) -> Any:
    return lambda what: typer.echo(f"{name}: {what}", err=True)


def _show(costs: "dict[str, Cost]", published: "dict[str, Published]", where: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    told = "{backbone}, {precision}, {classes} classes, on {device} ({machine})".format(**where)
    counted = Table("method", box=None)
    for column in ("parameters", "GFLOPs\nwhole", "GFLOPs\nhere", "GFLOPs\ncached"):
        counted.add_column(column, justify="right")
    timed = Table("images per second", box=None)
    for speed in next(iter(costs.values())).speeds if costs else ():
        for column in ("train", "encode", "cached"):
            timed.add_column(f"{column}\nbatch {speed.batch}", justify="right")
    for name, cost in costs.items():
        operations = (cost.flops_plain, cost.flops, cost.flops_cached)
        counted.add_row(name, f"{cost.parameters:,}", *(_number(None if n is None else n / 2e9) for n in operations))
        found = [value for speed in cost.speeds for value in (speed.training, speed.inference, speed.cached)]
        timed.add_row(name, *map(_number, found))
    # As wide as the tables are, also where there is no terminal.
    console = Console(highlight=False, width=max(120, 16 + 30 * len(timed.columns) // 3))
    console.print(told, style="bold")
    for shown, note in ((counted, _NOTES[0]), (timed, _NOTES[1])):
        console.print(shown)
        console.print(note, style="dim")
        console.print()
    for name, one in published.items():
        console.print(
            f"published of {name}: {one.gflops} GFLOPs, {one.images_per_second:g} images per second ({one.read_in}; "
            "how its operations were counted, and for how many classes, is not said there)"
        )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
