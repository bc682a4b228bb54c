"""CLAP and the zero-shot-initialised linear probe: class prototypes that start at the text features.

Source: Silva-Rodríguez et al., "A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models", CVPR 2024;
jusiro/CLAP@dbdf409 trainers/adapters.py:91-252. Departs: the outer augmented-Lagrangian steps of the variant
"adaptative", which none of the published experiments uses, are left out; underscores of class names become spaces;
on ImageNet, there is one template, where the source has eight.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from maple.clip import Backbone
from maple.descriptions import PlotStyle
from maple.methods.base import batch_accuracy, full_precision
from maple.methods.features import Features
from maple.methods.per_class import PerClassMethod, PerClassSettings
from maple.prompts import TemplateClasses, l2_normalize


class CLAPSettings(PerClassSettings):
    """`constraint` ties the prototypes to the text features, by a weight for each class; "none" is ZS-LP.

    The weight of a class in "l2" (CLAP) is the mean zero-shot probability of the right class of its training images;
    "l2_corrected" divides the weights by their mean, "l2_constant" sets each to their mean, and "l2_balanced" to 1.
    """

    constraint: Literal["none", "l2", "l2_constant", "l2_corrected", "l2_balanced"] = "l2"
    template: str = "a photo of a {}."

    @classmethod
    def for_template(cls, template: str) -> dict[str, Any]:
        return {"template": template}


class CLAP(PerClassMethod):
    """A prototype [C, D] for each class, which starts at its raw text feature; logits are scaled cosines to it.

    The loss is cross-entropy plus the mean over classes of `constraint_weights` x squared distance between prototype
    and raw text feature. The weights are 1 until `fit_features`.
    """

    title = "CLAP"
    paper = "A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models, CVPR 2024"
    summary = "class prototypes that start at the text features and are tied to them; without the tie, ZS-LP"
    plot_style = PlotStyle("#4d7f71", "$C$", (0, (4, 1, 1, 1)))
    Settings = CLAPSettings
    log_names = ("cross_entropy", "constraint", "accuracy")
    uses_features = True

    settings: CLAPSettings
    classes: TemplateClasses

    def __init__(
        self, settings: CLAPSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        del generator  # prototypes start at the text features
        super().__init__(settings, backbone)
        self.classes = TemplateClasses(backbone, [settings.template], normalize_each=False)
        self.set_trained_classes("prototypes", class_names)
        self.set_class_names(class_names)
        self.prototypes = nn.Parameter(self.classes.mean.clone())
        self.constraint_weights = torch.ones(len(class_names), device=backbone.device)

    def encode_classes(self) -> Tensor:
        return l2_normalize(self.prototypes[self.rows])

    @torch.no_grad()
    def fit_features(self, features: Features) -> None:
        """Compute the weights of the constraint [C] from all views; a class without images gets the others' mean."""
        images, labels = features.unit_views()
        zero_shot = self.logits(images, self.classes.features).softmax(dim=-1)
        sums, counts = features.class_sums(zero_shot.gather(1, labels[:, None]), len(self.prototypes))
        mean = sums[counts > 0].div(counts[counts > 0]).mean()
        weights = torch.where(counts > 0, sums / counts.clamp(min=1), mean).squeeze(1)
        match self.settings.constraint:
            case "none":
                weights = torch.zeros_like(weights)
            case "l2_corrected":
                weights = weights / mean
            case "l2_constant":
                weights = mean.expand(len(weights))
            case "l2_balanced":
                weights = torch.ones_like(weights)
        self.constraint_weights = weights

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self(images)
        cross_entropy = F.cross_entropy(logits, labels)
        constraint = torch.zeros_like(cross_entropy)
        if self.settings.constraint != "none":
            with full_precision(logits):
                distances = (self.prototypes[self.rows] - self.classes.mean).square().sum(dim=-1)
                constraint = (self.constraint_weights[self.rows] * distances).mean()
        logs = {"cross_entropy": cross_entropy.detach(), "constraint": constraint.detach()}
        return cross_entropy + constraint, {**logs, "accuracy": batch_accuracy(logits, labels)}
