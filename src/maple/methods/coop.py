"""CoOp: the words around the class name are learned.

Source: Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022; KaiyangZhou/CoOp@ff61507
trainers/coop.py:56-185.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Generator, Tensor

from maple.clip import Backbone
from maple.errors import ClassNamesError
from maple.methods.base import Method, MethodSettings, prompt_list
from maple.prompts import PromptedClasses
from maple.prompts.initialise import first_tokens, random_tokens
from maple.prompts.splice import Position, clean_class_names


class CoOpSettings(MethodSettings):
    """`init_text` may be empty (random tokens); otherwise its first `prompt_length` tokens are learned."""

    prompt_length: int = Field(16, ge=1)
    init_text: str = ""
    class_token_position: Position = "end"
    class_specific: bool = False


class CoOp(Method):
    """P text tokens at the input, shared by all classes or one set per class."""

    title = "CoOp"
    paper = "Learning to Prompt for Vision-Language Models, IJCV 2022"
    summary = "P text tokens at the input, shared or per class; the class name at the end, in the middle or in front"
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
        self._learned_for = tuple(class_names)
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
            ClassNamesError: also when class-specific prompts are asked about a class without a prompt.
        """
        rows = self._rows_of(clean_class_names(names)) if self.settings.class_specific else None
        super().set_class_names(names)
        self._rows = rows

    def _rows_of(self, names: Sequence[str]) -> Tensor:
        """Which learned prompt belongs to each name; equal names are told apart by their order."""
        places: dict[tuple[str, int], int] = {}
        seen: Counter[str] = Counter()
        for row, name in enumerate(clean_class_names(self._learned_for)):
            places[name, seen[name]] = row
            seen[name] += 1
        asked: Counter[str] = Counter()
        rows = []
        for name in names:
            if (name, asked[name]) not in places:
                raise ClassNamesError(
                    f"class-specific prompts were learned for {len(self._learned_for)} classes and {name!r} is not "
                    "one; ask about those classes, or train with class_specific=false"
                )
            rows.append(places[name, asked[name]])
            asked[name] += 1
        with torch.inference_mode(False):  # as in `Method.set_class_names`
            return torch.tensor(rows, device=self.backbone.device)

    def text_prompts(self) -> list[Tensor]:
        """[P, Ht], or [C, P, Ht] when class specific."""
        return [self.text_prompt[0] if self._rows is None else self.text_prompt[0][self._rows]]
