"""Weights into an open_clip model: every tensor in its place, or an error that names the one that is not."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from torch import Tensor
from torch.overrides import TorchFunctionMode

from maple.clip import formats
from maple.errors import BackboneError

_NAMED = 4  # how many tensors an error names before it counts the rest


def fill(model: Any, state: Mapping[str, Tensor], source: str, *, resize: bool = False) -> None:
    """Load `state` into `model`, in place; older layouts are translated, as open_clip does.

    Args:
        model: an open_clip model.
        state: its weights, in open_clip's or OpenAI's layout.
        source: where they came from, for the error.
        resize: interpolate positional embeddings of another length instead of refusing them.

    Raises:
        BackboneError: a tensor is missing, unknown, or of another shape.
    """
    weights = convert_state_dict(model, dict(state))
    if "positional_embedding" in weights and not hasattr(model, "positional_embedding"):
        weights = convert_to_custom_text_state_dict(weights)
    own = model.state_dict()
    weights = {key: value for key, value in weights.items() if key in own or not _is_bookkeeping(key)}
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in weights and scalar in own and weights[scalar].numel() == own[scalar].numel():
            weights[scalar] = weights[scalar].reshape(own[scalar].shape)
    if "logit_bias" in own:
        weights.setdefault("logit_bias", torch.zeros_like(own["logit_bias"]))
    if resize:
        resize_pos_embed(weights, model)
        resize_text_pos_embed(weights, model)
    if problems := _mismatches(own, weights):
        raise BackboneError(f"{source} does not fit the CLIP that it should fill: {'; '.join(problems)}")
    model.load_state_dict(weights)


@contextmanager
def uninitialised(active: bool = True) -> Iterator[None]:
    """Skip drawing random weights that `fill` overwrites: most of the time it takes to build a large model."""
    if not active:
        yield
        return
    with _NoDraws():
        yield


class _NoDraws(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0].zero_()
        return func(*args, **(kwargs or {}))


def _is_bookkeeping(key: str) -> bool:
    return key in formats.OPENAI_EXTRAS or key.endswith(".position_ids")


def _mismatches(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    unknown = [key for key in given if key not in own]
    shapes = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in given and given[key].shape != own[key].shape
    ]
    found = (("missing: ", missing), ("unknown: ", unknown), ("of another shape: ", shapes))
    return [label + _some(names) for label, names in found if names]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
