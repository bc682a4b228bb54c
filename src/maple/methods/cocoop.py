"""CoCoOp: CoOp whose tokens are shifted by a function of each image.

Source: Zhou et al., "Conditional Prompt Learning for Vision-Language Models", CVPR 2022; KaiyangZhou/CoOp@ff61507
trainers/cocoop.py:60-203.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from maple.clip import Backbone, prompt_edits
from maple.descriptions import PlotStyle
from maple.errors import ConfigError
from maple.methods.base import Method, MethodSettings, full_precision, hidden_width, prompt_list
from maple.prompts import PromptedClasses, l2_normalize, to_float32
from maple.prompts.coupling import seeded_linear
from maple.prompts.initialise import first_tokens


class CoCoOpSettings(MethodSettings):
    """`meta_net_reduction` divides D to give the meta-network's hidden width, and `meta_net_layers` is its depth.

    A small reduction and more layers are "heavier CoCoOp": with 1 and 14 it has as many parameters as MaPLe.
    """

    prompt_length: int = Field(4, ge=1)
    init_text: str = "a photo of a"
    meta_net_reduction: int = Field(16, ge=1)
    meta_net_layers: int = Field(2, ge=2, le=100)


class CoCoOp(Method):
    """A small network of the image's feature is added to every text token, so text features differ per image."""

    title = "CoCoOp"
    paper = "Conditional Prompt Learning for Vision-Language Models, CVPR 2022"
    summary = "CoOp + a meta-network of the image feature, added to every token: text features are per image"
    plot_style = PlotStyle("#94734a", "P", (0, (3, 1.5, 1, 1.5)))
    report_roles = frozenset({"class baseline"})
    Settings = CoCoOpSettings
    classes_depend_on_image = True

    classes: PromptedClasses

    def __init__(
        self, settings: CoCoOpSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        super().__init__(settings, backbone)
        backbone.text.require_promptable(self.title)
        hidden = hidden_width(backbone, settings.meta_net_reduction, "meta_net_reduction")
        self.classes = PromptedClasses(backbone, prompt_length=settings.prompt_length, init_text=settings.init_text)
        tokens = first_tokens(backbone, settings.init_text, settings.prompt_length, generator)
        self.text_prompt = prompt_list([tokens], backbone)
        widths = [hidden] * (settings.meta_net_layers - 1)
        sizes = pairwise([backbone.embed_dim, *widths, backbone.text.width])
        self.meta_net = nn.ModuleList(seeded_linear(*size, generator) for size in sizes).to(backbone.device)
        self.set_class_names(class_names)

    def text_prompts(self) -> list[Tensor]:
        return [self.text_prompt[0]]

    def encode_classes(self) -> Tensor:
        """Raise ConfigError: not defined without an image."""
        raise ConfigError("CoCoOp's text features depend on the image; use encode_classes_for(image_features)")

    def token_shift(self, image_features: Tensor) -> Tensor:
        """The shift of every text token, for each of the unit image features [B, D]: [B, Ht]."""
        with full_precision(image_features):
            first, *others = self.meta_net
            states: Tensor = first(image_features)
            for layer in others:
                states = layer(torch.relu(states))
            return states

    def class_features_raw(self, image_features: Tensor) -> Tensor:
        prompts = self.text_prompts()[0] + self.token_shift(image_features)[:, None]
        return to_float32(self.classes.encode_raw(prompt_edits([prompts[:, None]])))

    def encode_classes_for(self, image_features: Tensor) -> Tensor:
        """Unit text features [B, C, D] for each of the unit image features [B, D]."""
        return l2_normalize(self.class_features_raw(image_features))
