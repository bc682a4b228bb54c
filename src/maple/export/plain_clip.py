"""A method as a plain CLIP checkpoint and a zero-shot head: exact where the image tower is that of CLIP.

Learned tokens in the text tower only change the class embeddings, which are the head. Learned tokens in the image
tower, or a network after it, are not weights of a plain CLIP.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transformer import QuickGELU
from tokenizers.models import BPE
from torch import Tensor

from maple import __version__
from maple.checkpoint import save_safetensors
from maple.clip.backbone import Preprocessing
from maple.clip.load import load_backbone
from maple.clip.transformers_format import transformers_name
from maple.errors import ExportError, MapleError
from maple.export.export_source import ExportSource
from maple.export.graphs import head_of, keeps_image_features
from maple.export.parity_check import largest_difference, require_parity
from maple.inference.manifest import MERGES
from maple.inference.predictor import Floats
from maple.inference.tokenizer import read_vocabulary
from maple.methods import Method
from maple.prompts import l2_normalize, to_float32

_ENDS = ("<|startoftext|>", "<|endoftext|>")


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under transformers' names; those of packed attention in three parts."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        name = transformers_name(key)
        packed = re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name)
        if packed:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{packed[1]}.self_attn.{letter}_proj.{packed[2]}"] = part.contiguous()
        elif key == "text_projection":
            renamed["text_projection.weight"] = value.T.contiguous()
        elif key == "visual.proj":
            renamed["visual_projection.weight"] = value.T.contiguous()
        else:
            renamed[name] = value
    return renamed


def transformers_config(config: Mapping[str, Any], logit_scale: float) -> dict[str, Any]:
    """The content of config.json, from open_clip's configuration and the logarithm of the logit scale."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    activation = "quick_gelu" if config["quick_gelu"] else "gelu"
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "logit_scale_init_value": logit_scale,
        "text_config": {
            "model_type": "clip_text_model",
            "hidden_size": text["width"],
            "intermediate_size": round(text["width"] * text["mlp_ratio"]),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "projection_dim": config["embed_dim"],
            "hidden_act": activation,
            "layer_norm_eps": 1e-5,
            "bos_token_id": text["vocab_size"] - 2,
            "eos_token_id": text["vocab_size"] - 1,
            "pad_token_id": text["vocab_size"] - 1,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision["width"],
            "intermediate_size": round(vision["width"] * vision["mlp_ratio"]),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "projection_dim": config["embed_dim"],
            "hidden_act": activation,
            "layer_norm_eps": 1e-5,
        },
    }


def image_processor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """The content of preprocessor_config.json."""
    size = preprocessing.size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": {"bilinear": 2, "bicubic": 3}[preprocessing.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": preprocessing.mean,
        "image_std": preprocessing.std,
        "do_convert_rgb": True,
    }


def write_tokenizer(merges: Path, folder: Path, context_length: int) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json of CLIP's tokenizer, from its published merges."""
    vocabulary, pairs = read_vocabulary(merges, _ENDS)
    BPE(vocabulary, pairs, end_of_word_suffix="</w>").save(str(folder))
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "bos_token": _ENDS[0],
        "eos_token": _ENDS[1],
        "unk_token": _ENDS[1],
        "pad_token": _ENDS[1],
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


HEAD = "zero_shot_head.safetensors"
HEAD_NAMES = "zero_shot_head.json"


