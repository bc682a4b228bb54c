"""2SFS: the norms of the blocks or low-rank updates first, then a classifier of the trained names.

Source: Farina et al., "Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages", CVPR 2025, section 4;
FarinaMatteo/rethinking_fewshot_vlms@64ac143 fs/twostage.py, fs/utils/model_utils.py. The norms outside of the
blocks are given to the optimizer there, but stay frozen (model_utils.py:136-162): here they are not given to it.
Departs: the text features that the classifier starts from are computed without dropout.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from maple.clip import Backbone, ImageTower, LayerEdit, TextTower
from maple.clip.edits import Projection
from maple.descriptions import PlotStyle
from maple.errors import ConfigError
from maple.methods.base import Method, MethodSettings, TrainingStage, batch_accuracy
from maple.methods.clip_lora import LowRankUpdates
from maple.methods.trained_names import TrainedNamesMethod
from maple.prompts import PromptedClasses, TemplateClasses, l2_normalize, to_float32


class TwoStageSettings(MethodSettings):
    """The first stage takes `fraction` of the steps, and tunes the blocks from the starts on, counted from 0.

    `sides` names the towers that are tuned; `matrices`, `rank`, `alpha` and `dropout` are those of CLIP-LoRA, for
    `tuned` = "lora" alone.
    """

    tuned: Literal["layer_norm", "lora"] = "layer_norm"
    sides: Literal["both", "text", "vision"] = "both"
    vision_start: int = Field(0, ge=0)
    text_start: int = Field(0, ge=0)
    fraction: float = Field(0.6, gt=0, lt=1)
    template: str = "a photo of a {}."
    matrices: tuple[Projection, ...] = ("q", "k", "v")
    rank: int = Field(2, ge=1)
    alpha: float = Field(1.0, gt=0)
    dropout: float = Field(0.25, ge=0, lt=1)

    @property
    def draws_random_numbers(self) -> bool:
        return self.tuned == "lora" and self.dropout > 0


class TunedNorms(nn.ModuleDict):
    """Learned affine parameters of the norms of a tower's blocks, which start at CLIP's.

    `block.1.weight` and `block.1.bias` [H] are those of the norm before the attention, and `block.2` before the MLP.
    """

    def __init__(self, tower: TextTower | ImageTower, layers: Sequence[int]) -> None:
        super().__init__()
        for layer in layers:
            norms = nn.ModuleDict()
            for number, (weight, bias) in enumerate(tower.norms(layer), start=1):
                start = {"weight": to_float32(weight).clone(), "bias": to_float32(bias).clone()}
                norms[str(number)] = nn.ParameterDict(start)
            self[str(layer)] = norms

    def edits(self) -> list[LayerEdit]:
        """The edits of the blocks up to the last one."""
        edits = [LayerEdit()] * (max(map(int, self)) + 1)
        for layer, norms in self.items():
            first, second = (norms[number] for number in "12")  # type: ignore[index]
            edits[int(layer)] = LayerEdit(norms=((first["weight"], first["bias"]), (second["weight"], second["bias"])))
        return edits


class TwoStage(TrainedNamesMethod):
    """Trained names are predicted by rows of the classifier, other names by the tuned text tower."""

    title = "2SFS"
    paper = "Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages, CVPR 2025"
    summary = "the norms of both towers' blocks or low-rank updates first, then a classifier for trained names"
    plot_style = PlotStyle("#7a5195", "$2$", (0, (8, 1, 1, 1, 1, 1)))
    Settings = TwoStageSettings

    settings: TwoStageSettings

    def __init__(
        self, settings: TwoStageSettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        super().__init__(settings, backbone)
        self._tuned = settings.tuned
        self.add_module(self._tuned, nn.ModuleDict())
        self._tune("vision", backbone.image, settings.vision_start, generator)
        self._tune("text", backbone.text, settings.text_start, generator)
        self.classes: PromptedClasses | TemplateClasses
        if settings.sides == "vision":
            self.classes = TemplateClasses(backbone, [settings.template])
        else:
            self.classes = PromptedClasses(backbone, prompt_length=0, template=settings.template)
        self.set_trained_names(class_names)
        self.set_class_names(class_names)
        self.to(backbone.device)  # which computes the text features
        with torch.no_grad():
            self.classifier = nn.Parameter(self.eval().text_features().clone())  # without dropout

    def _tune(self, name: str, tower: TextTower | ImageTower, start: int, generator: Generator) -> None:
        """Learn something in a tower's blocks from `start` on, if the settings name the tower."""
        if self.settings.sides not in ("both", name):
            return
        tower.require_standard_blocks(self.title)
        if start >= tower.depth:
            raise ConfigError(
                f"{name}_start={start}, but the {name} tower has {tower.depth} blocks; choose 0 to {tower.depth - 1}, "
                "or leave the tower unchanged (sides)"
            )
        layers = range(start, tower.depth)
        self.get_submodule(self._tuned).add_module(
            name,
            TunedNorms(tower, layers)
            if self._tuned == "layer_norm"
            else LowRankUpdates(self.settings, tower.width, layers, tower.depth, generator, name),
        )

    def training_stages(self) -> list[TrainingStage]:
        tuned = tuple(name for name in self.prompt_parameters() if name != "classifier")
        return [TrainingStage(self.settings.fraction, tuned), TrainingStage(1.0, ("classifier",))]

    def text_edits(self) -> list[LayerEdit]:
        return self._edits("text")

    def vision_edits(self) -> list[LayerEdit]:
        return self._edits("vision")

    def _edits(self, name: str) -> list[LayerEdit]:
        towers: Any = self.get_submodule(self._tuned)
        return list(towers[name].edits()) if name in towers else []

    def text_features(self) -> Tensor:
        return Method.encode_classes(self)

    def embed_trained(self, text_features: Tensor, rows: Tensor) -> Tensor:
        del text_features  # the classifier started from them
        return l2_normalize(self.classifier[rows])

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross-entropy of the tuned towers in the first stage, of the classifier on frozen ones in the second."""
        if self.stage == 0:
            logits = self.logits(self.encode_images(images), self.text_features())
        else:
            with torch.no_grad():
                features = self.encode_images(images)
            logits = self.logits(features, l2_normalize(self.classifier[self.rows]))
        loss = F.cross_entropy(logits, labels)
        return loss, {"cross_entropy": loss.detach(), "accuracy": batch_accuracy(logits, labels)}

    @torch.no_grad()
    def on_epoch_end(self, epoch: int, epochs: int) -> None:
        """In the first stage, make the classifier of the text features: the second starts from them."""
        del epoch, epochs
        if self.stage == 0:
            self.classifier[self.rows] = self.text_features()[self.trained]
