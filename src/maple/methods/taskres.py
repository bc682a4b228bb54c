"""TaskRes: a learned residual on the text feature of each class.

Source: Yu et al., "Task Residual for Tuning Vision-Language Models", CVPR 2023, section 3.3;
geekyutao/TaskRes@293cc9e trainers/taskres.py (with the regular base classifier, not the enhanced one).
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from maple.clip import Backbone
from maple.descriptions import PlotStyle
from maple.methods.per_class import PerClassMethod, PerClassSettings
from maple.prompts import TemplateClasses, l2_normalize


class TaskResSettings(PerClassSettings):
    """`scale` is the weight of the residual, the paper's alpha."""

    scale: float = Field(0.5, gt=0)
    templates: tuple[str, ...] = ("a photo of a {}.",)


class TaskRes(PerClassMethod):
    """Raw text features of fixed sentences, plus `scale` times a residual [C, D] that starts at zero."""

    title = "TaskRes"
    paper = "Task Residual for Tuning Vision-Language Models, CVPR 2023"
    summary = "a learned residual on the text feature of each class; both towers are unchanged"
    plot_style = PlotStyle("#23272e", "8", (0, (6, 2, 1, 2, 1, 2)))
    Settings = TaskResSettings

    settings: TaskResSettings
    classes: TemplateClasses

    def __init__(
        self, settings: TaskResSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        del generator  # it starts at zero
        super().__init__(settings, backbone)
        self.residual = nn.Parameter(torch.zeros(len(class_names), backbone.embed_dim, device=backbone.device))
        self.classes = TemplateClasses(backbone, settings.templates, normalize_each=False)
        self.set_trained_classes("residuals of text features", class_names)
        self.set_class_names(class_names)

    def encode_classes(self) -> Tensor:
        return l2_normalize(self.classes.mean + self.settings.scale * self.residual[self.rows])
