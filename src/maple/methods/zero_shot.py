"""Zero-shot CLIP: nothing is learned.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, section 3.1;
KaiyangZhou/CoOp@ff61507 trainers/zsclip.py.
"""

from collections.abc import Sequence

from torch import Generator

from maple.clip import Backbone
from maple.descriptions import PlotStyle
from maple.methods.base import Method, MethodSettings
from maple.prompts import TemplateClasses


class ZeroShotSettings(MethodSettings):
    """`templates` are sentences with {} for the class name; the features of several are averaged (an ensemble)."""

    templates: tuple[str, ...] = ("a photo of a {}.",)


class ZeroShot(Method):
    """CLIP with fixed sentences, the baseline of every table."""

    title = "zero-shot CLIP"
    paper = "CLIP, ICML 2021"
    summary = "nothing is learned: hand-written sentences, one template or an ensemble"
    plot_style = PlotStyle("#7d838c", "o", (0, (1, 1.5)))
    report_roles = frozenset({"zero-shot", "baseline"})
    Settings = ZeroShotSettings

    def __init__(
        self, settings: ZeroShotSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        del generator  # nothing is random
        super().__init__(settings, backbone)
        self.classes = TemplateClasses(backbone, settings.templates)
        self.set_class_names(class_names)
