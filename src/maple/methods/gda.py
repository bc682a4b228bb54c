"""GDA: Gaussian discriminant analysis of image features, added to zero-shot CLIP.

Source: Wang et al., "A Hard-to-Beat Baseline for Training-Free CLIP-Based Adaptation", ICLR 2024, arXiv 2402.04087;
mrflogs/ICLR24@c83409b main_few_shots.py. Departs: of equal prior probabilities, the constant in every logit is left
out, which changes no probability; the classifier that the source makes up for novel classes (main_base2new.py) is not
included.
"""

import logging
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from maple.clip import Backbone
from maple.descriptions import PlotStyle
from maple.methods.base import full_precision
from maple.methods.features import Features, seconds_of
from maple.methods.per_class import PerClassMethod, PerClassSettings
from maple.prompts import TemplateClasses, l2_normalize

logger = logging.getLogger(__name__)

_ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)


class GDASettings(PerClassSettings):
    """`alpha` is the weight of the discriminant; by default the best power of ten on the validation images."""

    alpha: float | None = Field(None, ge=0)
    templates: tuple[str, ...] = ("a photo of a {}.",)

    @property
    def needs_validation(self) -> bool:
        return self.alpha is None


class GDA(PerClassMethod):
    """Zero-shot logits, plus alpha times a discriminant with weight [C, D] and bias [C].

    The weight and the bias are zero until `fit_features`: zero-shot CLIP.
    """

    title = "GDA"
    paper = "A Hard-to-Beat Baseline for Training-Free CLIP-Based Adaptation, ICLR 2024"
    summary = "Gaussian discriminant analysis of image features, in closed form, added to zero-shot CLIP"
    plot_style = PlotStyle("#5b6fa8", "$G$", (0, (7, 1.5)))
    Settings = GDASettings
    selection = "gda searches alpha", "set it, as in method.alpha=1"
    uses_features = True

    settings: GDASettings
    classes: TemplateClasses
    alpha: Tensor

    def __init__(
        self, settings: GDASettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        del generator  # nothing is random
        super().__init__(settings, backbone)
        self.classes = TemplateClasses(backbone, settings.templates)
        self.set_trained_classes("means of image features", class_names)
        self.set_class_names(class_names)
        self.weight = nn.Parameter(torch.zeros(len(class_names), backbone.embed_dim, device=backbone.device))
        self.bias = nn.Parameter(torch.zeros(len(class_names), device=backbone.device))
        alpha = 1.0 if settings.alpha is None else settings.alpha
        self.register_buffer("alpha", torch.tensor(alpha, device=backbone.device))

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Logits [B, C] of unit image features [B, D] and the unit text features [C, D] of the current classes."""
        zero_shot = super().logits(image_features, text_features)
        with full_precision(image_features):
            return zero_shot + self.alpha * (image_features @ self.weight[self.rows].T + self.bias[self.rows])

    @torch.no_grad()
    def fit_features(self, features: Features) -> None:
        """Estimate the discriminant from all views, each counted as an image, and search alpha.

        Raises:
            ConfigError: alpha is to be searched, and there are no validation images.
        """
        self.require_validation(len(features.val))
        weight, bias = discriminant(features, len(self.bias))
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        if not self.settings.needs_validation:
            return
        images = l2_normalize(features.val)
        zero_shot = super().logits(images, self.classes.features)
        scores = images @ self.weight.T + self.bias

        def correct(alpha: float) -> int:
            return int(((zero_shot + alpha * scores).argmax(dim=-1) == features.val_labels).sum())

        self.alpha.fill_(max(_ALPHAS, key=correct))  # the first of equally good ones

    def fit_seconds(self, features: Features) -> float:
        return seconds_of(lambda: discriminant(features, len(self.bias)))

    def selected_hyperparameters(self) -> dict[str, float]:
        return {"alpha": float(self.alpha)}


def discriminant(features: Features, classes: int) -> tuple[Tensor, Tensor]:
    """The weight [C, D] and the bias [C] of Gaussians with a shared covariance and equal priors, float64.

    The precision is D ((N - 1) S + tr(S) I)^-1, S [D, D] being the covariance of the N views around their class means
    (the shrinkage of Kubokawa and Srivastava). A class without images gets the mean of the others.

    Example:
        >>> weight, bias = discriminant(features, len(class_names))
    """
    images, labels = features.unit_views()
    images = images.double()
    sums, counts = features.class_sums(images, classes)
    means = sums / counts.clamp(min=1)
    means = torch.where(counts > 0, means, means.sum(dim=0) / (counts > 0).sum())
    centred = images - means[labels]
    scatter = centred.T @ centred  # (N - 1) S
    trace = scatter.trace() / max(len(images) - 1, 1)
    if trace < 1e-12:  # the source's pseudo-inverse of zero is zero
        logger.warning(
            "gda estimates how images of one class vary, and each class has one view of one image, or equal images: it "
            "predicts as zero-shot CLIP does; give more images, or more views (train.views)"
        )
        return torch.zeros_like(means), torch.zeros_like(means[:, 0])
    shrunk = scatter + trace * torch.eye(len(scatter), dtype=scatter.dtype, device=scatter.device)
    weight: Tensor = len(scatter) * torch.linalg.solve(shrunk, means.T).T
    return weight, -(weight * means).sum(dim=1) / 2
