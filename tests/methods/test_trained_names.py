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


@pytest.mark.parametrize(
    ("variant", "counted"),
    [
        ("mmrl", {"mixed": 0, "trained": 0}),  # as published: another list is new, whatever its names are
        ("dept", {"mixed": 0, "trained": 2}),
        ("two_stage", {"mixed": 1, "trained": 2}),
    ],
)
def test_the_list_of_another_data_set(variant: str, counted: dict[str, int], backbone: Backbone) -> None:
    method = make(variant, backbone, ["cat", "dog"])
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 32, 32, generator=generator)
    with torch.no_grad():
        for parameter in method.prompt_parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    lists = {"mixed": ["a tree", "dog"], "trained": ["dog", "cat"]}
    for kind, names in lists.items():
        target = method.with_class_names(names)
        before = target.predict_logits(images)  # its class embeddings are cached
        target.set_target_class_names(names)
        assert len(target.trained) == counted[kind]
        new = method.with_class_names(names)
        new.set_trained_names(["a name that is not among them"])
        new.set_class_names(names)
        if counted[kind] == 0:
            torch.testing.assert_close(target.predict_logits(images), new.predict_logits(images))
        else:
            torch.testing.assert_close(target.predict_logits(images), before)
        target.set_class_names(names)
        torch.testing.assert_close(target.predict_logits(images), before)
        assert not torch.allclose(new.predict_logits(images), before, atol=1e-3), "or the rules could not be told apart"
