"""What a published checkpoint holds of its frozen CLIP and its class names, to check those that it is imported with.

Source: muzairkhattak/multimodal-prompt-learning@69bce21 trainers/maple.py:119-131: the embeddings of "X X NAME." are
    saved as `token_prefix` (SOS) and `token_suffix` (all after the prompt), whichever text tower they are from.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maple.clip import Backbone
from maple.clip.checkpoints.formats import CLIP_VOCABULARY

# Embeddings of the training sentences [C, T, Ht], which begin with that of SOS; or the whole table [V, Ht].
_FIRST_TOKENS = re.compile(r"(prompt_learner\.)?token_prefix|(representation_learner\.)?prompt_embeddings")
_TABLE = re.compile(r"(adapter_learner\.)?token_embedding\.weight")
_SUFFIX = re.compile(r"(prompt_learner\.)?token_suffix")
_WEIGHTS = {"text_encoder.text_projection": "text_projection", "image_encoder.conv1.weight": "visual.conv1.weight"}
_ROUNDING = 5e-3  # of bfloat16, in relation to the norm; the tensors of two CLIPs differ by about this norm


@dataclass(frozen=True)
class FrozenParts:
    """Frozen tensors of a published checkpoint.

    Attributes:
        weights: some of the CLIP's, by open_clip's names; none where the learned tensors alone were saved.
        sos: the embedding of the first token of a sentence [Ht], or None.
        names: the embeddings of what follows the prompt in the sentence of each class [C, n, Ht], or None.

    Example:
        >>> parts = frozen_parts(state_dict)
        >>> parts.not_of(load_clip("ViT-B-16")), parts.unlike(load_clip("ViT-B-16"), ["cat", "dog"])
        ([], [])
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    sos: Tensor | None = None
    names: Tensor | None = None

    def not_of(self, backbone: Backbone) -> list[str]:
        """The names of the tensors that are not this backbone's, but for rounding to half precision."""
        state = backbone.model.state_dict()
        differing = [name for name, weight in self.weights.items() if not _same(weight, state.get(name))]
        if self.sos is not None and backbone.text.obstacle is None:
            first = backbone.text.token_embeddings(backbone.tokenize(["a"])[0, :1].tolist())[0]
            differing += [] if _same(self.sos, first) else ["the embedding of the first token"]
        return differing

    def unlike(self, backbone: Backbone, class_names: Sequence[str]) -> list[str]:
        """Those of the class names, in their order, that are not in the checkpoint's sentences of their classes.

        There are none where the checkpoint has no sentences, or those of another number of classes.
        """
        if self.names is None or len(self.names) != len(class_names) or backbone.text.obstacle is not None:
            return []

        def is_in(name: str, states: Tensor) -> bool:
            words = backbone.text.token_embeddings(backbone.word_ids(name.replace("_", " "))).cpu()
            # Fixed words of the sentence may stand before and after the name.
            return any(_same(states[start : start + len(words)], words) for start in range(len(states)))

        return [name for name, states in zip(class_names, self.names, strict=True) if not is_in(name, states.float())]


def frozen_parts(state_dict: Mapping[str, object]) -> FrozenParts:
    """The frozen tensors of a published state dict by which its backbone and class names can be checked.

    Example:
        >>> frozen_parts({"ctx": torch.zeros(4, 512), "token_prefix": torch.zeros(10, 1, 512)}).sos.shape
        torch.Size([512])
    """
    weights, sos, names = dict[str, Tensor](), None, None
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        name = key.removeprefix("module.")
        if name in _WEIGHTS:
            weights[_WEIGHTS[name]] = value.detach().float().cpu()
        elif _FIRST_TOKENS.fullmatch(name) and value.ndim == 3 and value.numel():
            sos = value[0, 0].detach().float().cpu()
        elif _TABLE.fullmatch(name) and value.ndim == 2 and len(value) == CLIP_VOCABULARY:
            sos = value[-2].detach().float().cpu()
        elif _SUFFIX.fullmatch(name) and value.ndim == 3:
            names = value.detach().cpu()
    return FrozenParts(weights, sos, names)


def _same(first: Tensor, second: Tensor | None) -> bool:
    if second is None or first.shape != second.shape:
        return False
    second = second.detach().float().cpu()
    return bool(torch.linalg.vector_norm(first - second) <= _ROUNDING * torch.linalg.vector_norm(second))
