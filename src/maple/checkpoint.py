"""Prompts files: the learned tensors of one method and what is needed to use them again. Never the backbone."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maple import files
from maple.clip import Backbone, load_clip
from maple.errors import CheckpointError, ConfigError
from maple.methods import METHODS, Method, build_method

FORMAT = 1
_KEY = "maple"


@dataclass(frozen=True)
class PromptsFile:
    """The content of a prompts file.

    Attributes:
        method: {"name": ..., **settings}.
        backbone: name, pretrained, precision and fingerprint of the CLIP it was learned on.
        class_names: the classes it was learned for.
        info: data set, training summary, versions, where it came from.
        tensors: the parameters by contract name, float32, and what else a method has found.
    """

    method: dict[str, Any]
    backbone: dict[str, Any]
    class_names: tuple[str, ...]
    info: dict[str, Any]
    tensors: dict[str, Tensor]


def describe(method: Method) -> dict[str, Any]:
    """{"name": ..., **settings}: what `build_method` takes.

    Raises:
        ConfigError: the method's class is not in METHODS, so that nobody could build it again.
    """
    name = next((name for name, kind in METHODS.items() if kind is type(method)), None)
    if name is None:
        raise ConfigError(
            f"{type(method).__name__} is in METHODS under no name, so it could not be loaded again; "
            "add it first: maple.METHODS['its_name'] = " + type(method).__name__
        )
    return {"name": name, **method.settings.model_dump(mode="json")}


def describe_backbone(backbone: Backbone) -> dict[str, Any]:
    """How to load the backbone again, and how to know that it is the same."""
    return {
        "name": backbone.name,
        "pretrained": backbone.pretrained,
        "precision": backbone.precision,
        "fingerprint": backbone.fingerprint,
    }


def save_prompts(path: str | Path, method: Method, info: Mapping[str, Any] | None = None) -> None:
    """Write the method's prompts and all that `load_prompts` needs, atomically, as safetensors."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in method.saved_tensors().items()}
    content = {
        "method": describe(method),
        "backbone": describe_backbone(method.backbone),
        "class_names": list(method.class_names),
        "info": {**(info or {}), "versions": versions()},
    }
    write_tensors(path, tensors, content)


def write_tensors(path: str | Path, tensors: dict[str, Tensor], content: Mapping[str, Any]) -> None:
    """Write tensors with JSON metadata, atomically."""
    header = {_KEY: json.dumps({"format": FORMAT, **content}, sort_keys=True, allow_nan=False)}
    files.write_with(path, lambda temporary: save_safetensors(tensors, temporary, header))


def save_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; where the disk refuses, with the OSError of any other file.

    Raises:
        OSError: the disk is full, say, which the library tells as an error of its own.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        if code := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(code[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote: (tensors, metadata).

    Raises:
        CheckpointError: missing, damaged, not a file of ours, or of a newer format.
    """
    try:
        with safe_open(str(path), framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        content = json.loads(header[_KEY])
    except FileNotFoundError as error:
        # The library says so of a file too that may not be read.
        if os.path.exists(path):  # a Path raises where a folder may not be entered
            raise CheckpointError(f"{path} cannot be read: permission denied; change its mode or its owner") from error
        raise CheckpointError(f"{path} does not exist") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable prompts file: {error}") from error
    except KeyError as error:
        raise CheckpointError(
            f"{path} is a safetensors file, but not one that maple wrote; checkpoints of the reference are read by "
            "`maple import`"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise CheckpointError(
            f"{path} has format {found!r}; this version of maple reads format {FORMAT}: upgrade maple"
        )
    return tensors, content


def read_prompts(path: str | Path) -> PromptsFile:
    """Read a prompts file without loading a backbone.

    Raises:
        CheckpointError: missing, damaged, or not a prompts file.
    """
    tensors, content = read_tensors(path)
    try:
        backbone = dict(content["backbone"])
        return PromptsFile(
            dict(content["method"]),
            {key: backbone[key] for key in ("name", "pretrained", "precision", "fingerprint")},
            tuple(content["class_names"]),
            dict(content["info"]),
            tensors,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} lacks a part of its metadata: {error}") from error


def load_prompts(
    path: str | Path,
    backbone: Backbone | None = None,
    *,
    precision: str | None = None,
    device: str | torch.device = "cpu",
) -> Method:
    """Rebuild a trained method, ready to predict.

    Args:
        backbone: the CLIP to put the prompts on; without it, the one the file names is loaded.
        precision, device: for that loading; by default the precision of training, on the CPU.

    Raises:
        CheckpointError: unreadable file, another backbone than it was learned on, or parameters that are missing,
            unknown or of another shape.
    """
    stored = read_prompts(path)
    wanted = stored.backbone
    if backbone is None:
        backbone = load_clip(
            wanted["name"], wanted["pretrained"], precision=precision or wanted["precision"], device=device
        )
    if backbone.fingerprint != wanted["fingerprint"]:
        raise CheckpointError(
            f"{path} was learned on {wanted['name']} / {wanted['pretrained']} (fingerprint {wanted['fingerprint']}), "
            f"but this backbone is {backbone.name} / {backbone.pretrained} (fingerprint {backbone.fingerprint}); "
            "prompts mean nothing to other weights: load that backbone, or train again on this one"
        )
    try:
        method = build_method(stored.method, backbone, stored.class_names)
    except ConfigError as error:
        raise CheckpointError(f"{path} describes a method that this version cannot build: {error}") from error
    put_parameters(method, stored.tensors, source=str(path))
    return method.eval()


@torch.no_grad()
def put_parameters(method: Method, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Set every saved tensor of the method from `tensors`; none may be missing, unknown, or of another shape.

    Nothing is set unless everything fits.

    Raises:
        CheckpointError: it does not; `source` and the parameters are named.
    """
    method.resize_for({name: tuple(value.shape) for name, value in tensors.items()})
    parameters = method.saved_tensors()
    problems = [f"{name} is missing" for name in parameters.keys() - tensors.keys()]
    problems += [f"{name} is unknown" for name in tensors.keys() - parameters.keys()]
    for name in parameters.keys() & tensors.keys():
        expected, found = tuple(parameters[name].shape), tuple(tensors[name].shape)
        if expected != found:
            problems.append(f"{name} has shape {list(found)} instead of {list(expected)}")
        elif not bool(torch.isfinite(tensors[name]).all()):
            problems.append(f"{name} holds values that are not finite")
    if problems:
        raise CheckpointError(f"{source} does not fit {describe(method)}: {'; '.join(sorted(problems))}")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    from maple import __version__

    found = {"maple": __version__}
    for package in ("torch", "torchvision", "open_clip_torch", "pillow"):
        found[package] = metadata.version(package)
    return found
