"""What every method promises, asked of every method and variant; and what is said of some of them alone."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from variants import HEADS, LEARNING, NAMES, VARIANTS, WORDS_ONLY, make

from maple.clip import Backbone
from maple.errors import ClassNamesError, ConfigError, UnlearnedClassesError
from maple.methods import method_settings
from maple.testing import METHOD_CHECKS, MethodCase, check_loss_falls, equal_values, logits_of, values_of

every = pytest.mark.parametrize("variant", VARIANTS)


# A random CLIP of other packages' tests may be harder to move than this one.
_CHECKS = [partial(each, most=0.9) if each is check_loss_falls else each for each in METHOD_CHECKS]


@every
@pytest.mark.parametrize("check", _CHECKS, ids=[each.__name__.removeprefix("check_") for each in METHOD_CHECKS])
def test_promises(check, variant: str, backbone: Backbone, images: Tensor, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    check(MethodCase(partial(make, variant, backbone), images, tmp_path))


@every
def test_what_is_learned(variant: str, backbone: Backbone) -> None:
    first, other = make(variant, backbone), make(variant, backbone, seed=2)
    assert bool(first.prompt_parameters()) == (variant in LEARNING)
    assert equal_values(values_of(first), values_of(other)) == (variant in WORDS_ONLY)


@every
def test_refusals_name_the_class(variant: str, backbone: Backbone) -> None:
    method = make(variant, backbone)
    if not method.supports_new_classes:
        with pytest.raises(UnlearnedClassesError, match=r"learned for 3 classes, and 'owl' is not one of them; use"):
            method.set_class_names(["owl", "submarine"])
    with pytest.raises(ClassNamesError, match=r"very very.* needs \d+ tokens, but this CLIP reads at most 77; shorten"):
        make(variant, backbone, ["cat", "very " * 80 + "long"])


@every
def test_equal_names_have_equal_logits(variant: str, backbone: Backbone, images: Tensor) -> None:
    logits = logits_of(make(variant, backbone, ["crane", "cat", "crane"]), images)
    each_learns_its_own = variant in ("coop-class_specific", "promptsrc-class_specific") or variant in HEADS
    assert torch.allclose(logits[:, 0], logits[:, 2], atol=1e-5) != each_learns_its_own


@every
def test_names_of_per_class_methods_may_be_spelled_otherwise(variant: str, backbone: Backbone, images: Tensor) -> None:
    method = make(variant, backbone)
    if not method.supports_new_classes:
        method.set_class_names(["fire_truck", "cat"])
        expected = logits_of(method, images)
        method.set_class_names(["Fire truck", "Cat"])
        torch.testing.assert_close(logits_of(method, images), expected)


def test_cocoop_has_no_class_embeddings(backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="depend on the image; use encode_classes_for"):
        make("cocoop", backbone).class_embeddings()


@pytest.mark.parametrize("variant", [name for name in LEARNING if "cocoop" not in name])
def test_class_embeddings_are_computed_once(
    variant: str, backbone: Backbone, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = make(variant, backbone)
    calls = []
    plain = method.encode_classes
    monkeypatch.setattr(method, "encode_classes", lambda: (calls.append(1), plain())[1])
    for _ in range(2):
        method.class_embeddings()
        method.predict_logits(images)
    assert len(calls) == 1


@every
def test_settings_say_whether_new_classes_are_supported(variant: str, backbone: Backbone) -> None:
    _, settings = method_settings(VARIANTS[variant])
    method = make(variant, backbone)
    assert settings.supports_new_classes == method.supports_new_classes
    assert method.class_names == NAMES
