"""DePT: the base methods it takes, and which names get its head."""

from typing import Any

import pytest
import torch
from torch import Tensor
from variants import HEADS, NAMES, VARIANTS, make

from maple.clip import Backbone
from maple.errors import ConfigError
from maple.methods import build_method, method_settings
from maple.methods.dept import DePT


def dept(variant: str, backbone: Backbone) -> DePT:
    """One that has gone some way from where it starts, where FiLM does nothing."""
    method = make(variant, backbone)
    assert isinstance(method, DePT)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in method.prompt_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return method


def fused(method: DePT, images: Tensor) -> Tensor:
    """The rule as published: the weighted sum of the base method's logits and of the head's."""
    weight, raw = method.settings.head_weight, method.image_features_raw(images)
    if method.settings.film:
        film: Any = method.film_image
        raw = raw * film["scale"] + film["bias"]
    logits: Tensor = (1 - weight) * method.prompts(images) + weight * method.head(raw)
    return logits


@pytest.mark.parametrize("variant", sorted(HEADS))
def test_trained_names_get_the_head_and_others_the_similarity(variant: str, backbone: Backbone, images: Tensor) -> None:
    method = dept(variant, backbone)
    with torch.no_grad():
        expected = fused(method, images)
        torch.testing.assert_close(method(images), expected, rtol=1e-5, atol=1e-5)
        names = ["owl", NAMES[2].upper(), NAMES[0], "river"]
        mixed, similarity = method.with_class_names(names), method.prompts.with_class_names(names)
        logits = mixed(images)
        torch.testing.assert_close(logits[:, [1, 2]], expected[:, [2, 0]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits[:, [0, 3]], similarity(images)[:, [0, 3]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mixed.predict_logits(images), logits, rtol=1e-5, atol=1e-5)


def test_without_fusion_predictions_are_those_of_the_base_method(backbone: Backbone, images: Tensor) -> None:
    method = dept("dept-promptsrc", backbone)
    torch.testing.assert_close(method.predict_logits(images), method.prompts.predict_logits(images))


def test_settings_are_those_of_the_base_method_and_its_own() -> None:
    _, settings = method_settings({"name": "dept", "base_method": "maple", "prompt_depth": 3})
    values = settings.model_dump()
    assert (values["prompt_depth"], values["prompt_length"], values["head_weight"]) == (3, 2, 0.7)
    assert method_settings({"name": "dept", **values})[1] == settings
    assert settings.depth_limits == {"prompt_depth": ("text", "image")}
    _, settings = method_settings({"name": "dept", "base_method": "kgcoop"})
    assert settings.model_dump()["text_loss_weight"] == 2.0
    assert settings.base["weight"] == 2.0  # type: ignore[attr-defined]
    template = "a centered satellite photo of {}."
    _, settings = method_settings({"name": "dept", "base_method": "kgcoop", "dataset_template": template})
    assert settings.model_dump()["teacher_template"] == template
    assert "dataset_template" not in settings.model_dump()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"prompt_lenght": 4}, "unknown setting .*prompt_lenght"),
        ({"base_method": "dept"}, "is this method itself"),
        ({"base_method": "cop"}, "unknown base method 'cop'"),
        ({"base_method": ["coop"]}, "unknown base method"),
        ({"base_method": "coop", "prompt_length": 0}, "prompt_length = 0: "),
        ({"base_method": "kgcoop", "weight": 8.0}, "weight of kgcoop is called text_loss_weight here"),
        ({"head_weight": 1.5}, "head_weight = 1.5"),
        ({"head_lr_factor": True}, "must be a number"),
    ],
)
def test_refused_settings(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        method_settings({"name": "dept", **settings})


@pytest.mark.parametrize("base", ["zero_shot", "prograd", "taskres", "clip_adapter", "mmrl", "linear_probe", "mmapp"])
def test_refused_base_methods(base: str, backbone: Backbone) -> None:
    description = {key: value for key, value in VARIANTS[base].items() if key != "name"}
    with pytest.raises(ConfigError, match=r"DePT cannot train the prompts of .* such as coop, cocoop, kgcoop"):
        build_method({"name": "dept", "base_method": base, **description}, backbone, NAMES)
