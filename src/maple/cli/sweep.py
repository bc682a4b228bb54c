"""`maple sweep`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from maple.cli import options
from maple.errors import ConfigError, one_of
from maple.names import names_in

if TYPE_CHECKING:
    from maple.sweeps import PlannedRun, RunOutcome
    from maple.sweeps.executors import Executor


def sweep_command(
    sweep_name: Annotated[
        str,
        Argument(
            metavar="WHAT",
            help="A protocol: base-to-novel, few-shot, cross-dataset, domain-generalization; a shipped sweep: demo, "
            "per-class, complexity, ablation-prompting, -depth, -depth-language, -depth-vision, -length, -sharing, "
            "-initialisation, -coupling, -epochs, -cocoop; or a TOML file.",
        ),
    ],
    methods: options.Methods = None,
    datasets: Annotated[
        str | None,
        Option(
            help='Data sets, folders, files of features, or targets: "eurosat,dtd"; quote one with a comma. paper11, '
            "cross10 and imagenet-variants are the papers'."
        ),
    ] = None,
    source: Annotated[str | None, Option(help="Transfer protocols: the data set to train on.")] = None,
    seeds: Annotated[str | None, Option(help="As in 1,2,3 or 1-3. Default: 1-3.")] = None,
    shots: Annotated[str | None, Option(help="As in 16; all; 1,2,4. Default: 16; few-shot 1,2,4,8,16.")] = None,
    grid: Annotated[list[str] | None, Option(help="Values to try: prompt_depth=1,3,6; repeat to combine.")] = None,
    backbone: options.Backbone = None,
    pretrained: options.Pretrained = None,
    precision: options.Precision = None,
    overrides: options.Overrides = None,
    data_root: options.DataRoot = None,
    output: Annotated[Path, Option(help="The folder of the run folders.")] = Path("runs"),
    jobs: Annotated[int, Option(help="The number of processes on this machine.")] = 1,
    together: Annotated[
        int,
        Option(
            min=1,
            help="Train up to this number of runs in one pass, where they differ only in seed, train.lr or "
            "train.weight_decay: for GPUs that small batches leave idle.",
        ),
    ] = 1,
    executor: Annotated[str, Option(help="local, or ray: all machines of a cluster; they share --output.")] = "local",
    ray_address: Annotated[str | None, Option(help="HOST:6379, ray://HOST:10001, auto. Default: RAY_ADDRESS.")] = None,
    ray_storage: Annotated[str | None, Option(help="An fsspec URL for finished runs, if no folder is shared.")] = None,
    gpus_per_run: Annotated[float | None, Option(help="ray: GPUs, or a fraction of one. Default: 0.25.")] = None,
    cpus_per_run: Annotated[float | None, Option(help="ray: cores that a run reserves. Default: 1.")] = None,
    retry_failed: Annotated[bool, Option("--retry-failed", help="Repeat failed runs.")] = False,
    plan_only: Annotated[bool, Option("--plan", help="Print the runs and their status, and stop.")] = False,
    as_json: Annotated[bool, Option("--json", help="--plan: print one JSON object, with estimated times.")] = False,
    device: options.Device = None,
    tracker: options.Tracker = None,
) -> None:
    """Execute the runs and evaluations of a protocol. Repeat the command to resume it; finished runs are kept."""
    from maple.config import merge_layers, options_layer, override_layer
    from maple.runs.tracking import require_tracker
    from maple.sweeps import SweepSettings, plan_sweep, read_sweep, run_sweep
    from maple.sweeps.plan import PAPERS_TARGETS

    if as_json and not plan_only:
        raise ConfigError("--json prints the plan of a sweep: add --plan, or leave --json out")
    if tracker is not None:
        require_tracker(tracker)
    settings = read_sweep(sweep_name)
    settings |= options_layer(
        methods=options.method_names(methods),
        datasets=None if datasets is None else names_in(datasets),
        source=source,
        seeds=options.number_list(seeds, "--seeds"),
        shots=None if shots is None else [options.parse_shots(part) for part in options.comma_list(shots) or []],
        grid=_parse_grid(grid or []),
    )
    layer = options_layer(
        backbone={"name": backbone, "pretrained": pretrained, "precision": precision}, data={"root": data_root}
    )
    settings["settings"] = merge_layers(settings.get("settings", {}), layer, override_layer(overrides or []))
    for key, example in (("methods", "zero_shot,maple"), ("datasets", "eurosat,dtd")):
        if key not in settings and not (key == "datasets" and settings.get("protocol") in PAPERS_TARGETS):
            raise ConfigError(f"{sweep_name} names no {key}; give --{key}, as in --{key} {example}")
    runs = plan_sweep(SweepSettings(**settings), lambda text: options.echo(text, err=True))
    ray_options = {
        "ray-address": ray_address,
        "ray-storage": ray_storage,
        "gpus-per-run": gpus_per_run,
        "cpus-per-run": cpus_per_run,
    }
    chosen_executor = _ray_executor(executor, jobs, device, ray_options)
    if as_json:
        _print_json_plan(runs, output)
        return
    _print_plan(runs, output, full=plan_only)
    if plan_only:
        return

    from maple.cli.progress import SweepBar

    with SweepBar(len(runs)) as bar:
        outcomes = run_sweep(
            runs,
            output,
            jobs=jobs,
            together=together,
            device=device,
            executor=chosen_executor,
            tracker=tracker,
            retry_failed=retry_failed,
            progress=bar,
        )
    _print_outcomes(runs, outcomes, output)


def _ray_executor(name: str, jobs: int, device: str | None, ray_options: dict[str, Any]) -> "Executor | None":
    """Return the executor of `--executor ray`; None for this machine."""
    from functools import partial

    from maple.sweeps import on_ray

    given = {key: value for key, value in ray_options.items() if value is not None}
    if name not in ("local", "ray"):
        raise ConfigError(one_of("executor", name, ("local", "ray")))
    if name == "ray":
        if jobs != 1:
            raise ConfigError(f"--jobs {jobs} is for --executor local; Ray runs as many at once as it has room for")
        arguments = {key.removeprefix("ray-").replace("-", "_"): value for key, value in given.items()}
        return partial(on_ray, device=device, **arguments)
    if given:
        names = ", ".join(f"--{key}" for key in given)
        raise ConfigError(f"{names} without --executor ray has no effect; add it, or leave them out")
    return None


def _parse_grid(texts: list[str]) -> dict[str, list[Any]]:
    from maple.config import parse_value

    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, separator, values = text.partition("=")
        key, parts = key.strip(), [part.strip() for part in values.split(",")]
        if not separator or not key or not all(parts):
            raise ConfigError(f"--grid {text!r} must have the form setting=value,value, as in prompt_depth=1,3,6")
        if key in grid:
            raise ConfigError(f"--grid {text!r}: {key} is given twice; give all its values at once, with commas")
        grid[key] = [parse_value(part) for part in parts]
    return grid


def _print_plan(runs: "list[PlannedRun]", output: Path, *, full: bool) -> None:
    from collections import Counter

    from maple.sweeps.runner import status_of

    status = {run.name: status_of(run, output) for run in runs}
    counts = ", ".join(f"{count} {name}" for name, count in sorted(Counter(status.values()).items()))
    options.echo(f"{len(runs)} runs in {output} ({counts})", err=not full)
    options.echo(f"recipes: {', '.join(dict.fromkeys(run.recipe for run in runs))}", err=not full)
    if full:
        for name, place in _absent_data(runs):
            options.echo(f"absent: {name}, expected at {place}")
        for run in runs:
            evaluations = ", ".join(f"{e.dataset or 'its own'} {e.classes}" for e in run.evaluations)
            options.echo(f"{status[run.name]:<12} {run.label}  [{evaluations}]  {run.name}")


def _absent_data(runs: "list[PlannedRun]") -> list[tuple[str, str]]:
    """The data sets that runs need and that are not there, and where each is expected."""
    from maple.data.catalogue import place_of_absent

    wanted = {
        (name or run.settings.data.dataset, run.settings.data.root)
        for run in runs
        for name in (None, *(evaluation.dataset for evaluation in run.evaluations))
    }
    places = ((name, place_of_absent(name, None if root is None else Path(root))) for name, root in wanted)
    return sorted((name, place) for name, place in places if place)


def _print_json_plan(runs: "list[PlannedRun]", output: Path) -> None:
    import json
    from collections import Counter

    from maple.sweeps.runner import describe_plan

    described = describe_plan(runs, output)
    estimates = [row["estimated_seconds"] for row in described if row["status"] != "finished"]
    content = {
        "output": str(output),
        "counts": dict(Counter(row["status"] for row in described)),
        "estimated_seconds": None if None in estimates else sum(estimates),
        "absent": [{"dataset": name, "place": place} for name, place in _absent_data(runs)],
        "runs": described,
    }
    typer.echo(json.dumps(content, indent=1))


def _print_outcomes(runs: "list[PlannedRun]", outcomes: "list[RunOutcome]", output: Path) -> None:
    unfinished = [(run, outcome) for run, outcome in zip(runs, outcomes, strict=True) if outcome.status != "finished"]
    for run, outcome in unfinished:
        options.echo(f"{outcome.status}: {run.label}: {outcome.error}", err=True)
    options.echo(f"{len(runs) - len(unfinished)} of {len(runs)} runs have finished")
    options.echo(f"next: maple report {output}")
    statuses = {outcome.status for _, outcome in unfinished}
    if "busy" in statuses:
        message = "some runs are being trained by another process; repeat the command when it has finished"
        options.echo(message, err=True)
    if "interrupted" in statuses:
        options.echo("repeat the command to continue interrupted runs", err=True)
    if "failed" in statuses:
        options.echo("repeat failed runs with --retry-failed", err=True)
    if unfinished:
        raise typer.Exit(1)
