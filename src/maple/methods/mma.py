"""MMA: adapters around the last blocks of both towers, which share a layer.

Source: Yang et al., "MMA: Multi-Modal Adapter for Vision-Language Models", CVPR 2024, section 3.2;
ZjjConan/VLM-MultiModalAdapter@c3d0bc2 trainers/mmadapter.py, clip/model.py:188-283.
"""

from collections.abc import Sequence
from dataclasses import replace
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
from maple.methods.base import DepthLimits, Method, MethodSettings, require_both_towers
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
        start, end = settings.adapter_start, settings.adapter_end
        if start > end:
            raise ConfigError(f"adapter_start={start} is after adapter_end={end}; choose 0 to {end}")
        require_both_towers(self, end, "adapter_end")
        keys = [*(["input"] if start == 0 else []), *(str(block - 1) for block in range(max(start, 1), end + 1))]
        width = settings.adapter_width

        def adapters_of(channels: int) -> nn.ModuleDict:
            pairs = ((_linear(channels, width, generator), _linear(width, channels, generator)) for _ in keys)
            return nn.ModuleDict(
                {key: nn.ModuleDict({"down": down, "up": up}) for key, (down, up) in zip(keys, pairs, strict=True)}
            )

        self.text_adapter = adapters_of(backbone.text.width)
        self.vision_adapter = adapters_of(backbone.image.width)
        self.shared_adapter = nn.ModuleDict({key: _linear(width, width, generator) for key in keys})
        self.classes = PromptedClasses(backbone, prompt_length=0, template=settings.template)
        self.set_class_names(class_names)

    def text_edits(self) -> list[LayerEdit]:
        return self._edits(self.text_adapter)

    def vision_edits(self) -> list[LayerEdit]:
        return self._edits(self.vision_adapter)

    def _edits(self, adapters: nn.ModuleDict) -> list[LayerEdit]:
        edits = [LayerEdit()] * self.settings.adapter_end
        for key in adapters:
            if key != "input":
                edits[int(key)] = LayerEdit(residual=partial(self._block_residual, adapters, key))
        if "input" in adapters:
            edits[0] = replace(edits[0], input_residual=partial(self._input_residual, adapters))
        return edits

    def _branch(self, adapters: Any, key: str, states: Tensor) -> Tensor:
        """The residual of states [..., H] before it is scaled: [..., H]."""
        hidden = torch.relu(_apply_linear(adapters[key]["down"], states))
        return _apply_linear(adapters[key]["up"], torch.relu(_apply_linear(self.shared_adapter[key], hidden)))

    def _input_residual(self, adapters: nn.ModuleDict, states: Tensor) -> Tensor:
        return self.settings.adapter_scale * self._branch(adapters, "input", states)

    def _block_residual(self, adapters: nn.ModuleDict, key: str, states: Tensor) -> Tensor:
        """Its value, and the gradient that goes through it, are scaled; that of the adapter is not."""
        scale = self.settings.adapter_scale
        if not torch.is_grad_enabled():
            return scale * self._branch(adapters, key, states)
        branch = self._branch(adapters, key, _Rescale.apply(states, 1.0, scale))
        return _Rescale.apply(branch, scale, 1.0)  # type: ignore[no-any-return]


class _Rescale(torch.autograd.Function):
    """Multiply values by one factor, and gradients by another."""

    @staticmethod
    def forward(context: Any, states: Tensor, value: float, gradient: float) -> Tensor:
        context.gradient = gradient
        return states * value

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * context.gradient, None, None


def _linear(inputs: int, outputs: int, generator: Generator) -> nn.Linear:
    """A linear layer with He's initialisation for the outputs, and a bias of zero."""
    layer: nn.Linear = skip_init(nn.Linear, inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def _apply_linear(layer: Any, states: Tensor) -> Tensor:
    """A float32 linear layer on states [..., H_in] of any type, in that type: [..., H_out]."""
    return F.linear(states, layer.weight.to(states.dtype), layer.bias.to(states.dtype))
