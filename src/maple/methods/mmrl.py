"""MMRL and MMRL++: tokens of a space shared by both towers enter late, and have an image feature of their own.

Source: Guo and Gu, "MMRL: Multi-Modal Representation Learning for Vision-Language Models", CVPR 2025, section 3;
"MMRL++", IJCV 2026; yunncheng/MMRL@27d8821 trainers/mmrl.py, trainers/mmrlpp.py, clip/model_mmrl.py.
"""

from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Generator, Tensor, nn

from maple.clip import Backbone, LayerEdit
from maple.descriptions import PlotStyle
from maple.methods.base import MethodSettings, batch_accuracy, full_precision, require_both_towers
from maple.methods.teacher import Teacher
from maple.methods.trained_names import TrainedNamesMethod
from maple.prompts import PromptedClasses, l2_normalize, random_tokens, to_float32
from maple.prompts.coupling import seeded_linear, seeded_weight


class MMRLSettings(MethodSettings):
    """`tokens` tokens of width `token_width` enter before each of `layers`, blocks counted from 1.

    `alpha` is the weight of the class token's feature against that of the new tokens, in the loss and for trained
    names; `weight` is that of the distances to the frozen features.
    """

    layers: tuple[int, ...] = (6, 7, 8, 9, 10, 11, 12)
    tokens: int = Field(5, ge=1)
    token_width: int = Field(512, ge=1)
    alpha: float = Field(0.7, ge=0, le=1)
    weight: float = Field(0.5, ge=0)
    template: str = "a photo of a {}."
    logit_scale: float = Field(100.0, gt=0)

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if not layers or layers[0] < 1 or any(a >= b for a, b in pairwise(layers)):
            raise ValueError("give ascending numbers of blocks, counted from 1, as in [6, 7, 8]")
        return layers

    @classmethod
    def for_template(cls, template: str) -> dict[str, Any]:
        return {"template": template}


class MMRLPlusPlusSettings(MMRLSettings):
    """`beta` is the share of new tokens against those that the block before left; `rank` is that of the maps of layers.

    `projection_rank` is the rank of what is learned of the projection of the new tokens' image feature.
    """

    beta: float = Field(0.9, ge=0, le=1)
    rank: int = Field(4, ge=1)
    projection_rank: int = Field(64, ge=1)


