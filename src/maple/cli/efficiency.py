"""`maple efficiency`."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from maple.cli import options
from maple.errors import ConfigError


def efficiency_command(
    backbone: options.MeasuredBackbone = "ViT-B-16",
    pretrained: options.Pretrained = None,
    precision: options.Precision = "fp32",
    methods: Annotated[str | None, Option(help="As for `maple sweep`, or all. Default: sweep `complexity`.")] = None,
    classes: Annotated[int, Option(help="How many classes an image is compared with.")] = 50,
    batch: Annotated[str, Option(help="Batch sizes to time: 1,4,100.")] = "1,4,100",
    seconds: Annotated[float, Option(help="How long to time each mode at each batch size.")] = 1.0,
    output: Annotated[Path | None, Option(help="A folder of runs; `maple report` shows the results there.")] = None,
    device: options.Device = None,
) -> None:
    """Count and time methods: learned parameters, operations, images per second in training and inference."""
    from maple.cli.report import show_table
    from maple.clip import load_clip
    from maple.config import preset_names, read_preset, resolve
    from maple.distributed import this_process
    from maple.efficiency import measure_cost, write_cost
    from maple.errors import MapleError
    from maple.methods import describe_methods
    from maple.report import cost_tables
    from maple.report.collect import COSTS
    from maple.report.records import CostRow
    from maple.sweeps import read_sweep
    from maple.sweeps.plan import recipe_of

    if output is not None and (output.suffix == ".json" or output.is_file()):
        raise ConfigError(
            f"--output {output} must be a folder, as in --output runs/b2n; each method gets a file in its complexity/, "
            "and `maple report` makes a table of them"
        )
    batch_sizes = options.number_list(batch, "--batch") or []
    names = options.comma_list(methods) or read_sweep("complexity")["methods"]
    if names == ["all"]:
        ending = "_base-to-novel"
        names = [name.removesuffix(ending) for name in preset_names() if name.endswith(ending)]
    recipes = {
        name: resolve([read_preset(recipe_of(name, "base-to-novel")), {"backbone": {"name": backbone}}])
        for name in names
    }
    weights = options.needs_no_weights(backbone, pretrained)
    clip = load_clip(backbone, weights, precision=precision or "fp32", device=this_process(device).device)
    rows: list[CostRow] = []
    for name, settings in recipes.items():

        def on_step(step: str, name: str = name) -> None:
            typer.echo(f"{name}: {step}", err=True)

        try:
            rows.append(
                measure_cost(
                    *(settings, clip),
                    classes=classes,
                    recipe=Path(name).stem,
                    batches=batch_sizes,
                    seconds=seconds,
                    on_step=on_step,
                )
            )
        except MapleError as error:
            if len(recipes) == 1:
                raise
            typer.echo(f"{name} is left out: {error}", err=True)
            continue
        # Written one by one, so that an interruption loses only the current measurement.
        if output is not None:
            write_cost(rows[-1], output)
    for table in cost_tables(rows, describe_methods()):
        show_table(table)
    if output is not None and rows:
        typer.echo(f"written: {len(rows)} files in {output / COSTS}")
        typer.echo(f"next: maple report {output}")
