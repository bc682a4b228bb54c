"""KgCoOp: CoOp whose text features are kept close to those of a hand-written sentence.

Source: Yao et al., "Visual-Language Prompt Tuning with Knowledge-guided Context Optimization", CVPR 2023, equations
5-7; htyao89/KgCoOp@c43ccc3 KgCoOp/trainers/kgcoop.py. Departs: the reference also creates, saves and never uses a
meta-network, a bias and an adapter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from maple.clip import Backbone
from maple.descriptions import PlotStyle
from maple.methods.base import batch_accuracy
from maple.methods.coop import CoOp, CoOpSettings
from maple.methods.teacher import Teacher
from maple.methods.wraps_prompts import WrapsPrompts


class KgCoOpSettings(CoOpSettings):
    """CoOp's settings, the `weight` of the added term, and the `teacher_template`."""

    prompt_length: int = Field(4, ge=1)
    init_text: str = "a photo of a"
    weight: float = Field(8.0, ge=0)
    teacher_template: str = "a photo of a {}."

    @classmethod
    def for_template(cls, template: str) -> dict[str, Any]:
        return {"teacher_template": template}


class KgCoOp(WrapsPrompts):
    """CoOp's prompts; the loss adds 1 - the mean cosine between prompted and frozen text features."""

    title = "KgCoOp"
    paper = "Visual-Language Prompt Tuning with Knowledge-guided Context Optimization, CVPR 2023"
    summary = "CoOp whose text features are kept close to those of a hand-written sentence"
    plot_style = PlotStyle("#4c78a8", "X", (0, (4, 1, 1, 1, 1, 1)))
    Settings = KgCoOpSettings
    log_names = ("cross_entropy", "knowledge", "accuracy")
    added_names = ("text_cosine",)

    settings: KgCoOpSettings

    def __init__(
        self, settings: KgCoOpSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        coop = CoOpSettings(**settings.model_dump(include=set(CoOpSettings.model_fields)))
        super().__init__(settings, CoOp(coop, backbone, class_names, generator))
        self._teacher = Teacher(backbone, [settings.teacher_template])

    def added_terms(
        self, image_features: Tensor, text_features: Tensor, images: Tensor
    ) -> Mapping[str, tuple[float, Tensor]]:
        """1 - the mean over classes of the cosine to the teacher's text feature, with `weight`."""
        del image_features, images
        cosines = (text_features * self._teacher.text_features(self.class_names)).sum(dim=-1)
        return {"text_cosine": (self.settings.weight, 1 - cosines.mean())}

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy + the weighted distance to the teacher's text features."""
        image_features, text_features = self.encode_images(images), self.encode_classes()
        logits = self.logits(image_features, text_features)
        cross_entropy = F.cross_entropy(logits, labels)
        weight, distance = self.added_terms(image_features, text_features, images)["text_cosine"]
        knowledge = weight * distance
        logs = {"cross_entropy": cross_entropy.detach(), "knowledge": knowledge.detach()}
        return cross_entropy + knowledge, {**logs, "accuracy": batch_accuracy(logits, labels)}
