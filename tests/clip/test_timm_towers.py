"""timm's towers: stages, prompts and every edit against timm's own blocks, called one by one with changed weights."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from tower_families import FAMILIES, OTHERS, build_family, double_family, family, images

from maple.clip import Backbone, LayerEdit, LowRank
from maple.errors import UnsupportedTowerError
from maple.methods import build_method
from maple.prompts import encode_image, encode_image_and_tokens
from maple.prompts.encode import encode_image_with_attention

AS_THEY_ARE = ["post-norm", "gated"]
STANDARD = [
    *("SigLIP", "EVA-02"),
    *(name for name in OTHERS if name not in (*AS_THEY_ARE, "relative positions")),
]
PROMPT, TOKENS, RANK = 3, 2, 2

EDITS: list[list[set[str]]] = [
    [{"prompt"}, {"prompt"}, {"prompt"}],
    [{"late prompt", "input"}, {"residual"}, set(), {"tokens", "residual"}],
    [{"q", "norm 1"}, {"prompt", "v", "o"}, {"tokens", "norm 2", "k"}, {"mixed tokens", "q", "k", "v", "o"}],
]


class Change:
    """An edit, and what the oracle needs of it, out of the same tensors."""

    def __init__(self, parts: set[str], layer: int, width: int, generator: torch.Generator) -> None:
        self.leaves: list[Tensor] = []

        def leaf(*shape: int) -> Tensor:
            tensor = 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)
            self.leaves.append(tensor.requires_grad_())
            return self.leaves[-1]

        def branch() -> Any:
            down, up = leaf(width, 4), leaf(4, width)
            return lambda rows: torch.relu(rows @ down) @ up

        self.edit = LayerEdit(
            prompt=leaf(PROMPT, width) if parts & {"prompt", "late prompt"} else None,
            after_positions="late prompt" in parts,
            tokens=leaf(TOKENS, width) if parts & {"tokens", "mixed tokens"} else None,
            keep=0.4 if "mixed tokens" in parts else 0.0,
            input_residual=branch() if "input" in parts and layer == 0 else None,
            residual=branch() if "residual" in parts else None,
            low_rank={kind: LowRank(leaf(RANK, width), leaf(width, RANK), 0.7) for kind in sorted(parts & set("qkvo"))},  # type: ignore[misc]
            norms=tuple((1 + leaf(width), leaf(width)) if f"norm {n}" in parts else None for n in (1, 2)),  # type: ignore[arg-type]
        )


def changed_weights(block: Any, edit: LayerEdit) -> dict[str, Tensor]:
    """Parameters of timm's block with those of the edit in them."""
    weights = {
        f"norm{n}.{name}": affine[i]
        for n, affine in enumerate(edit.norms, 1)
        if affine is not None
        for i, name in enumerate(("weight", "bias"))
    }
    for kind, update in edit.low_rank.items():
        added, attention = 0.7 * update.up @ update.down, block.attn
        if kind == "o":
            weights["attn.proj.weight"] = attention.proj.weight + added
        elif getattr(attention, "q_proj", None) is not None:
            weights[f"attn.{kind}_proj.weight"] = getattr(attention, f"{kind}_proj").weight + added
        else:
            before = weights.get("attn.qkv.weight", attention.qkv.weight)
            q, k, v = before.chunk(3)
            parts = {"q": q, "k": k, "v": v}
            parts[kind] = parts[kind] + added
            weights["attn.qkv.weight"] = torch.cat(list(parts.values()))
    return weights


