"""Coupling functions: the tokens of one tower computed from those of the other, layer by layer.

Source: MaPLe section 3.3 (the vision-language coupling function F); its sharing and direction are ablated in the
paper's appendix. MaPLe@69bce21 trainers/maple.py:103-118.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from maple.clip.initialisation import uninitialised

Sharing = Literal["per_layer", "unified"]
Direction = Literal["text_to_vision", "vision_to_text"]


class Coupling(nn.ModuleList):
    """J linear maps, or one shared by all layers, from tokens [P, H_in] to tokens [P, H_out].

    Initial values have the distribution of torch.nn.Linear. As in the reference, which deep-copies one Linear, the maps
    of all layers after the first start as identical copies, and are then trained separately.

    Example:
        >>> coupling = Coupling(512, 768, depth=2, sharing="per_layer", generator=torch.Generator().manual_seed(0))
        >>> [tokens.shape for tokens in coupling.couple([torch.zeros(4, 512), torch.zeros(4, 512)])]
        [torch.Size([4, 768]), torch.Size([4, 768])]
    """

    def __init__(self, inputs: int, outputs: int, depth: int, sharing: Sharing, generator: Generator) -> None:
        super().__init__([seeded_linear(inputs, outputs, generator)])
        self.depth = depth
        if sharing == "unified" or depth == 1:
            return
        deep = seeded_linear(inputs, outputs, generator)
        self.extend(deepcopy(deep) for _ in range(depth - 1))

    def couple(self, prompts: Sequence[Tensor]) -> list[Tensor]:
        """Map the prompts of each layer: J tensors [P, H_in] to J tensors [P, H_out]."""
        maps = list(self) if len(self) > 1 else [self[0]] * self.depth
        return [function(prompt) for function, prompt in zip(maps, prompts, strict=True)]


def seeded_linear(inputs: int, outputs: int, generator: Generator) -> nn.Linear:
    """A linear layer with torch's default initialisation, drawn from `generator` instead of the global one."""
    with uninitialised():
        linear = nn.Linear(inputs, outputs)
    with torch.no_grad():
        linear.weight.copy_(seeded_weight(outputs, inputs, generator))
        nn.init.uniform_(linear.bias, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)
    return linear


def seeded_weight(outputs: int, inputs: int, generator: Generator) -> Tensor:
    """A matrix [outputs, inputs] with the distribution of the weight of torch.nn.Linear."""
    bound = 1 / math.sqrt(inputs)
    return nn.init.uniform_(torch.empty(outputs, inputs), -bound, bound, generator=generator)
