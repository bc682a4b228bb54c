"""PIL's antialiased resizing of 8-bit images, for many images at once, of any sizes, on any device.

In whole numbers and in PIL's order, with a rounding to bytes after the first direction. So the pixels are PIL's own.

Source: python-pillow/Pillow@11 src/libImaging/Resample.c (`precompute_coeffs`, `normalize_coeffs_8bpc`,
`ImagingResampleHorizontal_8bpc`, `ImagingResampleVertical_8bpc`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int32]

_BITS = 22
_ROWS_BYTES = 32 * 1024**2  # of the sums of one pass; images that need more go one after another


def _bicubic(x: Doubles) -> Doubles:
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _bilinear(x: Doubles) -> Doubles:
    return np.maximum(1.0 - np.abs(x), 0.0)


_FILTERS: dict[str, tuple[Callable[[Doubles], Doubles], float]] = {
    "bicubic": (_bicubic, 2.0),
    "bilinear": (_bilinear, 1.0),
}


@dataclass(frozen=True)
class Taps:
    """Which pixels of a line make each of n new ones: `weights` [n, K] of those from `first` [n] on, in 2^-22."""

    first: Integers
    weights: Integers

    def flipped(self) -> "Taps":
        """The new line from its end."""
        return Taps(self.first[::-1], self.weights[::-1])

    def extent(self) -> tuple[int, int]:
        """The first pixel that is used, and the one after the last."""
        used = (self.weights != 0) * np.arange(1, self.weights.shape[1] + 1)
        return int(self.first.min()), int((self.first + used.max(axis=1)).max())

    def moved(self, by: int) -> "Taps":
        """The same for a line whose first `by` pixels are cut off."""
        return Taps(self.first - np.int32(by), self.weights)


@dataclass(frozen=True)
class Piece:
    """The pixels [h, w, 3] uint8 that a new image is made of, and how.

    Each row of pixels is made one of R by `columns`, then each column of these by `rows`. Where PIL begins with the
    columns, the piece is `transposed`.
    """

    pixels: npt.NDArray[np.uint8]
    rows: Taps
    columns: Taps
    transposed: bool = False

    def turned(self) -> "Piece":
        """The same new image, by the columns first."""
        return Piece(self.pixels.transpose(1, 0, 2), self.columns, self.rows, not self.transposed)


def columns_first(height: int, width: int, resized: tuple[int, int]) -> bool:
    """Whether PIL, resizing `height` x `width` pixels to `resized`, resizes the columns before the rows.

    Source: observed on Pillow 13.0 in all of thousands of random sizes; older ones always begin with the rows.
    """
    shorter, narrower = height - resized[0], width - resized[1]
    return shorter > 0 and shorter > 2 * narrower and _may_begin_with_columns()


@cache
def _may_begin_with_columns() -> bool:
    """Ask the PIL that is installed: for this image the order shows."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 6, 3), dtype=np.uint8)
    size = 12
    piece = Piece(pixels, line_taps(60, size, 0, size, "bicubic"), line_taps(6, size, 0, size, "bicubic"))
    begun_with_rows = resample([piece], torch.device("cpu"))[0].numpy()
    found = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    return not np.array_equal(found, begun_with_rows)


def line_taps(length: int, resized: int, start: int, count: int, interpolation: str) -> Taps:
    """How `count` pixels from `start` on, of a line of `length` resized to `resized`, are made.

    `interpolation` is `bicubic` or `bilinear`.
    """
    function, radius = _FILTERS[interpolation]
    scale = length / resized
    stretch = max(scale, 1.0)
    support = radius * stretch
    centers = (np.arange(start, start + count) + 0.5) * scale
    first = np.maximum(np.trunc(centers - support + 0.5), 0).astype(np.int64)
    last = np.minimum(np.trunc(centers + support + 0.5), length).astype(np.int64)
    taps = np.arange(math.ceil(support) * 2 + 1)
    values = function((taps + first[:, None] - centers[:, None] + 0.5) * (1.0 / stretch))
    values = np.where(taps < (last - first)[:, None], values, 0.0)
    # One after the other, as a loop adds them; numpy's own sum adds in pairs.
    total = np.cumsum(values, axis=1)[:, -1:]
    scaled = np.divide(values, total, out=values, where=total != 0.0) * (1 << _BITS)
    weights = np.trunc(scaled + np.where(scaled < 0, -0.5, 0.5)).astype(np.int32)
    return Taps(first.astype(np.int32), weights[:, : int((last - first).max())])


