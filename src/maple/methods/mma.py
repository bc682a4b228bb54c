"""MMA: adapters around the last blocks of both towers, which share a layer.

Source: Yang et al., "MMA: Multi-Modal Adapter for Vision-Language Models", CVPR 2024, section 3.2;
ZjjConan/VLM-MultiModalAdapter@c3d0bc2 trainers/mmadapter.py, clip/model.py:188-283.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from maple.clip import Backbone, LayerEdit
from maple.clip.initialisation import uninitialised
from maple.descriptions import PlotStyle
from maple.errors import ConfigError
from maple.methods.base import DepthLimits, Method, MethodSettings, require_both_towers
from maple.prompts import PromptedClasses


class AdapterSettings(MethodSettings):
    """Blocks are counted from 1, both ends included; `adapter_start` 0 adapts the input of the towers too."""

    depth_limits: ClassVar[DepthLimits] = {"adapter_end": ("text", "image")}

    adapter_start: int = Field(5, ge=0)
    adapter_end: int = Field(12, ge=1)
    adapter_width: int = Field(32, ge=1)


class AdapterMethod(Method):
    """Base class of methods with adapters around blocks of both towers, which share a layer in the middle.

    Args:
        random_bias: whether biases start with PyTorch's random values, instead of zero.
    """

    settings: AdapterSettings
    classes: PromptedClasses

    def __init__(
        self, settings: AdapterSettings, backbone: Backbone, generator: Generator, *, random_bias: bool = False
    ) -> None:
        super().__init__(settings, backbone)
        start, end = settings.adapter_start, settings.adapter_end
        if start > end:
            raise ConfigError(f"adapter_start={start} is after adapter_end={end}; choose 0 to {end}")
        require_both_towers(self, end, "adapter_end")
        for tower in (backbone.text, backbone.image):
            tower.require_residuals(self.title)
        keys = [*(["input"] if start == 0 else []), *(str(block - 1) for block in range(max(start, 1), end + 1))]
        width = settings.adapter_width

        def linear(inputs: int, outputs: int) -> nn.Linear:
            with uninitialised():
                layer = nn.Linear(inputs, outputs)
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            if random_bias:
                nn.init.uniform_(layer.bias, -(inputs**-0.5), inputs**-0.5, generator=generator)
            else:
                nn.init.zeros_(layer.bias)
            return layer

        def adapters_of(channels: int) -> nn.ModuleDict:
            pairs = ((linear(channels, width), linear(width, channels)) for _ in keys)
            return nn.ModuleDict(
                {key: nn.ModuleDict({"down": down, "up": up}) for key, (down, up) in zip(keys, pairs, strict=True)}
            )

        self.text_adapter = adapters_of(backbone.text.width)
        self.vision_adapter = adapters_of(backbone.image.width)
        self.shared_adapter = nn.ModuleDict({key: linear(width, width) for key in keys})

    def adapter_edits(
        self,
        adapters: nn.ModuleDict,
        residual: Callable[[nn.ModuleDict, str, Tensor], Tensor],
        *,
        is_random: bool = False,
    ) -> list[LayerEdit]:
        """The edits of one tower: `residual` of its adapters, of a key ("input" or a block) and of states."""
        edits = [LayerEdit()] * self.settings.adapter_end
        for key in adapters:
            if key != "input":
                edits[int(key)] = LayerEdit(residual=partial(residual, adapters, key), is_random=is_random)
        if "input" in adapters:
            edits[0] = replace(edits[0], input_residual=partial(residual, adapters, "input"), is_random=is_random)
        return edits

    def branch(self, adapters: Any, key: str, states: Tensor) -> Tensor:
        """The residual of states [..., H] before it is scaled: [..., H]."""
        hidden = torch.relu(_apply_linear(adapters[key]["down"], states))
        hidden = self.drop(torch.relu(_apply_linear(self.shared_adapter[key], hidden)))
        return _apply_linear(adapters[key]["up"], hidden)

    def drop(self, hidden: Tensor) -> Tensor:
        """The dropout of the shared layer's output; by default none."""
        return hidden


class MMASettings(AdapterSettings):
    """Those of the adapters, the scale of the residual, and the sentence."""

    adapter_scale: float = Field(0.001, gt=0)
    template: str = "a photo of a {}."


class MMA(AdapterMethod):
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

    def __init__(
        self, settings: MMASettings, backbone: Backbone, class_names: Sequence[str], generator: Generator
    ) -> None:
        super().__init__(settings, backbone, generator)
        self.classes = PromptedClasses(backbone, prompt_length=0, template=settings.template)
        self.set_class_names(class_names)

    def text_edits(self) -> list[LayerEdit]:
        return self.adapter_edits(self.text_adapter, self._residual)

    def vision_edits(self) -> list[LayerEdit]:
        return self.adapter_edits(self.vision_adapter, self._residual)

    def _residual(self, adapters: nn.ModuleDict, key: str, states: Tensor) -> Tensor:
        """Its value, and the gradient that goes through it, are scaled; that of a block's adapter is not."""
        scale = self.settings.adapter_scale
        if key == "input" or not torch.is_grad_enabled():
            return scale * self.branch(adapters, key, states)
        branch = self.branch(adapters, key, _Rescale.apply(states, 1.0, scale))
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


def _apply_linear(layer: Any, states: Tensor) -> Tensor:
    """A float32 linear layer on states [..., H_in] of any type, in that type: [..., H_out]."""
    return F.linear(states, layer.weight.to(states.dtype), layer.bias.to(states.dtype))
