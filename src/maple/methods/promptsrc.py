"""PromptSRC: prompts regularised by the frozen CLIP, by an ensemble of templates, and by averaging over epochs.

Source: Khattak et al., "Self-regulating Prompts: Foundational Model Adaptation without Forgetting", ICCV 2023, sections
3.2-3.4; muzairkhattak/PromptSRC@bb95c77 trainers/promptsrc.py. Departs: only prompts are averaged over epochs, where
the reference averages the whole model in float16, frozen weights included.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Generator, Tensor

from maple.clip import Backbone
from maple.descriptions import PlotStyle
from maple.errors import CheckpointError
from maple.methods.base import Method, batch_accuracy
from maple.methods.independent_vl import IndependentVL, IndependentVLSettings
from maple.methods.teacher import Teacher
from maple.methods.wraps_prompts import WrapsPrompts, settings_of


def sixty_templates() -> tuple[str, ...]:
    """Sixty of CLIP's eighty templates for ImageNet, of which the text teacher is the average.

    Source: muzairkhattak/PromptSRC@bb95c77 trainers/imagenet_templates.py; openai/CLIP notebooks.
    """
    file = resources.files("maple") / "assets" / "templates" / "imagenet_sixty.txt"
    return tuple(file.read_text(encoding="utf-8").splitlines())


class PromptSRCSettings(IndependentVLSettings):
    """Independent V-L prompts and their regularisation.

    `gpa_mean` and `gpa_std`, in epochs from 1, are the Gaussian that weights the prompts of each epoch in the final
    average; with fewer epochs than the mean, the last ones have most weight. `prompts` selects those of another method,
    as in {name = "maple", prompt_depth = 9}; the lengths, depths and `init_text` here must then keep their defaults.
    """

    text_prompt_length: int = Field(4, ge=0)
    vision_prompt_length: int = Field(4, ge=0)
    text_prompt_depth: int = Field(9, ge=0)
    vision_prompt_depth: int = Field(9, ge=0)
    prompts: dict[str, Any] = Field(default={})
    text_loss_weight: float = Field(25.0, ge=0)
    image_loss_weight: float = Field(10.0, ge=0)
    gpa_mean: float = 15.0
    gpa_std: float = Field(1.0, gt=0)
    teacher_templates: tuple[str, ...] = Field(default_factory=sixty_templates)

    @property
    def supports_new_classes(self) -> bool:
        return settings_of(self.prompts).supports_new_classes if self.prompts else super().supports_new_classes

    @property
    def draws_random_numbers(self) -> bool:
        return bool(self.prompts) and settings_of(self.prompts).draws_random_numbers

    @field_validator("prompts")
    @classmethod
    def _complete(cls, prompts: dict[str, Any]) -> dict[str, Any]:
        return {"name": prompts.get("name"), **settings_of(prompts).model_dump(mode="json")} if prompts else prompts

    @model_validator(mode="after")
    def _one_kind_of_prompts(self) -> Self:
        fields = {name: type(self).model_fields[name].default for name in IndependentVLSettings.model_fields}
        set_here = [name for name, default in fields.items() if getattr(self, name) != default]
        if self.prompts and set_here:
            raise ValueError(
                f"{', '.join(set_here)} would be ignored, since prompts = {self.prompts} names another method; set "
                "them inside prompts, or leave prompts out"
            )
        return self


class PromptSRC(WrapsPrompts):
    """Independent V-L prompts, or those of `prompts`, kept close to the frozen features and averaged over epochs."""

    title = "PromptSRC"
    paper = "Self-regulating Prompts: Foundational Model Adaptation without Forgetting, ICCV 2023"
    summary = "IVLP, or other prompts, kept close to the frozen features and predictions; averaged over epochs"
    plot_style = PlotStyle("#5a6b2f", "<", (0, (1, 3)))
    Settings = PromptSRCSettings
    needs_frozen_features = True
    added_names = ("text_l1", "image_l1", "logits_kl")
    log_names = ("cross_entropy", *added_names, "accuracy")

    settings: PromptSRCSettings

    def __init__(
        self, settings: PromptSRCSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        prompts: Method
        if settings.prompts:
            from maple.methods import build_method  # imports this module

            prompts = build_method(settings.prompts, backbone, class_names, generator=generator)
        else:
            kept = settings.model_dump(include=set(IndependentVLSettings.model_fields))
            prompts = IndependentVL(IndependentVLSettings(**kept), backbone, class_names, generator)
        super().__init__(settings, prompts)
        self._teacher = Teacher(backbone, settings.teacher_templates, normalize_each=False)
        self._average = {name: torch.zeros_like(value) for name, value in self.prompt_parameters().items()}

    def added_terms(
        self, image_features: Tensor, text_features: Tensor, images: Tensor
    ) -> Mapping[str, tuple[float, Tensor]]:
        """L1 distances to the frozen features of both towers, and the divergence from the frozen predictions.

        Each is a mean over its elements; the divergence over B and C.
        """
        taught_text = self._teacher.text_features(self.class_names)
        taught_image = self._teacher.image_features(images)
        logits, taught = self.logits(image_features, text_features), self.logits(taught_image, taught_text)
        divergence = F.kl_div(logits.log_softmax(-1), taught.log_softmax(-1), reduction="sum", log_target=True)
        return {
            "text_l1": (self.settings.text_loss_weight, F.l1_loss(text_features, taught_text)),
            "image_l1": (self.settings.image_loss_weight, F.l1_loss(image_features, taught_image)),
            "logits_kl": (1.0, divergence / logits.numel()),
        }

    def loss(self, images: Tensor, labels: Tensor, frozen: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy + the added terms; without `frozen` features of the images they are computed."""
        text, image = self.encode_classes(), self.encode_images(images)
        logits = self.logits(image, text)
        added = self.added_terms(image, text, images if frozen is None else frozen)
        terms = {"cross_entropy": F.cross_entropy(logits, labels)}
        terms |= {name: weight * value for name, (weight, value) in added.items()}
        logs = {name: value.detach() for name, value in terms.items()}
        return torch.stack(list(terms.values())).sum(), {**logs, "accuracy": batch_accuracy(logits, labels)}

    @torch.no_grad()
    def on_epoch_end(self, epoch: int, epochs: int) -> None:
        """Add this epoch's prompts to the average; after the last epoch, replace the prompts by it."""
        weight = epoch_weights(epochs, self.settings.gpa_mean, self.settings.gpa_std)[epoch]
        for name, parameter in self.prompt_parameters().items():
            self._average[name] += weight * parameter
            if epoch == epochs - 1:
                parameter.copy_(self._average[name])

    def training_state(self) -> dict[str, Tensor]:
        return {f"average/{name}": value for name, value in self._average.items()}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        expected = {name: list(value.shape) for name, value in self.training_state().items()}
        shapes = {name: list(value.shape) for name, value in state.items()}
        if shapes != expected:
            raise CheckpointError(f"the average of the prompts does not fit: {shapes} instead of {expected}")
        for name, value in self._average.items():
            value.copy_(state[f"average/{name}"])


def epoch_weights(epochs: int, mean: float, std: float) -> list[float]:
    """The weights of the epochs in the final average of prompts: a Gaussian at 1, 2, ..., `epochs`, with sum 1."""
    at = torch.arange(1, epochs + 1, dtype=torch.float64)
    return (-0.5 * ((at - mean) / std) ** 2).softmax(dim=0).tolist()
