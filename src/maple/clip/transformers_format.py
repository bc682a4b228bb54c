"""A transformers-format CLIP, read as an open_clip configuration and state dict.

Source: huggingface/transformers, models/clip/configuration_clip.py and convert_clip_original_pytorch_to_hf.py
(the same weights under other names).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from maple.clip.formats import CLIP_VOCABULARY, StateDict, check_vocabulary, mlp_ratio, read_tensors, shards
from maple.errors import BackboneError
from maple.files import read_json

PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")


def read_transformers_folder(folder: Path) -> tuple[dict[str, Any], StateDict, dict[str, Any]]:
    """Read a CLIP folder in transformers' format: configuration and state dict as open_clip's, preprocess settings.

    Raises:
        BackboneError: it is not a CLIP, its activation or vocabulary is not CLIP's, or weights are missing.
    """
    config: dict[str, Any] = read_json(folder / "config.json", error=BackboneError, foreign=True)
    if config.get("model_type") != "clip":
        raise BackboneError(
            f"{folder / 'config.json'} describes a {config.get('model_type')!r} model; a backbone in transformers' "
            "format must have model_type 'clip'"
        )
    # Old files have some sizes in a second place, which wins (transformers, configuration_clip.py).
    try:
        text, vision = (
            {**(config.get(f"{tower}_config") or {}), **(config.get(f"{tower}_config_dict") or {})}
            for tower in ("text", "vision")
        )
        model_config = _open_clip_config(config, text, vision)
        activations = {text.get("hidden_act", "quick_gelu"), vision.get("hidden_act", "quick_gelu")}
        if len(activations) != 1 or not activations <= {"quick_gelu", "gelu"}:
            raise BackboneError(
                f"{folder}: the towers' activations are {sorted(activations)}; both must be quick_gelu, or both gelu"
            )
    except (TypeError, ArithmeticError) as error:
        raise BackboneError(f"{folder / 'config.json'} does not describe a CLIP: {error}") from error
    check_vocabulary(text.get("vocab_size", CLIP_VOCABULARY), str(folder))
    preprocessors = [folder / name for name in PREPROCESSORS if (folder / name).is_file()]
    stored: dict[str, Any] = read_json(preprocessors[0], error=BackboneError, foreign=True) if preprocessors else {}
    preprocess = processor_preprocess(stored.get("image_processor") or stored, vision.get("image_size", 224), folder)
    return model_config, _from_transformers(_read_weights(folder), folder), preprocess


def processor_preprocess(stored: Mapping[str, Any], side: Any, folder: Path) -> dict[str, Any]:
    """The preprocess settings, as `maple.clip.backbone.preprocessing_of` reads them, of a transformers processor.

    Args:
        stored: the content of preprocessor_config.json; what it leaves out is as in the class that it names, for images
            of the tower's size.
        side: of the square images that the tower reads.

    Raises:
        BackboneError: images are prepared in a way that cannot be followed.

    Source: transformers 5.24 image_processing_backends.py `TorchvisionBackend`,
        models/clip/image_processing_clip.py, models/siglip/image_processing_siglip.py.
    """

    def refused(problem: str) -> BackboneError:
        return BackboneError(f"{folder}: its processor {problem}; such images cannot be prepared here")

    kind = str(stored.get("image_processor_type") or stored.get("feature_extractor_type") or "CLIPImageProcessor")
    kind = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", kind)
    if kind not in _PROCESSORS:
        raise refused(f"is of the type {kind!r:.80}, not {' or '.join(_PROCESSORS)}")
    values: dict[str, Any] = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_pad": False}
    values |= {"resample": 3, "rescale_factor": 1 / 255, **_PROCESSORS[kind]}
    # The class's own sizes are those of its first model, and do not fit others.
    values |= {"size": side, "crop_size": side}
    values |= {key: value for key, value in stored.items() if value is not None}
    if values["do_pad"]:
        raise refused("pads images (do_pad)")
    crop, resize, resized = None, "none", None
    if values["do_center_crop"]:
        crop = _square(values["crop_size"], ("height", "width"))
        if crop is None:
            raise refused(f"cuts images to {values['crop_size']!r:.80}, not to a square")
    if values["do_resize"]:
        size = values["size"]
        # A plain number is the shorter side for CLIP's class, and both sides for others.
        if isinstance(size, int) and not isinstance(size, bool):
            size = {"shortest_edge": size} if kind == "CLIP" else {"height": size, "width": size}
        resize = "shortest" if isinstance(size, Mapping) and size.keys() == {"shortest_edge"} else "squash"
        resized = _square(size, ("shortest_edge",) if resize == "shortest" else ("height", "width"))
        if resized is None:
            raise refused(f"resizes images to {values['size']!r:.80}, which is neither a shorter side nor a square")
    final = crop if crop is not None else resized if resize == "squash" else None
    if final is None:
        raise refused("neither cuts images to a square nor resizes them to one (do_center_crop, do_resize)")
    if final != side:
        raise refused(f"makes images of {final} pixels, but the model reads {side}")
    if not isinstance(values["resample"], int) or values["resample"] not in _RESAMPLES:
        raise refused(f"has resample {values['resample']!r:.80}, not one of {sorted(_RESAMPLES)}")
    try:
        # Levels are multiplied by the factor before they are normalised.
        factor = 255 * float(values["rescale_factor"]) if values["do_rescale"] else 255.0
        mean, std = values["image_mean"], values["image_std"]
        if not values["do_normalize"]:
            mean, std = [0.0] * 3, [1.0] * 3
        mean, std = ([float(v) / factor for v in (x if isinstance(x, list | tuple) else [x] * 3)] for x in (mean, std))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise refused(f"has image_mean, image_std or rescale_factor that are not numbers ({error})") from error
    return {
        "size": side,
        "mean": mean,
        "std": std,
        "interpolation": _RESAMPLES[values["resample"]],
        "resize_mode": resize,
        "resize_size": resized,
        "crop_offset": "floor",
    }


def _square(size: Any, keys: Sequence[str]) -> int | None:
    """The side of a square that a processor's size describes by these keys, or None."""
    sides = [size.get(key) for key in keys] if isinstance(size, Mapping) and size.keys() == set(keys) else [size]
    side = sides[0]
    if not isinstance(side, int) or isinstance(side, bool) or sides[-1] != side:
        return None
    return side if 0 < side <= _LARGEST_SIDE else None


