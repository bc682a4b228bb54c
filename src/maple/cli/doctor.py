"""`maple doctor`: what is installed, where it computes, and what it keeps on disk."""

import os
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from maple.cli import options
from maple.cli.cache import size_text
from maple.errors import first_line
from maple.machine import usable_cores

_PACKAGE = "maple-clip"
_SHOWN = ("torch", "torchvision", "open_clip_torch", "timm", "transformers", "onnxruntime", "huggingface_hub", "ray")
EXTRAS = {
    "ray": "sweeps and predictions on a cluster, Parquet files of predictions",
    "serve": "the page and API of `maple serve`",
    "tensorboard": "--tracker tensorboard",
    "wandb": "--tracker wandb",
    "mlflow": "--tracker mlflow",
    "transformers": "backbones in transformers' format, and those with its text towers",
    "onnx": "to use ONNX exports",
    "export": "to write ONNX exports",
    "datasets": "data sets of the Hugging Face Hub, Parquet and Arrow",
    "all": "everything above",
}
"""What each extra of the package is for."""
_HUB_SECONDS = 5.0


def doctor_command(
    online: Annotated[bool, Option("--online", help="Also try to reach the Hugging Face Hub.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Show versions, devices, caches, the data root and installed extras, for you and for reports of errors."""
    import json

    content: dict[str, Any] = {
        "versions": _versions(),
        "devices": _devices(),
        "caches": _caches(),
        "data_root": _data_root(),
        "extras": _extras(),
        "hub": _hub(online),
    }
    if as_json:
        typer.echo(json.dumps(content, indent=1))
        return
    for name, version in content["versions"].items():
        options.echo(f"{name:<16} {version or 'not installed'}")
    options.print_table(("device", "name", "memory or threads"), [list(row.values()) for row in content["devices"]])
    rows = [(cache["name"], size_text(cache["size"]), cache["folder"] or "none") for cache in content["caches"]]
    options.print_table(("kept on disk", "size", "folder"), rows, right=("size",), soft_wrap=True)
    options.echo(f"data root: {content['data_root'] or 'none; set MAPLE_DATA, or give --data-root'}")
    table = [
        (e["extra"], "yes" if e["installed"] else f"no: {', '.join(e['missing'])}", e["for"]) for e in content["extras"]
    ]
    options.print_table(("extra", "installed", "for"), table, soft_wrap=True)
    options.echo("install one with: pip install 'maple-clip[EXTRA]'")
    options.echo(f"Hugging Face Hub: {content['hub']}")


def _versions() -> dict[str, str | None]:
    import platform

    from maple import __version__

    return {"maple": __version__, "python": platform.python_version(), **{name: _version(name) for name in _SHOWN}}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, str]]:
    """The CPU and the accelerators; only the number of cores where PyTorch is not installed."""
    cores = usable_cores()
    try:
        import torch

        from maple.distributed import processor
    except ModuleNotFoundError:
        return [{"device": "cpu", "name": "PyTorch is not installed", "size": f"{cores} cores"}]
    threads = f"{torch.get_num_threads()} threads, {cores} cores"
    devices = [{"device": "cpu", "name": processor(), "size": threads}]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        devices.append({"device": f"cuda:{index}", "name": about.name, "size": size_text(about.total_memory)})
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU", "size": "shared memory"})
    return devices


def _caches() -> list[dict[str, Any]]:
    """What is kept between commands: the name, the folder (None where there is none) and its size in bytes."""
    from maple.places import cache_folder, state_folder

    folders = {"cache": cache_folder(), "remembered choices": state_folder()}
    with suppress(ModuleNotFoundError):  # an installation that only runs exports downloads nothing
        from huggingface_hub import constants

        folders["Hugging Face Hub"] = Path(constants.HF_HUB_CACHE)
    return [
        {"name": name, "folder": None if folder is None else str(folder), "size": _size_of(folder)}
        for name, folder in folders.items()
    ]


def _size_of(folder: Path | None) -> int:
    """The bytes of the files below a folder; links, of which the hub's cache is full, count once."""
    total = 0
    for parent, _, names in os.walk(folder or ""):
        for name in names:
            path = Path(parent, name)
            if not path.is_symlink():
                total += path.stat().st_size
    return total


def _data_root() -> str | None:
    """MAPLE_DATA, and whether it is a folder."""
    root = os.environ.get("MAPLE_DATA")
    return root if not root or Path(root).expanduser().is_dir() else f"{root} (MAPLE_DATA), which is not a folder"


def _extras() -> list[dict[str, Any]]:
    """The extras of the installed package: the name, what it is for, whether all of it is there, what is missing."""
    try:
        names = metadata.metadata(_PACKAGE).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return []
    extras = []
    for name in names:
        if name in EXTRAS:
            missing = sorted(_missing(_PACKAGE, name))
            extras.append({"extra": name, "installed": not missing, "missing": missing, "for": EXTRAS[name]})
    return extras


def _missing(distribution: str, extra: str) -> set[str]:
    """The requirements of an extra, and of the extras that these name, that are not installed."""
    from packaging.requirements import Requirement

    missing: set[str] = set()
    for line in metadata.requires(distribution) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            missing.add(f"{requirement.name}{requirement.specifier}")
        else:
            missing.update(*(_missing(requirement.name, nested) for nested in requirement.extras))
    return missing


def _hub(online: bool) -> str:
    """Whether the Hugging Face Hub can be reached, in words."""
    try:
        from huggingface_hub import constants
    except ModuleNotFoundError:
        return "huggingface_hub is not installed"
    if constants.HF_HUB_OFFLINE:
        return "switched off by HF_HUB_OFFLINE"
    if not online:
        return "not tried; --online does"
    from maple.files import web_opener

    try:
        with web_opener().open(constants.ENDPOINT, timeout=_HUB_SECONDS):
            return f"{constants.ENDPOINT} answers"
    except OSError as error:
        return f"{constants.ENDPOINT} cannot be reached ({first_line(error)})"
