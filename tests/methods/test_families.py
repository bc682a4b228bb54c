"""The main promises of every method on every family of towers; what a tower does not permit is refused at once."""

from pathlib import Path

import pytest
import torch
from test_contract import logits_of, same, train_step, values
from tower_families import FAMILIES, family, images
from variants import LEARNING, NAMES, VARIANTS, make

from maple.checkpoint import load_prompts, save_prompts
from maple.clip import Backbone
from maple.errors import UnsupportedTowerError
from maple.methods import Method

ONE_OF_EACH = list({settings["name"]: variant for variant, settings in reversed(VARIANTS.items())}.values())


def made_or_refused(variant: str, backbone: Backbone) -> Method | str:
    try:
        return make(variant, backbone)
    except UnsupportedTowerError as error:
        return str(error)


@pytest.mark.parametrize("family_name", [name for name in FAMILIES if name != "CLIP"])
@pytest.mark.parametrize("variant", ONE_OF_EACH)
def test_promises(variant: str, family_name: str, tmp_path: Path) -> None:
    backbone, pixels = family(family_name), images(6)
    image, changes_images = backbone.image, not make(variant, family("CLIP")).accepts_features
    method = made_or_refused(variant, backbone)
    if isinstance(method, str):
        lacks_stages = image.obstacle is not None and image.obstacle in method
        assert lacks_stages or (image.pools_by_attention and "single tokens have no features" in method)
        assert changes_images
        return
    assert image.obstacle is None or not changes_images
    frozen = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    before, untrained = values(method), logits_of(method, pixels)
    assert untrained.shape == (6, 3)
    assert untrained.isfinite().all()
    torch.testing.assert_close(untrained[2:3], logits_of(method, pixels[2:3]), rtol=1e-4, atol=1e-4)
    if variant in LEARNING:
        train_step(method, pixels)
        assert all(not torch.equal(before[name], value) for name, value in values(method).items())
        assert not torch.equal(logits_of(method, pixels), untrained)
    assert all(weight.grad is None for weight in backbone.model.parameters())
    assert same(frozen, backbone.model.state_dict())
    save_prompts(tmp_path / "prompts.safetensors", method)
    loaded = load_prompts(tmp_path / "prompts.safetensors", backbone)
    assert torch.equal(logits_of(loaded, pixels), logits_of(method, pixels))
    if method.supports_new_classes:
        loaded.set_class_names(["owl", "submarine", NAMES[0], "tea"])
        assert loaded.predict_logits(pixels).isfinite().all()
        torch.testing.assert_close(loaded.predict_logits(pixels)[:, 2], logits_of(method, pixels)[:, 0])
