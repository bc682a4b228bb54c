"""Settings that cannot be meant: each is refused, and the message says what is allowed."""

from typing import Any

import pytest
import torch
from torch import Tensor
from variants import NAMES, VARIANTS

from maple.clip import Backbone
from maple.errors import ClassNamesError, ConfigError, UnsupportedTowerError
from maple.methods import METHODS, build_method, method_settings

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"name": "mapel"}, r"unknown method 'mapel'; choose one of: zero_shot, coop, "),
    ({"name": ["maple"]}, r"unknown method \['maple'\]; choose one of: zero_shot, "),
    (
        {"name": "tip_adapter", "search_steps": [0, 20]},
        r"search_steps.0 = 0: input should be greater than or equal to 1",
    ),
    ({"name": "tip_adapter", "search_scale": [7, 0.1]}, r"search_scale.1 = 0.1: input should be greater than 0.1"),
    ({}, r"unknown method None; choose one of: zero_shot, "),
    ({"name": "maple", "prompt_depth": 4}, r"prompt_depth=4, but the text tower has 3 blocks; choose 1 to 3"),
    ({"name": "maple", "prompt_depth": 0}, r"prompt_depth = 0: input should be greater than or equal to 1"),
    ({"name": "maple", "prompt_length": 0}, r"prompt_length = 0: input should be greater than or equal to 1"),
    ({"name": "maple", "coupling_sharing": "shared"}, r"coupling_sharing = 'shared': .*'per_layer' or 'unified'"),
    ({"name": "maple", "coupling_direction": "both"}, r"'both': .*'text_to_vision' or 'vision_to_text'"),
    ({"name": "maple", "prompt_lenght": 2}, r"unknown setting '.*prompt_lenght'; choose one of: prompt_length, "),
    ({"name": "maple", "prompt_depth": 3, "init_text": "photo"}, r"'photo' has 1 tokens, fewer than prompt_length=2"),
    ({"name": "maple", "deep_init": "words", "init_text": ""}, r"deep_init='words' has no effect: init_text is empty"),
    ({"name": "maple", "deep_init": "words", "prompt_length": 5}, r"no effect: .*prompt_length=5 .*choose 1 to 4"),
    (
        {"name": "maple", "deep_init": "words", "coupling_direction": "vision_to_text"},
        r"no effect: coupling_direction='vision_to_text'",
    ),
    ({"name": "deep_language", "prompt_depth": 4}, r"text prompt depth=4, but the text tower has 3 .* 1 to 3"),
    ({"name": "deep_language", "prompt_depth": 0}, r"prompt_depth = 0: input should be greater"),
    ({"name": "vpt", "vision_prompt_depth": 5}, r"vision prompt depth=5, but the image tower has 4 .* 1 to 4"),
    ({"name": "vpt", "vision_prompt_length": 0}, r"vision_prompt_length = 0: input should be greater"),
    ({"name": "vpt", "vision_prompt_depth": 4, "template": "a photo"}, r"'a photo' must have exactly one \{\}"),
    ({"name": "independent_vl", "vision_prompt_depth": 4}, r"text prompt depth=12, but the text tower has 3"),
    ({"name": "independent_vl", "text_prompt_depth": 3}, r"vision prompt depth=12, but the image tower has 4"),
    ({"name": "independent_vl", "text_prompt_depth": 0}, r"text_prompt_length=2 with text_prompt_depth=0: set both"),
    ({"name": "independent_vl", "text_prompt_depth": 2, "vision_prompt_length": 0}, r"vision_prompt_length=0 with"),
    (
        {
            "name": "independent_vl",
            "text_prompt_depth": 0,
            "text_prompt_length": 0,
            "vision_prompt_depth": 0,
            "vision_prompt_length": 0,
        },
        r"needs prompts in one tower at least; else use zero_shot",
    ),
    ({"name": "independent_vl", "text_prompt_depth": -1}, r"text_prompt_depth = -1: input should be greater"),
    ({"name": "coop", "prompt_length": 0}, r"prompt_length = 0: input should be greater"),
    ({"name": "coop", "prompt_length": 5, "init_text": "a photo of a"}, r"has 4 tokens, fewer than prompt_length=5"),
    ({"name": "coop", "class_token_position": "back"}, r"'back': .*'end', 'middle' or 'front'"),
    (
        {"name": "coop", "prompt_length": 2, "init_text": "a photo of a", "class_token_position": "middle"},
        r"with the class name in the middle all of them must be learned: set prompt_length=4",
    ),
    ({"name": "coop", "prompt_length": "many"}, r"prompt_length = 'many': input should be a valid integer"),
    ({"name": "cocoop", "meta_net_reduction": 64}, r"=64 is larger than the 32 dimensions .* choose 1 to 32"),
    ({"name": "cocoop", "meta_net_reduction": 0}, r"meta_net_reduction = 0: input should be greater"),
    ({"name": "zero_shot", "templates": []}, r"templates is empty; give at least one sentence"),
    ({"name": "zero_shot", "templates": ["a {} and a {}."]}, r"must have exactly one \{\}"),
    ({"name": "coop", "init_text": "a photo of a {}."}, r"init_text .* has \{\}; leave it out"),
    ({"name": "maple", "prompt_depth": 2, "init_text": "a photo of a {}."}, r"init_text .* has \{\}; leave it out"),
    ({"name": "kgcoop", "weight": -1}, r"weight = -1: input should be greater"),
    ({"name": "kgcoop", "teacher_template": "a photo"}, r"'a photo' must have exactly one \{\}"),
    (
        {"name": "prograd", "teacher_template": "a {}, a pet."},
        r"'a \{\}, a pet.' must be words followed by",
    ),
    ({"name": "prograd", "teacher_template": " {}."}, r"must be words followed by the class name"),
    ({"name": "prograd", "prompt_length": 3}, r"has 4 words .* more than prompt_length=3; set prompt_length=4"),
    ({"name": "prograd", "temperature": 0}, r"temperature = 0: input should be greater than 0"),
    ({"name": "promptsrc"}, r"text prompt depth=9, but the text tower has 3"),
    ({"name": "promptsrc", "gpa_std": 0}, r"gpa_std = 0: input should be greater than 0"),
    (
        {"name": "promptsrc", "text_prompt_depth": 3, "prompts": {"name": "maple", "prompt_depth": 3}},
        r"text_prompt_depth would be ignored, since prompts = .*'maple'",
    ),
    ({"name": "promptsrc", "prompts": {"name": "mapel"}}, r"unknown method 'mapel'"),
    ({"name": "promptsrc", "prompts": {"name": "maple", "lenght": 2}}, r"unknown setting '.*lenght'"),
    (
        {"name": "promptsrc", "prompts": {"name": "cocoop", "meta_net_reduction": 4}},
        r"cannot train the prompts of CoCoOp",
    ),
    ({"name": "promptsrc", "prompts": {"name": "kgcoop"}}, r"cannot train the prompts of KgCoOp"),
    ({"name": "promptsrc", "prompts": {"name": "zero_shot"}}, r"cannot train the prompts of zero-shot CLIP"),
    (
        {"name": "promptsrc", "prompts": {"name": "tip_adapter", "learn_keys": True}},
        r"cannot train the prompts of Tip-",
    ),
    ({"name": "linear_probe", "inverse_regularisation": 0}, r"inverse_regularisation = 0: input should be greater"),
    (
        {"name": "clip_adapter", "reduction": 33},
        r"reduction=33 is larger than the 32 dimensions .* choose 1 to 32",
    ),
    ({"name": "clip_adapter", "ratio": 0}, r"ratio = 0: input should be greater than 0"),
    ({"name": "clip_adapter", "templates": []}, r"templates is empty"),
    ({"name": "tip_adapter", "beta": -1}, r"beta = -1: input should be greater"),
    ({"name": "taskres", "scale": 0}, r"scale = 0: input should be greater than 0"),
    ({"name": "zero_shot", "prompt_depth": 1}, r"unknown setting '.*prompt_depth'; choose one of: templates"),
]


