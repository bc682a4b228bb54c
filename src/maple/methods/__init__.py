"""Methods: one file per paper, a registry of them, and of those from outside the package."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator

from maple.clip import Backbone
from maple.config import add_presets, preset_of
from maple.descriptions import MethodDescription
from maple.errors import ConfigError
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
from maple.plugins import Registry, require_distinct_files, short_code_name

ZERO_SHOT = "zero_shot"
"""The method that learns nothing: the frozen CLIP, with which every other is compared."""


def _outside_method(source: str, loaded: object) -> type[Method]:
    """A method class from outside the package; its presets are then known under its name."""
    if not isinstance(loaded, type) or not issubclass(loaded, Method):
        raise ConfigError(f"{source} is {loaded!r:.80}; it must be a class derived from maple.Method")
    for attribute in ("title", "paper", "summary", "Settings"):
        if not hasattr(loaded, attribute):
            raise ConfigError(f'{source} has no {attribute}; the page "Add a method" says what a method needs')
    if not isinstance(loaded.Settings, type) or not issubclass(loaded.Settings, MethodSettings):
        raise ConfigError(
            f"the Settings of {source} are {loaded.Settings!r:.80}; they must be a class derived from MethodSettings"
        )
    return loaded


_OWN: dict[str, type[Method]] = {
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

METHODS = Registry("maple.methods", "method", _OWN, _outside_method)
"""The methods of this package, of installed packages (entry points `maple.methods`), and those that are assigned."""

__all__ = [
    "METHODS",
    "Features",
    "Method",
    "MethodSettings",
    "build_method",
    "describe_methods",
    "method_settings",
    "recipe_of",
]


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
        ConfigError: the method or a setting is unknown, a value is out of range, or two files with code have one name.

    Example:
        >>> method_settings({"name": "coop", "prompt_length": 4})[1].prompt_length
        4
    """
    require_distinct_files(description)
    values = dict(description)
    name = values.pop("name", None)
    return name, METHODS.find(name, ", or PATH/FILE.py:CLASS for one of your own").Settings(**values)


def recipe_of(method: str, endings: Iterable[str]) -> str:
    """The preset of a method, or of a variant of one, with the first of these endings that exists.

    A method from outside the package has the presets of its class, by protocol; in any case one for few-shot and one
    for base-to-novel. The path of a TOML file is returned as it is.

    Raises:
        ConfigError: there is none, or the class cannot be imported.

    Example:
        >>> recipe_of("maple-shallow", ["few-shot", "base-to-novel"])
        'maple-shallow_base-to-novel'
    """
    if method not in _OWN and (kind := METHODS.get(method)) is not None:
        # Two versions of a file have the same short name.
        method = add_presets(method, [short_code_name(method), method], kind.presets)
    return preset_of(method, endings)


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
    constructor: Any = METHODS.find(name)
    method: Method = constructor(settings, backbone, class_names, generator or torch.Generator().manual_seed(0))
    return method.to(backbone.device).eval()
