"""Tip-Adapter: zero-shot CLIP plus a cache of training features; fine-tuned, it is Tip-Adapter-F.

Source: Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification", ECCV 2022, section 3;
gaopengcuhk/Tip-Adapter@d0e2d6f main.py, utils.py. Departs: after fine-tuning the last epoch is kept, where the
reference keeps the one that is best on the test images; AdamW's epsilon is 1e-8, where the reference, whose keys are
float16, needs 1e-4: in float32, 1e-8 comes nearer to what it publishes.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from maple.clip import Backbone
from maple.descriptions import PlotStyle
from maple.methods.base import full_precision
from maple.methods.features import Features, seconds_of_steps
from maple.methods.per_class import PerClassMethod, PerClassSettings
from maple.prompts import TemplateClasses, l2_normalize

_Scale = Annotated[float, Field(gt=0.1)]
_Steps = Annotated[int, Field(ge=1, le=10_000)]


class TipAdapterSettings(PerClassSettings):
    """`learn_keys`: fine-tune the cached features (Tip-Adapter-F).

    `alpha` is the weight of the cache and `beta` the sharpness of its affinities; by default both are searched on the
    validation images, in `search_steps` steps from 0.1 to below `search_scale`: both list beta first, as the source
    does. Fine-tuning uses `alpha` and `beta` if they are set, else `start_alpha` and `start_beta`.
    """

    learn_keys: bool = False
    alpha: float | None = Field(None, ge=0)
    beta: float | None = Field(None, ge=0)
    start_alpha: float = Field(1.0, ge=0)
    start_beta: float = Field(5.5, ge=0)
    search_scale: tuple[_Scale, _Scale] = (7.0, 3.0)
    search_steps: tuple[_Steps, _Steps] = (200, 20)
    templates: tuple[str, ...] = ("a photo of a {}.",)

    @property
    def needs_validation(self) -> bool:
        return self.alpha is None or self.beta is None


class TipAdapter(PerClassMethod):
    """Zero-shot logits plus those of a cache, whose keys are image features and whose values are their classes.

    Before `fit_features`, the keys are the text features of the classes.
    """

    title = "Tip-Adapter"
    paper = "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification, ECCV 2022"
    summary = "training images vote by the similarity of their features; fine-tuned with learn_keys (Tip-Adapter-F)"
    plot_style = PlotStyle("#8a4f7d", "d", (0, (2, 2, 6, 2)))
    Settings = TipAdapterSettings
    selection = "tip_adapter searches alpha and beta", "set both, as in method.alpha=1 and method.beta=5.5"
    uses_features = True

    settings: TipAdapterSettings
    classes: TemplateClasses
    keys: Tensor
    labels: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(
        self, settings: TipAdapterSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        del generator  # nothing is random
        super().__init__(settings, backbone)
        self.classes = TemplateClasses(backbone, settings.templates)
        self.set_trained_classes("votes of cached images", class_names)
        self.set_class_names(class_names)
        for name in ("alpha", "beta"):
            value = getattr(settings, name)
            value = getattr(settings, f"start_{name}") if value is None else value
            self.register_buffer(name, torch.tensor(value, device=backbone.device))
        self._set_cache(self.classes.features, torch.arange(len(class_names), device=backbone.device))
        self._count = len(class_names)

    def _set_cache(self, keys: Tensor, labels: Tensor) -> None:
        """Set the keys, N unit features [N, D], and the indices of their classes [N]."""
        if self.settings.learn_keys:
            self.keys = nn.Parameter(keys.clone())
        else:
            self.register_buffer("keys", keys.clone())
        self.register_buffer("labels", labels.clone())

    def resize_for(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Resize the cache to the number of training images."""
        keys, labels = shapes.get("keys"), shapes.get("labels")
        if keys != tuple(self.keys.shape) and labels is not None and keys == (*labels, self.backbone.embed_dim):
            self._set_cache(self.keys.new_zeros(keys), self.labels.new_zeros(labels))

    def problems_of(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Labels that are not rows of the classes."""
        labels = tensors["labels"]
        wrong = labels[(labels < 0) | (labels >= self._count)].tolist()
        return [f"labels holds {wrong[0]}, but the classes are 0 to {self._count - 1}"] if wrong else []

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Scaled cosines plus the cache's logits [B, C] for unit features [B, D] and [C, D]."""
        with full_precision(image_features):
            cached = self._cache_logits(image_features @ self.keys.T, self.beta)[:, self.rows]
            return super().logits(image_features, text_features) + self.alpha * cached

    def _cache_logits(self, cosines: Tensor, beta: Tensor | float) -> Tensor:
        """The cache's logits [B, all learned classes] for cosines [B, N] to the keys."""
        values = F.one_hot(self.labels, self._count).to(cosines.dtype)
        return torch.exp(-beta * (1 - cosines)) @ values

    @torch.no_grad()
    def fit_features(self, features: Features) -> None:
        """Set the keys to the mean feature of each image's views; without fine-tuning, search alpha and beta.

        Raises:
            ConfigError: alpha or beta is to be searched, and there are no validation images.
        """
        self.require_validation(len(features.val))
        self._set_cache(l2_normalize(features.train.mean(dim=0)), features.train_labels)
        if not self.settings.learn_keys:
            self._search(features)

    def select_hyperparameters(self, features: Features) -> None:
        """After fine-tuning, search alpha and beta."""
        if self.settings.learn_keys:
            self._search(features)

    @torch.no_grad()
    def _search(self, features: Features) -> None:
        """Take the first pair of the grid, beta in the outer loop, that classifies most validation images correctly."""
        if not self.settings.needs_validation:
            return
        images = l2_normalize(features.val)
        zero_shot, cosines = super().logits(images, self.classes.features), images @ self.keys.T
        settings = self.settings
        betas, alphas = (
            [value] if value is not None else [0.1 + step * (scale - 0.1) / steps for step in range(steps)]
            for value, scale, steps in zip(
                (settings.beta, settings.alpha), settings.search_scale, settings.search_steps, strict=True
            )
        )
        best = -1
        for beta in betas:
            cached = self._cache_logits(cosines, beta)
            for alpha in alphas:
                correct = int(((zero_shot + alpha * cached).argmax(dim=-1) == features.val_labels).sum())
                if correct > best:
                    best = correct
                    self.alpha.fill_(alpha)
                    self.beta.fill_(beta)

    def fit_seconds(self, features: Features) -> float:
        self._set_cache(l2_normalize(features.train.mean(dim=0)), features.train_labels)
        betas, alphas = self.settings.search_steps
        shorter = copy(self)

        def run(steps: int) -> None:
            shorter.settings = self.settings.changed(search_steps=(steps, alphas))
            shorter._search(features)

        return seconds_of_steps(run, betas if self.settings.beta is None else 1, 3)

    def selected_hyperparameters(self) -> dict[str, float]:
        return {"alpha": float(self.alpha), "beta": float(self.beta)}
