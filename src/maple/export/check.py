"""Whether an export computes what PyTorch computes."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from maple.errors import ExportError
from maple.export.source import Source
from maple.inference.predictor import Floats
from maple.methods import Method

LARGEST_DIFFERENCE = 1e-3
"""Of logits, above which an export in float32 is refused."""

NEW_NAMES = ("red car", "a_very small  blue car", "Crème brûlée & co.", "x")
"""Names that no training knows: with signs, of several lengths."""


@torch.no_grad()
def reference_logits(method: Method, views: Floats, names: Sequence[str]) -> Floats:
    """Logits [n, C] of views [n, 3, R, R] by PyTorch."""
    twin = method.with_class_names(names)
    found: Floats = twin.logits_of(method.encode_images(torch.from_numpy(views))).numpy()
    return found


def largest_difference(
    source: Source, logits: Callable[[Floats], Floats], method: Method, names: Sequence[str]
) -> float:
    """The largest difference of `logits` (of views [n, 3, R, R]: [n, C]) from PyTorch's, over all views at hand.

    They are asked in batches of one, of three, and of what is left, so that a size taken for fixed shows.
    """
    views = np.concatenate([source.random, source.own])
    parts = [views[:1], views[1:4], *([views[4:]] if len(views) > 4 else [])]
    found = np.concatenate([logits(part) for part in parts])
    expected = reference_logits(method, views, names)
    if found.shape != expected.shape or not np.isfinite(found).all():
        raise ExportError(f"the export gives logits {list(found.shape)} instead of finite {list(expected.shape)}")
    return float(np.abs(found - expected).max())


def require_equal(difference: float, what: str) -> None:
    """Refuse an export whose logits differ.

    Raises:
        ExportError: by more than `LARGEST_DIFFERENCE`.
    """
    if not difference <= LARGEST_DIFFERENCE:
        raise ExportError(
            f"{what} differs from PyTorch by up to {difference:.2g} in logits, more than the allowed "
            f"{LARGEST_DIFFERENCE:g}; nothing was written. Please report it, with the versions of torch and the run"
        )
