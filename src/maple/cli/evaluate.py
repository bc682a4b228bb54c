"""`maple evaluate`."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from maple.cli import options
from maple.names import names_in

if TYPE_CHECKING:
    from maple.metrics import Scores


def evaluate_command(
    run: options.RunFolder,
    classes: Annotated[str, Option(help="Classes: all, base, novel; or several, as in base,novel.")] = "all",
    dataset: Annotated[str | None, Option(help="Another data set, or folder, than that of the run.")] = None,
    features: options.Features = None,
    data_root: options.DataRoot = None,
    part: Annotated[
        str | None, Option(help="The images: test, val, train or all. Default: test; all of another, undivided folder.")
    ] = None,
    names: Annotated[str | None, Option(help='Other names of all classes: "red car,blue car".')] = None,
    only: Annotated[str | None, Option(help='Keep only these classes: "River,Forest".')] = None,
    class_names: options.ClassNamesFile = None,
    device: options.Device = None,
    backbone: options.TrainedBackbone = None,
    pretrained: options.Pretrained = None,
    trust_backbone: options.TrustBackbone = False,
    trust_code: options.TrustCode = False,
    per_class: Annotated[bool, Option("--per-class", help="Print the accuracy of every class.")] = False,
    confusion: Annotated[bool, Option("--confusion", help="Print the confusion matrix.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Evaluate a finished run on held-out images; the results are also written to its rows.jsonl."""
    from rich.console import Console
    from rich.progress import Progress

    from maple.checkpoint import load_prompts
    from maple.config import DataSettings
    from maple.distributed import this_process
    from maple.errors import ConfigError, UnlearnedClassesError
    from maple.metrics import harmonic_mean
    from maple.runs import evaluate_run, finished_prompts

    if features is not None:
        if dataset is not None:
            raise ConfigError("--features and --dataset both name what is evaluated; leave one out")
        dataset = options.feature_files(features)
    parts = [DataSettings(classes=name).classes for name in options.comma_list(classes) or []]  # type: ignore[arg-type]
    method = load_prompts(
        finished_prompts(run),
        device=this_process(device).device,
        **options.load_arguments(backbone, pretrained, trust_backbone, trust_code),
    )
    results: dict[str, tuple[Scores, dict[str, Any]]] = {}
    unsupported: dict[str, UnlearnedClassesError] = {}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for class_part in parts:
            task = bar.add_task(f"{class_part} classes", total=None)
            try:
                results[class_part] = evaluate_run(
                    run,
                    classes=class_part,
                    dataset=dataset,
                    root=data_root,
                    part=part,
                    names=None if names is None else names_in(names),
                    only=None if only is None else names_in(only),
                    class_names=options.read_names_file(class_names),
                    device=device,
                    method=method,
                    on_images=lambda done, total, task=task: bar.update(task, completed=done, total=total),  # type: ignore[misc]
                )
            except UnlearnedClassesError as error:
                unsupported[class_part] = error
            bar.remove_task(task)
    if not results and unsupported:
        raise next(iter(unsupported.values()))
    for name, reason in unsupported.items():
        options.echo(f"{name}: - ({reason})", err=True)
    if as_json:
        for _, row in results.values():
            typer.echo(json.dumps(row))
        return
    _print_scores(results)
    if {"base", "novel"} <= results.keys():
        mean = harmonic_mean(results["base"][0].top1, results["novel"][0].top1)
        options.echo(f"harmonic mean of base and novel: {mean:.2%}")
    for scores, row in results.values():
        if per_class:
            cells = (
                (name, sum(counts), "-" if accuracy is None else f"{100 * accuracy:.2f}")
                for name, accuracy, counts in zip(row["class_names"], scores.per_class, scores.confusion, strict=True)
            )
            options.print_table(("class", "images", "accuracy"), cells)
        if confusion:
            width = max(len(str(count)) for counts in scores.confusion for count in counts) + 1
            longest = max(map(len, row["class_names"]))
            options.echo("rows: true class; columns: predicted class, in the same order")
            for name, counts in zip(row["class_names"], scores.confusion, strict=True):
                options.echo(f"{name:<{longest}} " + "".join(f"{count:>{width}}" for count in counts))


def _print_scores(results: "dict[str, tuple[Scores, dict[str, Any]]]") -> None:
    row = next(iter(results.values()))[1]
    rows = []
    for class_part, (scores, part_row) in results.items():
        values = (scores.top1, scores.top5, scores.macro_f1, scores.calibration_error)
        percentages = [f"{100 * value:.2f}" for value in values]
        rows.append([class_part, scores.images, len(part_row["class_names"]), *percentages])
    columns = ("classes", "images", "names", "top-1", "top-5", "macro F1", "calibration error")
    title = f"{row['method']['name']} on {row['dataset']} ({row['part']}), per cent"
    options.print_table(columns, rows, title=title, right=columns[1:])
