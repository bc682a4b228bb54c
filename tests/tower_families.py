"""Small CLIPs of every family of image towers, with random weights, 4 image blocks and 3 text blocks."""

from __future__ import annotations

from functools import cache, partial
from typing import Any
from unittest.mock import patch

import open_clip
import timm
import torch
from torch import Tensor

from maple.clip import Backbone, Preprocessing

SIDE = 32
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 3}
_BIDIRECTIONAL = {**_TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
_VISION = {"image_size": SIDE, "layers": 4, "width": 128, "patch_size": 8, "head_width": 64}
_SMALL = {"img_size": SIDE, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}


def _timm(name: str, pool: str, proj: str | None, **sizes: Any) -> dict[str, Any]:
    return {
        "vision_cfg": {"image_size": SIDE, "timm_model_name": name, "timm_pool": pool, "timm_proj": proj},
        "text_cfg": _TEXT,
        "custom_text": True,
        "sizes": {**_SMALL, **sizes},
    }


FAMILIES: dict[str, dict[str, Any]] = {
    "CLIP": {"vision_cfg": _VISION, "text_cfg": _TEXT},
    "SigLIP": {**_timm("vit_base_patch16_siglip_224", "map", "none"), "text_cfg": _BIDIRECTIONAL},
    "EVA-02": _timm("eva02_base_patch16_clip_224", "token", None),
    "CoCa": {
        "vision_cfg": {**_VISION, "attentional_pool": True, "output_tokens": True}
        | {"attn_pooler_heads": 2, "attn_pooler_queries": 8},
        "text_cfg": {**_TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 76, "width": 64, "heads": 1, "layers": 1, "vocab_size": 49408},
    },
    "convolutions": {**_timm("test_efficientnet", "avg", "linear"), "sizes": {}},
}
"""A family of towers in each entry; those of the tests of every method."""

OTHERS: dict[str, dict[str, Any]] = {
    "Perception Encoder": _timm("vit_pe_core_base_patch16_224", "map", None),
    "EVA, gap": _timm("eva_giant_patch14_224", "avg", None),
    "registers": _timm("vit_small_patch14_reg4_dinov2", "token", "linear"),
    "rotary in each block": _timm("vit_base_patch16_rope_mixed_224", "token", "linear"),
    "registers, rotary, averaged": _timm("vit_base_patch16_rope_reg1_gap_256", "avg", "mlp"),
    "norms of heads": _timm(
        "vit_base_patch16_clip_224", "avg", "linear", qk_norm=True, scale_attn_norm=True, init_values=0.5
    ),
    "dynamic size": _timm("vit_base_patch16_siglip_gap_224", "avg", "none", dynamic_img_size=True),
    "post-norm": _timm("eva02_base_patch16_clip_224", "token", None, use_post_norm=True),
    "gated": _timm("eva02_base_patch16_clip_224", "token", None),
    "relative positions": _timm("vit_relpos_medium_patch16_cls_224", "token", "linear"),
}


def fill(model: Any, seed: int = 0) -> Any:
    """Random weights at which every part matters: norms, biases and scales too."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if "logit" in name:
            value.data.fill_(2.5)
        elif value.ndim < 2:
            value.data.copy_(0.2 * noise + ("weight" in name or "gamma" in name))
        else:
            value.data.copy_(noise * (0.1 if "emb" in name or "token" in name else value[0].numel() ** -0.5))
    return model.eval()


def build_family(name: str, precision: str = "fp32") -> Backbone:
    config = {**FAMILIES, **OTHERS}[name]
    custom, sizes = config.get("custom_text", False), config.get("sizes", {})
    parts = {key: dict(value) for key, value in config.items() if key.endswith("_cfg")}
    kind = open_clip.CoCa if "multimodal_cfg" in parts else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with torch.random.fork_rng(devices=[]), patch.object(timm, "create_model", partial(timm.create_model, **sizes)):
        model = kind(embed_dim=64, **parts)
    if name == "gated":
        for block in model.visual.trunk.blocks:
            block.attn.gate = torch.nn.Linear(64, 64)
    tokenizer = open_clip.SimpleTokenizer(context_length=parts["text_cfg"]["context_length"])
    seen = Preprocessing(SIDE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Backbone(
        fill(model), name=name, pretrained=None, preprocessing=seen, tokenizer=tokenizer, precision=precision
    )


@cache
def family(name: str) -> Backbone:
    """A backbone that tests share; a frozen one, which none of them may change."""
    return build_family(name)


@cache
def double_family(name: str) -> Backbone:
    """The same computing in float64."""
    made = build_family(name)
    made.model.double()
    made.dtype = made.text.dtype = made.image.dtype = torch.float64
    return made


def images(count: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5)).to(dtype)
