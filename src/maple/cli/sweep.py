"""`maple sweep`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maple.cli.options import DataRoot, Device, Tracker, comma_list, number_list, shots_of

if TYPE_CHECKING:
    from maple.sweeps import PlannedRun, RunOutcome
    from maple.sweeps.executors import Executor


def sweep_command(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="base-to-novel, few-shot, cross-dataset, domain-generalization; demo; ablation-prompting, -depth, "
            "-depth-language, -depth-vision, -length, -initialisation, -coupling, -epochs, -cocoop; per-class; or a "
            "TOML file.",
        ),
    ],
    methods: Annotated[
        str | None, typer.Option(help='First parts of presets\' names, or files: "zero_shot,coop,maple".')
    ] = None,
    datasets: Annotated[
        str | None, typer.Option(help='Data sets or folders: "eurosat,dtd"; with --source its targets.')
    ] = None,
    source: Annotated[str | None, typer.Option(help="What to train on, in the two protocols that transfer.")] = None,
    seeds: Annotated[str | None, typer.Option(help="As in 1,2,3 or 1-3. Default: 1-3.")] = None,
    shots: Annotated[
        str | None,
        typer.Option(
            help="Training images per class, one or several: 16; all; 1,2,4. Default: 16; few-shot 1,2,4,8,16."
        ),
    ] = None,
    grid: Annotated[
        list[str] | None, typer.Option(help="Values of a setting to try: prompt_depth=1,3,6; repeat to combine.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="As for `maple train`.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="As for `maple train`.")] = None,
    precision: Annotated[str | None, typer.Option(help="As for `maple train`.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting of all runs: section.key=value; repeatable.")
    ] = None,
    data_root: DataRoot = None,
    output: Annotated[Path, typer.Option(help="The folder of the runs' folders.")] = Path("runs"),
    jobs: Annotated[int, typer.Option(help="How many processes at once, on this machine.")] = 1,
    together: Annotated[
        int,
        typer.Option(
            min=1,
            help="How many runs to train in one pass, at most, of those that differ in seed, train.lr or "
            "train.weight_decay alone: for GPUs that small batches leave idle.",
        ),
    ] = 1,
    executor: Annotated[
        str, typer.Option(help="local: this machine. ray: as many machines as a Ray cluster has; they share --output.")
    ] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="HOST:6379, ray://HOST:10001 or auto. Default: RAY_ADDRESS, or this machine.")
    ] = None,
    ray_storage: Annotated[
        str | None, typer.Option(help="Where machines share no folder: an fsspec URL for finished runs, as in s3://...")
    ] = None,
    gpus_per_run: Annotated[
        float | None, typer.Option(help="With ray: GPUs or a fraction of one. Default: 0.25 if there are any.")
    ] = None,
    cpus_per_run: Annotated[float | None, typer.Option(help="With ray: cores that a run reserves. Default: 1.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Begin failed runs again.")] = False,
    plan_only: Annotated[bool, typer.Option("--plan", help="Show the runs and how far they are, and stop.")] = False,
    device: Device = None,
    tracker: Tracker = None,
) -> None:
    """Carry out the runs and evaluations of a protocol. Repeat the command to go on; finished runs are kept."""
    from functools import partial

    from maple.runs import require_tracker
    from maple.sweeps import SweepSettings, plan_sweep, run_sweep
    from maple.sweeps.runner import run_group

    if tracker is not None:
        require_tracker(tracker)
    asked = {
        "methods": comma_list(methods),
        "datasets": comma_list(datasets),
        "source": source,
        "seeds": number_list(seeds, "--seeds"),
        "shots": None if shots is None else [shots_of(part) for part in comma_list(shots) or []],
        "grid": _grid(grid) if grid else None,
    }
    layer = _layer({"name": backbone, "pretrained": pretrained, "precision": precision}, data_root, overrides or [])
    whole = _whole_sweep(what, asked, layer)
    runs = plan_sweep(SweepSettings(**whole), lambda word: typer.echo(word, err=True))
    for_ray = {
        "address": ray_address,
        "storage": ray_storage,
        "gpus_per_run": gpus_per_run,
        "cpus_per_run": cpus_per_run,
    }
    chosen_executor = _executor(executor, jobs, device, for_ray)
    _show_plan(runs, output, whole=plan_only)
    if plan_only:
        return

    from maple.cli.progress import SweepBar

    work = partial(run_group, tracker=tracker)
    with SweepBar(len(runs)) as bar:
        outcomes = run_sweep(
            runs,
            output,
            together=together,
            executor=chosen_executor,
            work=work,
            retry_failed=retry_failed,
            progress=bar,
        )
    _show_end(runs, outcomes, output)


def _layer(backbone: dict[str, str | None], data_root: str | None, overrides: list[str]) -> dict[str, Any]:
    """What the options say of all runs."""
    from maple.config import merge_layers, options_layer, override_layer

    return merge_layers(options_layer(backbone=backbone, data={"root": data_root}), override_layer(overrides))


def _whole_sweep(what: str, asked: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """The sweep of that name, with what was asked for laid over it."""
    from maple.config import merge_layers
    from maple.errors import ConfigError
    from maple.sweeps import read_sweep

    settings = read_sweep(what)
    given = {key: value for key, value in asked.items() if value is not None}
    whole = {**settings, **given, "settings": merge_layers(settings.get("settings", {}), layer)}
    for key, example in (("methods", "zero_shot,maple"), ("datasets", "eurosat,dtd")):
        if key not in whole:
            raise ConfigError(f"{what} names no {key}; give --{key}, as in --{key} {example}")
    return whole


def _executor(name: str, jobs: int, device: str | None, for_ray: dict[str, Any]) -> "Executor":
    from functools import partial

    from maple.errors import ConfigError, one_of
    from maple.sweeps import in_processes, in_turn, on_ray

    given = {key: value for key, value in for_ray.items() if value is not None}
    if name == "ray":
        if jobs != 1:
            raise ConfigError(f"--jobs {jobs} is for --executor local; Ray runs as many at once as it has room for")
        return partial(on_ray, device=device, **given)
    if name != "local":
        raise ConfigError(one_of("executor", name, ("local", "ray")))
    if given:
        options = {"address": "--ray-address", "storage": "--ray-storage"}
        told = ", ".join(options.get(key, f"--{key.replace('_', '-')}") for key in given)
        raise ConfigError(f"{told} without --executor ray has no effect; add it, or leave them out")
    if jobs < 1:
        raise ConfigError(f"--jobs is {jobs}; it must be at least 1")
    return partial(in_turn, device=device) if jobs == 1 else partial(in_processes, jobs=jobs, device=device)


def _grid(texts: list[str]) -> dict[str, list[Any]]:
    from maple.config import parse_value
    from maple.errors import ConfigError

    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, separator, values = text.partition("=")
        parts = [part.strip() for part in values.split(",")]
        if not separator or not key.strip() or not all(parts):
            raise ConfigError(f"--grid {text!r} must have the form setting=value,value, as in prompt_depth=1,3,6")
        if key.strip() in grid:
            raise ConfigError(
                f"--grid {text!r}: {key.strip()} is given twice; give all its values at once, with commas"
            )
        grid[key.strip()] = [parse_value(part) for part in parts]
    return grid


def _show_plan(runs: "list[PlannedRun]", output: Path, *, whole: bool) -> None:
    from collections import Counter

    from maple.sweeps.runner import status_of

    states = {run.name: status_of(run, output) for run in runs}
    counts = Counter(states.values())
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    typer.echo(f"{len(runs)} runs in {output} ({told})", err=not whole)
    recipes = {run.recipe: None for run in runs}
    typer.echo(f"recipes: {', '.join(recipes)}", err=not whole)
    if whole:
        for run in runs:
            asked = ", ".join(f"{e.dataset or 'its own'} {e.classes}" for e in run.evaluations)
            typer.echo(f"{states[run.name]:<12} {run.label}  [{asked}]  {run.name}")


def _show_end(runs: "list[PlannedRun]", outcomes: "list[RunOutcome]", output: Path) -> None:
    failed = [(run, outcome) for run, outcome in zip(runs, outcomes, strict=True) if outcome.status != "finished"]
    for run, outcome in failed:
        typer.echo(f"{outcome.status}: {run.label}: {outcome.error}", err=True)
    typer.echo(f"{len(runs) - len(failed)} of {len(runs)} runs have finished")
    typer.echo(f"next: maple report {output}")
    if any(outcome.status == "busy" for _, outcome in failed):
        typer.echo("another process is at the busy ones; repeat the command to have theirs too", err=True)
    if any(outcome.status == "failed" for _, outcome in failed):
        typer.echo("failed runs are begun again with --retry-failed", err=True)
    if failed:
        raise typer.Exit(1)
