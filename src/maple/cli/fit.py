"""`maple fit`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maple.cli.options import DataRoot, Device, read_mapping, shots_of, visible_lines
from maple.errors import visible

if TYPE_CHECKING:
    from maple.fitting import FitResult
    from maple.report.comparison import MeasuredAccuracy, PairedAccuracy

_MOST_CHANGES = 5


def fit_command(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES",
            help="A folder of class-named folders, FOLDER:DOMAIN, or a .csv or .jsonl of path and label.",
        ),
    ],
    check: Annotated[bool, typer.Option("--check", help="Only look at the images; write and train nothing.")] = False,
    class_names: Annotated[
        Path | None,
        typer.Option(help='JSON: words for folder names, as in {"n02123045": "tabby cat"}.', dir_okay=False),
    ] = None,
    method: Annotated[str, typer.Option(help="What to learn; `maple methods` lists them.")] = "maple",
    shots: Annotated[str, typer.Option(help="Training images per class, or what there is; or `all`.")] = "16",
    seed: Annotated[int, typer.Option(help="Decides the division, the sample and the prompts' start.")] = 1,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="An open_clip architecture, hf-hub:org/model, a folder, or a file. Default: OpenAI's ViT-B-16, "
            "fetched on first use; maple-small is packaged."
        ),
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="For an architecture: an open_clip tag, a file, or random[:SEED].")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; prompts are always fp32.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override any setting: section.key=value; repeatable.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run folder. Default: a name by content in runs/.")] = None,
    data_root: DataRoot = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Adapt CLIP to your own images: look at them, train on a few, compare with zero-shot CLIP on others.

    Repeat the same command to go on after an interruption, or to see the result again.
    """
    words = read_mapping(class_names)
    from maple.config import merge_layers, options_layer, setting_layer
    from maple.fitting import fit, fit_folder, fit_settings, inspect_source

    if check:
        from maple.cli.progress import FileBars

        with FileBars() as bars:
            found = inspect_source(
                source,
                data_root,
                class_names=words,
                seed=seed,
                on_images=lambda done, total: bars.advance("images looked at", done, total),
            )
        typer.echo(json.dumps(found.as_json(), indent=1) if as_json else visible_lines(found.lines()))
        return
    layer = merge_layers(
        options_layer(
            backbone={"name": backbone, "pretrained": pretrained, "precision": precision},
            data={"root": data_root, "class_names": words},
            seed=seed,
        ),
        setting_layer("data.shots", shots_of(shots)),
    )
    settings = fit_settings(source, method, layer=layer, overrides=overrides or [])
    folder = _folder(output, fit_folder(settings))

    from maple.cli.fit_progress import FitBars
    from maple.cli.report import thumbnail_loader

    with FitBars(settings, folder) as progress:
        result = fit(settings, folder, device=device, progress=progress, load_thumbnail=thumbnail_loader(data_root))
    if as_json:
        typer.echo(json.dumps(_as_json(result), indent=1))
        return
    _show(result)
    known = context.find_root().command.commands  # type: ignore[attr-defined]
    _show_next(folder, serve="serve" in known)


def _folder(output: Path | None, default: Path) -> Path:
    from maple.errors import ConfigError

    if output is not None and str(output) == ".":
        raise ConfigError("--output names the current folder; give a folder of its own, as in --output runs/first")
    return output or default


def _show(result: "FitResult") -> None:
    if result.was_finished:
        typer.echo(f"already finished: {result.folder}")
        typer.echo(visible_lines(result.lines))
    typer.echo()
    if result.ours is None:
        typer.echo("trained, but not tested: there is no image to spare; add images to see whether it helps")
    elif result.versus is None:
        typer.echo(f"accuracy on {result.ours.images:,} held-out images, in per cent (95 % interval)")
        typer.echo(_line(result.ours, len(result.ours.title)))
    else:
        _show_versus(result.versus)
    typer.echo()
    if result.page is not None:
        typer.echo(f"page: {result.page}")
    elif result.ours is not None:
        typer.echo(f"no page: {result.no_page}")


def _show_versus(found: "PairedAccuracy") -> None:
    width = max(len(found.method.title), len(found.zero_shot.title))
    typer.echo(f"accuracy on {found.method.images:,} held-out images, in per cent (95 % interval)")
    for one in (found.zero_shot, found.method):
        typer.echo(_line(one, width))
    typer.echo(
        f"images: {found.fixed:,} right that zero-shot CLIP has wrong, {found.regressed:,} wrong that it has right"
        f" ({_verdict(found)})"
    )
    better = [change for change in found.changes if change.difference > 0]
    worse = [change for change in reversed(found.changes) if change.difference < 0]
    for word, changes in (("better", better), ("worse", worse)):
        shown = ", ".join(
            f"{visible(one.class_name)} {100 * one.difference:+.0f}".replace("-", "\N{MINUS SIGN}")
            for one in changes[:_MOST_CHANGES]
        )
        more = f", and {len(changes) - _MOST_CHANGES} more" if len(changes) > _MOST_CHANGES else ""
        typer.echo(f"{word}: {len(changes)} of {len(found.changes)} classes" + (f" ({shown}{more})" if shown else ""))


def _line(one: "MeasuredAccuracy", width: int) -> str:
    low, high = one.interval
    return f"  {one.title:<{width}}  {100 * one.fraction:5.1f}  ({100 * low:.1f} to {100 * high:.1f})"


def _verdict(found: "PairedAccuracy") -> str:
    chance = "hardly chance" if found.p < 0.05 else "may be chance"
    small = "p < 0.001" if found.p < 0.001 else f"p = {found.p:.3f}"
    return f"sign test: {small}, {chance}"


def _show_next(folder: Path, *, serve: bool) -> None:
    import shlex

    name = shlex.quote(str(folder))
    typer.echo("next:")
    typer.echo(f"  maple predict {name} picture.jpg --zero-shot")
    if serve:
        typer.echo(f"  maple serve {name}")


def _as_json(result: "FitResult") -> dict[str, Any]:
    def accuracy(one: "MeasuredAccuracy | None") -> dict[str, Any] | None:
        if one is None:
            return None
        return {"right": one.right, "images": one.images, "accuracy": one.fraction, "interval": list(one.interval)}

    found = result.versus
    versus = found and {
        "mended": found.fixed,
        "broken": found.regressed,
        "p": found.p,
        "changes": [{"class": one.class_name, "difference": one.difference} for one in found.changes],
    }
    return {
        "folder": str(result.folder),
        "findings": list(result.lines),
        "method": accuracy(result.ours),
        "zero_shot": accuracy(found.zero_shot if found else None),
        "versus": versus,
        "page": None if result.page is None else str(result.page),
    }