def write_plain_clip(source: ExportSource, folder: Path, kind: str) -> float:
    """Write the CLIP in the format `kind` (openclip or transformers) and its head; return the difference of logits.

    Raises:
        ExportError: a plain CLIP cannot hold the method, or the format not this backbone, or the result differs.
    """
    method = source.method
    backbone, model, seen = method.backbone, method.backbone.model, method.backbone.preprocessing
    _require_plain_clip(method, kind)
    config = _open_clip_config(source, kind)
    state = {name: value.detach().contiguous().clone() for name, value in model.state_dict().items()}
    state.pop("attn_mask", None)
    if kind == "openclip":
        preprocess = {"mean": seen.mean, "std": seen.std, "interpolation": seen.interpolation}
        content = {"model_cfg": config, "preprocess_cfg": {**preprocess, "resize_mode": "shortest"}}
        _write_json(folder / "open_clip_config.json", content)
        save_safetensors(state, folder / "open_clip_model.safetensors")
    else:
        _write_json(folder / "config.json", transformers_config(config, float(model.logit_scale)))
        _write_json(folder / "preprocessor_config.json", image_processor_config(seen))
        save_safetensors(to_transformers(state), folder / "model.safetensors", {"format": "pt"})
        write_tokenizer(Path(open_clip.__file__).parent / MERGES, folder, config["text_cfg"]["context_length"])
    embeddings = method.class_embeddings().contiguous()
    scale = torch.tensor(method.logit_scale / method.temperature)
    save_safetensors({"class_embeddings": embeddings, "logit_scale": scale}, folder / HEAD)
    # Load the folder as a user would, and compare.
    try:
        loaded = load_backbone(str(folder), None, precision="fp32", device="cpu")
    except MapleError as error:
        raise ExportError(f"{kind}: the written folder cannot be loaded ({error})") from error
    if loaded.fingerprint != backbone.fingerprint:
        raise ExportError(f"{kind}: this backbone has weights that the format does not hold; use format=onnx")

    @torch.no_grad()
    def logits(images: Floats) -> Floats:
        features = l2_normalize(to_float32(loaded.image.plain(torch.from_numpy(images))))
        return np.asarray((scale * features @ embeddings.T).numpy())

    difference = largest_difference(source, logits, method, method.class_names)
    require_parity(difference, f"the {kind} folder")
    description = {
        "maple": __version__,
        "about": {**source.about, "precision": "fp32"},
        "class_names": list(method.class_names),
        "maximal_difference": difference,
    }
    _write_json(folder / HEAD_NAMES, description)
    return difference


def _require_plain_clip(method: Method, kind: str) -> None:
    """Refuse methods and backbones that a plain CLIP with a zero-shot head cannot represent."""
    instead = "use format=onnx, or torchscript"
    if method.vision_edits():
        problem = "has learned something in the image tower that is not weights of a plain CLIP"
        raise ExportError(f"{method.title} {problem}, so {kind} cannot hold it; {instead}")
    if method.classes_depend_on_image:
        problem = "its classes depend on the image"
        raise ExportError(f"{method.title}: {problem}, so {kind} cannot hold it; use format=onnx")
    if not keeps_image_features(method) or head_of(method) != "cosine":
        problem = "computes more than the cosines of a plain CLIP"
        raise ExportError(f"{method.title} {problem}, so {kind} cannot hold it; {instead}")
    backbone = method.backbone
    obstacle = backbone.text.obstacle or backbone.image.obstacle
    if obstacle is not None or not backbone.uses_clip_tokenizer:
        problem = "this backbone is not a CLIP with two plain transformers and CLIP's tokenizer"
        raise ExportError(f"{kind}: {problem}{'' if obstacle is None else f' ({obstacle})'}; {instead}")


def _open_clip_config(source: ExportSource, kind: str) -> dict[str, Any]:
    """open_clip's configuration of a CLIP, from its weights and blocks."""
    backbone = source.method.backbone
    model = backbone.model
    try:
        image, text = model.visual, model.transformer
        blocks = (image.transformer.resblocks[0], text.resblocks[0])
        heads = [block.attn.num_heads for block in blocks]
        hidden = [block.mlp.c_fc.weight.shape[0] for block in blocks]
        quick = {isinstance(block.mlp.gelu, QuickGELU) for block in blocks}
    except AttributeError as error:
        problem = f"this backbone is not built like CLIP ({error})"
        raise ExportError(f"{kind}: {problem}; use format=onnx, or torchscript") from error
    image_width, text_width = backbone.image.width, backbone.text.width
    return {
        "embed_dim": backbone.embed_dim,
        "quick_gelu": quick == {True},
        "vision_cfg": {
            "image_size": backbone.preprocessing.size,
            "layers": backbone.image.depth,
            "width": image_width,
            "patch_size": int(image.conv1.weight.shape[-1]),
            "head_width": image_width // heads[0],
            "mlp_ratio": hidden[0] / image_width,
        },
        "text_cfg": {
            "context_length": backbone.text.context_length,
            "vocab_size": int(model.token_embedding.weight.shape[0]),
            "width": text_width,
            "heads": heads[1],
            "layers": backbone.text.depth,
            "mlp_ratio": hidden[1] / text_width,
        },
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
