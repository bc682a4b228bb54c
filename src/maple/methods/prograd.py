"""ProGrad: CoOp whose training steps never oppose the predictions of zero-shot CLIP.

Source: Zhu et al., "Prompt-aligned Gradient for Prompt Tuning", ICCV 2023, section 3.2; BeierZhu/Prompt-align@1b76203
ProGrad.public/trainers/prograd.py (start, losses) and Dassl.ProGrad.pytorch/dassl/engine/trainer.py (projection).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from maple.clip import Backbone
from maple.descriptions import PlotStyle
from maple.errors import ConfigError
from maple.methods.base import MethodSettings, batch_accuracy
from maple.methods.coop import CoOp, CoOpSettings
from maple.methods.teacher import Teacher
from maple.methods.wraps_prompts import WrapsPrompts

_NAME = " {}."


class ProGradSettings(MethodSettings):
    """The prompt starts from the words of `teacher_template`, which has the class name at its end.

    With fewer words than `prompt_length` the leading tokens start at zero. `strength` is the paper's lambda: how much
    of an opposing component is taken out, 1 for all of it. `temperature` softens both predictions.
    """

    prompt_length: int = Field(16, ge=1)
    strength: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, gt=0)
    teacher_template: str = "a photo of a {}."

    @classmethod
    def for_template(cls, template: str) -> dict[str, Any]:
        """The data set's sentence with its end moved to the front, as in "a type of pet, a photo of a {}."."""
        before, _, after = template.partition("{}")
        after = after.strip(" ,.")
        if not before.strip():
            return {}
        return {"teacher_template": f"{after}, {before}{{}}." if after else f"{before}{{}}."}


class ProGrad(WrapsPrompts):
    """CoOp's prompts; the component of the gradient that increases the divergence from zero-shot CLIP is removed."""

    title = "ProGrad"
    paper = "Prompt-aligned Gradient for Prompt Tuning, ICCV 2023"
    summary = "CoOp without the component of the gradient that opposes the predictions of zero-shot CLIP"
    plot_style = PlotStyle("#b4638c", "h", (0, (8, 3)))
    Settings = ProGradSettings
    log_names = ("cross_entropy", "kl", "accuracy")
    auxiliary_losses = ("kl",)

    settings: ProGradSettings

    def __init__(
        self, settings: ProGradSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        template, length = settings.teacher_template, settings.prompt_length
        words = template.removesuffix(_NAME).strip()
        count = len(words.split())
        if not template.endswith(_NAME) or not words or "{}" in words:
            raise ConfigError(
                f"teacher_template {template!r} must be words followed by the class name, as in 'a photo of a {{}}.': "
                "the prompt starts from these words"
            )
        if count > length:
            raise ConfigError(
                f"teacher_template {template!r} has {count} words before the class name, more than "
                f"prompt_length={length}; set prompt_length={count}, or use a shorter template"
            )
        missing = length - count
        coop = CoOpSettings(prompt_length=length, init_text=" ".join([backbone.placeholder] * missing + [words]))
        super().__init__(settings, CoOp(coop, backbone, class_names, generator))
        with torch.no_grad():
            self.text_prompts()[0][:missing] = 0
        self._teacher = Teacher(backbone, [settings.teacher_template])

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy; the log "kl" is the cross-entropy to the teacher's softened predictions, times T squared.

        It differs from the divergence by the teacher's entropy, which does not have a gradient.
        """
        image_features = self.encode_images(images)
        logits = self.logits(image_features, self.encode_classes())
        # Both have the same image tower, and so the same image features.
        taught = self.logits(image_features, self._teacher.text_features(self.class_names))
        temperature = self.settings.temperature
        kl = F.cross_entropy(logits / temperature, (taught / temperature).softmax(dim=-1)) * temperature**2
        cross_entropy = F.cross_entropy(logits, labels)
        logs = {"cross_entropy": cross_entropy.detach(), "kl": kl, "accuracy": batch_accuracy(logits, labels)}
        return cross_entropy, logs

    def combine_gradients(self, gradients: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The gradient of the cross-entropy without its component along that of "kl", if the two are opposed."""
        combined = {}
        for name, gradient in gradients["loss"].items():
            direction = F.normalize(gradients["kl"][name].flatten(), dim=0).view_as(gradient)
            component = (gradient * direction).sum()
            combined[name] = gradient - self.settings.strength * component.clamp(max=0) * direction
        return combined
