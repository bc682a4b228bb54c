"""Recognise the keys of published state dicts: learned prompts, and frozen CLIP weights, which are dropped.

Source: muzairkhattak/multimodal-prompt-learning@69bce21: trainers/maple.py:103-117 (`proj`, `ctx`,
    `compound_prompts_text`, `compound_prompt_projections`) and :130-131 (`token_prefix`, `token_suffix`);
    clip/model.py:210-223 (`VPT_shallow` of the blocks after the first) and :369-378 (`VPT`, absent at vision
    depth 0); trainers/coop.py:100,113-114; trainers/cocoop.py:97-104 (`meta_net`). htyao89/KgCoOp@c43ccc3:
    KgCoOp/trainers/kgcoop.py (`bias_vectors`, `meta_net.linear1`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from maple.archives import Placeholder
from maple.errors import CheckpointError, UnsafeCheckpointError

Kind = Literal["text_prompt", "deep_text_prompt", "vision_prompt", "coupling", "meta_net"]

_BLOCK = (
    r"transformer\.resblocks\.\d{1,3}\.(attn\.(in_proj_weight|in_proj_bias|out_proj\.(weight|bias))"
    r"|ln_[12]\.(weight|bias)|mlp\.c_(fc|proj)\.(weight|bias))"
)
_RESNET = (
    r"(layer[1-4]\.\d+\.)?(conv[123]\.weight|(bn[123]|downsample\.1)\.\w+|downsample\.0\.weight)"
    r"|attnpool\.(positional_embedding|[qkvc]_proj\.(weight|bias))"
)
_IMAGE = rf"(class_embedding|positional_embedding|proj|ln_(pre|post)\.(weight|bias)|{_BLOCK}|{_RESNET})"
_TEXT = rf"(positional_embedding|text_projection|ln_final\.(weight|bias)|{_BLOCK})"
# PromptSRC keeps a second image encoder, without prompts, in its prompt learner.
FROZEN = re.compile(rf"logit_scale|(prompt_learner\.ZS_)?image_encoder\.{_IMAGE}|text_encoder\.{_TEXT}")
TOKENS = re.compile(r"prompt_learner\.token_(prefix|suffix)")
# KgCoOp saves this, and one layer of a meta-network, and uses neither. DePT on it saves the whole model, which has that
# layer under a second name, and an adapter that is not used either.
_KGCOOP = "bias_vectors"
_UNUSED = re.compile(rf"prompt_learner\.{_KGCOOP}|adapter\.fc\.[02]\.weight")
_UNUSED_LAYER = "prompt_learner.meta_net."
# CoOp and CoCoOp save the prompt learner alone, without its name in the keys.
_BARE = re.compile(r"(ctx|meta_net\.|proj\.|compound_prompt|token_(prefix|suffix)|bias_vectors)")

_LEARNED: tuple[tuple[re.Pattern[str], Kind, int], ...] = (
    # The layer is the number in the key, or 0, plus the shift.
    (re.compile(r"prompt_learner\.ctx"), "text_prompt", 0),
    (re.compile(r"prompt_learner\.compound_prompts_text\.(\d{1,3})"), "deep_text_prompt", 1),
    (re.compile(r"prompt_learner\.proj\.(weight|bias)"), "coupling", 0),
    (re.compile(r"prompt_learner\.compound_prompt_projections\.(\d{1,3})\.(weight|bias)"), "coupling", 1),
    (re.compile(r"text_encoder\.transformer\.resblocks\.(\d{1,3})\.VPT_shallow"), "text_prompt", 0),
    (re.compile(r"image_encoder\.VPT"), "vision_prompt", 0),
    (re.compile(r"image_encoder\.transformer\.resblocks\.(\d{1,3})\.VPT_shallow"), "vision_prompt", 0),
    (re.compile(r"prompt_learner\.meta_net\.linear1\.(weight|bias)"), "meta_net", 0),
    (re.compile(r"prompt_learner\.meta_net\.linear2\.(weight|bias)"), "meta_net", 1),
)


@dataclass
class LearnedTensors:
    """The learned tensors of a state dict, float32, and what its other keys reveal.

    Attributes:
        tensors: by (kind, layer, part); the part is "weight" or "bias" of a linear layer, and "" of a prompt.
        keys: the original key of each tensor.
        dropped: the keys that were left out.
        dtypes: the dtypes of the learned tensors as stored.
        whole_model: whether the frozen CLIP was in the file.
        class_count: the number of classes of the stored token buffers, if there are any.
        kgcoop: whether a key is present that only KgCoOp saves.
    """

    tensors: dict[tuple[Kind, int, str], Tensor] = field(default_factory=dict)
    keys: dict[tuple[Kind, int, str], str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    dtypes: set[str] = field(default_factory=set)
    whole_model: bool = False
    class_count: int | None = None
    kgcoop: bool = False

    def prompts(self, *kinds: Kind) -> dict[int, Tensor]:
        """The prompts of some kinds, by layer."""
        return {layer: tensor for (kind, layer, _), tensor in self.tensors.items() if kind in kinds}

    def linears(self, kind: Kind) -> dict[int, dict[str, Tensor]]:
        """The linear layers of a kind: {layer: {"weight": ..., "bias": ...}}."""
        layers: dict[int, dict[str, Tensor]] = {}
        for (stored, layer, part), tensor in self.tensors.items():
            if stored == kind:
                layers.setdefault(layer, {})[part] = tensor
        return layers


def sort_keys(state_dict: Mapping[str, object]) -> LearnedTensors:
    """Sort a state dict into learned tensors and dropped keys; `module.`, which DataParallel adds, is accepted.

    Raises:
        CheckpointError: a key is unknown, occurs twice, or is not a string; a learned tensor cannot be used.
        UnsafeCheckpointError: a learned tensor would be the result of running code.
    """
    learned = LearnedTensors(kgcoop=any(str(key).endswith(_KGCOOP) for key in state_dict))
    original: dict[str, str] = {}
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise CheckpointError(f"the state dict has the key {key!r}; keys are strings")
        name = key.removeprefix("module.")
        if _BARE.match(name):
            name = f"prompt_learner.{name}"
        if name in original and learned.kgcoop and name.startswith(_UNUSED_LAYER):
            learned.dropped.append(key)
            continue
        if name in original:
            raise CheckpointError(f"the state dict has both {original[name]!r} and {key!r}; remove one of them")
        original[name] = key
        if TOKENS.fullmatch(name):
            if isinstance(value, Tensor) and value.ndim == 3:
                learned.class_count = value.shape[0]
        elif FROZEN.fullmatch(name):
            learned.whole_model = True
        elif not (learned.kgcoop and _UNUSED.fullmatch(name)):
            place = _place(name, key)
            if place in learned.keys:
                raise CheckpointError(
                    f"the state dict has both {learned.keys[place]!r} and {key!r} for layer {place[1]};"
                    " the published code writes one of them"
                )
            learned.keys[place] = key
            learned.tensors[place] = learned_tensor(key, value)
            learned.dtypes.add(str(getattr(value, "dtype", "")).removeprefix("torch."))
            continue
        learned.dropped.append(key)
    return learned


def _place(name: str, key: str) -> tuple[Kind, int, str]:
    """The kind, layer and part of a learned parameter."""
    for pattern, kind, shift in _LEARNED:
        if match := pattern.fullmatch(name):
            layers = [int(group) for group in match.groups() if group.isdecimal()]
            parts = [group for group in match.groups() if not group.isdecimal()]
            return kind, shift + sum(layers), "".join(parts)
    raise CheckpointError(
        f"unknown key {key!r}: neither a learned parameter of MaPLe, IVLP, VPT, CoOp, CoCoOp, KgCoOp or TCP, nor part"
        " of the frozen CLIP; import a file of the published code, or remove the key"
    )


def learned_tensor(key: str, value: object) -> Tensor:
    """A learned tensor as float32, contiguous, owning its memory.

    Raises:
        CheckpointError: it is not a floating-point tensor, or holds no numbers, or values that are not finite.
        UnsafeCheckpointError: it would be the result of running code.
    """
    if isinstance(value, Placeholder):
        raise UnsafeCheckpointError(
            f"{key!r} would come from running {value.origin}; nothing was run. Save the checkpoint again with"
            " plain tensors"
        )
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{key!r} is a {type(value).__name__}; a tensor is needed")
    if not value.is_floating_point():
        raise CheckpointError(f"{key!r} has dtype {value.dtype}; a learned parameter is floating point")
    if value.numel() == 0:
        raise CheckpointError(f"{key!r} has shape {list(value.shape)}: it contains no numbers")
    tensor = value.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{key!r} has NaN or infinite values; its training diverged, import another epoch")
    return tensor
