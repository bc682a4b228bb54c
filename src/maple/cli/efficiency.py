"""`maple efficiency`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maple.cli.options import Device, comma_list, number_list

if TYPE_CHECKING:
    from maple.config import RunSettings

_METHODS = "zero_shot,coop,cocoop,deep_language,vpt,independent_vl,maple-shallow,maple-unified,maple"


def efficiency_command(
    backbone: Annotated[str, typer.Option(help="The CLIP to measure on; weights are not needed.")] = "ViT-B-16",
    pretrained: Annotated[
        str | None, typer.Option(help="Which weights. They do not matter: random, for an architecture's name.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    methods: Annotated[str, typer.Option(help="First parts of presets' names, or files; or all.")] = _METHODS,
    classes: Annotated[int, typer.Option(help="How many classes an image is held against.")] = 50,
    batch: Annotated[str, typer.Option(help="Batch sizes to time: 1,4,100.")] = "1,4,100",
    seconds: Annotated[float, typer.Option(help="How long to time each way at each batch size.")] = 1.0,
    output: Annotated[
        Path | None,
        typer.Option(help="A folder of runs: what was measured goes into its complexity/, for `maple report`."),
    ] = None,
    device: Device = None,
) -> None:
    """Count and time methods: learned parameters, operations, images per second in training and inference."""
    from tempfile import TemporaryDirectory

    from maple.clip import load_clip
    from maple.distributed import this_process
    from maple.efficiency import measure_cost, write_cost
    from maple.errors import MapleError
    from maple.report.collect import COSTS
    from maple.report.records import CostRow

    _check_output(output)
    sizes = number_list(batch, "--batch") or []
    recipes = {name: _settings(name, backbone) for name in _names(methods)}
    if pretrained is None and "/" not in backbone and not Path(backbone).exists():
        pretrained = "random" if backbone != "maple-small" else None
    clip = load_clip(backbone, pretrained, precision=precision, device=this_process(device).device)
    rows: list[CostRow] = []
    with TemporaryDirectory() as temporary:
        for name, settings in recipes.items():
            try:
                cost = measure_cost(
                    settings, clip, classes=classes, batches=sizes, seconds=seconds, on_step=_teller(name)
                )
            except MapleError as error:
                if len(recipes) == 1:
                    raise
                typer.echo(f"{name} is left out: {error}", err=True)
                continue
            # One by one, so that an interruption costs what is being measured and no more.
            rows.append(write_cost(cost, Path(name).stem, settings, clip, classes, output or Path(temporary)))
    _show(rows)
    if output is not None and rows:
        typer.echo(f"written: {len(rows)} files in {output / COSTS}")
        typer.echo(f"next: maple report {output}")


def _check_output(output: Path | None) -> None:
    from maple.errors import ConfigError

    if output is not None and (output.suffix == ".json" or output.is_file()):
        raise ConfigError(
            f"--output {output} must be a folder, as in --output runs/b2n; each method gets a file in its complexity/, "
            "and `maple report` makes a table of them"
        )


def _names(methods: str) -> list[str]:
    from maple.config import preset_names

    if methods.strip() == "all":
        ending = "_base-to-novel"
        return [name.removesuffix(ending) for name in preset_names() if name.endswith(ending)]
    return list(dict.fromkeys(comma_list(methods) or []))


def _settings(name: str, backbone: str) -> "RunSettings":
    from maple.config import read_preset, resolve
    from maple.sweeps.plan import recipe_of

    return resolve([read_preset(recipe_of(name, "base-to-novel")), {"backbone": {"name": backbone}}])


def _teller(name: str) -> Any:
    return lambda what: typer.echo(f"{name}: {what}", err=True)


def _show(rows: list[Any]) -> None:
    from maple.cli.report import show_table
    from maple.methods import describe_methods
    from maple.report import cost_tables

    for table in cost_tables(rows, describe_methods()):
        show_table(table)
