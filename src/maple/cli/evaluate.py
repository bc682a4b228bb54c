"""`maple evaluate`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maple.cli.options import DataRoot, Device, RunFolder, comma_list, read_mapping
from maple.names import names_in

if TYPE_CHECKING:
    from maple.metrics import Scores


def evaluate_command(
    run: RunFolder,
    classes: Annotated[
        str, typer.Option(help="Which part of the classes: all, base, novel; several with commas, as in base,novel.")
    ] = "all",
    dataset: Annotated[
        str | None, typer.Option(help="Another data set, or folder, than the one it was trained on.")
    ] = None,
    data_root: DataRoot = None,
    part: Annotated[
        str | None,
        typer.Option(help="Which items: test, val, train or all. Default: test; all of another, undivided folder."),
    ] = None,
    names: Annotated[
        str | None, typer.Option(help='Other names for all the classes, in label order: "red car,blue car".')
    ] = None,
    only: Annotated[str | None, typer.Option(help='Keep only these classes: "River,Forest".')] = None,
    class_names: Annotated[
        Path | None, typer.Option(help="JSON: other words for some class or folder names.", dir_okay=False)
    ] = None,
    device: Device = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Show the accuracy of every class.")] = False,
    confusion: Annotated[bool, typer.Option("--confusion", help="Show the confusion matrix.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON, one a line.")] = False,
) -> None:
    """Measure a finished run on held-out images; results are also kept in the run's rows.jsonl."""
    from rich.console import Console
    from rich.progress import Progress

    from maple.checkpoint import load_prompts
    from maple.config import DataSettings
    from maple.distributed import this_process
    from maple.errors import UnlearnedClassesError
    from maple.metrics import harmonic_mean
    from maple.runs import evaluate_run, finished_prompts

    parts = [DataSettings(classes=name).classes for name in comma_list(classes) or []]  # type: ignore[arg-type]
    method = load_prompts(finished_prompts(run), device=this_process(device).device)
    results = {}
    silent: dict[str, UnlearnedClassesError] = {}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for which in parts:
            task = bar.add_task(f"{which} classes", total=None)
            try:
                results[which] = evaluate_run(
                    run,
                    classes=which,
                    dataset=dataset,
                    root=data_root,
                    part=part,
                    names=None if names is None else names_in(names),
                    only=None if only is None else names_in(only),
                    class_names=read_mapping(class_names),
                    device=device,
                    method=method,
                    on_images=lambda done, total, task=task: bar.update(task, completed=done, total=total),  # type: ignore[misc]
                )
            except UnlearnedClassesError as error:
                silent[which] = error
            bar.remove_task(task)
    for unanswered, reason in silent.items():
        if not results:
            raise reason
        typer.echo(f"{unanswered}: - ({reason})", err=True)
    if as_json:
        for _, row in results.values():
            typer.echo(json.dumps(row))
        return
    _show(results)
    if {"base", "novel"} <= results.keys():
        mean = harmonic_mean(results["base"][0].top1, results["novel"][0].top1)
        typer.echo(f"harmonic mean of base and novel: {mean:.2%}")
    for scores, row in results.values():
        if per_class:
            _show_classes(scores, row["class_names"])
        if confusion:
            _show_confusion(scores, row["class_names"])


def _show(results: "dict[Any, tuple[Scores, dict[str, Any]]]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    first = next(iter(results.values()))[1]
    table = Table(title=Text(f"{first['method']['name']} on {first['dataset']} ({first['part']}), per cent"))
    for column in ("classes", "images", "names", "top-1", "top-5", "macro F1", "calibration error"):
        table.add_column(column, justify="left" if column == "classes" else "right")
    for which, (scores, row) in results.items():
        figures = (scores.top1, scores.top5, scores.macro_f1, scores.calibration_error)
        percent = [f"{100 * figure:.2f}" for figure in figures]
        table.add_row(which, str(scores.images), str(len(row["class_names"])), *percent)
    Console().print(table)


def _show_classes(scores: "Scores", names: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("class", "images", "accuracy")
    for name, accuracy, counts in zip(names, scores.per_class, scores.confusion, strict=True):
        table.add_row(Text(name), str(sum(counts)), "-" if accuracy is None else f"{100 * accuracy:.2f}")
    Console().print(table)


def _show_confusion(scores: "Scores", names: list[str]) -> None:
    width = max(len(str(count)) for row in scores.confusion for count in row) + 1
    longest = max(map(len, names))
    typer.echo("rows: true class; columns: predicted class, in the same order")
    for name, row in zip(names, scores.confusion, strict=True):
        typer.echo(f"{name:<{longest}} " + "".join(f"{count:>{width}}" for count in row))
