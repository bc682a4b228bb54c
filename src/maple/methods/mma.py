"""MMA: adapters around the last blocks of both towers, which share a layer.

Source: Yang et al., "MMA: Multi-Modal Adapter for Vision-Language Models", CVPR 2024, section 3.2;
ZjjConan/VLM-MultiModalAdapter@c3d0bc2 trainers/mmadapter.py, clip/model.py:188-283.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.nn.utils import skip_init

from maple.clip import Backbone, LayerEdit
from maple.descriptions import PlotStyle
from maple.errors import ConfigError
from maple.methods.base import DepthLimits, Method, MethodSettings, check_depth
from maple.prompts import PromptedClasses


class MMASettings(MethodSettings):
    """Blocks are counted from 1, both ends included; `adapter_start` 0 adapts the input of the towers too."""

    depth_limits: ClassVar[DepthLimits] = {"adapter_end": ("text", "image")}

    adapter_start: int = Field(5, ge=0)
    adapter_end: int = Field(12, ge=1)
    adapter_width: int = Field(32, ge=1)
    adapter_scale: float = Field(0.001, gt=0)
    template: str = "a photo of a {}."


class MMA(Method):
    """A residual `scale * up(relu(shared(relu(down(x)))))` around each block, for the first norm x of its input.

    The adapters of blocks learn by the gradient of an unscaled residual, as in the source: with its scale of 0.001 they
    would hardly learn at its rate. What reaches the blocks below is the true gradient.
    """

    title = "MMA"
    paper = "MMA: Multi-Modal Adapter for Vision-Language Models, CVPR 2024"
    summary = "adapters around the last blocks of both towers, which share a layer"
    plot_style = PlotStyle("#8a5a9e", "$A$", (0, (4, 1.5)))
    Settings = MMASettings

    settings: MMASettings
    classes: PromptedClasses

    def __init__(
        self, settings: MMASettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        super().__init__(settings, backbone)
        backbone.text.require_promptable(self.title)
        backbone.image.require_promptable(self.title)
        start, end = settings.adapter_start, settings.adapter_end
        if start > end:
            raise ConfigError(f"adapter_start={start} is after adapter_end={end}; choose 0 to {end}")
        for tower, depth in (("text", backbone.text.depth), ("image", backbone.image.depth)):
            check_depth(end, depth, setting="adapter_end", tower=tower)
        keys = [*(["input"] if start == 0 else []), *(str(block - 1) for block in range(max(start, 1), end + 1))]
        width = settings.adapter_width

        def adapters_of(channels: int) -> nn.ModuleDict:
            pairs = ((linear(channels, width, generator), linear(width, channels, generator)) for _ in keys)
            return nn.ModuleDict(
                {key: nn.ModuleDict({"down": down, "up": up}) for key, (down, up) in zip(keys, pairs, strict=True)}
            )

        self.text_adapter = adapters_of(backbone.text.width)
        self.vision_adapter = adapters_of(backbone.image.width)
        self.shared_adapter = nn.ModuleDict({key: linear(width, width, generator) for key in keys})
        self.classes = PromptedClasses(backbone, prompt_length=0, template=settings.template)
        self.set_class_names(class_names)

    def text_edits(self) -> list[LayerEdit]:
        return self._edits(self.text_adapter, self.settings.adapter_scale)

    def vision_edits(self) -> list[LayerEdit]:
        return self._edits(self.vision_adapter, self.settings.adapter_scale)

    def _edits(self, adapters: nn.ModuleDict, scale: float) -> list[LayerEdit]:
        branches = {key: partial(self.branch, adapter, self.shared_adapter[key]) for key, adapter in adapters.items()}
        edits = []
        for block in range(self.settings.adapter_end):
            entry = branches.get("input") if block == 0 else None
            branch = branches.get(str(block))
            edits.append(
                LayerEdit(
                    input_residual=None if entry is None else partial(_scaled, entry, scale),
                    residual=None if branch is None else self.scaled_branch(branch, scale),
                )
            )
        return edits

    def branch(self, adapter: Any, shared: nn.Module, states: Tensor) -> Tensor:
        """The residual of states [..., H] before it is scaled: [..., H]."""
        hidden = torch.relu(apply_linear(adapter["down"], states))
        return apply_linear(adapter["up"], torch.relu(apply_linear(shared, hidden)))

    def scaled_branch(self, branch: Callable[[Tensor], Tensor], scale: float) -> Callable[[Tensor], Tensor]:
        """The residual of a block: its value, and the gradient that goes through it, are scaled."""

        def residual(states: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return scale * branch(states)
            return _Rescale.apply(branch(_Rescale.apply(states, 1.0, scale)), scale, 1.0)  # type: ignore[no-any-return]

        return residual


class _Rescale(torch.autograd.Function):
    """Multiply values by one factor, and gradients by another."""

    @staticmethod
    def forward(context: Any, states: Tensor, value: float, gradient: float) -> Tensor:
        context.gradient = gradient
        return states * value

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * context.gradient, None, None


def _scaled(branch: Callable[[Tensor], Tensor], scale: float, states: Tensor) -> Tensor:
    return scale * branch(states)


def linear(inputs: int, outputs: int, generator: Generator) -> nn.Linear:
    """A linear layer with He's initialisation for the outputs, and a bias of zero."""
    layer: nn.Linear = skip_init(nn.Linear, inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def apply_linear(layer: Any, states: Tensor) -> Tensor:
    """A float32 linear layer on states [..., H_in] of any type, in that type: [..., H_out]."""
    return F.linear(states, layer.weight.to(states.dtype), layer.bias.to(states.dtype))
