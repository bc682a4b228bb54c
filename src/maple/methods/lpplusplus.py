"""LP++: a linear probe plus text features, blended by a learned factor for each class, with step sizes from the data.

Source: Huang et al., "LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP", CVPR 2024, arXiv 2404.02285; the
behaviour of FereshteShakeri/FewShot-CLIP-Strong-Baseline@f81054f. Departs: float32, where the source is in float16 on a
GPU; classes need not have equally many images, and the mean that starts the blend is over those that have some.
"""

from collections.abc import Sequence
from copy import copy

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

_BLEND_SCALE = 250


class LPPlusPlusSettings(PerClassSettings):
    """`select_epoch` keeps the epoch that is best on the validation images; without it the last one is kept.

    `epochs` are of the full batch, all within `fit_features`; the blend makes a step after every `blend_every` epochs.
    """

    epochs: int = Field(300, ge=1)
    momentum: float = Field(0.9, ge=0, lt=1)
    blend_every: int = Field(10, ge=1)
    select_epoch: bool = True
    templates: tuple[str, ...] = ("a photo of a {}.",)

    @property
    def needs_validation(self) -> bool:
        return self.select_epoch


class LPPlusPlus(PerClassMethod):
    """Logits are image features x weight [C, D], plus bias [C], plus blend [C] x cosines to the text features.

    Before `fit_features`, weight and bias are zero and the blend is CLIP's logit scale: zero-shot CLIP.

    Attributes:
        start_bias: the bias [C] at which `fit_features` starts.
        rates: the learning rates of weight and bias, and of the blend, which `fit_features` computes.
        fit_losses, val_accuracies: of each epoch of `fit_features`; the loss is that before the epoch's step, and the
            accuracy, a fraction, that after it.
    """

    title = "LP++"
    paper = "LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP, CVPR 2024"
    summary = "a linear probe plus text features, blended by a factor for each class; step sizes from the data"
    plot_style = PlotStyle("#b0762b", "$P$", (0, (1, 2)))
    Settings = LPPlusPlusSettings
    selection = "lpplusplus selects its epoch", "set method.select_epoch=false to keep the last epoch"
    uses_features = True

    settings: LPPlusPlusSettings
    classes: TemplateClasses

    def __init__(
        self, settings: LPPlusPlusSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        super().__init__(settings, backbone)
        self.classes = TemplateClasses(backbone, settings.templates)
        self.set_trained_classes("weights of LP++", class_names)
        self.set_class_names(class_names)
        count, width, device = len(class_names), backbone.embed_dim, backbone.device
        self.weight = nn.Parameter(torch.zeros(count, width, device=device))
        self.bias = nn.Parameter(torch.zeros(count, device=device))
        self.blend = nn.Parameter(torch.full((count,), float(backbone.logit_scale), device=device))
        # The source fits from the random bias of a new linear layer of PyTorch.
        self.start_bias = ((2 * torch.rand(count, generator=generator) - 1) / width**0.5).to(device)
        self.rates = (0.0, 0.0)
        self.fit_losses: list[float] = []
        self.val_accuracies: list[float] = []
        self._selected: dict[str, float] = {}

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Logits [B, C] of unit image features [B, D] and the unit text features [C, D] of the current classes."""
        with full_precision(image_features):
            cosines = image_features @ text_features.T
            return image_features @ self.weight[self.rows].T + self.bias[self.rows] + self.blend[self.rows] * cosines

    @torch.no_grad()
    def start(self, features: Features) -> None:
        """Set the parameters to what `fit_features` starts at; classes without images do not count for the blend."""
        images, labels = features.unit_views()
        sums, counts = features.class_sums(images, len(self.bias))
        self.weight.copy_(sums)  # the sum, not the mean
        self.bias.copy_(self.start_bias)
        own_cosines = (images * self.classes.features[labels]).sum(dim=1, keepdim=True)
        sums, _ = features.class_sums(own_cosines, len(self.bias))
        self.blend.fill_(float(_BLEND_SCALE * (sums[counts > 0] / counts[counts > 0]).mean()))

    def fit_features(self, features: Features) -> None:
        """Fit all parameters to the features of all views, each counted as an image.

        Raises:
            ConfigError: the epoch is to be selected, and there are no validation images.
        """
        self.require_validation(len(features.val))
        images, labels = features.unit_views()
        val, text = l2_normalize(features.val), self.classes.features
        cosines = images @ text.T
        self.start(features)
        # Reciprocals of bounds on the curvature of the cross-entropy, in the weights and in the blend.
        weight_rate = 4 * len(images) / float(torch.linalg.matrix_norm(images, ord=2) ** 2)
        blend_rate = len(images) / (4 * float(cosines.square().sum(dim=0).max()))
        self.rates = weight_rate, blend_rate
        optimizer = torch.optim.SGD([self.weight, self.bias], lr=weight_rate, momentum=self.settings.momentum)
        self.fit_losses, self.val_accuracies = [], []
        self.blend.grad = None
        best, best_epoch = self._values(), 0
        for epoch in range(1, self.settings.epochs + 1):
            optimizer.zero_grad()
            loss = F.cross_entropy(images @ self.weight.T + self.bias + self.blend * cosines, labels)
            loss.backward()
            optimizer.step()
            if epoch % self.settings.blend_every == 0 and self.blend.grad is not None:
                with torch.no_grad():
                    # As in the source, the gradient is the sum over all epochs so far: it is never set to zero.
                    self.blend -= blend_rate * self.blend.grad
            self.fit_losses.append(loss.item())
            if len(val):
                with torch.no_grad():
                    correct = (self.logits(val, text).argmax(dim=-1) == features.val_labels).float().mean()
                self.val_accuracies.append(float(correct))
                if self.settings.select_epoch and self.val_accuracies[-1] == max(self.val_accuracies):
                    best, best_epoch = self._values(), epoch  # of equally good epochs, the last
        self.blend.grad = None
        if self.settings.select_epoch:
            with torch.no_grad():
                for name, value in self.named_parameters():
                    value.copy_(best[name])
            self._selected = {"epoch": float(best_epoch)}

    def fit_seconds(self, features: Features) -> float:
        shorter = copy(self)

        def run(epochs: int) -> None:
            shorter.settings = self.settings.changed(epochs=epochs)
            shorter.fit_features(features)

        return seconds_of_steps(run, self.settings.epochs, 6)

    def _values(self) -> dict[str, Tensor]:
        """Copies of all parameters by name."""
        return {name: value.detach().clone() for name, value in self.named_parameters()}

    def selected_hyperparameters(self) -> dict[str, float]:
        return self._selected
