"""Runs side by side: each comes to what it comes to alone."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from maple.clip import Backbone
from maple.clip.load import backbone_from_state_dict
from maple.config import TrainSettings
from maple.data import Batch
from maple.errors import ConfigError, ImageError, MapleError, TrainingDivergedError
from maple.methods import Method, build_method
from maple.prompts import encode_image, encode_text, together, write_sentences
from maple.prompts import encode as encoding
from maple.train import EpochReport, StepReport, Trainer, run_epochs

NAMES = ["cat", "dog", "owl"]
METHODS: dict[str, dict[str, Any]] = {
    "maple": {"name": "maple", "prompt_depth": 3},
    "maple-reversed": {"name": "maple", "prompt_depth": 2, "coupling_direction": "vision_to_text"},
    "coop": {"name": "coop", "prompt_length": 4},
    "coop-class_specific": {"name": "coop", "prompt_length": 3, "class_specific": True},
    "coop-middle": {"name": "coop", "prompt_length": 5, "class_token_position": "middle"},
    "cocoop": {"name": "cocoop", "meta_net_reduction": 4},
    "deep_language": {"name": "deep_language", "prompt_depth": 3},
    "vpt": {"name": "vpt", "vision_prompt_length": 3, "vision_prompt_depth": 4},
    "independent_vl": {"name": "independent_vl", "text_prompt_depth": 2, "vision_prompt_depth": 4},
    "kgcoop": {"name": "kgcoop"},
    "prograd": {"name": "prograd", "prompt_length": 6},
    "promptsrc": {"name": "promptsrc", "text_prompt_depth": 3, "vision_prompt_depth": 4, "gpa_mean": 2.0},
    "clip_adapter": {"name": "clip_adapter"},
    "tip_adapter-f": {"name": "tip_adapter", "learn_keys": True, "alpha": 1.0, "beta": 1.0},
    "taskres": {"name": "taskres"},
    "linear_probe": {"name": "linear_probe"},
}
every = pytest.mark.parametrize("name", METHODS)
