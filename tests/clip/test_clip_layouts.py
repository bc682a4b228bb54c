"""The kinds of towers that open_clip publishes, in the smallest sizes that it can build: the features of open_clip."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import clip_files as files
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from maple.clip import load_clip
from maple.clip.describe import FAMILIES, describe_backbone
from maple.errors import UnsupportedTowerError
from maple.methods import build_method

# A method of each family, in its smallest form.
EXAMPLES = {
    "text prompts": {"name": "coop", "prompt_length": 2},
    "image prompts": {"name": "vpt", "vision_prompt_depth": 1},
    "both towers": {"name": "maple", "prompt_depth": 1},
    "features of tokens": {"name": "mmrl", "layers": [1, 2], "tokens": 2, "token_width": 16},
    "inside the blocks": {"name": "clip_lora"},
    "frozen features": {"name": "linear_probe"},
}
SMALL = {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
TIMM = {"timm_model_pretrained": False, "timm_proj": None}
LAYOUTS: dict[str, dict[str, Any]] = {
    "siglip": {
        "vision_cfg": {
            **TIMM,
            "timm_model_name": "test_vit",
            "timm_pool": "map",
            "timm_proj": "none",
            "image_size": 160,
        },
        "text_cfg": {**SMALL, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
        "init_logit_bias": -10,
    },
    "eva02": {
        "vision_cfg": {**TIMM, "timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "image_size": 224},
        "text_cfg": SMALL,
    },
    "pe_core": {
        "vision_cfg": {
            **TIMM,
            "timm_model_name": "vit_pe_core_tiny_patch16_384",
            "timm_pool": "map",
            "image_size": 384,
        },
        "text_cfg": SMALL,
    },
    "mobileclip2": {
        "vision_cfg": {**TIMM, "timm_model_name": "fastvit_mci0", "timm_pool": "avg", "image_size": 256},
        "text_cfg": {**SMALL, "no_causal_mask": True},
    },
    "coca": {
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 64,
            "patch_size": 16,
            "head_width": 32,
            "output_tokens": True,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "attn_pooler_queries": 8,
        },
        "text_cfg": {**SMALL, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**SMALL, "attn_pooler_heads": 2},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_open_clip_publishes(tmp_path: Path, layout: str) -> None:
    width = {"siglip": 64, "coca": 64}.get(layout, 48)
    config = {"embed_dim": width, **LAYOUTS[layout]}
    kind = open_clip.CoCa if layout == "coca" else open_clip.CustomTextCLIP
    model = files.shaken(kind(**json.loads(json.dumps(config))))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    described = {"model_cfg": {**config, "custom_text": True}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    backbone = load_clip(str(tmp_path))
    described = describe_backbone(str(tmp_path))
    assert described.families().keys() == EXAMPLES.keys() == FAMILIES.keys()
    assert (described.parameters, described.embed_dim) == (backbone.parameter_count, backbone.embed_dim)
    assert described.image_size == (backbone.preprocessing.size,) * 2
    for tower, about in ((backbone.text, described.text), (backbone.image, described.image)):
        assert (about.prompts, about.depth, about.width) == (tower.obstacle, tower.depth, tower.width)
    for family, reason in described.families().items():
        with nullcontext() if reason is None else pytest.raises(UnsupportedTowerError):
            build_method(EXAMPLES[family], backbone, ["cat", "dog"])
    images, ids = files.images(config["vision_cfg"]["image_size"])[:1], backbone.tokenize(["a photo of a cat.", "dogs"])
    with torch.no_grad():
        pairs = (
            (backbone.image.plain(images), model.encode_image(images, normalize=False)),
            (backbone.text.plain(ids), model.encode_text(ids, normalize=False)),
        )
    for features, expected in pairs:
        assert expected.std() > 1e-3
        close = torch.nn.functional.normalize
        torch.testing.assert_close(close(features, dim=-1), close(expected, dim=-1), rtol=0, atol=1e-5)
