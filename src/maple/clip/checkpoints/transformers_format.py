"""CLIP, MetaCLIP 2 and SigLIP in transformers' format, read as an open_clip configuration and state dict.

Source: huggingface/transformers, models/clip/configuration_clip.py and convert_clip_original_pytorch_to_hf.py
(the same weights under other names); models/metaclip_2/modeling_metaclip_2.py.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from maple.clip.checkpoints import siglip_format
from maple.clip.checkpoints.formats import CLIP_VOCABULARY, StateDict, check_vocabulary, mlp_ratio, read_tensors, shards
from maple.errors import BackboneError
from maple.files import read_json

MODEL_TYPES = ("clip", "metaclip_2", "siglip")
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")


def read_transformers_folder(folder: Path) -> tuple[str, dict[str, Any], StateDict, dict[str, Any]]:
    """Read a folder in transformers' format: model_type, configuration and state dict as open_clip's, preprocessing.

    Raises:
        BackboneError: it is not a CLIP, MetaCLIP 2 or SigLIP, its activation or vocabulary is not the model's, or
            weights are missing.
    """
    model_type, model_config = read_transformers_config(folder)
    preprocessors = [folder / name for name in PREPROCESSORS if (folder / name).is_file()]
    stored: dict[str, Any] = read_json(preprocessors[0], error=BackboneError, foreign=True) if preprocessors else {}
    processor = stored.get("image_processor") or stored
    if model_type == "siglip" and isinstance(processor, Mapping):
        processor = {"image_processor_type": "SiglipImageProcessor", **processor}
    preprocess = processor_preprocess(processor, model_config["vision_cfg"]["image_size"], folder)
    state = _with_joined_attention(_read_weights(folder), folder)
    weights = _siglip_state(state, folder) if model_type == "siglip" else _clip_state(state)
    return model_type, model_config, weights, preprocess


def read_transformers_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The model_type of a folder in transformers' format, and its configuration as open_clip's.

    That of a SigLIP has the sizes of its image tower under `timm_trunk`, for `build_siglip`.

    Raises:
        BackboneError: it is not a CLIP, MetaCLIP 2 or SigLIP, or its activation or vocabulary is not the model's.
    """
    path = folder / "config.json"
    config: dict[str, Any] = read_json(path, error=BackboneError, foreign=True)
    model_type = transformers_model_type(config, path)
    # Old files have some sizes in a second place, which wins (transformers, configuration_clip.py).
    try:
        text, vision = (
            {**(config.get(f"{tower}_config") or {}), **(config.get(f"{tower}_config_dict") or {})}
            for tower in ("text", "vision")
        )
        if model_type == "siglip":
            return model_type, siglip_format.siglip_config(text, vision, str(path))
        return model_type, _open_clip_config(model_type, config, text, vision, folder)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise BackboneError(f"{path} does not describe a CLIP: {error}") from error


def transformers_model_type(config: Mapping[str, Any], path: Path) -> str:
    """The model_type of a transformers configuration that is read here: clip, metaclip_2 or siglip.

    Raises:
        BackboneError: it is another one.
    """
    model_type = config.get("model_type")
    if model_type == "siglip2":
        raise BackboneError(
            f"{path} describes a SigLIP 2 of variable image sizes (NaFlex, model_type 'siglip2'), whose patches differ "
            "from image to image; only square images of one size are supported. Take one of the checkpoints of one "
            "resolution, such as google/siglip2-base-patch16-224"
        )
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise BackboneError(
            f"{path} describes a {model_type!r:.80} model; a backbone in transformers' format must have model_type "
            f"{' or '.join(map(repr, MODEL_TYPES))}"
        )
    return model_type


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


def _open_clip_config(
    model_type: str, config: Mapping[str, Any], text: Mapping[str, Any], vision: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    activations = {text.get("hidden_act", "quick_gelu"), vision.get("hidden_act", "quick_gelu")}
    if len(activations) != 1 or not activations <= {"quick_gelu", "gelu"}:
        raise BackboneError(
            f"{folder}: the towers' activations are {sorted(activations)}; both must be quick_gelu, or both gelu"
        )
    pooling: dict[str, Any] = {}
    if model_type == "clip":
        check_vocabulary(text.get("vocab_size", CLIP_VOCABULARY), str(folder))
    else:  # MetaCLIP 2 has CLIP's layout, but another vocabulary, in which the EOS token does not have the largest id
        end = text.get("eos_token_id", 49407)
        if not isinstance(end, int) or isinstance(end, bool):
            raise BackboneError(f"{folder}: eos_token_id is {end!r:.40}; one number is required")
        pooling = {"pool_type": "eos", "eos_id": end}
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
            **pooling,
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


def _with_joined_attention(state: Mapping[str, Tensor], folder: Path) -> StateDict:
    """The weights with the queries, keys and values of each attention in one, `self_attn.in_proj_weight` and `_bias`.

    Raises:
        BackboneError: one of the three is missing.
    """
    joined: StateDict = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        part = re.fullmatch(r"(.*\.self_attn)\.([qkv])_proj\.(weight|bias)", key)
        if part:
            attention.setdefault(f"{part[1]}.in_proj_{part[3]}", {})[part[2]] = value
        elif not key.endswith("position_ids"):
            joined[key] = value
    for key, parts in attention.items():
        if missing := sorted(set("qkv") - set(parts)):
            names = ", ".join(key.replace(".in_proj_", f".{letter}_proj.") for letter in missing)
            raise BackboneError(f"{folder} lacks the weights {names}, which its attention needs")
        joined[key] = torch.cat([parts[letter] for letter in "qkv"])
    return joined


def _clip_state(state: Mapping[str, Tensor]) -> StateDict:
    """CLIP's weights under open_clip's names, with the final projections transposed."""
    projections = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
    return {
        projections.get(key) or open_clip_name(key).replace(".self_attn.", ".attn."): (
            value.T.contiguous() if key in projections else value
        )
        for key, value in state.items()
    }


def _siglip_state(state: Mapping[str, Tensor], folder: Path) -> StateDict:
    """SigLIP's weights under the names of open_clip's text tower and timm's image tower."""
    return {
        _renamed(key, siglip_format.PREFIXES, parts): value
        for key, value in siglip_format.split_pooling(state, str(folder)).items()
        for parts in [siglip_format.TEXT_PARTS if key.startswith("text_model.") else siglip_format.IMAGE_PARTS]
    }
