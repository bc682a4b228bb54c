"""The keys of the published state dicts: which tensor is which learned parameter, and which are frozen CLIP.

Source: muzairkhattak/multimodal-prompt-learning@69bce21: trainers/maple.py:103-117 (`proj`, `ctx`,
    `compound_prompts_text`, `compound_prompt_projections`) and :130-131 (`token_prefix`, `token_suffix`);
    clip/model.py:210-223 (`VPT_shallow` of the blocks after the first) and :369-378 (`VPT`, absent at vision
    depth 0); trainers/coop.py:100,113-114; trainers/cocoop.py:97-104 (`meta_net`). htyao89/KgCoOp@c43ccc3:
    KgCoOp/trainers/kgcoop.py (`bias_vectors`, `meta_net.linear1`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from maple.archives.unpickle import Placeholder
from maple.errors import CheckpointError, UnsafeCheckpointError

_BLOCK = (
    r"transformer\.resblocks\.\d+\.(attn\.(in_proj_weight|in_proj_bias|out_proj\.(weight|bias))"
    r"|ln_[12]\.(weight|bias)|mlp\.c_(fc|proj)\.(weight|bias))"
)
_RESNET = (
    r"(layer[1-4]\.\d+\.)?(conv[123]\.weight|(bn[123]|downsample\.1)\.\w+|downsample\.0\.weight)"
    r"|attnpool\.(positional_embedding|[qkvc]_proj\.(weight|bias))"
)
_IMAGE = rf"(class_embedding|positional_embedding|proj|ln_(pre|post)\.(weight|bias)|{_BLOCK}|{_RESNET})"
_TEXT = rf"(positional_embedding|text_projection|ln_final\.(weight|bias)|{_BLOCK})"
# PromptSRC keeps a second, unprompted image encoder in its prompt learner
_FROZEN = re.compile(rf"logit_scale|(prompt_learner\.ZS_)?image_encoder\.{_IMAGE}|text_encoder\.{_TEXT}")
_TOKENS = re.compile(r"prompt_learner\.token_(prefix|suffix)")
# KgCoOp saves it, beside one layer of a meta-network, and uses neither
_KGCOOP = re.compile(r"prompt_learner\.bias_vectors")
_BARE = re.compile(r"(ctx|meta_net\.|proj\.|compound_prompt|token_(prefix|suffix)|bias_vectors)")

_LEARNED = (
    # key, target; the number of the layer is the number in the key plus the shift
    (re.compile(r"prompt_learner\.ctx"), "text_prompt", 0),
    (re.compile(r"prompt_learner\.compound_prompts_text\.(\d+)"), "compound", 1),
    (re.compile(r"prompt_learner\.proj\.(weight|bias)"), "coupling", 0),
    (re.compile(r"prompt_learner\.compound_prompt_projections\.(\d+)\.(weight|bias)"), "coupling", 1),
    (re.compile(r"text_encoder\.transformer\.resblocks\.(\d+)\.VPT_shallow"), "text_prompt", 0),
    (re.compile(r"image_encoder\.VPT"), "vision_prompt", 0),
    (re.compile(r"image_encoder\.transformer\.resblocks\.(\d+)\.VPT_shallow"), "vision_prompt", 0),
    (re.compile(r"prompt_learner\.meta_net\.linear1\.(weight|bias)"), "meta_net", 0),
    (re.compile(r"prompt_learner\.meta_net\.linear2\.(weight|bias)"), "meta_net", 1),
)


@dataclass
class Found:
    """The learned tensors of a state dict, float32, by kind and layer.

    Attributes:
        layers: `text_prompt`, `compound` (MaPLe's deep text prompts), `vision_prompt`: layer -> tensor.
        linears: `coupling`, `meta_net`: layer -> {"weight": ..., "bias": ...}.
        keys: the original key of a learned tensor, by (kind, layer, part).
        dropped: the keys left out.
        whole_model: whether the frozen CLIP was in the file.
        dtypes: the dtypes of the learned tensors as stored.
        class_count: the number of classes of the stored token buffers, if they are there.
        kgcoop: whether what only KgCoOp saves is there.
    """

    layers: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    linears: dict[str, dict[int, dict[str, torch.Tensor]]] = field(default_factory=dict)
    keys: dict[tuple[str, int, str], str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    whole_model: bool = False
    dtypes: set[str] = field(default_factory=set)
    class_count: int | None = None
    kgcoop: bool = False


def sort_keys(state_dict: Mapping[str, object]) -> Found:
    """Sort every key of `state_dict` into learned and frozen.

    Raises:
        CheckpointError: a key is unknown, appears twice after its prefix is removed, or holds no tensor of
            finite floating-point numbers.
        UnsafeCheckpointError: a learned value would come from running code.
    """
    found = Found()
    seen: dict[str, str] = {}
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise CheckpointError(f"the state dict has the key {key!r}; keys are strings")
        name = full_name(key)
        if name in seen:
            raise CheckpointError(f"the state dict has both {seen[name]!r} and {key!r}; remove one of them")
        seen[name] = key
        if _TOKENS.fullmatch(name):
            if isinstance(value, torch.Tensor) and value.ndim == 3:
                found.class_count = value.shape[0]
            found.dropped.append(key)
        elif _FROZEN.fullmatch(name):
            found.whole_model = True
            found.dropped.append(key)
        elif _KGCOOP.fullmatch(name):
            found.kgcoop = True
            found.dropped.append(key)
        else:
            _store(found, name, key, value)
    return found


def full_name(key: str) -> str:
    """The key without DataParallel's `module.`, and with the `prompt_learner.` that CoOp and CoCoOp leave out."""
    name = key.removeprefix("module.")
    return f"prompt_learner.{name}" if _BARE.match(name) else name


def _store(found: Found, name: str, key: str, value: object) -> None:
    for pattern, kind, shift in _LEARNED:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        numbers = [int(group) for group in match.groups() if group.isdecimal()]
        part = next((group for group in match.groups() if not group.isdecimal()), "")
        layer = shift + (numbers[0] if numbers else 0)
        if (kind, layer, part) in found.keys:
            raise CheckpointError(
                f"the state dict has both {found.keys[kind, layer, part]!r} and {key!r} for layer {layer};"
                " the reference writes one of them"
            )
        found.keys[kind, layer, part] = key
        tensor = _learned_tensor(key, value)
        found.dtypes.add(str(getattr(value, "dtype", "")).removeprefix("torch."))
        if part:
            found.linears.setdefault(kind, {}).setdefault(layer, {})[part] = tensor
        else:
            found.layers.setdefault(kind, {})[layer] = tensor
        return
    raise CheckpointError(
        f"unknown key {key!r}: neither a learned parameter of MaPLe, IVLP, VPT, CoOp, CoCoOp or KgCoOp, nor part of the"
        " frozen CLIP; import a file of the reference code, or remove the key"
    )


def _learned_tensor(key: str, value: object) -> torch.Tensor:
    if isinstance(value, Placeholder):
        raise UnsafeCheckpointError(
            f"{key!r} would come from running {value.origin}; nothing was run. Save the checkpoint again with"
            " plain tensors"
        )
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"{key!r} is a {type(value).__name__}; a tensor is needed")
    if not value.is_floating_point():
        raise CheckpointError(f"{key!r} has dtype {value.dtype}; a learned parameter is floating point")
    if value.numel() == 0:
        raise CheckpointError(f"{key!r} has shape {list(value.shape)}: it holds no numbers")
    tensor = value.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{key!r} has NaN or infinite values; its training diverged, import another epoch")
    return tensor
