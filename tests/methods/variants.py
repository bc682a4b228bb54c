"""Every method, with the variants of its papers, at sizes that fit the small CLIP of the tests."""

from collections.abc import Sequence
from typing import Any

import torch

from maple.clip import Backbone
from maple.methods import METHODS, Method, build_method

NAMES = ("cat", "dog", "fire_truck")
_TWO_TEMPLATES = {"name": "promptsrc", "teacher_templates": ["a photo of a {}.", "a sketch of the {}!"]}

VARIANTS: dict[str, dict[str, Any]] = {
    "zero_shot": {"name": "zero_shot"},
    "zero_shot-ensemble": {"name": "zero_shot", "templates": ["a photo of a {}.", "a sketch of the {}!"]},
    "coop": {"name": "coop", "prompt_length": 4},
    "coop-words": {"name": "coop", "prompt_length": 4, "init_text": "a photo of a"},
    "coop-class_specific": {"name": "coop", "prompt_length": 3, "class_specific": True},
    "coop-class_specific-words": {
        "name": "coop",
        "prompt_length": 2,
        "class_specific": True,
        "init_text": "a photo of a",
    },
    "coop-middle": {"name": "coop", "prompt_length": 5, "class_token_position": "middle"},
    "coop-front": {"name": "coop", "prompt_length": 3, "class_token_position": "front"},
    "cocoop": {"name": "cocoop", "meta_net_reduction": 4},
    "cocoop-heavier": {"name": "cocoop", "meta_net_reduction": 2, "meta_net_layers": 4},
    "deep_language": {"name": "deep_language", "prompt_length": 4, "prompt_depth": 3},
    "vpt": {"name": "vpt", "vision_prompt_length": 3, "vision_prompt_depth": 4},
    "independent_vl": {
        "name": "independent_vl",
        "text_prompt_length": 2,
        "vision_prompt_length": 3,
        "text_prompt_depth": 2,
        "vision_prompt_depth": 4,
    },
    "independent_vl-language_only": {
        "name": "independent_vl",
        "text_prompt_depth": 3,
        "vision_prompt_length": 0,
        "vision_prompt_depth": 0,
    },
    "independent_vl-vision_only": {
        "name": "independent_vl",
        "text_prompt_length": 0,
        "text_prompt_depth": 0,
        "vision_prompt_depth": 3,
    },
    "independent_vl-one_set": {
        "name": "independent_vl",
        "text_prompt_depth": 3,
        "vision_prompt_depth": 4,
        "prompt_sharing": "unified",
    },
    "maple": {"name": "maple", "prompt_depth": 3},
    "maple-one_set": {"name": "maple", "prompt_depth": 3, "prompt_sharing": "unified"},
    "maple-reversed-one_set": {
        "name": "maple",
        "prompt_depth": 3,
        "coupling_direction": "vision_to_text",
        "prompt_sharing": "unified",
    },
    "maple-shallow": {"name": "maple", "prompt_depth": 1},
    "maple-unified": {"name": "maple", "prompt_depth": 3, "coupling_sharing": "unified"},
    "maple-reversed": {"name": "maple", "prompt_depth": 3, "coupling_direction": "vision_to_text"},
    "maple-reversed-unified": {
        "name": "maple",
        "prompt_depth": 2,
        "coupling_direction": "vision_to_text",
        "coupling_sharing": "unified",
    },
    "maple-deep_words": {"name": "maple", "prompt_depth": 3, "deep_init": "words"},
    "maple-random": {"name": "maple", "prompt_depth": 2, "init_text": ""},
    "maple-long": {"name": "maple", "prompt_depth": 2, "prompt_length": 6},
    "kgcoop": {"name": "kgcoop"},
    "kgcoop-random": {"name": "kgcoop", "prompt_length": 5, "init_text": "", "weight": 2.0},
    "prograd": {"name": "prograd", "prompt_length": 6},
    "prograd-words": {"name": "prograd", "prompt_length": 4, "temperature": 2.0, "strength": 0.5},
    "promptsrc": {"name": "promptsrc", "text_prompt_depth": 3, "vision_prompt_depth": 4},
    # "promptsrc" above has all sixty sentences of the teacher.
    "promptsrc-maple": {**_TWO_TEMPLATES, "prompts": {"name": "maple", "prompt_depth": 3}},
    "promptsrc-class_specific": {**_TWO_TEMPLATES, "prompts": {"name": "coop", "class_specific": True}},
    "promptsrc-vpt": {**_TWO_TEMPLATES, "prompts": {"name": "vpt", "vision_prompt_depth": 4}},
    "dept": {"name": "dept", "prompt_length": 4},
    "dept-maple": {"name": "dept", "base_method": "maple", "prompt_depth": 3, "head_weight": 0.5},
    "dept-kgcoop": {"name": "dept", "base_method": "kgcoop", "film": False},
    "dept-cocoop": {"name": "dept", "base_method": "cocoop", "meta_net_reduction": 4},
    "dept-vpt": {"name": "dept", "base_method": "vpt", "vision_prompt_depth": 4},
    "dept-promptsrc": {
        "name": "dept",
        "base_method": "promptsrc",
        "text_prompt_depth": 3,
        "vision_prompt_depth": 4,
        "teacher_templates": ["a photo of a {}."],
        "test_time_fusion": False,
    },
    "tcp": {"name": "tcp", "class_prompt_layer": 2},
    "tcp-words": {
        "name": "tcp",
        "class_prompt_layer": 1,
        "template": "a photo of a {}, a type of pet.",
        "init_text": "a photo of a",
    },
    "clip_lora": {"name": "clip_lora", "dropout": 0.0},
    "clip_lora-dropout": {"name": "clip_lora", "text_layers": [0, 2], "matrices": ["q", "v", "o"], "dropout": 0.25},
    "clip_lora-text": {"name": "clip_lora", "encoder": "text", "dropout": 0.0},
    "clip_lora-vision": {"name": "clip_lora", "encoder": "vision", "vision_layers": [1, 3], "dropout": 0.0},
    "two_stage": {"name": "two_stage", "vision_start": 2},
    "two_stage-text": {"name": "two_stage", "sides": "text", "text_start": 1, "fraction": 0.5},
    "two_stage-lora": {"name": "two_stage", "tuned": "lora", "sides": "vision", "dropout": 0.0},
    "two_stage-dropout": {"name": "two_stage", "tuned": "lora", "matrices": ["q", "o"], "text_start": 2},
    "mma": {"name": "mma", "adapter_start": 2, "adapter_end": 3, "adapter_width": 8, "adapter_scale": 0.1},
    "mma-input": {"name": "mma", "adapter_start": 0, "adapter_end": 1, "adapter_width": 8, "adapter_scale": 0.05},
    "mmapp": {
        "name": "mmapp",
        "adapter_start": 2,
        "adapter_end": 3,
        "adapter_width": 8,
        "adapter_train_scale": 0.1,
        "adapter_test_scale": 0.1,
        "templates": ["a photo of a {}.", "a sketch of the {}!"],
    },
    "mmrl": {"name": "mmrl", "layers": [2, 3], "tokens": 2, "token_width": 16},
    "mmrlpp": {"name": "mmrlpp", "layers": [1, 3], "tokens": 2, "token_width": 16, "rank": 2, "projection_rank": 4},
    "linear_probe": {"name": "linear_probe"},
    "clip_adapter": {"name": "clip_adapter", "ratio": 0.5},
    "tip_adapter": {"name": "tip_adapter", "alpha": 2.0},
    "tip_adapter-f": {"name": "tip_adapter", "learn_keys": True, "alpha": 10.0, "beta": 1.0},
    "clap": {"name": "clap"},
    "clap-none": {"name": "clap", "constraint": "none"},
    "taskres": {"name": "taskres", "templates": ["a photo of a {}.", "a sketch of the {}!"]},
}

# A method without a variant of its own is asked with its defaults; the small CLIP has 3 text blocks and 4 image blocks.
_ASKED = {one["name"] for one in VARIANTS.values()}
VARIANTS |= {name: {"name": name} for name in METHODS if name not in _ASKED}

LEARNING = [name for name in VARIANTS if name != "tip_adapter" and not name.startswith("zero_shot")]
# These predict trained names with a head that starts at random.
HEADS = {"dept", "dept-maple", "dept-kgcoop", "dept-cocoop", "dept-vpt"}
# These draw nothing at random, or not before `fit_features`.
WORDS_ONLY = {
    *("zero_shot", "zero_shot-ensemble", "coop-words", "coop-class_specific-words"),
    *("kgcoop", "prograd", "prograd-words"),
    *("linear_probe", "tip_adapter", "tip_adapter-f", "taskres", "clap", "clap-none", "gda", "lpplusplus"),
    *("two_stage", "two_stage-text"),
}


def make(variant: str, backbone: Backbone, names: Sequence[str] = NAMES, seed: int = 1) -> Method:
    return build_method(VARIANTS[variant], backbone, names, generator=torch.Generator().manual_seed(seed))
