"""CLIP-LoRA: low-rank updates of the attention of both towers.

Source: Zanella and Ben Ayed, "Low-Rank Few-Shot Adaptation of Vision-Language Models", CVPR 2024 workshops, section
3.2; the published code scales by alpha / sqrt(rank). Written from a description of MaxZanella/CLIP-LoRA@358f0d7.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from maple.clip import Backbone, LayerEdit, LowRank
from maple.clip.edits import Projection
from maple.descriptions import PlotStyle
from maple.errors import ConfigError
from maple.methods.base import Method, MethodSettings
from maple.prompts import PromptedClasses, TemplateClasses
from maple.prompts.coupling import seeded_weight

_STEPS = 2**16
"""How many rates of dropout there are."""


class CLIPLoRASettings(MethodSettings):
    """`encoder` names the towers that are updated, and the layers their blocks, from 0; None for all of them.

    An update is multiplied by `alpha` / sqrt(`rank`). `dropout` is that of its input, in training.
    """

    encoder: Literal["both", "text", "vision"] = "both"
    matrices: tuple[Projection, ...] = ("q", "k", "v")
    rank: int = Field(2, ge=1)
    alpha: float = Field(1.0, gt=0)
    text_layers: tuple[int, ...] | None = None
    vision_layers: tuple[int, ...] | None = None
    dropout: float = Field(0.25, ge=0, lt=1)
    template: str = "a photo of a {}."
    logit_scale: float = Field(100.0, gt=0)

    @property
    def draws_random_numbers(self) -> bool:
        return self.dropout > 0


class LowRankUpdates(nn.ModuleDict):
    """Learned updates of the attentions of a tower's blocks: `block.matrix.down` [r, H] and `block.matrix.up` [H, r].

    Args:
        layers: the blocks that are updated, from 0.
        depth: how many the tower has.

    Raises:
        ConfigError: no matrix, or a block that there is not.
    """

    def __init__(
        self, settings: Any, width: int, layers: Sequence[int] | None, depth: int, generator: Generator, tower: str
    ) -> None:
        super().__init__()
        layers = range(depth) if layers is None else layers
        if not settings.matrices or any(not 0 <= layer < depth for layer in layers):
            raise ConfigError(
                f"the blocks {list(layers)} of the {tower} tower and the matrices {list(settings.matrices)} are to be "
                f"updated; choose blocks 0 to {depth - 1}, and at least one of q, k, v, o"
            )
        self.scale, self.dropout = settings.alpha / settings.rank**0.5, settings.dropout
        for layer in layers:
            updates = nn.ModuleDict()
            for matrix in settings.matrices:
                down = seeded_weight(settings.rank, width, generator)
                updates[matrix] = nn.ParameterDict({"down": down, "up": torch.zeros(width, settings.rank)})
            self[str(layer)] = updates

    def edits(self) -> list[LayerEdit]:
        """The edits of the blocks up to the last one that is updated; dropout draws random numbers in training."""
        edits = [LayerEdit()] * (max(map(int, self), default=-1) + 1)
        is_random = self.training and self.dropout > 0
        for layer, updates in self.items():
            low_rank: dict[Projection, LowRank] = {
                matrix: LowRank(factors["down"], factors["up"], self.scale, self.drop(f"{layer}.{matrix}"))
                for matrix, factors in updates.items()  # type: ignore[operator]
            }
            edits[int(layer)] = LayerEdit(low_rank=low_rank, is_random=is_random)
        return edits

    def drop(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """The dropout of the input of one update; None for none. Each update has its own."""
        del name
        return partial(dropout, rate=self.dropout) if self.training and self.dropout else None


def dropout(inputs: Tensor, rate: float) -> Tensor:
    """`torch.nn.functional.dropout` in training, of a `rate` rounded to 16 bits: [...] -> [...].

    On a CPU, PyTorch draws a float from each pair of random numbers; here 64 random bits decide for four inputs, which
    takes a third of the time, gradient included.
    """
    if inputs.device.type != "cpu":
        return F.dropout(inputs, rate)
    count, dropped = inputs.numel(), min(round(rate * _STEPS), _STEPS - 1)
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = (bits[:count].view(inputs.shape) >= dropped - _STEPS // 2).to(inputs.dtype)
    return inputs * kept.mul_(_STEPS / (_STEPS - dropped))


class CLIPLoRA(Method):
    """Low-rank updates of queries, keys and values in every block; nothing is learned of a class."""

    title = "CLIP-LoRA"
    paper = "Low-Rank Few-Shot Adaptation of Vision-Language Models, CVPR 2024 workshops"
    summary = "low-rank updates of queries, keys and values in every block of both towers"
    plot_style = PlotStyle("#2c6fbb", "$L$", (0, (6, 1, 1, 1)))
    Settings = CLIPLoRASettings

    settings: CLIPLoRASettings

    def __init__(
        self, settings: CLIPLoRASettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        super().__init__(settings, backbone)
        self.lora = nn.ModuleDict()
        for name, tower, layers in (
            ("vision", backbone.image, settings.vision_layers),
            ("text", backbone.text, settings.text_layers),
        ):
            if settings.encoder in ("both", name):
                tower.require_standard_blocks(self.title)
                self.lora[name] = LowRankUpdates(settings, tower.width, layers, tower.depth, generator, name)
        if "text" in self.lora:
            self.classes = PromptedClasses(backbone, prompt_length=0, template=settings.template)
        else:
            self.classes = TemplateClasses(backbone, [settings.template])
        self.set_class_names(class_names)

    @property
    def logit_scale(self) -> float:
        return self.settings.logit_scale

    def text_edits(self) -> list[LayerEdit]:
        return self._edits("text")

    def vision_edits(self) -> list[LayerEdit]:
        return self._edits("vision")

    def _edits(self, name: str) -> list[LayerEdit]:
        if name not in self.lora:
            return []
        updates: Any = self.lora[name]
        return list(updates.edits())
