"""A CLIP in transformers' format, from open_clip's: the inverse of `maple.clip.transformers_format`.

Source: huggingface/transformers, models/clip/convert_clip_original_pytorch_to_hf.py and tokenization_clip.py.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers.models import BPE
from torch import Tensor

from maple.clip.backbone import Preprocessing
from maple.clip.transformers_format import transformers_name
from maple.inference.tokenizer import read_vocabulary

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
