"""Heat maps: exact where an answer is known, and about what they claim to be about."""

import pytest
import torch
from torch import Tensor
from tower_families import double_family, family
from tower_families import images as tower_images
from variants import NAMES, VARIANTS, make

from maple.clip import Backbone
from maple.errors import ConfigError, UnsupportedTowerError
from maple.explain import relevance
from maple.explain.relevance import attended_features, explained_logits
from maple.methods import build_method
from maple.prompts import encode_image, encode_image_with_attention, to_float32


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_explains_what_the_method_says(variant: str, backbone: Backbone, images: Tensor) -> None:
    """The path that gradients take gives the method's own logits, for every method."""
    method = make(variant, backbone)
    features, seen = attended_features(method, images, method.vision_edits())
    torch.testing.assert_close(explained_logits(method, features), method.predict_logits(images), rtol=1e-4, atol=1e-4)
    assert len(seen) == backbone.image.depth
    torch.testing.assert_close(seen[0].sum(dim=-1), torch.ones_like(seen[0][..., 0]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_are_of_patches_and_touch_nothing(variant: str, backbone: Backbone, images: Tensor) -> None:
    method = make(variant, backbone)
    maps = relevance(method, images, torch.tensor([0, 1, 2, 0, 1, 2]))
    assert maps.shape == (6, 2, 2)
    assert maps.isfinite().all()
    assert maps.min() >= 0
    assert maps.sum() > 0
    assert all(parameter.grad is None for parameter in method.parameters())
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


def test_a_naive_rollout_agrees(backbone: Backbone, images: Tensor) -> None:
    """The rule of the paper, written out token by token for a tower with prompts in two layers."""
    method = build_method({"name": "vpt", "vision_prompt_length": 3, "vision_prompt_depth": 2}, backbone, NAMES)
    image = images[:1].clone().requires_grad_()
    raw, seen = encode_image_with_attention(backbone.image, image, method.vision_edits())
    logits = method.logits(method.encode_images(to_float32(raw)), method.encode_classes())[0]
    gradients = torch.autograd.grad(logits[1] - (logits[0] + logits[2]) / 2, seen)
    patches, prompts = 4, 3
    rows = [[float(row == column) for column in range(1 + patches)] for row in range(1 + patches + prompts)]
    for layer, (attention, slope) in enumerate(zip(seen, gradients, strict=True)):
        if layer < 2:
            rows[1 + patches :] = [[0.0] * (1 + patches) for _ in range(prompts)]
        weights = (attention * slope)[0].clamp(min=0).mean(dim=0).tolist()
        rows = [
            [
                rows[row][column] + sum(weight * rows[other][column] for other, weight in enumerate(weights[row]))
                for column in range(1 + patches)
            ]
            for row in range(len(rows))
        ]
    torch.testing.assert_close(relevance(method, images[:1], torch.tensor([1])).flatten(), torch.tensor(rows[0][1:]))


def test_batches_change_nothing(backbone: Backbone, images: Tensor) -> None:
    method = make("maple", backbone)
    classes = torch.tensor([0, 1, 2, 0, 1, 2])
    together = relevance(method, images, classes)
    alone = torch.cat([relevance(method, images[i : i + 1], classes[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-6)


def test_another_class_has_another_map(backbone: Backbone, images: Tensor) -> None:
    method = make("maple", backbone)
    one, other = (relevance(method, images, torch.full((6,), index)) for index in (0, 1))
    assert not torch.allclose(one, other, rtol=1e-2)


@pytest.mark.parametrize("variant", ["cocoop", "maple", "tip_adapter", "linear_probe"])
def test_it_works_without_gradients_around(variant: str, backbone: Backbone, images: Tensor) -> None:
    method = make(variant, backbone)
    with torch.inference_mode():
        method.predict_logits(images)
    expected = relevance(method, images[:1], torch.tensor([0]))
    with torch.no_grad():
        torch.testing.assert_close(relevance(method, images[:1], torch.tensor([0])), expected)
    with torch.inference_mode():
        torch.testing.assert_close(relevance(method, images[:1].clone(), torch.tensor([0])), expected)


def test_one_class_alone(backbone: Backbone, images: Tensor) -> None:
    method = make("maple", backbone, ["cat"])
    assert relevance(method, images, torch.zeros(6, dtype=torch.int64)).isfinite().all()


def test_plain_clip_is_unchanged(backbone: Backbone, images: Tensor) -> None:
    raw, _ = encode_image_with_attention(backbone.image, images, [])
    torch.testing.assert_close(raw, encode_image(backbone.image, images, []), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [[0], [0, 1, 2, 0, 1, 3], [0, 1, 2, 0, 1, -1]])
def test_classes_that_do_not_exist(classes: list[int], backbone: Backbone, images: Tensor) -> None:
    with pytest.raises(ConfigError, match="one index for each image, 0 to 2"):
        relevance(make("maple", backbone), images, torch.tensor(classes))


def test_resnets_have_no_attention_to_read(resnet_backbone: Backbone, images: Tensor) -> None:
    with pytest.raises(UnsupportedTowerError, match="heat maps need a CLIP with a vision transformer"):
        relevance(make("coop", resnet_backbone), images, torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize("name", ["SigLIP", "Perception Encoder", "EVA, gap", "CoCa"])
def test_towers_that_pool_several_rows(name: str) -> None:
    """The rule written out: rows count by what they contribute to the score, by moving each towards the mean row."""
    backbone, pixels = family(name), tower_images(1)
    tower = backbone.image
    method = build_method({"name": "vpt", "vision_prompt_length": 3, "vision_prompt_depth": 2}, backbone, NAMES)
    states: list[Tensor] = []
    leaf = pixels.clone().requires_grad_()
    raw, seen = encode_image_with_attention(tower, leaf, method.vision_edits(), None, states)
    final = states[0].double()

    def score(features: Tensor) -> Tensor:
        unit = method.encode_images(to_float32(features))
        logits = method.logits(unit, method.class_embeddings().to(unit.dtype))[0]
        return logits[1] - (logits[0] + logits[2]) / 2

    gradients = torch.autograd.grad(score(raw), seen)
    rows = final.shape[1]
    relevant = torch.cat([torch.eye(rows), torch.zeros(3, rows)])
    for layer, (attention, slope) in enumerate(zip(seen, gradients, strict=True)):
        if layer < 2:
            relevant[rows:] = 0
        relevant = relevant + (attention * slope)[0].clamp(min=0).mean(dim=0).detach() @ relevant
    contributed, step = [], 1e-3
    with torch.no_grad():
        for row in range(rows):
            less, more, away = final.clone(), final.clone(), final[:, row] - final.mean(dim=1)
            less[:, row] -= step * away
            more[:, row] += step * away
            exact = double_family(name).image
            contributed.append((score(exact.finish(more)) - score(exact.finish(less))) / (2 * step))
    expected = torch.stack(contributed).clamp(min=0).float() @ relevant[:rows, tower.first_patch :]
    found = relevance(method, pixels, torch.tensor([1])).flatten()
    torch.testing.assert_close(found / found.sum(), expected / expected.sum(), rtol=1e-3, atol=1e-4)
    assert float(found.max() / found.min().clamp(min=1e-9)) > 1.05, "not the same everywhere"


def test_a_class_token_with_rotary_positions_and_registers() -> None:
    for name in ("EVA-02", "registers"):
        method = build_method({"name": "maple", "prompt_depth": 3}, family(name), NAMES)
        maps = relevance(method, tower_images(), torch.tensor([0, 1, 2]))
        assert maps.shape == (3, 4, 4)
        assert float(maps.amax(dim=(1, 2)).min()) > 0