def whole(size: int) -> Taps:
    """The taps of a line that stays as it is."""
    return Taps(np.arange(size, dtype=np.int32), np.full((size, 1), 1 << _BITS, dtype=np.int32))


def resample(pieces: Sequence[Piece], device: torch.device) -> Tensor:
    """New images [B, R, R, 3] uint8 on `device`, made of B pieces; all have R rows and columns, B is at least 1."""
    found = []
    for group in _groups(pieces):
        buffer = np.concatenate([piece.pixels.reshape(-1, 3) for piece in group])
        pixels = _moved(torch.from_numpy(buffer), device)
        heights = [piece.pixels.shape[0] for piece in group]
        widths = [piece.pixels.shape[1] for piece in group]
        images = _columns(group, _rows(group, pixels, heights, widths), heights)
        if any(piece.transposed for piece in group):
            turned = torch.tensor([piece.transposed for piece in group]).to(device)
            images = torch.where(turned[:, None, None, None], images.transpose(1, 2), images)
        found.append(images)
    return found[0] if len(found) == 1 else torch.cat(found)


def _rows(group: Sequence[Piece], pixels: Tensor, heights: Sequence[int], widths: Sequence[int]) -> Tensor:
    """All rows of all pieces, each of R pixels now: [sum of h, R, 3] uint8."""
    device = pixels.device
    first, weights = _stacked([piece.columns for piece in group], device)
    piece_of = torch.from_numpy(np.repeat(np.arange(len(group)), heights)).to(device)
    begins = np.cumsum([0, *np.repeat(widths, heights)[:-1]])
    index = torch.from_numpy(begins).to(device)[:, None] + first[piece_of]
    sums = torch.full((*index.shape, 3), 1 << (_BITS - 1), dtype=torch.int32, device=device)
    for tap, weight in enumerate(weights):
        sums += _taken(pixels, index + tap) * weight[piece_of][..., None]
    return _bytes(sums)


def _columns(group: Sequence[Piece], rows: Tensor, heights: Sequence[int]) -> Tensor:
    """The new images [B, R, R, 3] uint8, of rows that are resized already."""
    device = rows.device
    first, weights = _stacked([piece.rows for piece in group], device)
    begins = torch.from_numpy(np.cumsum([0, *heights[:-1]])).to(device)
    index = begins[:, None] + first
    sums = torch.full((*index.shape, rows.shape[1], 3), 1 << (_BITS - 1), dtype=torch.int32, device=device)
    for tap, weight in enumerate(weights):
        sums += _taken(rows, index + tap) * weight[..., None, None]
    return _bytes(sums)


def _stacked(taps: Sequence[Taps], device: torch.device) -> tuple[Tensor, Tensor]:
    """First pixels [B, n] int64 and weights [K, B, n] int32, K the most that one has."""
    most = max(each.weights.shape[1] for each in taps)
    weights = np.zeros((most, len(taps), len(taps[0].first)), dtype=np.int32)
    for number, each in enumerate(taps):
        weights[: each.weights.shape[1], number] = each.weights.T
    first = np.stack([each.first for each in taps]).astype(np.int64)
    return torch.from_numpy(first).to(device), _moved(torch.from_numpy(weights), device)


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """The `values` [n, ...] at `index` as int32; taps without weight may lie beyond the end."""
    found = values.index_select(0, index.clamp(max=len(values) - 1).flatten())
    return found.view(*index.shape, *values.shape[1:]).to(torch.int32)


def _bytes(sums: Tensor) -> Tensor:
    return (sums >> _BITS).clamp_(0, 255).to(torch.uint8)


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it, where that can be done."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _groups(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces in order, in groups that need a bounded amount of memory."""
    groups: list[list[Piece]] = []
    rows = 0
    for piece in pieces:
        height, size = piece.pixels.shape[0], len(piece.columns.first)
        rows += height
        if not groups or rows * size * 12 > _ROWS_BYTES:
            groups.append([])
            rows = height
        groups[-1].append(piece)
    return groups
