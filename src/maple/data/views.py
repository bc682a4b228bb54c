"""Batches of views: image by image on the host, or many at once on a device. The values are the same."""

import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maple.data.images.train_transform import EvalTransform, TrainTransform
from maple.data.resampling import Piece, columns_first, line_taps, resample, whole

_PIECE_BYTES = 2 * 1024**2
"""Larger pieces are resized on the host: many of them wait in memory while a batch is collected."""


class Views(Protocol):
    """Makes batches of views in two steps: `one` where images are read (any thread), `batch` in the caller's."""

    def one(self, image: Image.Image, generator: torch.Generator | None = None) -> Any:
        """Return what `batch` needs of an RGB image."""
        ...

    def batch(self, ones: Sequence[Any]) -> Tensor:
        """Return the views [B, 3, R, R] float32, normalised; B may be 0."""
        ...


class HostViews:
    """One by one, by a transform; batches lie on the CPU."""

    def __init__(self, transform: TrainTransform | EvalTransform) -> None:
        """Make the views of `transform`."""
        self.transform = transform

    def one(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        """Return the view [3, R, R]."""
        return self.transform(image, generator)  # type: ignore[arg-type]

    def batch(self, ones: Sequence[Tensor]) -> Tensor:
        """Stack them."""
        if not ones:
            return torch.empty(0, 3, self.transform.size, self.transform.size, dtype=torch.float32)
        return torch.stack(list(ones))


class DeviceViews:
    """Whole batches on a device, of bytes: the same boxes, flips and values as the transform's own, to the bit.

    Where a compiler fused multiplications and additions when PIL was built, as it may on ARM, a byte may rarely differ
    by one.
    """

    def __init__(self, transform: TrainTransform | EvalTransform, device: torch.device) -> None:
        """Make the views of `transform` on `device`, where the batches lie."""
        self.transform = transform
        self.device = device
        self._size = transform.size
        constants = ([255.0] * 3, transform.mean, transform.std)
        # Tensors, as a division by a plain number may become a product with its reciprocal.
        self._constants = [
            torch.tensor(values, dtype=torch.float32, device=device).reshape(3, 1, 1) for values in constants
        ]

    def one(self, image: Image.Image, generator: torch.Generator | None = None) -> Piece:
        """Return the bytes of the part that the view shows, and how they are resized."""
        transform, size = self.transform, self._size
        cut = transform.cut(image.height, image.width, generator)  # type: ignore[arg-type]
        lines = (cut.height, cut.resized[0], cut.window[0]), (cut.width, cut.resized[1], cut.window[1])
        rows, columns = (line_taps(*line, size, transform.interpolation) for line in lines)
        (top, bottom), (left, right) = rows.extent(), columns.extent()
        if (bottom - top) * (right - left) * 3 > _PIECE_BYTES:
            return Piece(np.array(transform.render(image, cut)), whole(size), whole(size))
        box = (cut.left + left, cut.top + top, cut.left + right, cut.top + bottom)
        columns = columns.moved(left)
        piece = Piece(np.array(image.crop(box)), rows.moved(top), columns.flipped() if cut.flipped else columns)
        return piece.turned() if columns_first(cut.height, cut.width, cut.resized) else piece

    def batch(self, ones: Sequence[Piece]) -> Tensor:
        """Resize, round, flip and normalise them all, on the device."""
        if not ones:
            return torch.empty(0, 3, self._size, self._size, dtype=torch.float32, device=self.device)
        scale, mean, std = self._constants
        pixels = (
            resample(ones, self.device).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        )
        return pixels.div_(scale).sub_(mean).div_(std)


def make_views(transform: TrainTransform | EvalTransform, device: torch.device | None = None) -> Views:
    """Views of `transform`: in batches on `device`, or one by one on the host where that is None."""
    return HostViews(transform) if device is None else DeviceViews(transform, device)


def views_device(place: str, device: torch.device) -> torch.device | None:
    """Where views are made in batches, None for one by one on the host.

    `place` is `host`, `device`, or `auto`: on a GPU there, otherwise on the host, which is faster than batches on a
    CPU (benchmarks/pipeline.py).
    """
    return device if place == "device" or (place == "auto" and device.type == "cuda") else None


def reading_threads(workers: int | None, most: int = 4) -> int:
    """How many threads read ahead: `workers`, or, if that is None, up to `most` where there are several cores."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(most, cores) if cores > 1 else 0
