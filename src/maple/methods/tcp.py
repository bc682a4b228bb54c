"""TCP: text tokens of each class, computed from its frozen text feature, enter the middle of the text tower.

Source: Yao et al., "TCP: Textual-based Class-aware Prompt tuning for Visual-Language Model", CVPR 2024, section 3.2;
htyao89/Textual-based_Class-aware_prompt_tuning@bd97bec trainers/tcp.py. Departs: the number of class tokens is always
the number of prompt tokens, where the reference has the literals 4 and 512.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from maple.clip import Backbone, LayerEdit
from maple.clip.plain_model import QuickGELU
from maple.descriptions import PlotStyle
from maple.errors import ConfigError
from maple.methods.base import (
    DepthLimits,
    Method,
    MethodSettings,
    batch_accuracy,
    full_precision,
    hidden_width,
    prompt_list,
)
from maple.methods.teacher import Teacher
from maple.prompts import PromptedClasses
from maple.prompts.coupling import seeded_linear
from maple.prompts.initialise import first_tokens


class TCPSettings(MethodSettings):
    """The first `prompt_length` tokens of `template` are learned, from random values if `init_text` is empty.

    Before block `class_prompt_layer` (from 0) they are replaced by tokens of each class. `meta_net_reduction` divides D
    to give the hidden width of the network that computes these.
    """

    depth_limits: ClassVar[DepthLimits] = {"class_prompt_layer": ("text",)}
    prediction_sentences: ClassVar[tuple[str, ...]] = ("template", "teacher_template")

    prompt_length: int = Field(4, ge=1)
    init_text: str = ""
    class_prompt_layer: int = Field(8, ge=0)
    meta_net_reduction: int = Field(4, ge=1)
    template: str = "X X X X {}."
    teacher_template: str = "a photo of a {}."
    text_loss_weight: float = Field(8.0, ge=0)

    @classmethod
    def for_template(cls, template: str) -> dict[str, Any]:
        return {"teacher_template": template}


class TCP(Method):
    """CoOp's tokens, replaced midway by tokens of each class; text features are kept close to the frozen ones."""

    title = "TCP"
    paper = "TCP: Textual-based Class-aware Prompt tuning for Visual-Language Model, CVPR 2024"
    summary = "text tokens of each class, computed from its frozen text feature, enter the middle of the text tower"
    plot_style = PlotStyle("#3f7f5f", "$T$", (0, (5, 1, 1, 1)))
    Settings = TCPSettings
    log_names = ("cross_entropy", "text_cosine", "accuracy")

    settings: TCPSettings
    classes: PromptedClasses

    def __init__(
        self, settings: TCPSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        super().__init__(settings, backbone)
        text, length = backbone.text, settings.prompt_length
        text.require_promptable(self.title)
        if settings.class_prompt_layer >= text.depth:
            raise ConfigError(
                f"class_prompt_layer={settings.class_prompt_layer}, but the text tower has {text.depth} blocks; choose "
                f"0 to {text.depth - 1}"
            )
        hidden = hidden_width(backbone, settings.meta_net_reduction, "meta_net_reduction")
        self.classes = PromptedClasses(backbone, prompt_length=length, template=settings.template)
        self.text_prompt = prompt_list([first_tokens(backbone, settings.init_text, length, generator)], backbone)
        sizes = pairwise([backbone.embed_dim, hidden, length * text.width])
        self.meta_net = nn.ModuleList(seeded_linear(*size, generator) for size in sizes).to(backbone.device)
        self._teacher = Teacher(backbone, [settings.teacher_template])
        self.set_class_names(class_names)

    def set_class_names(self, names: Sequence[str]) -> None:
        super().set_class_names(names)
        self._taught = self._teacher.text_features(names)

    def text_prompts(self) -> list[Tensor]:
        return [self.text_prompt[0]]

    def text_edits(self) -> list[LayerEdit]:
        with full_precision(self._taught):
            hidden = self.meta_net[0](self._taught)
            tokens = self.meta_net[1](QuickGELU()(hidden))
        layer = self.settings.class_prompt_layer
        edits = [LayerEdit(prompt=self.text_prompt[0]), *[LayerEdit()] * layer]
        # In the first block, too, class tokens come after positions: nothing is left of the learned tokens there.
        prompt = tokens.unflatten(1, (self.settings.prompt_length, -1))
        edits[layer] = LayerEdit(prompt=prompt, after_positions=layer == 0)
        return edits

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy + `text_loss_weight` x (1 - mean over classes of the cosine to the teacher's text feature)."""
        text_features = self.encode_classes()
        logits = self.logits(self.encode_images(images), text_features)
        cross_entropy = F.cross_entropy(logits, labels)
        distance = 1 - (text_features * self._taught).sum(dim=-1).mean()
        logs = {"cross_entropy": cross_entropy.detach(), "text_cosine": distance.detach()}
        loss = cross_entropy + self.settings.text_loss_weight * distance
        return loss, {**logs, "accuracy": batch_accuracy(logits, labels)}
