"""CoOp: the words around the class name are learned.

Source: Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022; KaiyangZhou/CoOp@ff61507
trainers/coop.py:56-185.
"""

from collections.abc import Sequence

from pydantic import Field
from torch import Generator, Tensor

from maple.clip import Backbone
from maple.descriptions import PlotStyle
from maple.methods.base import Method, MethodSettings, prompt_list
from maple.methods.per_class import TrainedClasses
from maple.prompts import PromptedClasses
from maple.prompts.initialise import first_tokens, random_tokens
from maple.prompts.splice import Position


class CoOpSettings(MethodSettings):
    """The first `prompt_length` tokens of `init_text` are learned; if it is empty, random tokens."""

    prompt_length: int = Field(16, ge=1)
    init_text: str = ""
    class_token_position: Position = "end"
    class_specific: bool = False

    @property
    def supports_new_classes(self) -> bool:
        return not self.class_specific


class CoOp(Method):
    """P text tokens at the input, shared by all classes or learned for each class."""

    title = "CoOp"
    paper = "Learning to Prompt for Vision-Language Models, IJCV 2022"
    summary = "P text tokens at the input, shared or per class; the class name at the end, in the middle or in front"
    plot_style = PlotStyle("#c08a1e", "s", (0, (5, 2)))
    report_roles = frozenset({"baseline", "class baseline"})
    Settings = CoOpSettings

    settings: CoOpSettings

    def __init__(
        self, settings: CoOpSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        super().__init__(settings, backbone)
        backbone.text.require_promptable(self.title)
        self.classes = PromptedClasses(
            backbone,
            prompt_length=settings.prompt_length,
            init_text=settings.init_text,
            position=settings.class_token_position,
        )
        self._trained = TrainedClasses("class-specific prompts", class_names, advice="train with class_specific=false")
        self._rows: Tensor | None = None
        if settings.class_specific and not settings.init_text.strip():
            shape = len(class_names), settings.prompt_length, backbone.text.width
            tokens = random_tokens(*shape, generator=generator)
        else:
            tokens = first_tokens(backbone, settings.init_text, settings.prompt_length, generator)
            tokens = tokens.repeat(len(class_names), 1, 1) if settings.class_specific else tokens
        self.text_prompt = prompt_list([tokens], backbone)
        self.set_class_names(class_names)

    def set_class_names(self, names: Sequence[str]) -> None:
        rows = self._trained.rows(names, self.backbone.device) if self.settings.class_specific else None
        super().set_class_names(names)
        self._rows = rows

    def text_prompts(self) -> list[Tensor]:
        return [self.text_prompt[0] if self._rows is None else self.text_prompt[0][self._rows]]
