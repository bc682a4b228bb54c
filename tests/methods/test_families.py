"""The main promises of every method on every family of towers; what a tower does not permit is refused at once."""

from pathlib import Path

import pytest
import torch
from tower_families import FAMILIES, family, images
from variants import LEARNING, NAMES, VARIANTS, make

from maple.clip import Backbone
from maple.errors import UnsupportedTowerError
from maple.methods import Method
from maple.testing import logits_of, trained_and_loaded

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
    untrained = logits_of(method, pixels)
    assert untrained.shape == (6, 3)
    torch.testing.assert_close(untrained[2:3], logits_of(method, pixels[2:3]), rtol=1e-4, atol=1e-4)
    loaded = trained_and_loaded(method, pixels, tmp_path, learns=variant in LEARNING)
    if method.supports_new_classes:
        loaded.set_class_names(["owl", "submarine", NAMES[0], "tea"])
        assert loaded.predict_logits(pixels).isfinite().all()
        torch.testing.assert_close(loaded.predict_logits(pixels)[:, 2], logits_of(method, pixels)[:, 0])