@pytest.mark.parametrize(("description", "message"), REFUSED)
def test_refused(description: dict[str, Any], message: str, backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match=message):
        build_method(description, backbone, NAMES)


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_setting_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        method_settings({"name": name, "prompt_colour": 1})
    assert "prompt_colour" in str(caught.value)
    assert all(setting in str(caught.value) for setting in METHODS[name].Settings.model_fields)


def test_a_prompt_without_room_for_a_name_is_refused(backbone: Backbone) -> None:
    with pytest.raises(ClassNamesError, match="reads at most 77; shorten the class name, the template, or the prompt"):
        build_method({"name": "coop", "prompt_length": 75}, backbone, NAMES)


def test_class_specific_prompts_accept_their_classes_only(backbone: Backbone) -> None:
    method = build_method(VARIANTS["coop-class_specific"], backbone, NAMES)
    with pytest.raises(
        ClassNamesError, match=r"learned for 3 classes, and 'owl' is not one of .*; .*class_specific=false"
    ):
        method.set_class_names(["cat", "owl"])
    with pytest.raises(ClassNamesError, match="'cat' is not"):
        method.set_class_names(["cat", "cat"])


def test_class_specific_prompts_follow_their_class(backbone: Backbone, images: Tensor) -> None:
    method = build_method(VARIANTS["coop-class_specific"], backbone, ["owl", "cat", "owl"])
    before = method.predict_logits(images)
    method.set_class_names(["cat", "owl", "owl"])
    torch.testing.assert_close(method.predict_logits(images), before[:, [1, 0, 2]])


@pytest.mark.parametrize("variant", ["zero_shot", "zero_shot-ensemble", "coop", "cocoop", "deep_language", "taskres"])
def test_methods_without_vision_prompts_run_on_a_resnet(
    variant: str, resnet_backbone: Backbone, images: Tensor
) -> None:
    method = build_method(VARIANTS[variant], resnet_backbone, NAMES)
    loss, _ = method.loss(images, torch.zeros(6, dtype=torch.int64))
    if method.prompt_parameters():
        loss.backward()
    assert all(bool(value.grad.abs().sum() > 0) for value in method.parameters() if value.grad is not None)
    torch.testing.assert_close(method.predict_logits(images), method(images).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["vpt", "independent_vl", "independent_vl-vision_only", "maple", "maple-reversed"])
def test_a_resnet_does_not_take_image_prompts(variant: str, resnet_backbone: Backbone) -> None:
    with pytest.raises(UnsupportedTowerError, match=r"image tower is a ModifiedResNet.*; use a ViT .*image prompts"):
        build_method(VARIANTS[variant], resnet_backbone, NAMES)
