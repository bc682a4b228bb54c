"""DePT: a linear head of the trained names next to the similarity of any prompt method, on features of its own.

Source: Zhang et al., "DePT: Decoupled Prompt Tuning", CVPR 2024, section 3. Written from a description of
Koorye/DePT@d4ff416. Departs: which names get the head is decided name by name, where the reference decides for a list;
evaluations on other published data sets decide as the reference does.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from maple.clip import Backbone
from maple.descriptions import PlotStyle
from maple.methods.base import Method, batch_accuracy, full_precision
from maple.methods.trained_names import TrainedNamesMethod
from maple.methods.wraps_prompts import BaseMethodSettings, WrapsPrompts
from maple.prompts import l2_normalize
from maple.prompts.coupling import seeded_linear


class DePTSettings(BaseMethodSettings):
    """The base method, all settings of it, the weight of the head, and the factor of its learning rate.

    KgCoOp's `weight` is called `text_loss_weight`, and is 2 here. Without `film` the head is applied to the features as
    they are; without `test_time_fusion` it is used in training alone.
    """

    renamed: ClassVar = {"kgcoop": {"text_loss_weight": "weight"}}
    base_defaults: ClassVar = {"kgcoop": {"weight": 2.0}}

    base_method: str = "coop"
    head_weight: float = Field(0.7, ge=0, le=1)
    head_lr_factor: float = Field(6.5, gt=0)
    film: bool = True
    test_time_fusion: bool = True


class DePT(TrainedNamesMethod, WrapsPrompts):
    """A base method's similarity, and a linear head of the un-normalised features, scaled and shifted by channel.

    Trained names get the weighted sum of both logits, other names the similarity alone. Image features are [B, 2D+1]:
    unit features, raw features and one; class embeddings have the weights of each, so that logits are products.
    """

    title = "DePT"
    paper = "DePT: Decoupled Prompt Tuning, CVPR 2024"
    summary = "a linear head of the trained names next to the similarity of any prompt method"
    plot_style = PlotStyle("#7a7a2e", "$D$", (0, (2, 1, 1, 1)))
    Settings = DePTSettings
    target_rule = "all"
    needed = (
        "a method of prompts or adapters with one feature of an image, trained by cross-entropy and added terms, such "
        "as coop, cocoop, kgcoop, maple, independent_vl, vpt or promptsrc"
    )

    settings: DePTSettings

    def __init__(
        self, settings: DePTSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        from maple.methods import build_method  # imports this module

        prompts = build_method(settings.base, backbone, class_names, generator=generator)
        WrapsPrompts.__init__(self, settings, prompts)
        self.classes_depend_on_image = prompts.classes_depend_on_image
        self.needs_frozen_features = prompts.needs_frozen_features
        self.log_names = ("cross_entropy", "head_cross_entropy", *prompts.added_names, "accuracy")
        if settings.film:
            for name in ("film_image", "film_text"):
                parts = {"scale": torch.ones(backbone.embed_dim), "bias": torch.zeros(backbone.embed_dim)}
                setattr(self, name, nn.ParameterDict(parts))
        self.head = seeded_linear(backbone.embed_dim, len(class_names), generator)
        self.set_trained_names(class_names)
        self.find_trained(class_names)

    def can_train(self, prompts: Method) -> bool:
        kind = type(prompts)
        return (
            bool(prompts.prompt_parameters())
            and prompts.uses_text_tower
            and not (prompts.uses_features or prompts.auxiliary_losses or isinstance(prompts, TrainedNamesMethod))
            and kind.encode_images in (Method.encode_images, WrapsPrompts.encode_images)
            and kind.logits is Method.logits
            and (prompts.classes_depend_on_image or kind.encode_classes in _PLAIN_CLASSES)
            and (kind.loss is Method.loss or kind.added_terms is not Method.added_terms)
        )

    def prompt_parameters(self) -> dict[str, nn.Parameter]:
        return self.prompts.prompt_parameters() | self._head_parameters()

    def saved_tensors(self) -> dict[str, Tensor]:
        return self.prompts.saved_tensors() | dict(self._head_parameters())

    def _head_parameters(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.named_parameters() if not name.startswith("prompts.")}

    def learning_rate_factors(self) -> dict[str, float]:
        return dict.fromkeys(self._head_parameters(), self.settings.head_lr_factor)

    def with_class_names(self, names: Sequence[str]) -> Self:
        other = super().with_class_names(names)
        other.find_trained(names)
        return other

    def text_features(self) -> Tensor:
        return self.prompts.encode_classes()

    def encode_classes_for(self, image_features: Tensor) -> Tensor:
        return self.embed_classes(self.prompts.encode_classes_for(image_features[:, : self.backbone.embed_dim]))

    def encode_images(self, images: Tensor) -> Tensor:
        raw = self.image_features_raw(images)
        unit = l2_normalize(raw)
        return torch.cat([unit, raw, torch.ones_like(raw[:, :1])], dim=1) if self.settings.test_time_fusion else unit

    def embed_trained(self, text_features: Tensor, rows: Tensor) -> Tensor:
        if not self.settings.test_time_fusion:
            return text_features
        weight = self.settings.head_weight
        with full_precision(text_features):
            # What the head computes of an image's raw feature and one; the product will be scaled as cosines are.
            per_channel, bias = self.head.weight[rows], self.head.bias[rows]
            if self.settings.film:
                film: Any = self.film_image
                bias, per_channel = bias + per_channel @ film["bias"], per_channel * film["scale"]
            head = weight / self.logit_scale * torch.cat([per_channel, bias[:, None]], dim=1)
            head = head.expand(*text_features.shape[:-2], -1, -1)
            return torch.cat([(1 - weight) * text_features, head.to(text_features.dtype)], dim=-1)

    def head_logits(self, images: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        """The head's logits [2B, C] of raw features: of the text of each image's class, then of the images.

        Args:
            images, text: [B, D], and [C, D] or [B, C, D].
        """
        with full_precision(images):
            of_labels = text[labels] if text.ndim == 2 else text[torch.arange(len(labels), device=text.device), labels]
            if self.settings.film:
                text_film: Any = self.film_text
                image_film: Any = self.film_image
                of_labels = of_labels * text_film["scale"] + text_film["bias"]
                images = images * image_film["scale"] + image_film["bias"]
            logits: Tensor = self.head(torch.cat([of_labels, images]))
            return logits

    def loss(self, images: Tensor, labels: Tensor, frozen: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted cross-entropies of similarity and head, and what the base method adds; logs are not weighted."""
        weight = self.settings.head_weight
        raw = self.prompts.image_features_raw(images)
        image = l2_normalize(raw)
        raw_text = self.prompts.class_features_raw(image)
        text = l2_normalize(raw_text)
        similarity, head = self.prompts.logits(image, text), self.head_logits(raw, raw_text, labels)
        terms: Mapping[str, tuple[float, Tensor]] = {
            "cross_entropy": (1 - weight, F.cross_entropy(similarity, labels)),
            "head_cross_entropy": (weight, F.cross_entropy(head, labels.repeat(2))),
            **self.prompts.added_terms(image, text, images if frozen is None else frozen),
        }
        loss = torch.stack([factor * term for factor, term in terms.values()]).sum()
        logs = {name: term.detach() for name, (_, term) in terms.items()}
        fused = (1 - weight) * similarity + weight * head[len(labels) :]
        return loss, {**logs, "accuracy": batch_accuracy(fused, labels)}


_PLAIN_CLASSES = (Method.encode_classes, WrapsPrompts.encode_classes)
