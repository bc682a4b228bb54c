"""Prompts files: the learned tensors of a method and the metadata to load it again; never the backbone."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from maple import files
from maple.clip import Backbone
from maple.clip.backbone_names import ASSUMED, require_trusted
from maple.clip.load import load_given
from maple.errors import CheckpointError, ClassNamesError, ConfigError, shortened
from maple.methods import METHODS, Method, build_method
from maple.names import clean_class_names
from maple.plugins import code_files, code_of, require_code

FORMAT = 1
_TYPES = {torch.float32, torch.float64, torch.float16, torch.bfloat16}
_FEW_TOKENS = 10_000
_KEY = "maple"
_BACKBONE = ("name", "pretrained", "precision", "fingerprint")
_LONGEST_NAME = 4096


@dataclass(frozen=True)
class PromptsFile:
    """The content of a prompts file.

    Attributes:
        method: {"name": ..., **settings}.
        backbone: name, pretrained, precision, fingerprint, activation and preprocessing of the CLIP it was learned on;
            the last two are missing in files of earlier versions.
        info: data set, training summary, calibration, versions, origin.
        tensors: the parameters by contract name, float32, and other tensors that a method has computed.
    """

    method: dict[str, Any]
    backbone: dict[str, Any]
    class_names: tuple[str, ...]
    info: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def activation(self) -> str:
        """That of the CLIP it was learned on."""
        return self.backbone.get("activation") or ASSUMED

    @property
    def temperature(self) -> float:
        """By which logits are divided for probabilities; 1 in files without a calibration."""
        return float(self.info.get("calibration", {}).get("temperature") or 1.0)


def describe(method: Method) -> dict[str, Any]:
    """{"name": ..., **settings}: the argument of `build_method` that makes such a method.

    Raises:
        ConfigError: the method's class is not in METHODS, so that it could not be built again.
    """
    name = METHODS.name_of(type(method))
    if name is None:
        raise ConfigError(
            f"{type(method).__name__} is not in METHODS, so it could not be loaded again; "
            "add it first: maple.METHODS['its_name'] = " + type(method).__name__
        )
    return {"name": name, **method.settings.model_dump(mode="json")}


def describe_backbone(backbone: Backbone) -> dict[str, Any]:
    """The arguments to load the backbone again, and the fingerprint and activation to check that it is the same."""
    return {key: getattr(backbone, key) for key in (*_BACKBONE, "activation")}


def _describe_preprocessing(backbone: Backbone) -> dict[str, Any]:
    """How a backbone sees images, as JSON has it, without the rounding of the crop: that is a pixel at most."""
    values = asdict(backbone.preprocessing)
    del values["crop_offset"]
    values["resize_size"] = values["resize_size"] or values["size"]
    return dict(json.loads(json.dumps(values)))


def save_prompts(path: str | Path, method: Method, info: Mapping[str, Any] | None = None) -> None:
    """Write the method's prompts and all that `load_prompts` needs, atomically, as safetensors.

    The code of a method of an accepted file is written next to it.

    Example:
        >>> save_prompts("prompts.safetensors", method, {"dataset": "photos"})
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in method.saved_tensors().items()}
    info = dict(info or {})
    if method.temperature != 1 or "calibration" in info:
        info["calibration"] = {**info.get("calibration", {}), "temperature": method.temperature}
    described = describe(method)
    content = {
        "method": described,
        "backbone": {**describe_backbone(method.backbone), "preprocessing": _describe_preprocessing(method.backbone)},
        "class_names": list(method.class_names),
        "info": {**info, "versions": versions()},
    }
    write_tensors(path, tensors, content)
    for name, file in code_files(described).items():
        if (code := code_of(name)) is not None:  # so that the folder can be given to others
            with files.replacing(Path(path).parent / file) as temporary:
                temporary.write_bytes(code)


def write_tensors(path: str | Path, tensors: dict[str, Tensor], content: Mapping[str, Any]) -> None:
    """Write tensors with JSON metadata, atomically."""
    header = {_KEY: json.dumps({"format": FORMAT, **content}, sort_keys=True, allow_nan=False)}
    with files.replacing(path) as temporary:
        temporary.write_bytes(save(tensors, metadata=header))  # `save_file` has a temporary file of its own


