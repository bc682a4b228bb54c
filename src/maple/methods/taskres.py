"""TaskRes: a learned residual on the text feature of each class.

Source: Yu et al., "Task Residual for Tuning Vision-Language Models", CVPR 2023, section 3.3;
geekyutao/TaskRes@293cc9e trainers/taskres.py (the regular base; the enhanced one is another training).
"""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from maple.clip import Backbone
from maple.descriptions import PlotStyle
from maple.methods.per_class import PerClassMethod, PerClassSettings
from maple.prompts import TemplateClasses, l2_normalize


class TaskResSettings(PerClassSettings):
    """`scale`: how much of the residual is added, the paper's alpha."""

    scale: float = Field(0.5, gt=0)
    templates: tuple[str, ...] = ("a photo of a {}.",)

    @classmethod
    def for_template(cls, template: str) -> dict[str, Any]:
        """One sentence: the data set's own."""
        return {"templates": [template]}


class TaskRes(PerClassMethod):
    """Raw text features of fixed sentences, plus `scale` times a residual [C, D] that starts at zero."""

    title = "TaskRes"
    paper = "Task Residual for Tuning Vision-Language Models, CVPR 2023"
    summary = "a learned residual on the text feature of each class; both towers are left alone"
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
        self.classes = TemplateClasses(backbone, settings.templates, unit_each=False)
        self.learn_classes("residuals of text features", class_names)
        self.set_class_names(class_names)

    def encode_classes(self) -> Tensor:
        """Unit text features [C, D]."""
        return l2_normalize(self.classes.mean + self.settings.scale * self.residual[self.rows])
