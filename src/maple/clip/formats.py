"""Other people's CLIP files, read as an open_clip configuration and state dict.

Source: openai/CLIP@a1d0717 clip/model.py:399-436 (sizes are read from the shapes of the weights);
huggingface/transformers, models/clip/configuration_clip.py and convert_clip_original_pytorch_to_hf.py
(the same weights under other names).
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from maple.errors import BackboneError

StateDict = dict[str, Tensor]

_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
_HEAD_WIDTH = 64  # every CLIP that OpenAI published; its files do not say
_CLIP_VOCABULARY = 49408


def read_tensors(path: Path) -> StateDict:
    """Read a file of weights: safetensors, a TorchScript archive, or a pickle of tensors.

    Nothing but tensors and plain values is ever unpickled. `module.` prefixes and an enclosing
    {"state_dict": ...} are taken off.

    Raises:
        BackboneError: the file is none of these, or damaged.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = _read_torch(path)
    except (OSError, RuntimeError, SafetensorError, ValueError, EOFError, KeyError, AttributeError) as error:
        raise BackboneError(f"{path} cannot be read as CLIP weights: {_first_line(error)}") from error
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise BackboneError(
            f"{path} is a pickle that asks for more than tensors, so it was not opened: {_first_line(error)}"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise BackboneError(f"{path} holds no state dict of tensors")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def is_torchscript(path: Path) -> bool:
    """Whether `path` is a TorchScript archive: the form in which OpenAI publishes its models."""
    import zipfile

    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[1:2] == ["code"] or name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torch(path: Path) -> Any:
    if is_torchscript(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the end of torch.jit; OpenAI's files remain
            return dict(torch.jit.load(str(path), map_location="cpu").state_dict())
    return torch.load(path, map_location="cpu", weights_only=True)


def openai_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The open_clip configuration of a state dict in OpenAI's layout, from the shapes of its weights.

    Raises:
        BackboneError: a tensor that every CLIP has is missing; it is named.
    """
    try:
        width = state["ln_final.weight"].shape[0]
        config = {
            "embed_dim": state["text_projection"].shape[1],
            "quick_gelu": True,
            "vision_cfg": _openai_vision(state),
            "text_cfg": {
                "context_length": state["positional_embedding"].shape[0],
                "vocab_size": state["token_embedding.weight"].shape[0],
                "width": width,
                "heads": width // _HEAD_WIDTH,
                "layers": _count(state, r"transformer\.resblocks\.(\d+)\."),
            },
        }
    except KeyError as error:
        raise BackboneError(f"not a CLIP in OpenAI's layout: the tensor {error} is missing") from error
    return config


def openai_state(state: Mapping[str, Tensor]) -> StateDict:
    """The weights alone: without the three numbers that OpenAI stores beside them, and in float32."""
    return {key: value.float() for key, value in state.items() if key not in _OPENAI_EXTRAS}


def _openai_vision(state: Mapping[str, Tensor]) -> dict[str, Any]:
    if "visual.proj" in state:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
        return {
            "image_size": grid * patch,
            "layers": _count(state, r"visual\.transformer\.resblocks\.(\d+)\."),
            "width": width,
            "patch_size": patch,
            "head_width": _HEAD_WIDTH,
        }
    grid = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
    return {
        "image_size": grid * 32,
        "layers": [_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)],
        "width": state["visual.layer1.0.conv1.weight"].shape[0],
        "patch_size": None,
    }


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    found = {match.group(1) for match in map(re.compile(pattern).match, state) if match}
    return len(found)


def read_transformers_folder(folder: Path) -> tuple[dict[str, Any], StateDict, dict[str, Any]]:
    """Read a transformers-format CLIP folder: (open_clip configuration, state dict, preprocess settings).

    Raises:
        BackboneError: not a CLIP, an activation or vocabulary other than CLIP's, weights missing or strange.
    """
    config = _read_json(folder / "config.json")
    if config.get("model_type") != "clip":
        raise BackboneError(
            f"{folder / 'config.json'} describes a {config.get('model_type')!r} model; "
            "transformers-format backbones must have model_type 'clip'"
        )
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    if text.get("vocab_size", _CLIP_VOCABULARY) != _CLIP_VOCABULARY:
        raise BackboneError(
            f"{folder} has a vocabulary of {text['vocab_size']} words, not CLIP's {_CLIP_VOCABULARY}: "
            "its class names would be read wrongly"
        )
    model_config = _transformers_config(config, text, vision)
    state = _from_transformers(_transformers_weights(folder), folder)
    return model_config, state, _transformers_preprocess(folder, vision)


def _transformers_config(config: dict[str, Any], text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    activations = {text.get("hidden_act", "quick_gelu"), vision.get("hidden_act", "quick_gelu")}
    if len(activations) != 1 or not activations <= {"quick_gelu", "gelu"}:
        raise BackboneError(f"the towers' activations are {sorted(activations)}; both must be quick_gelu, or both gelu")
    text_width, vision_width = text.get("hidden_size", 512), vision.get("hidden_size", 768)
    epsilons = {text.get("layer_norm_eps", 1e-5), vision.get("layer_norm_eps", 1e-5)}
    norm = {} if epsilons == {1e-5} else {"norm_kwargs": {"eps": epsilons.pop()}}
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": activations == {"quick_gelu"},
        "vision_cfg": {
            "image_size": vision.get("image_size", 224),
            "layers": vision.get("num_hidden_layers", 12),
            "width": vision_width,
            "patch_size": vision.get("patch_size", 32),
            "head_width": vision_width // vision.get("num_attention_heads", 12),
            "mlp_ratio": vision.get("intermediate_size", 3072) / vision_width,
            **norm,
        },
        "text_cfg": {
            "context_length": text.get("max_position_embeddings", 77),
            "vocab_size": text.get("vocab_size", _CLIP_VOCABULARY),
            "width": text_width,
            "heads": text.get("num_attention_heads", 8),
            "layers": text.get("num_hidden_layers", 12),
            "mlp_ratio": text.get("intermediate_size", 2048) / text_width,
            **norm,
        },
    }


def _transformers_weights(folder: Path) -> StateDict:
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return read_tensors(folder / single)
        index = folder / f"{single}.index.json"
        if index.is_file():
            names = sorted(set(_read_json(index)["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise BackboneError(f"{folder} lacks {', '.join(missing)}, which its {index.name} names")
            return {key: value for name in names for key, value in read_tensors(folder / name).items()}
    raise BackboneError(f"{folder} has a config.json but no weights: expected model.safetensors or pytorch_model.bin")


def _transformers_preprocess(folder: Path, vision: dict[str, Any]) -> dict[str, Any]:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    path = folder / "preprocessor_config.json"
    stored = _read_json(path) if path.is_file() else {}
    return {
        "size": vision.get("image_size", 224),
        "mean": stored.get("image_mean") or OPENAI_DATASET_MEAN,
        "std": stored.get("image_std") or OPENAI_DATASET_STD,
        "interpolation": {2: "bilinear", 3: "bicubic"}.get(stored.get("resample", 3), "bicubic"),
    }


_RENAMED = (
    (r"^text_model\.embeddings\.token_embedding\.weight$", "token_embedding.weight"),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layr?norm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"\.layer_norm1\.", ".ln_1."),
    (r"\.layer_norm2\.", ".ln_2."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
)


def _from_transformers(state: Mapping[str, Tensor], folder: Path) -> StateDict:
    renamed: StateDict = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.endswith("position_ids"):
            continue
        name = key
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        part = re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", name)
        if part:
            attention.setdefault(f"{part[1]}.attn.in_proj_{part[3]}", {})[part[2]] = value
        elif key in ("text_projection.weight", "visual_projection.weight"):
            renamed["text_projection" if key.startswith("text") else "visual.proj"] = value.T.contiguous()
        else:
            renamed[name] = value
    for name, parts in attention.items():
        if set(parts) != set("qkv"):
            raise BackboneError(
                f"{folder}: the attention {name} lacks its {sorted(set('qkv') - set(parts))} projections"
            )
        renamed[name] = torch.cat([parts[letter] for letter in "qkv"])
    return renamed


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path} cannot be read as JSON: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise BackboneError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
