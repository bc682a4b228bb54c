"""SigLIP and SigLIP 2 in transformers' format, read as an open_clip model around a timm image tower.

transformers stores the SigLIP 2 checkpoints of one resolution as SigLIP, with another vocabulary.

Source: huggingface/transformers, models/siglip/modeling_siglip.py and convert_siglip_to_hf.py; SigLIP (Zhai et al.,
2023), section 4; open_clip 3.3.0 model_configs/ViT-B-16-SigLIP2.json.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import open_clip
import torch
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from maple.clip.checkpoints.formats import StateDict, mlp_ratio
from maple.errors import BackboneError, one_of

# (transformers, open_clip and timm): prefixes of tensor names, and parts within them.
PREFIXES = (
    ("text_model.embeddings.token_embedding.", "text.token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "text.positional_embedding"),
    ("text_model.encoder.layers.", "text.transformer.resblocks."),
    ("text_model.final_layer_norm.", "text.ln_final."),
    ("text_model.head.", "text.text_projection."),
    ("vision_model.embeddings.patch_embedding.", "visual.trunk.patch_embed.proj."),
    ("vision_model.embeddings.position_embedding.weight", "visual.trunk.pos_embed"),
    ("vision_model.encoder.layers.", "visual.trunk.blocks."),
    ("vision_model.post_layernorm.", "visual.trunk.norm."),
    ("vision_model.head.probe", "visual.trunk.attn_pool.latent"),
    ("vision_model.head.attention.out_proj.", "visual.trunk.attn_pool.proj."),
    ("vision_model.head.layernorm.", "visual.trunk.attn_pool.norm."),
    ("vision_model.head.mlp.", "visual.trunk.attn_pool.mlp."),
)
TEXT_PARTS = (
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.", ".attn."),
)
IMAGE_PARTS = (
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".self_attn.in_proj_", ".attn.qkv."),
    (".self_attn.out_proj.", ".attn.proj."),
)
_ACTIVATIONS = {"gelu_pytorch_tanh": "tanh", "gelu": "none"}  # as torch.nn.GELU calls them
_POOLING = "vision_model.head.attention.in_proj_"


def siglip_config(text: Mapping[str, Any], vision: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The open_clip configuration of a SigLIP, and the sizes of its timm image tower under `timm_trunk`.

    Raises:
        BackboneError: the activation is not a GELU, the image tower has no pooling head, or the towers' features have
            different lengths.
    """
    width, text_width = vision.get("hidden_size", 768), text.get("hidden_size", 768)
    projected = text.get("projection_size")
    projected = text_width if projected is None else projected
    if projected != width:
        raise BackboneError(
            f"{source} describes text features of {projected!r:.40} numbers and image features of {width!r:.40}; they "
            "are compared, and must have the same length"
        )
    if vision.get("vision_use_head", True) is not True:
        raise BackboneError(f"{source} describes a SigLIP without its pooling head (vision_use_head); it is required")
    activations = [tower.get("hidden_act", "gelu_pytorch_tanh") for tower in (text, vision)]
    for activation in activations:
        if activation not in _ACTIVATIONS:
            raise BackboneError(f"{source}: {one_of('hidden_act', activation, _ACTIVATIONS)}")
    text_activation, image_activation = (_ACTIVATIONS[activation] for activation in activations)
    image_ratio = mlp_ratio(vision.get("intermediate_size", 3072), width)
    side, patch = vision.get("image_size", 224), vision.get("patch_size", 16)
    heads, layers = vision.get("num_attention_heads", 12), vision.get("num_hidden_layers", 12)
    return {
        "embed_dim": width,
        "init_logit_bias": -10,
        "custom_text": True,
        # What open_clip's own image tower of these sizes would be: its size is checked before anything is built.
        "vision_cfg": {
            "image_size": side,
            "patch_size": patch,
            "width": width,
            "layers": layers,
            "mlp_ratio": image_ratio,
        },
        "timm_trunk": {
            "img_size": side,
            "patch_size": patch,
            "embed_dim": width,
            "depth": layers,
            "num_heads": heads,
            "mlp_ratio": image_ratio,
            "act_layer": "gelu_tanh" if image_activation == "tanh" else "gelu",
            "norm_eps": vision.get("layer_norm_eps", 1e-6),
        },
        "text_cfg": {
            "context_length": text.get("max_position_embeddings", 64),
            "vocab_size": text.get("vocab_size", 32000),
            "width": text_width,
            "heads": text.get("num_attention_heads", 12),
            "layers": text.get("num_hidden_layers", 12),
            "mlp_ratio": mlp_ratio(text.get("intermediate_size", 3072), text_width),
            "norm_kwargs": {"eps": text.get("layer_norm_eps", 1e-6)},
            "act_kwargs": {"approximate": text_activation},
            "no_causal_mask": True,
            "pool_type": "last",
            "proj_bias": True,
        },
    }


def split_pooling(state: Mapping[str, Tensor], source: str) -> StateDict:
    """The weights with the attention of the pooling head in timm's two parts: queries, and keys with values.

    Raises:
        BackboneError: the packed projection cannot be split into three.
    """
    weights = dict(state)
    for kind in ("weight", "bias"):
        packed = weights.pop(f"{_POOLING}{kind}", None)
        if packed is None:  # reported as missing later, with the names of the others
            continue
        if packed.ndim == 0 or packed.shape[0] % 3:
            raise BackboneError(f"{source}: {_POOLING}{kind} has the shape {list(packed.shape)}, not 3 projections")
        query, key, value = packed.chunk(3)
        weights[f"visual.trunk.attn_pool.q.{kind}"] = query
        weights[f"visual.trunk.attn_pool.kv.{kind}"] = torch.cat([key, value])
    if (positions := weights.pop("vision_model.embeddings.position_embedding.weight", None)) is not None:
        weights["visual.trunk.pos_embed"] = positions[None]  # timm keeps a dimension for the batch
    return weights


def build_siglip(config: Mapping[str, Any], trunk: Mapping[str, Any]) -> Any:
    """An open_clip model of `siglip_config`, whose image tower has the sizes of `trunk`."""
    import timm

    # open_clip builds timm's towers by name, in the sizes of that name: a small tower of its own holds the place.
    placeholder = {"image_size": 16, "patch_size": 16, "width": 64, "layers": 1}
    model = open_clip.CustomTextCLIP(**{**config, "vision_cfg": placeholder})
    sizes = dict(trunk)
    norm = partial(nn.LayerNorm, eps=sizes.pop("norm_eps"))
    model.visual = _SizedTimmModel(
        timm.create_model("vit_base_patch16_siglip_224", num_classes=0, norm_layer=norm, **sizes), sizes["img_size"]
    )
    return model


class _SizedTimmModel(TimmModel):  # type: ignore[misc]
    """open_clip's adapter around an image tower of timm that is built already, without a projection."""

    def __init__(self, trunk: nn.Module, image_size: int) -> None:
        nn.Module.__init__(self)
        self.image_size = (image_size, image_size)
        self.trunk = trunk
        self.head = nn.Sequential()
