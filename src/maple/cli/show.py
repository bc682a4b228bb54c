"""`maple methods` and `maple inspect`: what there is to train, and what has been trained."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument

from maple.cli import options


def methods_command(backbone: options.MeasuredBackbone = "ViT-B-16", pretrained: options.Pretrained = None) -> None:
    """List the methods with their presets, and the number of parameters that each preset learns on a backbone."""
    from rich.console import Console

    from maple.clip.load import load_backbone
    from maple.config import preset_names, read_preset, resolve
    from maple.errors import MapleError
    from maple.methods import METHODS, build_method

    clip = load_backbone(backbone, options.needs_no_weights(backbone, pretrained), precision="fp32", device="cpu")
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"learned parameters of each preset on {backbone}:\n")
    presets = {name: resolve([read_preset(name), {"backbone": {"name": backbone}}]).method for name in preset_names()}
    for name, method_class in METHODS.items():
        console.print(f"[bold]{name}[/]  {method_class.title} ({method_class.paper})\n    {method_class.summary}")
        for preset, description in presets.items():
            if description["name"] == name:
                try:
                    count = f"{build_method(description, clip, ['class']).parameter_count():>9,}"
                except MapleError as error:
                    count = str(error)
                console.print(f"    {preset:<32} {count}", markup=False)


def inspect_command(
    run: Annotated[
        Path, Argument(metavar="RUN", help="A run folder, `last`, or a prompts file.", callback=options.newest_run)
    ],
    as_json: options.AsJson = False,
) -> None:
    """Show the settings of a run, its epochs, its learned parameters and its evaluations. Loads no backbone."""
    import json

    from pydantic import ValidationError

    from maple.checkpoint import read_prompts
    from maple.data.checks.findings import number_of
    from maple.errors import CheckpointError, shortened_list
    from maple.report.records import Row, reason_of
    from maple.runs import read_history, read_rows, read_settings

    runs = [] if (run / "config.json").exists() else sorted(path.parent.name for path in run.glob("*/config.json"))
    if runs:
        listed = shortened_list(runs, 20, longest=150)
        raise CheckpointError(f"{run} is not a run folder, but holds {number_of(len(runs), 'run')}: {listed}")
    content: dict[str, Any] = {}
    prompts = run if run.is_file() else run / "prompts.safetensors"
    if not run.is_file():
        content["settings"] = read_settings(run).model_dump(mode="json")
        content["finished"] = prompts.exists()
        content["epochs"] = [{"epoch": h.epoch + 1, "lr": h.lr, "loss": h.loss, **h.logs} for h in read_history(run)]
        if rows := read_rows(run):
            try:
                for row in rows:
                    Row.model_validate(row)
            except ValidationError as error:
                raise CheckpointError(f"{run / 'rows.jsonl'} is damaged: {reason_of(error)}; move it away") from error
            content["rows"] = rows
    if prompts.exists() or run.is_file():
        stored = read_prompts(prompts)
        content["prompts"] = {
            "method": stored.method,
            "backbone": stored.backbone,
            "class_names": list(stored.class_names),
            "info": stored.info,
            "parameters": {name: list(tensor.shape) for name, tensor in stored.tensors.items()},
        }
    if as_json:
        typer.echo(json.dumps(content, indent=1))
    else:
        _print_run(content)


def _print_run(content: dict[str, Any]) -> None:
    from maple.data.checks.findings import number_of
    from maple.errors import shortened_list

    def line(values: Any) -> str:
        if not isinstance(values, dict):
            return str(values)
        return ", ".join(f"{key}={value}" for key, value in values.items() if value not in ({}, None))

    if "settings" in content:
        state = "finished" if content["finished"] else f"interrupted after {len(content['epochs'])} epochs"
        options.echo(f"run {state}")
        for section, values in content["settings"].items():
            options.echo(f"  {section} {line(values)}")
        rows = []
        for row in content["epochs"]:
            accuracy = row.get("accuracy")
            shown = f"{math.nan if accuracy is None else accuracy:.1%}"
            rows.append((row["epoch"], f"{row['lr']:.3g}", f"{row['loss']:.4f}", shown))
        options.print_table(("epoch", "rate", "loss", "accuracy"), rows)
    if "prompts" in content:
        prompts = content["prompts"]
        options.echo(f"prompts {line(prompts['method'])}")
        options.echo(f"  backbone {line(prompts['backbone'])}")
        count = sum(map(math.prod, prompts["parameters"].values()))
        options.echo(f"  {count:,} parameters in {len(prompts['parameters'])} tensors")
        for name, shape in prompts["parameters"].items():
            options.echo(f"    {name} {shape}")
        names = prompts["class_names"]
        options.echo(f"  {len(names)} classes: {shortened_list(names, 20)}")
        info = dict(prompts["info"])
        if calibration := info.pop("calibration", None):
            reason = f" ({calibration['reason']})" if calibration.get("reason") else ""
            images = number_of(calibration.get("images") or 0, "image")
            temperature = calibration.get("temperature") or 1.0
            options.echo(f"  temperature {temperature:g}, calibrated on {images}{reason}")
        if kept := info.pop("kept", None):
            from maple.train import describe_kept

            options.echo(f"  {describe_kept(kept)}")
        options.echo(f"  {line(info)}")
    for row in content.get("rows", []):
        options.echo(
            f"evaluated {row['dataset']} {row['part']} ({row['classes']}, {len(row['class_names'])} names): "
            f"top-1 {row['top1']:.2%}, top-5 {row['top5']:.2%}, macro F1 {row['macro_f1']:.2%}"
        )