class MMRL(TrainedNamesMethod):
    """Trained names are predicted by the class token and the new tokens, other names by the class token alone.

    Image features are [B, 2D], unit features of the class token and of the new tokens; class embeddings have the
    weights of both, so that logits are products.
    """

    title = "MMRL"
    paper = "MMRL: Multi-Modal Representation Learning for Vision-Language Models, CVPR 2025"
    summary = "tokens of a space shared by both towers enter late, with an image feature of their own for trained names"
    plot_style = PlotStyle("#b0436e", "$R$", (0, (5, 1.5, 1, 1.5)))
    Settings: ClassVar[type[MMRLSettings]] = MMRLSettings
    needs_frozen_features = True
    target_rule = "none"
    log_names = ("cross_entropy", "cross_entropy_representation", "image_cosine", "text_cosine", "accuracy")

    settings: MMRLSettings
    classes: PromptedClasses
    projection: Any

    def __init__(
        self, settings: MMRLSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        super().__init__(settings, backbone)
        require_both_towers(self, settings.layers[-1], "layers")
        backbone.image.require_token_features(self.title)
        self.tokens = nn.Parameter(random_tokens(settings.tokens, settings.token_width, generator=generator))
        self.add_maps(generator)
        self.classes = PromptedClasses(backbone, prompt_length=0, template=settings.template)
        self._teacher = Teacher(backbone, [settings.template])
        self.set_trained_names(class_names)
        self.set_class_names(class_names)

    def add_maps(self, generator: Generator) -> None:
        """Learn a linear map to each tower for each layer, which start as copies, and the projection of the tokens."""
        backbone, layers = self.backbone, len(self.settings.layers)
        for name, tower in (("to_vision", backbone.image), ("to_text", backbone.text)):
            first = seeded_linear(self.settings.token_width, tower.width, generator)
            setattr(self, name, nn.ModuleList(deepcopy(first) for _ in range(layers)))
        scale = backbone.image.width**-0.5
        shape = backbone.image.width, backbone.embed_dim
        self.projection = nn.Parameter(scale * torch.randn(shape, generator=generator))

    def mapped(self, name: str, layer: int) -> Tensor:
        """The tokens of a tower, "vision" or "text", for the `layer`-th of the layers: [K, H]."""
        tokens: Tensor = getattr(self, f"to_{name}")[layer](self.tokens)
        return tokens

    @property
    def kept(self) -> float:
        """The share of what the block before left in the rows of the tokens."""
        return 0.0

    def project(self, rows: Tensor) -> Tensor:
        """The feature [B, D] of the mean rows [B, Hv]."""
        feature: Tensor = rows @ self.projection
        return feature

    def text_edits(self) -> list[LayerEdit]:
        return self._edits("text")

    def vision_edits(self) -> list[LayerEdit]:
        return self._edits("vision")

    def _edits(self, name: str) -> list[LayerEdit]:
        edits = [LayerEdit()] * self.settings.layers[-1]
        with full_precision(self.tokens):
            for number, layer in enumerate(self.settings.layers):
                edits[layer - 1] = LayerEdit(tokens=self.mapped(name, number), keep=self.kept)
        return edits

    @property
    def logit_scale(self) -> float:
        return self.settings.logit_scale

    def join_token_rows(self, features: Tensor, rows: Tensor) -> Tensor:
        """Raw features [B, 2D] of the class token and of the new tokens."""
        with full_precision(rows):
            representation = self.project(to_float32(rows).mean(dim=1))
        return torch.cat([features, representation], dim=1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit features of the class token and of the new tokens: [B, 2D]."""
        class_token, representation = self.image_features_raw(images).chunk(2, dim=1)
        return torch.cat([l2_normalize(class_token), l2_normalize(representation)], dim=1)

    def text_features(self) -> Tensor:
        return self.classes.encode(self.text_edits())

    def embed_trained(self, text_features: Tensor, rows: Tensor) -> Tensor:
        del rows  # every trained name alike
        alpha = self.settings.alpha
        return torch.cat([alpha * text_features, (1 - alpha) * text_features], dim=1)

    def loss(self, images: Tensor, labels: Tensor, frozen: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropies of both features, weighted by `alpha`, and `weight` x the distances to the frozen features.

        Each distance is 1 - the mean cosine. Without `frozen` features they are computed.
        """
        alpha, weight = self.settings.alpha, self.settings.weight
        text, image = self.text_features(), self.encode_images(images)
        class_token, representation = image.chunk(2, dim=1)
        logits = self.logits(class_token, text), self.logits(representation, text)
        taught_image = self._teacher.image_features(images if frozen is None else frozen)
        taught_text = self._teacher.text_features(self.class_names)
        terms = {
            "cross_entropy": alpha * F.cross_entropy(logits[0], labels),
            "cross_entropy_representation": (1 - alpha) * F.cross_entropy(logits[1], labels),
            "image_cosine": weight * (1 - F.cosine_similarity(class_token, taught_image).mean()),
            "text_cosine": weight * (1 - F.cosine_similarity(text, taught_text).mean()),
        }
        logs = {name: term.detach() for name, term in terms.items()}
        mixture = alpha * logits[0] + (1 - alpha) * logits[1]
        return torch.stack(list(terms.values())).sum(), {**logs, "accuracy": batch_accuracy(mixture, labels)}


class MMRLPlusPlus(MMRL):
    """MMRL whose layers share a map, with low-rank differences, and whose tokens keep a share of what blocks left."""

    title = "MMRL++"
    paper = "MMRL++: Parameter-Efficient and Interaction-Aware Representation Learning, IJCV 2026"
    summary = "MMRL with a shared map of all layers, low-rank differences, and tokens that interact across layers"
    plot_style = PlotStyle("#d0688f", "$R^+$", (0, (5, 1.5, 1, 1.5, 1, 1.5)))
    Settings = MMRLPlusPlusSettings

    settings: MMRLPlusPlusSettings

    def add_maps(self, generator: Generator) -> None:
        backbone, settings = self.backbone, self.settings
        for name, tower in (("to_vision", backbone.image), ("to_text", backbone.text)):
            setattr(self, name, _SharedMap(settings, tower.width, generator))
        self.projection = nn.ParameterDict(
            {
                "down": seeded_weight(backbone.image.width, settings.projection_rank, generator),
                "up": torch.zeros(settings.projection_rank, backbone.embed_dim),
            }
        )

    def mapped(self, name: str, layer: int) -> Tensor:
        tokens: Tensor = getattr(self, f"to_{name}").of_layer(layer, self.tokens)
        return tokens

    @property
    def kept(self) -> float:
        return 1 - self.settings.beta

    def project(self, rows: Tensor) -> Tensor:
        learned: Tensor = rows @ self.projection["down"] @ self.projection["up"]
        return self.backbone.image.project(rows) + learned


class _SharedMap(nn.Module):
    """A linear map of all layers, plus a product of low rank and a bias of each."""

    def __init__(self, settings: MMRLPlusPlusSettings, width: int, generator: Generator) -> None:
        super().__init__()
        shared = seeded_linear(settings.token_width, width, generator)
        self.weight = nn.Parameter(shared.weight.detach())
        for layer in range(len(settings.layers)):
            parts = {
                "up": seeded_weight(width, settings.rank, generator),
                "down": torch.zeros(settings.rank, settings.token_width),
                "bias": shared.bias.detach().clone(),
            }
            self.add_module(str(layer), nn.ParameterDict(parts))

    def of_layer(self, layer: int, tokens: Tensor) -> Tensor:
        """Tokens [K, R] as those of a tower: [K, H]."""
        parts: Any = self.get_submodule(str(layer))
        difference: Tensor = parts["up"] @ parts["down"]
        return F.linear(tokens, self.weight + difference, parts["bias"])
