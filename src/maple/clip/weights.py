"""Load weights into an open_clip model: every tensor fits, or an error names the ones that do not."""

from collections.abc import Mapping
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from torch import Tensor

from maple.clip.checkpoints import formats
from maple.errors import BackboneError, shortened_list

_ALIGNMENT = 64  # bytes, of every tensor that torch allocates
_NAMED = 4  # how many tensors an error names before it counts the rest


def load_weights(model: Any, state: Mapping[str, Tensor], source: str, *, resize: bool = False) -> None:
    """Replace the weights of `model` by those of `state`; older layouts are converted, as open_clip does.

    The model keeps the given tensors where it can, so that there is no second copy of large weights.

    Args:
        state: the weights, in open_clip's or OpenAI's layout; they must not be changed afterwards.
        source: where they came from, for the error message.
        resize: interpolate positional embeddings of another length instead of refusing them.

    Raises:
        BackboneError: a tensor is missing, unknown, or of another shape.
    """
    weights = convert_state_dict(model, dict(state))
    if "positional_embedding" in weights and not hasattr(model, "positional_embedding"):
        weights = convert_to_custom_text_state_dict(weights)
    expected = model.state_dict()
    weights = {
        key: value
        for key, value in weights.items()
        if key in expected or not (key in formats.OPENAI_EXTRAS or key.endswith((".position_ids", "attn_mask")))
    }
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in weights and scalar in expected and weights[scalar].numel() == expected[scalar].numel():
            weights[scalar] = weights[scalar].reshape(expected[scalar].shape)
    if "logit_bias" in expected:
        weights.setdefault("logit_bias", torch.zeros_like(expected["logit_bias"]))
    if resize:
        resize_pos_embed(weights, model)
        resize_text_pos_embed(weights, model)
    if problems := _mismatches(expected, weights):
        hint = formats.layout_hint(state)
        raise BackboneError(f"{source} does not fit the architecture: {'; '.join(problems)}{hint}")
    model.load_state_dict({key: _owned(value, expected.get(key)) for key, value in weights.items()}, assign=True)


def _owned(value: Tensor, place: Tensor | None) -> Tensor:
    """`value` with the dtype of `place`, contiguous, aligned, and alone in its storage."""
    # Unaligned memory would change the last bits of sums; a view would keep the whole storage it is part of.
    value = value.detach()
    if place is not None and value.dtype != place.dtype:
        return value.to(place.dtype, memory_format=torch.contiguous_format)
    size = value.numel() * value.element_size()
    if value.is_contiguous() and value.data_ptr() % _ALIGNMENT == 0 and value.untyped_storage().nbytes() == size:
        return value
    return value.clone(memory_format=torch.contiguous_format)


def _mismatches(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    missing = [key for key in expected if key not in given and not key.endswith("num_batches_tracked")]
    unknown = [key for key in given if key not in expected]
    shapes = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in given and given[key].shape != expected[key].shape
    ]
    numbers = [
        f"{key} ({str(given[key].dtype).removeprefix('torch.')})"
        for key in expected
        if key in given and expected[key].is_floating_point() and not given[key].is_floating_point()
    ]
    problems = (
        *(("missing: ", missing), ("unknown: ", unknown)),
        *(("of another shape: ", shapes), ("not of floating-point numbers: ", numbers)),
    )
    return [label + shortened_list(names, _NAMED, longest=100) for label, names in problems if names]
