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
from maple.prompts.coupling import Sharing
from maple.prompts.initialise import first_tokens, words_if_short


class IndependentVLSettings(MethodSettings):
    """Length and depth of the prompts of each tower; 0 for both means no prompts in that tower.

    With `prompt_sharing` unified, one set of learned tokens enters before every one of a tower's layers.
    """

    depth_limits: ClassVar[DepthLimits] = {"text_prompt_depth": ("text",), "vision_prompt_depth": ("image",)}

    text_prompt_length: int = Field(2, ge=0)
    vision_prompt_length: int = Field(2, ge=0, le=10_000)
    text_prompt_depth: int = Field(12, ge=0)
    vision_prompt_depth: int = Field(12, ge=0)
    init_text: str = "a photo of a"
    prompt_sharing: Sharing = "per_layer"


class DeepLanguageSettings(MethodSettings):
    """Text tokens of the first `prompt_depth` layers."""

    depth_limits: ClassVar[DepthLimits] = {"prompt_depth": ("text",)}

    prompt_length: int = Field(4, ge=1)
    prompt_depth: int = Field(12, ge=1)
    init_text: str = "a photo of a"


class VPTSettings(MethodSettings):
    """Vision tokens of the first `vision_prompt_depth` layers; depth 1 is VPT-shallow."""

    depth_limits: ClassVar[DepthLimits] = {"vision_prompt_depth": ("image",)}

    vision_prompt_length: int = Field(8, ge=1, le=10_000)
    vision_prompt_depth: int = Field(12, ge=1)
    template: str = "a photo of a {}."


class _IndependentPrompts(Method):
    """Text and vision tokens of the first layers, each of which may be absent."""

    def __init__(self, settings: MethodSettings, backbone: Backbone) -> None:
        super().__init__(settings, backbone)
        self.text_prompt: nn.ParameterList | None = None
        self.vision_prompt: nn.ParameterList | None = None
        self._layers_per_prompt = {"text": 1, "vision": 1}

    def add_text_prompts(
        self, length: int, depth: int, init_text: str, generator: Generator, sharing: Sharing = "per_layer"
    ) -> None:
        """Learn P text tokens for each of the first J layers, or for all; after the first, they start at random."""
        backbone, init_text = self.backbone, words_if_short(init_text, length)
        backbone.text.require_promptable(self.title)
        check_depth(depth, backbone.text.depth, setting="text prompt depth", tower="text")
        self.classes = PromptedClasses(backbone, prompt_length=length, init_text=init_text)
        first = first_tokens(backbone, init_text, length, generator)
        sets = depth if sharing == "per_layer" else 1
        deep = [random_tokens(length, backbone.text.width, generator=generator) for _ in range(sets - 1)]
        self.text_prompt = prompt_list([first, *deep], backbone)
        self._layers_per_prompt["text"] = depth // sets

    def add_vision_prompts(self, length: int, depth: int, generator: Generator, sharing: Sharing = "per_layer") -> None:
        """Learn P vision tokens for each of the first J layers, or for all of them, starting at random."""
        backbone = self.backbone
        backbone.image.require_promptable(self.title)
        check_depth(depth, backbone.image.depth, setting="vision prompt depth", tower="image")
        sets = depth if sharing == "per_layer" else 1
        tokens = [random_tokens(length, backbone.image.width, generator=generator) for _ in range(sets)]
        self.vision_prompt = prompt_list(tokens, backbone)
        self._layers_per_prompt["vision"] = depth // sets

    def text_prompts(self) -> list[Tensor]:
        return [] if self.text_prompt is None else list(self.text_prompt) * self._layers_per_prompt["text"]

    def vision_prompts(self) -> list[Tensor]:
        return [] if self.vision_prompt is None else list(self.vision_prompt) * self._layers_per_prompt["vision"]


class IndependentVL(_IndependentPrompts):
    """Text and vision tokens that are learned independently (IVLP)."""

    title = "independent V-L prompting"
    short_title = "IVLP"
    paper = "MaPLe, CVPR 2023, Table 1"
    summary = "tokens in the first layers of both towers, learned independently"
    plot_style = PlotStyle("#7c68b3", "v", (0, (6, 1.5, 2, 1.5)))
    Settings = IndependentVLSettings

    def __init__(
        self, settings: IndependentVLSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        super().__init__(settings, backbone)
        has_prompts = {}
        for side in ("text", "vision"):
            length, depth = (getattr(settings, f"{side}_prompt_{size}") for size in ("length", "depth"))
            if (length == 0) != (depth == 0):
                raise ConfigError(
                    f"{side}_prompt_length={length} with {side}_prompt_depth={depth}: set both to 0 for no {side} "
                    "prompts, or both to at least 1"
                )
            has_prompts[side] = length > 0
        if not any(has_prompts.values()):
            raise ConfigError("independent V-L prompting needs prompts in one tower at least; else use zero_shot")
        if has_prompts["text"]:
            text = settings.text_prompt_length, settings.text_prompt_depth, settings.init_text
            self.add_text_prompts(*text, generator, settings.prompt_sharing)
        else:
            self.classes = TemplateClasses(backbone, [f"{settings.init_text or 'a photo of a'} {{}}."])
        if has_prompts["vision"]:
            vision = settings.vision_prompt_length, settings.vision_prompt_depth
            self.add_vision_prompts(*vision, generator, settings.prompt_sharing)
        self.set_class_names(class_names)


class DeepLanguage(_IndependentPrompts):
    """IVLP without vision tokens."""

    title = "deep language prompting"
    short_title = "deep language"
    paper = "MaPLe, CVPR 2023, Table 1"
    summary = "text tokens in the first layers; the image tower is unchanged"
    plot_style = PlotStyle("#6f9440", "^", (0, (7, 2, 1, 2)))
    Settings = DeepLanguageSettings

    def __init__(
        self, settings: DeepLanguageSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        super().__init__(settings, backbone)
        self.add_text_prompts(settings.prompt_length, settings.prompt_depth, settings.init_text, generator)
        self.set_class_names(class_names)


class VPT(_IndependentPrompts):
    """IVLP without text tokens: text features are those of a fixed template, encoded once."""

    title = "deep vision prompting (VPT)"
    short_title = "VPT"
    paper = "Visual Prompt Tuning, ECCV 2022; as in MaPLe, CVPR 2023, Table 1"
    summary = "vision tokens in the first layers; text features of a fixed template, computed once"
    plot_style = PlotStyle("#2f8f8b", "D", (0, (2, 1)))
    Settings = VPTSettings

    def __init__(
        self, settings: VPTSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        super().__init__(settings, backbone)
        self.add_vision_prompts(settings.vision_prompt_length, settings.vision_prompt_depth, generator)
        self.classes = TemplateClasses(backbone, [settings.template])
        self.set_class_names(class_names)
