"""Methods: one file per paper, and a dictionary of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator

from maple.clip import Backbone
from maple.descriptions import MethodDescription
from maple.errors import ConfigError, one_of
from maple.methods.base import Method, MethodSettings
from maple.methods.clap import CLAP
from maple.methods.clip_adapter import CLIPAdapter
from maple.methods.clip_lora import CLIPLoRA
from maple.methods.cocoop import CoCoOp
from maple.methods.coop import CoOp
from maple.methods.dept import DePT
from maple.methods.features import Features
from maple.methods.gda import GDA
from maple.methods.independent_vl import VPT, DeepLanguage, IndependentVL
from maple.methods.kgcoop import KgCoOp
from maple.methods.linear_probe import LinearProbe
from maple.methods.lpplusplus import LPPlusPlus
from maple.methods.maple import MaPLe
from maple.methods.mma import MMA
from maple.methods.mmapp import MMAPlusPlus
from maple.methods.mmrl import MMRL, MMRLPlusPlus
from maple.methods.prograd import ProGrad
from maple.methods.promptsrc import PromptSRC
from maple.methods.taskres import TaskRes
from maple.methods.tcp import TCP
from maple.methods.tip_adapter import TipAdapter
from maple.methods.two_stage import TwoStage
from maple.methods.zero_shot import ZeroShot

ZERO_SHOT = "zero_shot"
"""The method that learns nothing: the frozen CLIP, with which every other is compared."""

METHODS: dict[str, type[Method]] = {
    ZERO_SHOT: ZeroShot,
    "coop": CoOp,
    "cocoop": CoCoOp,
    "deep_language": DeepLanguage,
    "vpt": VPT,
    "independent_vl": IndependentVL,
    "maple": MaPLe,
    "kgcoop": KgCoOp,
    "prograd": ProGrad,
    "promptsrc": PromptSRC,
    "dept": DePT,
    "tcp": TCP,
    "clip_lora": CLIPLoRA,
    "two_stage": TwoStage,
    "mma": MMA,
    "mmapp": MMAPlusPlus,
    "mmrl": MMRL,
    "mmrlpp": MMRLPlusPlus,
    "linear_probe": LinearProbe,
    "clip_adapter": CLIPAdapter,
    "tip_adapter": TipAdapter,
    "taskres": TaskRes,
    "clap": CLAP,
    "lpplusplus": LPPlusPlus,
    "gda": GDA,
}

__all__ = ["METHODS", "Features", "Method", "MethodSettings", "build_method", "describe_methods", "method_settings"]


def describe_methods() -> dict[str, MethodDescription]:
    """How reports present each method: {name: its title, plot style and roles}, in the order of tables.

    Example:
        >>> describe_methods()["coop"].title
        'CoOp'
    """
    return {
        name: MethodDescription(kind.short_title or kind.title, order, kind.plot_style, kind.report_roles)
        for order, (name, kind) in enumerate(METHODS.items())
    }


def method_settings(description: Mapping[str, Any]) -> tuple[str, MethodSettings]:
    """Validate {"name": ..., **settings}: the name, and the method's settings with defaults filled in.

    Raises:
        ConfigError: the method or a setting is unknown, or a value is out of range.

    Example:
        >>> method_settings({"name": "coop", "prompt_length": 4})[1].prompt_length
        4
    """
    values = dict(description)
    name = values.pop("name", None)
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(one_of("method", name, METHODS))
    return name, METHODS[name].Settings(**values)


def build_method(
    description: Mapping[str, Any],
    backbone: Backbone,
    class_names: Sequence[str],
    *,
    generator: Generator | None = None,
) -> Method:
    """Build a method with newly initialised prompts on the backbone's device.

    Args:
        description: {"name": one of METHODS, **its settings}.
        generator: the source of randomness, on the CPU; by default seeded with 0.

    Raises:
        ConfigError, ClassNamesError, UnsupportedTowerError: the settings do not fit the backbone or the names.

    Example:
        >>> maple = build_method({"name": "maple", "prompt_depth": 9}, load_clip("ViT-B-16"), ["cat", "dog"])
        >>> maple.predict_logits(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 2])
    """
    name, settings = method_settings(description)
    constructor: Any = METHODS[name]
    method: Method = constructor(settings, backbone, class_names, generator or torch.Generator().manual_seed(0))
    return method.to(backbone.device).eval()
