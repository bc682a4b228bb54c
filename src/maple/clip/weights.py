"""Weights into an open_clip model: every tensor in its place, or an error that names the one that is not."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maple.clip import formats
from maple.errors import BackboneError

_DRAWS = (Tensor.normal_, Tensor.uniform_)
_ALIGNMENT = 64  # bytes; of every tensor that torch allocates
_NAMED = 4  # how many tensors an error names before it counts the rest


def fill(model: Any, state: Mapping[str, Tensor], source: str, *, resize: bool = False) -> None:
    """Put the weights of `state` in place of those of `model`; older layouts are translated, as open_clip does.

    The tensors become the model's own where they can: there is no second copy of large weights.

    Args:
        model: an open_clip model.
        state: its weights, in open_clip's or OpenAI's layout; whoever gives them leaves them alone afterwards.
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
    model.load_state_dict({key: _owned(value, own.get(key)) for key, value in weights.items()}, assign=True)


@contextmanager
def uninitialised(active: bool = True) -> Iterator[None]:
    """Skip drawing random weights that `fill` replaces: most of the time it takes to build a large model.

    Nor is their memory touched, so the system never has to provide it.
    """
    if not active:
        yield
        return
    with _NoDraws():
        yield


class _NoDraws(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        # Those of torch.nn.init come here as themselves, with the tensor by name; what they call does not.
        if func in _DRAWS or getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _owned(value: Tensor, place: Tensor | None) -> Tensor:
    """`value` as `place` holds it: its type, dense, and at an address where sums come out as in memory of torch's own.

    A tensor that a file keeps inside a larger one is copied, so that the larger one can go.
    """
    value = value.detach()
    if place is not None and value.dtype != place.dtype:
        return value.to(place.dtype, memory_format=torch.contiguous_format)
    size = value.numel() * value.element_size()
    if value.is_contiguous() and value.data_ptr() % _ALIGNMENT == 0 and value.untyped_storage().nbytes() == size:
        return value
    return value.clone(memory_format=torch.contiguous_format)


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
