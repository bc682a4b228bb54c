"""`maple train` and `maple fit`."""

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from maple.cli import options
from maple.descriptions import DEFAULT_METHOD
from maple.errors import ConfigError, visible

if TYPE_CHECKING:
    from maple.fitting import FitResult
    from maple.report.comparison import MeasuredAccuracy, PairedAccuracy

_MOST_CHANGES = 5
_TEST_ROWS = "test and test_labels, or store undivided features and labels, of which a quarter is held out"


def train_command(
    config: Annotated[
        str | None,
        Argument(
            metavar="[SETTINGS]",
            help="A TOML or JSON file of settings, as --print-config and a run's config.json are, or a run folder.",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        Option(
            help="A data set (`maple data list`), a folder of class-named folders, FOLDER:DOMAIN, a .csv, Parquet, "
            "an archive, shards, or hf:OWNER/NAME. "
            "Default: emoji-animals."
        ),
    ] = None,
    features: options.Features = None,
    data_root: options.DataRoot = None,
    method: options.MethodName = None,
    preset: Annotated[
        str | None, Option(help="A preset, a file of settings, or a run folder. Default: METHOD_base-to-novel.")
    ] = None,
    backbone: options.Backbone = None,
    pretrained: options.Pretrained = None,
    precision: options.Precision = None,
    shots: options.Shots = None,
    classes: Annotated[str | None, Option(help="The classes to train on: all, base or novel.")] = None,
    class_names: options.ClassNamesFile = None,
    seed: options.Seed = None,
    overrides: options.Overrides = None,
    output: options.RunOutput = None,
    device: options.Device = None,
    tracker: options.Tracker = None,
    print_config: options.PrintConfig = False,
) -> None:
    """Learn prompts from a few images per class. Repeat the same command to resume an interrupted run."""
    from contextlib import ExitStack

    from maple.config import options_layer, read_preset, resolve, setting_layer, to_toml
    from maple.runs import Tracked, complete, content_name, train_run

    if config is not None and preset is not None:
        raise ConfigError(f"{config} and --preset {preset} both have the settings; leave out one of them")
    preset = config if preset is None else preset
    method = None if method is None else options.method_name(method)
    names = options.read_names_file(class_names)
    layer = options_layer(
        backbone={"name": backbone, "pretrained": pretrained, "precision": precision},
        data={"dataset": dataset, "root": data_root, "classes": classes, "class_names": names},
        seed=seed,
    )
    if preset is None:
        from maple.methods import METHODS, recipe_of

        if method is not None:
            METHODS.find(method, ", or PATH/FILE.py:CLASS for one of your own")
        preset = recipe_of(method or DEFAULT_METHOD, ["base-to-novel"])
    layers = [read_preset(preset), *([] if method is None else [{"method": {"name": method}}]), layer]
    if shots is not None:
        layers.append(setting_layer("data.shots", options.parse_shots(shots)))
    given = resolve(layers, overrides or [])
    if features is not None:
        # Only now: a data set named next to them has chosen among the rules of the preset.
        given = given.changed(data=given.data.changed(dataset=options.feature_files(features), root=None))
    settings = complete(given)
    if print_config:
        typer.echo(to_toml(settings).rstrip())
        return
    folder = options.run_folder(output, Path("runs") / content_name(given))

    from maple.cli.progress import TrainBar

    is_main = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
    with ExitStack() as stack:
        bar = stack.enter_context(TrainBar(settings, folder, quiet=not is_main))
        tracked = stack.enter_context(Tracked(tracker, folder, settings, bar)) if tracker else None
        result = train_run(settings, folder, device=device, progress=tracked or bar, on_ready=bar.ready)
    if not is_main:
        return
    if result.was_finished:
        options.echo(f"already finished: {folder}")
    else:
        last = f"last epoch: loss {result.history[-1].loss:.4f}" if result.history else "no epochs"
        options.echo(f"finished: {folder} ({last})")
    if settings.train.keep == "best":
        from maple.checkpoint import read_prompts
        from maple.train import describe_kept

        if kept := read_prompts(folder / "prompts.safetensors").info.get("kept"):
            options.echo(describe_kept(kept))
    options.echo(f"next: maple evaluate {folder}")


def fit_command(
    context: typer.Context,
    source: Annotated[
        str | None,
        Argument(
            metavar="[IMAGES]",
            help="A folder of class-named folders, FOLDER:DOMAIN, a .csv or .jsonl of path and label, Parquet, an "
            "archive, shards, or hf:OWNER/NAME.",
        ),
    ] = None,
    features: options.Features = None,
    check: Annotated[bool, Option("--check", help="Only inspect the images; write and train nothing.")] = False,
    keep_near_copies: Annotated[
        bool, Option("--keep-near-copies", help="Keep test images that look like training images.")
    ] = False,
    class_names: options.ClassNamesFile = None,
    method: Annotated[
        str,
        Option(help="`auto` keeps the best of several; or one of `maple methods`, or your own: PATH/FILE.py:CLASS."),
    ] = "auto",
    methods: Annotated[
        str | None, Option(help='The methods that `auto` tries, in place of its own: "zero_shot,coop,maple".')
    ] = None,
    goal: Annotated[
        str | None,
        Option(help="`trained`: choose the best on the trained class names; `new`: on names not trained, too."),
    ] = None,
    minutes: Annotated[
        float | None, Option(help="The time that `auto` may take, as estimated before. Default: 10.")
    ] = None,
    preset: Annotated[
        str | None, Option(help="A preset, a file of settings, or a run folder: fit with its method.")
    ] = None,
    epochs: Annotated[int | None, Option(help="Passes over the training images, in place of the preset's.")] = None,
    shots: options.Shots = "16",
    seed: options.Seed = 1,
    backbone: options.Backbone = None,
    pretrained: options.Pretrained = None,
    precision: options.Precision = None,
    overrides: options.Overrides = None,
    output: options.RunOutput = None,
    data_root: options.DataRoot = None,
    device: options.Device = None,
    tracker: options.Tracker = None,
    print_config: Annotated[
        bool, Option("--print-config", help="Print the settings as TOML, and stop; those of one --method for --preset.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Adapt CLIP to your own images: inspect them, train on a few, compare with zero-shot CLIP on others.

    Several methods are tried by cross-validation on the training images, and the best one is trained.

    Repeat the same command to resume an interrupted fit, or to see the result again.
    """
    if source is None and features is None:
        raise typer.BadParameter("give a folder, or features with --features FILE", param_hint="IMAGES")
    if source is not None and features is not None:
        raise ConfigError(f"--features takes the place of images: leave out {source}")
    if features is not None and (backbone, pretrained, precision) != (None, None, None):
        raise ConfigError("--backbone, --pretrained, --precision: features need no CLIP; leave these out")
    source = str(source) if features is None else options.feature_files(features)
    names = options.read_names_file(class_names)

    from maple.cli.progress import FileBars, FitBars
    from maple.cli.report import thumbnail_loader
    from maple.config import merge_layers, options_layer, setting_layer, to_toml
    from maple.fitting import (
        AUTO,
        CANDIDATES,
        SelectionSettings,
        fit,
        fit_candidates,
        fit_folder,
        fit_settings,
        inspect_source,
    )
    from maple.fitting.readable_names import require_readable_names
    from maple.runs import complete
    from maple.runs.spec import columns_of
    from maple.runs.tracking import require_tracker

    layer = merge_layers(
        options_layer(
            backbone={"name": backbone, "pretrained": pretrained, "precision": precision},
            data={"root": data_root, "class_names": names},
            train={"epochs": epochs},
            seed=seed,
        ),
        setting_layer("data.shots", options.parse_shots(shots or "all")),
    )
    if tracker is not None:
        require_tracker(tracker)
    selection = None
    method = options.method_name(method)
    sets_method = any(override.startswith("method.") for override in overrides or ())
    if preset is None and method == AUTO and sets_method and methods is None:
        method = DEFAULT_METHOD
        options.echo(f"settings of a method are given: fitting {method} alone (--method names another)", err=True)
    if preset is None and method == AUTO:
        recipes = options.method_names(methods) or CANDIDATES
        candidates = fit_candidates(source, recipes, layer=layer, overrides=overrides or [])
        given: dict[str, Any] = {"goal": goal, "minutes": minutes}
        selection = SelectionSettings(**{key: value for key, value in given.items() if value is not None})
        settings = next(iter(candidates.values()))
    else:
        only_auto = {"--methods": methods, "--goal": goal, "--minutes": minutes}
        if unused := [name for name, value in only_auto.items() if value is not None]:
            raise ConfigError(f"{', '.join(unused)}: only for --method auto, which chooses among several methods")
        if preset is not None and method != AUTO:
            raise ConfigError(f"--preset {preset} has a method; leave out --method {method}")
        settings = fit_settings(source, method, preset=preset, layer=layer, overrides=overrides or [])
        candidates = {"": settings}
    if print_config:
        shown = {recipe: complete(candidate) for recipe, candidate in candidates.items()}
        if selection:
            typer.echo(f"# The settings of {len(shown)} methods, of which fit tries each. For --preset: --method NAME.")
        typer.echo(to_toml(shown if selection else shown[""]).rstrip())
        return
    if check:
        with FileBars() as bars:
            inspection = inspect_source(
                source,
                settings.data.root,
                class_names=settings.data.class_names,
                seed=settings.seed,
                keep_near_copies=keep_near_copies,
                **columns_of(settings.data),
                on_images=lambda done, total: bars.advance("images inspected", done, total),
            )
        typer.echo(json.dumps(inspection.as_json(), indent=1) if as_json else options.visible_lines(inspection.lines()))
        require_readable_names(settings, inspection.dataset.class_names)
        return
    fitted = candidates if selection else settings
    folder = options.run_folder(output, fit_folder(fitted, selection, keep_near_copies=keep_near_copies))
    with FitBars(settings, folder) as progress:
        result = fit(
            fitted,
            folder,
            selection=selection,
            keep_near_copies=keep_near_copies,
            device=device,
            tracker=tracker,
            progress=progress,
            load_thumbnail=thumbnail_loader(data_root),
        )
    if as_json:
        typer.echo(json.dumps(_as_json(result), indent=1))
        return
    _print_result(result, more="images unlike those for training" if features is None else _TEST_ROWS)
    if features is not None:
        options.echo(f"next:\n  maple predict {shlex.quote(str(folder))} --features more.safetensors")
        return
    options.echo(f"next:\n  maple predict {shlex.quote(str(folder))} image.jpg --zero-shot")
    if "serve" in context.find_root().command.commands:  # type: ignore[attr-defined]
        options.echo(f"  maple serve {shlex.quote(str(folder))}")


def _print_result(result: "FitResult", more: str) -> None:
    """Print a result; `more` is what to add where nothing is left to test on."""
    if result.was_finished:
        options.echo(f"already finished: {result.folder}")
        typer.echo(options.visible_lines(result.findings))
    if result.selection is not None:
        options.echo()
        options.echo(str(result.selection))
    options.echo()
    if result.accuracy is None:
        options.echo(f"trained, but not tested: nothing is left to test on, see above; add {more}")
    elif result.comparison is None:
        _print_accuracies(result.accuracy)
    else:
        _print_comparison(result.comparison)
    if result.kept:
        options.echo(result.kept)
    if result.reliability is not None:
        options.echo(f"probabilities: {result.reliability.summary}")
        options.echo("  predict --reject    images answered    of these correct, in per cent")
        for each in result.reliability.coverage:
            right = "-" if each.accuracy is None else f"{100 * each.accuracy:.1f}"
            share = f"{each.kept:,} ({100 * each.fraction:.1f} %)"
            options.echo(f"  {each.threshold:<16g}    {share:<15}    {right}")
    options.echo()
    if result.page is not None:
        options.echo(f"page: {result.page}")


def _print_accuracies(*accuracies: "MeasuredAccuracy") -> None:
    width = max(len(accuracy.title) for accuracy in accuracies)
    options.echo(f"accuracy on {accuracies[0].images:,} held-out images, in per cent (95 % interval)")
    for accuracy in accuracies:
        low, high = (100 * bound for bound in accuracy.interval)
        options.echo(f"  {accuracy.title:<{width}}  {100 * accuracy.fraction:5.1f}  ({low:.1f} to {high:.1f})")


def _print_comparison(comparison: "PairedAccuracy") -> None:
    _print_accuracies(comparison.zero_shot, comparison.method)
    options.echo(f"images: {comparison.verdict}")
    better = [change for change in comparison.changes if change.difference > 0]
    worse = [change for change in reversed(comparison.changes) if change.difference < 0]
    for word, changes in (("better", better), ("worse", worse)):
        shown = [
            f"{visible(change.class_name)} {100 * change.difference:+.0f}".replace("-", "\N{MINUS SIGN}")
            for change in changes[:_MOST_CHANGES]
        ]
        if len(changes) > _MOST_CHANGES:
            shown.append(f"and {len(changes) - _MOST_CHANGES} more")
        details = f" ({', '.join(shown)})" if shown else ""
        options.echo(f"{word}: {len(changes)} of {len(comparison.changes)} classes{details}")


def _as_json(result: "FitResult") -> dict[str, Any]:
    def accuracy_json(accuracy: "MeasuredAccuracy | None") -> dict[str, Any] | None:
        if accuracy is None:
            return None
        interval = list(accuracy.interval)
        return {"right": accuracy.right, "images": accuracy.images, "accuracy": accuracy.fraction, "interval": interval}

    comparison = result.comparison
    return {
        "folder": str(result.folder),
        "findings": list(result.findings),
        "method": accuracy_json(result.accuracy),
        "zero_shot": accuracy_json(comparison.zero_shot if comparison else None),
        "versus": comparison
        and {
            "mended": comparison.fixed,
            "broken": comparison.regressed,
            "p": comparison.p,
            "changes": [{"class": change.class_name, "difference": change.difference} for change in comparison.changes],
        },
        "page": None if result.page is None else str(result.page),
        "selection": None if result.selection is None else result.selection.as_json(),
        "kept": result.kept or None,
        "probabilities": None if result.reliability is None else result.reliability.as_json(),
    }
