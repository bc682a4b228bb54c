"""MaPLe: prompts in both towers, those of one computed from those of the other.

Source: Khattak et al., "MaPLe: Multi-modal Prompt Learning", CVPR 2023, section 3; muzairkhattak/multimodal-prompt-
learning@69bce21 trainers/maple.py:68-204. Departs: the coupled side and the width of every map follow the backbone,
where the reference has the literals 512 and 768.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Generator, Tensor

from maple.clip import Backbone
from maple.descriptions import PlotStyle
from maple.errors import ConfigError
from maple.methods.base import DepthLimits, Method, MethodSettings, prompt_list, require_both_towers
from maple.prompts import Coupling, PromptedClasses, random_tokens, word_tokens
from maple.prompts.coupling import Direction, Sharing
from maple.prompts.initialise import first_tokens, words_if_short


class MaPLeSettings(MethodSettings):
    """`prompt_depth` 1 is shallow MaPLe; `coupling_sharing` unified is MaPLe-dagger.

    With `prompt_sharing` unified, one set of learned tokens enters before every one of the layers.

    With `coupling_direction` vision_to_text, the vision tokens are learned (from random values) and the text tokens are
    computed. With `deep_init` words, the text tokens of every layer, not only the first, start at the words of
    `init_text`; if that is empty, all layers start at random. These are the three initialisations of the paper's
    appendix.
    """

    depth_limits: ClassVar[DepthLimits] = {"prompt_depth": ("text", "image")}

    prompt_length: int = Field(2, ge=1)
    prompt_depth: int = Field(9, ge=1)
    init_text: str = "a photo of a"
    deep_init: Literal["random", "words"] = "random"
    prompt_sharing: Sharing = "per_layer"
    coupling_sharing: Sharing = "per_layer"
    coupling_direction: Direction = "text_to_vision"


class MaPLe(Method):
    """Coupled prompts in the first J layers of both towers."""

    title = "MaPLe"
    paper = "MaPLe: Multi-modal Prompt Learning, CVPR 2023"
    summary = "tokens in the first layers of both towers, the vision tokens computed from the text tokens"
    plot_style = PlotStyle("#cf4a2c", "*", "-")
    report_roles = frozenset({"headline"})
    Settings = MaPLeSettings

    def __init__(
        self, settings: MaPLeSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        super().__init__(settings, backbone)
        _check_deep_init(settings)
        depth, length = settings.prompt_depth, settings.prompt_length
        require_both_towers(self, depth, "prompt_depth")
        words = words_if_short(settings.init_text, length)
        self.classes = PromptedClasses(backbone, prompt_length=length, init_text=words)
        forward = settings.coupling_direction == "text_to_vision"
        widths = (backbone.text.width, backbone.image.width)
        inputs, outputs = widths if forward else widths[::-1]
        tokens = []
        for layer in range(depth if settings.prompt_sharing == "per_layer" else 1):
            if forward and layer == 0:
                tokens.append(first_tokens(backbone, words, length, generator))
            elif settings.deep_init == "words":
                tokens.append(word_tokens(backbone, words, length))
            else:
                tokens.append(random_tokens(length, inputs, generator=generator))
        if forward:
            self.text_prompt = prompt_list(tokens, backbone)
        else:
            self.vision_prompt = prompt_list(tokens, backbone)
        self.coupling = Coupling(inputs, outputs, depth, settings.coupling_sharing, generator).to(backbone.device)
        self._forward = forward
        self._copies = depth // len(tokens)
        self.set_class_names(class_names)

    def text_prompts(self) -> list[Tensor]:
        return self._learned() if self._forward else self.coupling.couple(self._learned())

    def vision_prompts(self) -> list[Tensor]:
        return self.coupling.couple(self._learned()) if self._forward else self._learned()

    def _learned(self) -> list[Tensor]:
        """The learned tokens of each layer."""
        return list(self.text_prompt if self._forward else self.vision_prompt) * self._copies


def _check_deep_init(settings: MaPLeSettings) -> None:
    """Raise ConfigError if `deep_init` is words, but there are none that a token could start at."""
    if settings.deep_init == "random":
        return
    if settings.coupling_direction == "vision_to_text":
        reason = "coupling_direction='vision_to_text' learns vision tokens, which do not stand for words"
    elif settings.prompt_sharing == "unified":
        reason = "with prompt_sharing='unified' there are no tokens of deeper layers"
    elif not settings.init_text.strip():
        reason = "init_text is empty"
    elif not words_if_short(settings.init_text, settings.prompt_length):
        reason = f"a prompt of prompt_length={settings.prompt_length} starts at random; choose 1 to 4"
    else:
        return
    raise ConfigError(f"deep_init='words' has no effect: {reason}. Set deep_init='random', or change the other setting")
