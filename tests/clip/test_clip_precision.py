"""Half precision: close to float32, norms in float32, the same fingerprint; for every kind of tower."""

from typing import Any

import clip_files as files
import open_clip
import pytest
import torch
from open_clip.transformer import LayerNorm, LayerNormFp32
from torch import nn

from maple.clip import Backbone, Preprocessing, load_clip
from maple.clip.initialisation import uninitialised
from maple.clip.towers.timm_image import TimmImageTower
from maple.errors import BackboneError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 0.0, "bf16": 0.03, "fp16": 0.005}  # of cosine similarities
SEEN = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

CUSTOM_BLOCKS = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}
MODELS: dict[str, dict[str, Any]] = {
    "plain": files.CONFIG,
    "quickgelu": files.changed(quick_gelu=True),
    "custom text": files.changed(custom_text=True),
    "linear projection": files.changed(text={"proj_bias": True}),
    "linear projection, custom text": files.changed(custom_text=True, text={"proj_bias": True}),
    "no projection": files.changed(text={"proj_type": "none"}),
    "layer scale": files.changed(vision={"ls_init_value": 0.3}, text={"ls_init_value": 0.3}),
    "no pre-norm": files.changed(vision={"no_ln_pre": True}),
    "average": files.changed(vision={"pool_type": "avg", "final_ln_after_pool": True}),
    "norm epsilon": files.changed(vision={"norm_kwargs": {"eps": 1e-2}}, text={"norm_kwargs": {"eps": 1e-2}}),
    "custom blocks": files.changed(vision=CUSTOM_BLOCKS, text=CUSTOM_BLOCKS),
    "bidirectional": files.changed(custom_text=True, text={"no_causal_mask": True, "pool_type": "last"}),
    "attention pool": files.changed(
        vision={"attentional_pool": True, "attn_pooler_queries": 1, "attn_pooler_heads": 2}
    ),
    "ResNet": files.changed(vision={"layers": [1, 1, 1, 1], "width": 16, "image_size": 64, "head_width": 64}),
    "timm": files.changed(
        vision={"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    ),
    "timm, convolutions": files.changed(
        vision={"timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    ),
}


def build(config: dict[str, Any], precision: str = "fp32") -> Backbone:
    config = {**config}
    custom = config.pop("custom_text", False)
    with torch.random.fork_rng(devices=[]), uninitialised():
        model = files.shaken((open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config))
    size = config["vision_cfg"]["image_size"]
    seen = Preprocessing(size, SEEN.mean, SEEN.std)
    tokenizer = files.tokenizer()
    return Backbone(
        model, name="x", pretrained=None, preprocessing=seen, tokenizer=tokenizer, precision=precision, device="cpu"
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_fingerprint(name: str, precision: str) -> None:
    full, low = build(MODELS[name]), build(MODELS[name], precision)
    expected, actual = files.logits(full) / full.logit_scale, files.logits(low) / low.logit_scale
    assert (actual - expected).abs().max() < TOLERANCE[precision]
    assert not torch.equal(actual, expected), "the precision had no effect"
    assert low.fingerprint == full.fingerprint
    assert low.logit_scale == full.logit_scale
    assert low.embed_dim == full.embed_dim
    assert low.parameter_count == full.parameter_count


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_states_and_norms(name: str, precision: str) -> None:
    backbone = build(MODELS[name], precision)
    norms = [m for m in backbone.model.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d)]
    assert all(p.dtype == torch.float32 for norm in norms for p in norm.parameters())
    with torch.no_grad():
        for tower, inputs in (
            (backbone.text, backbone.tokenize(files.SENTENCES)),
            (backbone.image, files.images(backbone.preprocessing.size)),
        ):
            if tower.obstacle is not None:
                continue
            states = tower.enter(tower.embed(inputs))
            assert states.dtype == DTYPES[precision]
            for layer in range(tower.depth):
                states = tower.block(layer, states)
                assert states.dtype == DTYPES[precision]
    if precision != "fp32":
        with_seams = [t for t in (backbone.text, backbone.image) if t.obstacle is None]
        converted = [t for t in with_seams if not isinstance(t, TimmImageTower)]  # timm's run under autocast
        blocks = [m for t in converted for b in t._blocks for m in b.module.modules()]
        assert not [m for m in blocks if type(m) is LayerNorm]
        assert all(m.weight.dtype == DTYPES[precision] for m in blocks if isinstance(m, nn.Linear))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_norms_compute_in_float32(precision: str) -> None:
    """Entries far apart lose their small differences in half precision; a float32 norm does not add to it."""
    norm = build(MODELS["norm epsilon"], precision).model.visual.ln_post
    assert isinstance(norm, LayerNormFp32)
    assert norm.eps == 1e-2
    states = (1000 + torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1))).to(DTYPES[precision])
    expected = nn.functional.layer_norm(states.float(), (128,), norm.weight, norm.bias, norm.eps)
    assert torch.equal(norm(states), expected.to(states.dtype))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_pass_through_to_prompts(name: str, precision: str) -> None:
    """What methods do: a float32 parameter is put among the states, and learns."""
    backbone = build(MODELS[name], precision)
    for tower, inputs in (
        (backbone.text, backbone.tokenize(files.SENTENCES)),
        (backbone.image, files.images(backbone.preprocessing.size)),
    ):
        if tower.obstacle is not None:
            continue
        states = tower.enter(tower.embed(inputs))
        prompt = nn.Parameter(torch.randn(states.shape[-1]))
        states = states + prompt.to(states.dtype)
        for layer in range(tower.depth):
            states = tower.block(layer, states)
        is_text = tower is backbone.text
        tower.finish(states[:, 3] if is_text else states).float().square().sum().backward()
        assert prompt.grad is not None
        assert prompt.grad.dtype == torch.float32
        assert prompt.grad.isfinite().all()
        assert prompt.grad.any()
    assert all(p.grad is None for p in backbone.model.parameters())


def test_resnet_by_name() -> None:
    """RN50 as open_clip defines it: loads, and its unpromptable tower runs under autocast."""
    backbone = load_clip("RN50", "random:2", precision="bf16")
    assert backbone.image.obstacle is not None
    with torch.no_grad():
        features = backbone.image.plain(torch.randn(1, 3, 224, 224))
        read = backbone.text.plain(backbone.tokenize(["a cat"]))
    assert features.shape == read.shape == (1, 1024)
    assert features.dtype == read.dtype == torch.bfloat16
    assert features.isfinite().all()
    assert {p.dtype for p in backbone.model.visual.parameters()} == {torch.float32}


def test_loader_passes_precision_on() -> None:
    low, full = (load_clip("maple-tiny", "random:1", precision=p) for p in ("bf16", "fp32"))
    assert low.dtype == torch.bfloat16
    assert low.fingerprint == full.fingerprint
    with pytest.raises(BackboneError, match="unknown precision 'int8'; choose one of: fp32, bf16, fp16"):
        load_clip("maple-tiny", precision="int8")
