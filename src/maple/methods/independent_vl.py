"""Independent vision-language prompting, and its two halves: deep language prompting and visual prompt tuning.

Source: the baselines of MaPLe (CVPR 2023, section 3.2 and Table 1); VPT: Jia et al., "Visual Prompt Tuning", ECCV
2022. muzairkhattak/multimodal-prompt-learning@69bce21 trainers/independentVL.py, trainers/vpt.py.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Generator, Tensor, nn

from maple.clip import Backbone
from maple.descriptions import PlotStyle
from maple.errors import ConfigError
from maple.methods.base import DepthLimits, Method, MethodSettings, check_depth, prompt_list
from maple.prompts import PromptedClasses, TemplateClasses, random_tokens
from maple.prompts.initialise import first_tokens, words_if_short


class IndependentVLSettings(MethodSettings):
    """Length and depth of each side; a side with depth 0 (or length 0) has no prompts."""

    depth_limits: ClassVar[DepthLimits] = {"text_prompt_depth": ("text",), "vision_prompt_depth": ("image",)}

    text_prompt_length: int = Field(2, ge=0)
    vision_prompt_length: int = Field(2, ge=0)
    text_prompt_depth: int = Field(12, ge=0)
    vision_prompt_depth: int = Field(12, ge=0)
    init_text: str = "a photo of a"


class DeepLanguageSettings(MethodSettings):
    """Text tokens of the first `prompt_depth` layers."""

    depth_limits: ClassVar[DepthLimits] = {"prompt_depth": ("text",)}

    prompt_length: int = Field(4, ge=1)
    prompt_depth: int = Field(12, ge=1)
    init_text: str = "a photo of a"


class VPTSettings(MethodSettings):
    """Vision tokens of the first `vision_prompt_depth` layers; depth 1 is VPT-shallow."""

    depth_limits: ClassVar[DepthLimits] = {"vision_prompt_depth": ("image",)}

    vision_prompt_length: int = Field(8, ge=1)
    vision_prompt_depth: int = Field(12, ge=1)
    template: str = "a photo of a {}."


def learned_text(backbone: Backbone, length: int, depth: int, init_text: str, generator: Generator) -> nn.ParameterList:
    """Fresh text tokens [P, Ht] for each of the first J layers: words first, the deeper ones random."""
    check_depth(depth, backbone.text.depth, setting="text prompt depth", tower="text")
    first = first_tokens(backbone, words_if_short(init_text, length), length, generator)
    deep = [random_tokens(length, backbone.text.width, generator=generator) for _ in range(depth - 1)]
    return prompt_list([first, *deep], backbone)


def learned_vision(backbone: Backbone, length: int, depth: int, generator: Generator) -> nn.ParameterList:
    """Fresh vision tokens [P, Hv] for each of the first J layers, all random."""
    check_depth(depth, backbone.image.depth, setting="vision prompt depth", tower="image")
    tokens = [random_tokens(length, backbone.image.width, generator=generator) for _ in range(depth)]
    return prompt_list(tokens, backbone)


class IndependentVL(Method):
    """Text and vision tokens, learned side by side with no link between them (IVLP)."""

    title = "independent V-L prompting"
    short_title = "IVLP"
    paper = "MaPLe, CVPR 2023, Table 1"
    summary = "fresh tokens in the first layers of both towers, with no link between them"
    plot_style = PlotStyle("#7c68b3", "v", (0, (6, 1.5, 2, 1.5)))
    Settings = IndependentVLSettings

    def __init__(
        self, settings: IndependentVLSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        super().__init__(settings, backbone)
        text, vision = _sides(settings)
        if not text and not vision:
            raise ConfigError("independent V-L prompting with no prompts on either side learns nothing: use zero_shot")
        self.text_prompt = self.vision_prompt = None
        if text:
            backbone.text.require_promptable(self.title)
            length = settings.text_prompt_length
            self.text_prompt = learned_text(backbone, length, settings.text_prompt_depth, settings.init_text, generator)
            self.classes = PromptedClasses(
                backbone, prompt_length=length, init_text=words_if_short(settings.init_text, length)
            )
        else:
            self.classes = TemplateClasses(backbone, [f"{settings.init_text or 'a photo of a'} {{}}."])
        if vision:
            backbone.image.require_promptable(self.title)
            self.vision_prompt = learned_vision(
                backbone, settings.vision_prompt_length, settings.vision_prompt_depth, generator
            )
        self.set_class_names(class_names)

    def text_prompts(self) -> list[Tensor]:
        """J tensors [P, Ht]."""
        return [] if self.text_prompt is None else list(self.text_prompt)

    def vision_prompts(self) -> list[Tensor]:
        """J tensors [P, Hv]."""
        return [] if self.vision_prompt is None else list(self.vision_prompt)


def _sides(settings: IndependentVLSettings) -> tuple[bool, bool]:
    """Which sides have prompts: (text, vision).

    Raises:
        ConfigError: a side has a length but no depth, or a depth but no length.
    """
    present = []
    for side in ("text", "vision"):
        length, depth = (getattr(settings, f"{side}_prompt_{what}") for what in ("length", "depth"))
        if (length == 0) != (depth == 0):
            raise ConfigError(
                f"{side}_prompt_length={length} with {side}_prompt_depth={depth}: set both to 0 for no {side} prompts, "
                "or both to at least 1"
            )
        present.append(length > 0)
    return present[0], present[1]


class DeepLanguage(Method):
    """IVLP with an empty image side."""

    title = "deep language prompting"
    short_title = "deep language"
    paper = "MaPLe, CVPR 2023, Table 1"
    summary = "fresh text tokens in the first layers; the image tower is left alone"
    plot_style = PlotStyle("#6f9440", "^", (0, (7, 2, 1, 2)))
    Settings = DeepLanguageSettings

    def __init__(
        self, settings: DeepLanguageSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        super().__init__(settings, backbone)
        backbone.text.require_promptable(self.title)
        length = settings.prompt_length
        self.text_prompt = learned_text(backbone, length, settings.prompt_depth, settings.init_text, generator)
        self.classes = PromptedClasses(
            backbone, prompt_length=length, init_text=words_if_short(settings.init_text, length)
        )
        self.set_class_names(class_names)

    def text_prompts(self) -> list[Tensor]:
        """J tensors [P, Ht]."""
        return list(self.text_prompt)


class VPT(Method):
    """IVLP with an empty text side: the classes are fixed sentences, encoded once."""

    title = "deep vision prompting (VPT)"
    short_title = "VPT"
    paper = "Visual Prompt Tuning, ECCV 2022; as in MaPLe, CVPR 2023, Table 1"
    summary = "fresh vision tokens in the first layers; text features of a fixed template, computed once"
    plot_style = PlotStyle("#2f8f8b", "D", (0, (2, 1)))
    Settings = VPTSettings

    def __init__(
        self, settings: VPTSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        super().__init__(settings, backbone)
        backbone.image.require_promptable(self.title)
        self.vision_prompt = learned_vision(
            backbone, settings.vision_prompt_length, settings.vision_prompt_depth, generator
        )
        self.classes = TemplateClasses(backbone, [settings.template])
        self.set_class_names(class_names)

    def vision_prompts(self) -> list[Tensor]:
        """J tensors [P, Hv]."""
        return list(self.vision_prompt)
