"""MMA++: MMA's adapters with many sentences for each class, and features that change little with the adapters' scale.

Source: Yang et al., "MMA++", IEEE T-PAMI 2026, doi 10.1109/TPAMI.2026.3691448. Written from a description of
ZjjConan/VLM-MMApp@e686c34. Departs: an evaluation during training changes nothing, where the reference's switches the
training to the scale of tests.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Generator, Tensor, nn

from maple.clip import Backbone, LayerEdit
from maple.descriptions import PlotStyle
from maple.errors import ConfigError
from maple.files import read_json
from maple.methods.base import batch_accuracy
from maple.methods.mma import AdapterMethod, AdapterSettings
from maple.prompts import EnsembleClasses, l2_normalize


def eighty_templates() -> tuple[str, ...]:
    """CLIP's eighty templates for ImageNet. Source: openai/CLIP notebooks, as in open_clip."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


class MMAPlusPlusSettings(AdapterSettings):
    """The scales of the adapters in training and afterwards, and the weight of consistency between two scales.

    `sentences`, {class name: [sentences]} or the path of such a JSON file, replace the `templates`. Settings that are
    saved hold the sentences themselves; every class that is predicted, new ones too, needs some.
    """

    adapter_train_scale: float = Field(0.01, gt=0)
    adapter_test_scale: float = Field(0.0065, gt=0)
    consistency_weight: float = Field(2.5, ge=0)
    dropout: float = Field(0.2, ge=0, lt=1)
    templates: tuple[str, ...] = Field(default_factory=eighty_templates)
    sentences: dict[str, tuple[str, ...]] = Field(default={})

    @property
    def draws_random_numbers(self) -> bool:
        return self.dropout > 0

    @classmethod
    def for_template(cls, template: str) -> dict[str, Any]:
        del template  # the same eighty for every data set
        return {}

    @field_validator("sentences", mode="before")
    @classmethod
    def _read(cls, sentences: Any) -> Any:
        if not isinstance(sentences, str):
            return sentences
        advice = "method.sentences names a JSON file {class name: [sentences]}"
        return read_json(sentences, error=ConfigError, advice=advice, foreign=True) if sentences else {}

    @field_validator("sentences")
    @classmethod
    def _not_empty(cls, sentences: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name, texts in sentences.items():
            if not texts or not all(text.strip() for text in texts):
                raise ValueError(f"give at least one sentence for {name!r}, and none without a word")
        return sentences


class MMAPlusPlus(AdapterMethod):
    """In each step one sentence per class, drawn at random; predictions have the mean over all sentences.

    The features of a step are kept close to those at a smaller scale of the adapters, which is drawn for each step.
    """

    title = "MMA++"
    paper = "MMA++, IEEE T-PAMI 2026"
    summary = "MMA with many sentences for each class, and features that change little with the adapters' scale"
    plot_style = PlotStyle("#b07cc6", "$A^+$", (0, (4, 1.5, 1, 1.5)))
    Settings = MMAPlusPlusSettings
    log_names = ("cross_entropy", "text_cosine", "image_cosine", "accuracy")

    settings: MMAPlusPlusSettings
    classes: EnsembleClasses

    def __init__(
        self, settings: MMAPlusPlusSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        super().__init__(settings, backbone, generator, random_bias=True)
        self.classes = EnsembleClasses(backbone, settings.templates, settings.sentences)
        self._drawn: tuple[Tensor, float] | None
        self.set_class_names(class_names)

    def text_edits(self) -> list[LayerEdit]:
        return self._scaled(self.text_adapter, self.settings.adapter_test_scale)

    def vision_edits(self) -> list[LayerEdit]:
        return self._scaled(self.vision_adapter, self.settings.adapter_test_scale)

    def _scaled(self, adapters: nn.ModuleDict, scale: float) -> list[LayerEdit]:
        is_random = self.training and self.settings.dropout > 0
        return self.adapter_edits(adapters, partial(self._residual, scale), is_random=is_random)

    def _residual(self, scale: float, adapters: nn.ModuleDict, key: str, states: Tensor) -> Tensor:
        return scale * self.branch(adapters, key, states)

    def drop(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, self.settings.dropout, self.training)

    def set_class_names(self, names: Sequence[str]) -> None:
        super().set_class_names(names)
        self._drawn = None

    def on_step_begin(self, generator: Generator) -> None:
        self._drawn = self.draw(generator)

    def draw(self, generator: Generator | None) -> tuple[Tensor, float]:
        """A sentence of each class, [C] int64, and the second scale, uniform from 0 to the scale of training."""
        numbers = torch.rand(len(self.class_names) + 1, generator=generator)
        counts = torch.tensor(self.classes.counts)
        chosen = (numbers[1:] * counts).long().minimum(counts - 1)  # a product may be rounded up to the count
        return chosen, float(numbers[0]) * self.settings.adapter_train_scale

    def features_at(self, scale: float, chosen: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features [C, D] of one sentence per class, and [B, D] of images, at a scale of the adapters."""
        text = self.classes.encode_one(self._scaled(self.text_adapter, scale), chosen)
        return text, l2_normalize(self.raw_features_with(self._scaled(self.vision_adapter, scale), images))

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy - `consistency_weight` x the mean cosines between the features at two scales, of both towers.

        Random numbers are those of `on_step_begin`. Without it they are drawn from PyTorch's generator in training
        mode, and are always the same in evaluation mode.
        """
        drawn = self._drawn if self.training else self.draw(torch.Generator().manual_seed(0))
        chosen, second_scale = self.draw(None) if drawn is None else drawn
        text, image = self.features_at(self.settings.adapter_train_scale, chosen, images)
        with torch.no_grad():
            other_text, other_image = self.features_at(second_scale, chosen, images)
        logits = self.logits(image, text)
        terms = {
            "cross_entropy": F.cross_entropy(logits, labels),
            "text_cosine": F.cosine_similarity(text, other_text).mean(),
            "image_cosine": F.cosine_similarity(image, other_image).mean(),
        }
        consistency = terms["text_cosine"] + terms["image_cosine"]
        loss = terms["cross_entropy"] - self.settings.consistency_weight * consistency
        logs = {name: term.detach() for name, term in terms.items()}
        return loss, {**logs, "accuracy": batch_accuracy(logits, labels)}