_LARGEST_SIDE = 10_000
_RESAMPLES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_HALVES = [0.5, 0.5, 0.5]
_PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": {
        "do_center_crop": True,
        "image_mean": OPENAI_DATASET_MEAN,
        "image_std": OPENAI_DATASET_STD,
    },
    "Siglip": {
        "do_center_crop": False,
        "image_mean": _HALVES,
        "image_std": _HALVES,
    },
    "ViT": {
        "do_center_crop": False,
        "resample": 2,
        "image_mean": _HALVES,
        "image_std": _HALVES,
    },
}


def _open_clip_config(config: dict[str, Any], text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    text_width, vision_width = text.get("hidden_size", 512), vision.get("hidden_size", 768)
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": text.get("hidden_act", "quick_gelu") == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.get("image_size", 224),
            "layers": vision.get("num_hidden_layers", 12),
            "width": vision_width,
            "patch_size": vision.get("patch_size", 32),
            "head_width": vision_width // vision.get("num_attention_heads", 12),
            "mlp_ratio": mlp_ratio(vision.get("intermediate_size", 3072), vision_width),
            "norm_kwargs": {"eps": vision.get("layer_norm_eps", 1e-5)},
        },
        "text_cfg": {
            "context_length": text.get("max_position_embeddings", 77),
            "vocab_size": text.get("vocab_size", CLIP_VOCABULARY),
            "width": text_width,
            "heads": text.get("num_attention_heads", 8),
            "layers": text.get("num_hidden_layers", 12),
            "mlp_ratio": mlp_ratio(text.get("intermediate_size", 2048), text_width),
            "norm_kwargs": {"eps": text.get("layer_norm_eps", 1e-5)},
        },
    }


def _read_weights(folder: Path) -> StateDict:
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return read_tensors(folder / single)
        index = folder / f"{single}.index.json"
        if index.is_file():
            names = shards(index)
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise BackboneError(f"{folder} lacks {', '.join(missing)}, which its {index.name} names")
            return {key: value for name in names for key, value in read_tensors(folder / name).items()}
    raise BackboneError(f"{folder} has a config.json but no weights: expected model.safetensors or pytorch_model.bin")


# (transformers, open_clip): prefixes of tensor names, and parts within them; read both ways.
_PREFIXES = (
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("text_model.final_layer_norm.", "ln_final."),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
)
_PARTS = (
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.out_proj.", ".attn.out_proj."),
)


def open_clip_name(name: str) -> str:
    """The open_clip name of a tensor of transformers, except those of attention projections and final projections."""
    return _renamed(name, _PREFIXES, _PARTS)


def transformers_name(name: str) -> str:
    """The transformers name of a tensor of open_clip: the inverse of `open_clip_name`."""
    return _renamed(name, [(new, old) for old, new in _PREFIXES], [(new, old) for old, new in _PARTS])


def _renamed(name: str, prefixes: Sequence[tuple[str, str]], parts: Sequence[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in parts:
        name = name.replace(old, new)
    return name


def _from_transformers(state: Mapping[str, Tensor], folder: Path) -> StateDict:
    """Rename, transpose the projections, and join queries, keys and values."""
    renamed: StateDict = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.endswith("position_ids"):
            continue
        name = open_clip_name(key)
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
