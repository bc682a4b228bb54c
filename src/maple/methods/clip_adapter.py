"""CLIP-Adapter: a small network after the image tower, whose output is mixed with its input.

Source: Gao et al., "CLIP-Adapter: Better Vision-Language Models with Feature Adapters", IJCV 2024, section 3.2;
gaopengcuhk/CLIP-Adapter@08d07f8 clip_adapter.py. Departs: the width follows the backbone, where the reference has 1024.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from maple.clip import Backbone
from maple.descriptions import PlotStyle
from maple.methods.base import Method, MethodSettings, full_precision, hidden_width
from maple.prompts import TemplateClasses, l2_normalize
from maple.prompts.coupling import seeded_linear


class CLIPAdapterSettings(MethodSettings):
    """`reduction` divides D to give the hidden width. `ratio` is the weight of the adapter's output."""

    reduction: int = Field(4, ge=1)
    ratio: float = Field(0.2, gt=0, le=1)
    templates: tuple[str, ...] = ("a photo of a {}.",)


class CLIPAdapter(Method):
    """Image features mixed with the output of a two-layer network; text features of fixed sentences."""

    title = "CLIP-Adapter"
    paper = "CLIP-Adapter: Better Vision-Language Models with Feature Adapters, IJCV 2024"
    summary = "a two-layer network of the image features, mixed with them; both towers are unchanged"
    plot_style = PlotStyle("#1f5f8b", "p", (0, (9, 2, 2, 2)))
    Settings = CLIPAdapterSettings

    settings: CLIPAdapterSettings

    def __init__(
        self, settings: CLIPAdapterSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        super().__init__(settings, backbone)
        width = backbone.embed_dim
        hidden = hidden_width(backbone, settings.reduction, "reduction")
        layers = [seeded_linear(*size, generator) for size in pairwise([width, hidden, width])]
        self.adapter = nn.ParameterList(nn.Parameter(layer.weight.detach().to(backbone.device)) for layer in layers)
        self.classes = TemplateClasses(backbone, settings.templates)
        self.set_class_names(class_names)

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit image features [B, D]: `ratio` of the adapter's output, 1 - `ratio` of the tower's."""
        raw = self.image_features_raw(images)
        with full_precision(raw):
            adapted = torch.relu(torch.relu(raw @ self.adapter[0].T) @ self.adapter[1].T)
        return l2_normalize(self.settings.ratio * adapted + (1 - self.settings.ratio) * raw)
