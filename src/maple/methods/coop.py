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
from maple.methods.per_class import KnownClasses
from maple.prompts import PromptedClasses
from maple.prompts.initialise import first_tokens, random_tokens
from maple.prompts.splice import Position


class CoOpSettings(MethodSettings):
    """`init_text` may be empty (random tokens); otherwise its first `prompt_length` tokens are learned."""

    prompt_length: int = Field(16, ge=1)
    init_text: str = ""
    class_token_position: Position = "end"
    class_specific: bool = False

    @property
    def supports_new_classes(self) -> bool:
        """Not with a prompt per class."""
        return not self.class_specific


class CoOp(Method):
    """P text tokens at the input, shared by all classes or one set per class."""

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
        self._known = KnownClasses("class-specific prompts", class_names, advice="train with class_specific=false")
        self._rows: Tensor | None = None
        self.text_prompt = prompt_list([self._first_tokens(settings, len(class_names), generator)], backbone)
        self.set_class_names(class_names)

    def _first_tokens(self, settings: CoOpSettings, classes: int, generator: Generator) -> Tensor:
        if not settings.class_specific:
            return first_tokens(self.backbone, settings.init_text, settings.prompt_length, generator)
        if settings.init_text.strip():
            words = first_tokens(self.backbone, settings.init_text, settings.prompt_length, generator)
            return words.repeat(classes, 1, 1)
        return random_tokens(classes, settings.prompt_length, self.backbone.text.width, generator=generator)

    def set_class_names(self, names: Sequence[str]) -> None:
        """As the contract says; class-specific prompts speak only of classes they were learned for.

        Raises:
            UnlearnedClassesError: class-specific prompts are asked about a class without a prompt.
        """
        rows = self._known.rows(names, self.backbone.device) if self.settings.class_specific else None
        super().set_class_names(names)
        self._rows = rows

    def text_prompts(self) -> list[Tensor]:
        """[P, Ht], or [C, P, Ht] when class specific."""
        return [self.text_prompt[0] if self._rows is None else self.text_prompt[0][self._rows]]