def plain_features(backbone: Backbone, pixels: Tensor, edits: list[LayerEdit]) -> tuple[Tensor, Tensor]:
    """Features, and the final rows of tokens, by timm's own modules."""
    visual = backbone.model.visual
    trunk = visual.trunk
    x, rope = trunk._pos_embed(trunk.patch_embed(pixels)), None
    if isinstance(x, tuple):
        x, rope = x
    count, prompt, tokens = x.shape[1], x[:, :0], x[:, :0]
    patches = x
    for layer, block in enumerate(trunk.blocks):
        edit = edits[layer] if layer < len(edits) else LayerEdit()
        given = None if edit.prompt is None else edit.prompt.expand(len(pixels), -1, -1)
        if layer == 0:
            early = given is not None and not edit.after_positions
            patches, prompt = trunk.norm_pre(patches), trunk.norm_pre(given) if early else prompt
            if edit.input_residual is not None:
                patches, prompt = patches + edit.input_residual(patches), prompt + edit.input_residual(prompt)
            prompt = given if given is not None and not early else prompt
        elif given is not None:
            prompt = given
        if edit.tokens is not None:
            own = edit.tokens.expand(len(pixels), -1, -1)
            tokens = edit.keep * tokens + (1 - edit.keep) * own if tokens.shape[1] else own
        x = torch.cat([patches, prompt, tokens], dim=1)
        options = {}
        if rope is not None:
            table = rope[layer] if trunk.rope_mixed else rope
            unrotated = torch.zeros(*table.shape[:-2], x.shape[1] - count, table.shape[-1], dtype=table.dtype)
            unrotated[..., table.shape[-1] // 2 :] = 1
            options["rope"] = torch.cat([table, unrotated], dim=-2)
        weights = changed_weights(block, edit)
        after = functional_call(block, weights, (x,), options)
        if edit.residual is not None:
            affine = {
                name.removeprefix("norm1."): value for name, value in weights.items() if name.startswith("norm1.")
            }
            after = after + edit.residual(functional_call(block.norm1, affine, (x,)))
        patches, prompt, tokens = after.split([count, prompt.shape[1], tokens.shape[1]], dim=1)
    features: Tensor = visual.head(trunk.forward_head(trunk.norm(patches)))
    rows: Tensor = trunk.fc_norm(trunk.norm(tokens))
    return features, rows


def gradients(features: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(0), dtype=features.dtype)
    return list(torch.autograd.grad((features * weights).sum(), leaves, materialize_grads=True))


@pytest.mark.parametrize("name", [*STANDARD, *AS_THEY_ARE])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stages_make_the_tower(name: str, precision: str) -> None:
    backbone, exact = build_family(name, precision), family(name)
    tower = backbone.image
    with torch.no_grad():
        expected = exact.model.encode_image(images())
        found = encode_image(tower, images(), ())  # the class token alone in the last block, where it is pooled
        states = tower.enter(tower.embed(images()))
        for layer in range(tower.depth):
            assert states.dtype == tower.dtype
            states = tower.block(layer, states)
        whole = tower.finish(states), tower.plain(images())
    if precision == "fp32":
        for each in (found, *whole):
            assert float((each - expected).abs().max() / expected.abs().max()) < 1e-5
    else:
        for each in (found, *whole):
            cosine = torch.cosine_similarity(each.float(), expected)
            assert float(1 - cosine.min()) < {"bf16": 0.03, "fp16": 0.005}[precision]
    assert backbone.fingerprint == exact.fingerprint
    assert {weight.dtype for weight in backbone.model.visual.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", STANDARD)
@pytest.mark.parametrize("parts", EDITS)
def test_edits_are_those_of_timms_blocks(name: str, parts: list[set[str]]) -> None:
    backbone = double_family(name)
    tower, pixels = backbone.image, images(dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    changes = [Change(each, layer, tower.width, generator) for layer, each in enumerate(parts)]
    edits, leaves = [change.edit for change in changes], [leaf for change in changes for leaf in change.leaves]
    expected, rows = plain_features(backbone, pixels, edits)
    found = encode_image(tower, pixels, edits)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    for one, other in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    assert all(weight.grad is None and not weight.requires_grad for weight in backbone.model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(encode_image(tower, pixels, edits), expected, rtol=1e-9, atol=1e-10)
        features, attention = encode_image_with_attention(tower, pixels, edits)
        torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-10)
        assert len(attention) == tower.depth
        torch.testing.assert_close(attention[-1].sum(dim=-1), torch.ones_like(attention[-1][..., 0]))
        if not tower.pools_by_attention:
            torch.testing.assert_close(
                encode_image_and_tokens(tower, pixels, edits), (expected, rows), rtol=1e-9, atol=1e-10
            )
            projected = backbone.model.visual.head(backbone.model.visual.trunk.head(rows))
            torch.testing.assert_close(tower.project(rows), projected)


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_other_blocks_run_as_they_are(name: str) -> None:
    backbone = double_family(name)
    tower, pixels, generator = backbone.image, images(dtype=torch.float64), torch.Generator().manual_seed(1)
    parts = [{"prompt"}, {"tokens"}, {"prompt"}]
    edits = [Change(each, layer, tower.width, generator).edit for layer, each in enumerate(parts)]
    expected, _ = plain_features(backbone, pixels, edits)
    torch.testing.assert_close(encode_image(tower, pixels, edits), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "why"),
    [("post-norm", r"structure of EvaBlockPostNorm, whose norms do not come"), ("gated", "a gate on its attention")],
)
def test_other_blocks_are_refused_by_name(name: str, why: str) -> None:
    backbone = family(name)
    for method in ({"name": "clip_lora", "encoder": "vision"}, {"name": "two_stage", "sides": "vision"}):
        with pytest.raises(UnsupportedTowerError, match=rf"block 0 of this image tower is not a standard .*{why}"):
            build_method(method, backbone, ["cat", "dog"])
    with pytest.raises(UnsupportedTowerError, match=rf"block 0 .*{why}.* its attention cannot be read"):
        encode_image_with_attention(backbone.image, images(), [])
    adapters = {"name": "mma", "adapter_start": 2, "adapter_end": 3}
    if name == "gated":
        build_method(adapters, backbone, ["cat", "dog"])
    else:
        with pytest.raises(UnsupportedTowerError, match=r"MMA adds adapters .*block 0 .*does not begin with a norm"):
            build_method(adapters, backbone, ["cat", "dog"])


def test_trunks_without_stages() -> None:
    for name, kind in (("relative positions", "VisionTransformerRelPos"), ("convolutions", "EfficientNet")):
        tower = family(name).image
        with pytest.raises(UnsupportedTowerError, match=f"its image tower is timm's {kind}, not a plain vision"):
            tower.require_promptable("MaPLe")
        with torch.no_grad():
            assert torch.equal(encode_image(tower, images(), ()), family(name).model.encode_image(images()))


def test_families_are_what_they_are_called() -> None:
    """The numbers of rows before the patches, and what pools."""
    facts = {
        name: (t.first_patch, t.pools_class_token, t.pools_by_attention)
        for name in [*FAMILIES, *OTHERS]
        if (t := family(name).image).obstacle is None
    }
    assert facts["SigLIP"] == (0, False, True)
    assert facts["EVA-02"] == (1, True, False)
    assert facts["Perception Encoder"] == (1, False, True)
    assert facts["registers"] == (5, True, False)
    assert facts["EVA, gap"] == (1, False, False)
    assert facts["CoCa"] == (1, False, True)
