"""`maple inspect`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def inspect_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a prompts file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a run is, how far it came, what it learned and how well it does. Loads no backbone."""
    from maple.checkpoint import read_prompts
    from maple.runs import read_history, read_settings

    found: dict[str, Any] = {}
    prompts = run if run.is_file() else run / "prompts.safetensors"
    if not run.is_file():
        found["settings"] = read_settings(run).model_dump(mode="json")
        found["finished"] = prompts.exists()
        found["epochs"] = [{"epoch": h.epoch + 1, "lr": h.lr, "loss": h.loss, **h.logs} for h in read_history(run)]
        rows = run / "rows.jsonl"
        if rows.exists():
            found["rows"] = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    if prompts.exists() or run.is_file():
        stored = read_prompts(prompts)
        found["prompts"] = {
            "method": stored.method,
            "backbone": stored.backbone,
            "class_names": list(stored.class_names),
            "info": stored.info,
            "parameters": {name: list(tensor.shape) for name, tensor in stored.tensors.items()},
        }
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    if "settings" in found:
        state = "finished" if found["finished"] else f"interrupted after {len(found['epochs'])} epochs"
        console.print(f"run {state}")
        for section, values in found["settings"].items():
            console.print(f"  {section} {_line(values)}", soft_wrap=True)
        table = Table("epoch", "rate", "loss", "accuracy")
        for epoch in found["epochs"]:
            accuracy = f"{epoch.get('accuracy', float('nan')):.1%}"
            table.add_row(str(epoch["epoch"]), f"{epoch['lr']:.3g}", f"{epoch['loss']:.4f}", accuracy)
        console.print(table)
    if "prompts" in found:
        prompts = found["prompts"]
        console.print(f"prompts {_line(prompts['method'])}", soft_wrap=True)
        console.print(f"  backbone {_line(prompts['backbone'])}", soft_wrap=True)
        count = sum(_product(shape) for shape in prompts["parameters"].values())
        console.print(f"  {count:,} parameters in {len(prompts['parameters'])} tensors")
        for name, shape in prompts["parameters"].items():
            console.print(f"    {name} {shape}")
        names = prompts["class_names"]
        console.print(f"  {len(names)} classes: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}")
        console.print(f"  {_line(prompts['info'])}", soft_wrap=True)
    for row in found.get("rows", []):
        console.print(
            f"evaluated {row['dataset']} {row['part']} ({row['classes']}, {len(row['class_names'])} names): "
            f"top-1 {row['top1']:.2%}, top-5 {row['top5']:.2%}, macro F1 {row['macro_f1']:.2%}"
        )


def _line(values: Any) -> str:
    if not isinstance(values, dict):
        return str(values)
    return ", ".join(f"{key}={value}" for key, value in values.items() if value not in ({}, None))


def _product(shape: list[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