def save_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; OSError if the disk is full, say, for which the library has an error of its own."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `write_tensors`: (tensors, metadata).

    Raises:
        CheckpointError: missing, damaged, written by another program, or of a newer format.
    """
    try:
        with safe_open(str(files.regular(path)), framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        content = files.parse_json(header[_KEY])
    except FileNotFoundError as error:
        # The library also raises this for a file without read permission.
        if os.path.exists(path):  # Path.exists raises for a folder without permission
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
        version = content.get("format") if isinstance(content, dict) else content
        raise CheckpointError(
            f"{path} has format {shortened(repr(version))}; this version of maple reads format {FORMAT}: upgrade maple"
        )
    return tensors, content


def read_prompts(path: str | Path) -> PromptsFile:
    """Read a prompts file without loading a backbone.

    Raises:
        CheckpointError: missing, damaged, or not a prompts file.

    Example:
        >>> read_prompts("prompts.safetensors").class_names
        ('cat', 'dog')
    """
    tensors, content = read_tensors(path)
    try:
        backbone = dict(content["backbone"])
        # Files of earlier versions do not say the activation and the preprocessing.
        keys = (*_BACKBONE, *(["activation"] if "activation" in backbone else []))
        preprocessing = {"preprocessing": dict(backbone["preprocessing"])} if "preprocessing" in backbone else {}
        backbone = {key: _name(backbone[key], key) for key in keys} | preprocessing
        method, names, info = dict(content["method"]), content["class_names"], dict(content["info"])
        if not isinstance(method["name"], str):
            raise ValueError(f"its method is {shortened(repr(method['name']))}, not a name")
        calibration = dict(info.get("calibration", {}))
        temperature, images, reason = (calibration.get(key) for key in ("temperature", "images", "reason"))
        if not isinstance(images, int | None) or not isinstance(reason, str | None):
            raise ValueError(f"its calibration is {shortened(repr(calibration))}")
        temperature = 1.0 if temperature is None else temperature
        if type(temperature) not in (int, float) or not 1e-3 <= temperature <= 1e3:
            raise ValueError(f"its temperature is {shortened(repr(temperature))}, not a number from 0.001 to 1000")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} lacks a part of its metadata: {error}") from error
    try:
        clean_class_names(names)
    except ClassNamesError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return PromptsFile(method, backbone, tuple(names), info, tensors)


def _name(value: object, key: str) -> str | None:
    if not isinstance(value, str | None if key == "pretrained" else str) or len(value or "") > _LONGEST_NAME:
        raise ValueError(f"the {key} of its backbone is {value!r:.80}, not a name")
    return value


def load_prompts(
    path: str | Path,
    backbone: Backbone | str | None = None,
    *,
    pretrained: str | None = None,
    trust_backbone: bool = False,
    trust_code: bool = False,
    precision: str | None = None,
    device: str | torch.device = "cpu",
) -> Method:
    """Rebuild a trained method, ready to predict.

    Args:
        backbone, pretrained: the CLIP to put the prompts on, loaded or as in `load_clip`; by default the one that the
            file names, if it is packaged, published by open_clip, or was given by this user before.
        trust_backbone: load whatever CLIP the file names.
        trust_code: run the file next to it that defines its method, if it has one and this user has never named it.
        precision, device: for loading it; by default the precision of training, on the CPU.

    Raises:
        UntrustedBackboneError: the file names an unknown CLIP.
        UntrustedCodeError: its method, or one that it trains, is defined by a file that was never named here.
        CheckpointError: unreadable file, another backbone than it was learned on, or parameters that are missing,
            unknown or of another shape.

    Example:
        >>> method = load_prompts("prompts.safetensors", device="cuda")
    """
    stored = read_prompts(path)
    for code_name in code_files(stored.method):
        require_code(code_name, Path(path).parent, str(path), trust=trust_code)
    name, weights, learned_precision, fingerprint = (stored.backbone[key] for key in _BACKBONE)
    if not isinstance(backbone, Backbone):
        if backbone is None and pretrained is None:
            if not trust_backbone:
                require_trusted(name, weights, str(path))
            pretrained = weights
        options = {"precision": precision or learned_precision, "device": device}
        backbone = load_given(backbone or name, pretrained, activation=stored.activation, **options)
    if backbone.fingerprint != fingerprint:
        raise CheckpointError(
            f"{path} was learned on {name} / {weights} (fingerprint {fingerprint}), "
            f"but this backbone is {backbone.name} / {backbone.pretrained} (fingerprint {backbone.fingerprint}); "
            "prompts do not work with other weights: load that backbone, or train again on this one"
        )
    if stored.activation not in (ASSUMED, backbone.activation):
        raise CheckpointError(
            f"{path} was learned on a CLIP with the activation {stored.activation}, but this backbone, of the same "
            f"weights, was loaded with {backbone.activation}, which gives other features; name the architecture with "
            f"its activation, as in ViT-B-32-{stored.activation}, or give pretrained={stored.activation!r} with a file"
        )
    stored_preprocessing, preprocessing = stored.backbone.get("preprocessing"), _describe_preprocessing(backbone)
    if stored_preprocessing not in (None, preprocessing):
        differing = [key for key in preprocessing if stored_preprocessing.get(key) != preprocessing[key]]
        before, now = ({key: values.get(key) for key in differing} for values in (stored_preprocessing, preprocessing))
        raise CheckpointError(
            f"{path} was learned on images with {before!s:.200}, but this backbone, of the same weights, was loaded "
            f"with {now}; name it as in the training, or put its open_clip_config.json next to the weights"
        )
    _refuse_larger_prompts(stored, path)
    try:
        method = build_method(stored.method, backbone, stored.class_names)
    except ConfigError as error:
        raise CheckpointError(f"{path} describes a method that this version cannot build: {error}") from error
    put_parameters(method, stored.tensors, source=str(path))
    method.temperature = stored.temperature
    return method.eval()


def with_settings(method: Method, changes: Mapping[str, Any], class_names: Sequence[str]) -> Method:
    """The same trained method with other settings that its parameters do not depend on, such as its sentences.

    Args:
        class_names: those that it was trained on.

    Example:
        >>> with_settings(method, {"template": "a centered satellite photo of {}."}, ["forest", "river"])
    """
    changed = build_method({**describe(method), **changes}, method.backbone, class_names)
    put_parameters(changed, method.saved_tensors(), source=f"the trained {method.title}")
    changed.temperature = method.temperature
    return changed.eval()


def _refuse_larger_prompts(stored: PromptsFile, path: str | Path) -> None:
    """Raise CheckpointError if the settings ask for far more tokens than the file holds, before memory is taken."""
    present = sum(tensor.numel() for tensor in stored.tensors.values())
    descriptions: list[dict[str, Any]] = [stored.method]
    for description in descriptions:
        for key, value in description.items():
            if isinstance(value, dict):
                descriptions.append(value)
            elif key.endswith("prompt_length") and isinstance(value, int):
                tokens = value * (len(stored.class_names) if description.get("class_specific") else 1)
                if tokens > max(present, _FEW_TOKENS):
                    raise CheckpointError(
                        f"{path} is damaged: {key}={value} needs {tokens:,} tokens, but its tensors hold {present:,} "
                        "numbers"
                    )


@torch.no_grad()
def put_parameters(method: Method, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Set every saved tensor of the method from `tensors`, or none.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape, or not finite.
    """
    method.resize_for({name: tuple(value.shape) for name, value in tensors.items()})
    parameters = method.saved_tensors()
    problems = [f"{name} is missing" for name in parameters.keys() - tensors.keys()]
    problems += [f"{name} is unknown" for name in tensors.keys() - parameters.keys()]
    for name in parameters.keys() & tensors.keys():
        expected, given = tuple(parameters[name].shape), tuple(tensors[name].shape)
        if expected != given:
            problems.append(f"{name} has shape {list(given)} instead of {list(expected)}")
        elif len(types := {parameters[name].dtype, tensors[name].dtype}) > 1 and not types <= _TYPES:
            problems.append(f"{name} has the type {tensors[name].dtype} instead of {parameters[name].dtype}")
        elif not bool(torch.isfinite(tensors[name].to(parameters[name].dtype)).all()):
            problems.append(f"{name} holds values that are not finite")
    problems = problems or method.problems_of(tensors)
    if problems:
        raise CheckpointError(f"{source} does not fit {describe(method)}: {'; '.join(sorted(problems))}")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def versions() -> dict[str, str]:
    """The versions of the packages that influence a result."""
    from maple import __version__

    packages = ("torch", "torchvision", "open_clip_torch", "pillow")
    return {"maple": __version__, **{package: metadata.version(package) for package in packages}}
