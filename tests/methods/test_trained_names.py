"""Methods that answer trained names by one rule and others by another: the rule is that of each name."""

import pytest
import torch
from variants import make

from maple.clip import Backbone
from maple.methods.mmrl import MMRL


@pytest.mark.parametrize("variant", ["mmrl", "mmrlpp"])
def test_a_list_with_both_kinds_of_names(variant: str, backbone: Backbone) -> None:
    method = make(variant, backbone, ["cat", "dog"])
    assert isinstance(method, MMRL)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    class_token, representation = method.encode_images(images).chunk(2, dim=1)
    alpha = method.settings.alpha
    mixed = method.with_class_names(["a tree", "dog", "Cat", "river"])
    text = mixed.text_features()
    mixture = alpha * class_token + (1 - alpha) * representation
    expected = 100 * torch.stack(
        [class_token @ text[0], mixture @ text[1], mixture @ text[2], class_token @ text[3]], dim=1
    )
    torch.testing.assert_close(mixed(images), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(mixed.predict_logits(images), expected, rtol=1e-5, atol=1e-4)
    only_new = method.with_class_names(["a tree", "river"])
    torch.testing.assert_close(only_new(images), expected[:, [0, 3]], rtol=1e-5, atol=1e-4)
    assert method.class_names == ("cat", "dog"), "the method itself keeps its names"
