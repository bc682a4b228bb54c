"""Linear probe: logistic regression on frozen image features.

Source: CLIP, ICML 2021, section 3.2; the sweep of few-shot papers: KaiyangZhou/CoOp@ff61507 lpclip/linear_probe.py.
Departs: features are unit-norm, as everywhere here, so that the same C regularises differently; the sweep adapts to it.
"""

from collections.abc import Callable, Sequence
from functools import cache

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

_COARSE = (1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6)
_HALVINGS = 8
_MOST_STEPS = 1000
# What a search took on CLIP's features of 80 to 300 photographs: problems that are solved, and steps of each.
_TYPICAL_PROBLEMS, _TYPICAL_STEPS = 15, 70


class LinearProbeSettings(PerClassSettings):
    """`inverse_regularisation` is scikit-learn's C; by default it is selected on the validation images."""

    inverse_regularisation: float | None = Field(None, gt=0)

    @property
    def needs_validation(self) -> bool:
        return self.inverse_regularisation is None


class LinearProbe(PerClassMethod):
    """A weight [C, D] and a bias [C]; before `fit_features` it is zero-shot CLIP with "a photo of a {}."."""

    title = "linear probe"
    paper = "CLIP, ICML 2021, section 3.2; the sweep as in CoOp, IJCV 2022"
    summary = "logistic regression on frozen image features, its regularisation selected on validation images"
    plot_style = PlotStyle("#99612b", ">", (0, (3, 3)))
    Settings = LinearProbeSettings
    selection = "linear_probe selects its regularisation", "set it, as in method.inverse_regularisation=1"
    uses_features = True
    uses_text_tower = False

    settings: LinearProbeSettings

    def __init__(
        self, settings: LinearProbeSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        del generator  # nothing is random
        super().__init__(settings, backbone)
        self.classes = TemplateClasses(backbone, ["a photo of a {}."])
        self.set_trained_classes("weights of a linear probe", class_names)
        self.set_class_names(class_names)
        self.weight = nn.Parameter(backbone.logit_scale * self.classes.features)
        self.bias = nn.Parameter(torch.zeros(len(class_names), device=backbone.device))
        self._selected: dict[str, float] = {}

    def encode_classes(self) -> Tensor:
        """The weights of the classes [C, D], normalised."""
        return l2_normalize(self.weight[self.rows])

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Weights times features, plus bias: [B, C], for unit features [B, D] and normalised weights [C, D]."""
        lengths: Tensor = self.weight[self.rows].norm(dim=-1)
        with full_precision(image_features):
            return image_features @ text_features.T * lengths + self.bias[self.rows]

    def fit_features(self, features: Features) -> None:
        """Fit the regression to the features of all views, with the C that is best on the validation images.

        Raises:
            ConfigError: C is not set, and there are no validation images to select it on.
        """
        self.require_validation(len(features.val))
        x, y = features.unit_views()

        @cache  # the search comes back to the ends of its intervals, and the last of them is the solution
        def solution(c: float) -> tuple[Tensor, Tensor]:
            return solve(x, y, len(self.bias), c)

        strength = self.settings.inverse_regularisation
        if strength is None:

            def correct(c: float) -> int:
                weight, bias = solution(c)
                scores = l2_normalize(features.val).double() @ weight.T + bias
                return int((scores.argmax(dim=-1) == features.val_labels).sum())

            strength = _sweep(correct)
        weight, bias = solution(strength)
        with torch.no_grad():
            self.weight.copy_(weight)
            self.bias.copy_(bias)
        self._selected = {"inverse_regularisation": strength}

    def fit_seconds(self, features: Features) -> float:
        x, y = features.unit_views()

        def run(steps: int) -> None:
            solve(x, y, len(self.bias), 100.0, most_steps=steps)

        problems = 1 if self.settings.inverse_regularisation is not None else _TYPICAL_PROBLEMS
        return problems * seconds_of_steps(run, _TYPICAL_STEPS, 8)

    def selected_hyperparameters(self) -> dict[str, float]:
        return self._selected


def solve(x: Tensor, y: Tensor, classes: int, c: float, *, most_steps: int = _MOST_STEPS) -> tuple[Tensor, Tensor]:
    """Minimise c x the sum of cross-entropies + half the squared weights: ([C, D], [C]), float64.

    Args:
        x: [N, D].
        y: [N] int64, below `classes`.
    """
    x = x.double()
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=most_steps, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        # The mean over images, and the penalty on the same scale, so that one tolerance serves every N and C.
        loss = F.cross_entropy(x @ weight.T + bias, y) + weight.square().sum() / (2 * c * len(x))
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _sweep(correct: Callable[[float], int]) -> float:
    """The C with most correct predictions: the best power of 100, then a binary search around it in logarithms.

    Of two equally good ends the stronger regularisation is taken, as in the source.
    """
    peak = max(_COARSE, key=correct)  # the first of equally good ones
    low, high = 0.1 * peak, 10 * peak
    best = low
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        if correct(low) < correct(high):
            best, low = high, middle
        else:
            best, high = low, middle
    return best
