"""Scenes of a drawing: the same image for the same seed on every machine.

Every pixel is computed in integer arithmetic: positions and rotations in fixed point with 16 fractional bits, random
numbers by SplitMix64, rotations by a rational point of the circle. So neither the sine of a platform, nor rounding
modes, nor the order of summation can make a difference.
"""

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from maple.errors import ConfigError, DataError

Integers = npt.NDArray[np.int64]

_ONE = 1 << 16  # 1.0 in fixed point
_MASK = (1 << 64) - 1
_LARGEST = 4096


def render_scene(glyph: Image.Image, seed: int, *, difficulty: float, size: int = 64) -> Image.Image:
    """Render a glyph into a scene: mode RGB, `size` x `size` pixels; equal arguments give equal bytes anywhere.

    The glyph is a square drawing on a transparent background, mode RGBA. `seed` decides scale, position, rotation,
    background, light and noise; `difficulty` goes from 0 (upright, large, centred on a plain light background) to 1
    (the full range of everything), in steps of 1/256.

    Raises:
        ConfigError: `difficulty` is not within 0..1, or `size` not within 1..4096.
        DataError: the glyph is not square or not RGBA.
    """
    if not 0 <= difficulty <= 1:
        raise ConfigError(f"difficulty is {difficulty}; it must be within 0 and 1")
    if not 1 <= size <= _LARGEST:
        raise ConfigError(f"size is {size}; it must be within 1 and {_LARGEST}")
    if glyph.mode != "RGBA" or glyph.width != glyph.height:
        raise DataError(f"the glyph is {glyph.mode}, {glyph.width} x {glyph.height}; it must be RGBA and square")
    level = int(difficulty * 256)
    random = Random(seed)
    x, y = _sample_places(random, level, glyph.width, size, 2)
    drawn = _sample(np.asarray(glyph).astype(np.int64), x, y)
    drawn = drawn.reshape(size, 2, size, 2, 4).sum(axis=(1, 3)) // 4
    background = _background(random, level, size)
    colour, alpha = drawn[..., :3], drawn[..., 3:]
    pixels = _light(random, level, colour + background * (255 - alpha) // 255)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


class Random:
    """SplitMix64: numbers, and arrays of noise."""

    def __init__(self, seed: int) -> None:
        self._state = seed & _MASK

    def bits(self) -> int:
        """64 random bits."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        z = self._state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
        return z ^ z >> 31

    def between(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included."""
        return low + (self.bits() >> 32) * (high - low + 1) // (1 << 32)

    def noise(self, *shape: int) -> Integers:
        """Independent integers 0..255 of the given shape."""
        count = math.prod(shape)
        with np.errstate(over="ignore"):
            z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(self.bits())
            z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return (z >> np.uint64(56)).astype(np.int64).reshape(shape)


def _sample_places(random: Random, level: int, side: int, size: int, finer: int) -> tuple[Integers, Integers]:
    """The place in the glyph of each sample: x and y in fixed-point pixels, each `finer * size` squared.

    The side of the drawing is 0.84 to 0.94 of the image at level 0 and 0.45 to 1.05 at level 256; the tangent of half
    the angle is up to 5/256 (2 degrees) and 74/256 (32 degrees).
    """
    low, high = 84 * _ONE // 100 - 39 * _ONE * level // 25600, 94 * _ONE // 100 + 11 * _ONE * level // 25600
    scale = random.between(low, high)
    turn = random.between(-5 - 69 * level // 256, 5 + 69 * level // 256)
    room = _ONE // 50 + max(_ONE - scale, _ONE // 16) * level // 512
    shift_x, shift_y = random.between(-room, room), random.between(-room, room)
    norm = 65536 + turn * turn
    cosine, sine = (65536 - turn * turn) * _ONE // norm, 512 * turn * _ONE // norm
    steps = finer * size
    line = (2 * np.arange(steps, dtype=np.int64) + 1 - steps) * _ONE // (2 * steps)  # -1/2 to 1/2 of the image
    dx, dy = (line - shift_x)[None, :], (line - shift_y)[:, None]
    x = (cosine * dx + sine * dy) // scale * side + side * _ONE // 2 - _ONE // 2
    y = (cosine * dy - sine * dx) // scale * side + side * _ONE // 2 - _ONE // 2
    return x, y


def _sample(pixels: Integers, x: Integers, y: Integers) -> Integers:
    """Bilinear samples [..., 4] of a glyph [side, side, 4], colours multiplied by opacity, zero outside."""
    side = len(pixels)
    padded = np.zeros((side + 2, side + 2, 4), np.int64)
    padded[1:-1, 1:-1, 3] = pixels[..., 3]
    padded[1:-1, 1:-1, :3] = (pixels[..., :3] * pixels[..., 3:] + 127) // 255
    x, y = np.clip(x, -_ONE, side * _ONE - 1) + _ONE, np.clip(y, -_ONE, side * _ONE - 1) + _ONE
    return _bilinear(padded, x, y)


def _bilinear(values: Integers, x: Integers, y: Integers) -> Integers:
    """Bilinear samples of `values` [height, width, channels] at fixed-point places up to the last pixel."""
    column, row = x >> 16, y >> 16
    across, down = ((x & 0xFFFF) >> 8)[..., None], ((y & 0xFFFF) >> 8)[..., None]
    upper = values[row, column] * (256 - across) + values[row, column + 1] * across
    lower = values[row + 1, column] * (256 - across) + values[row + 1, column + 1] * across
    blended: Integers = (upper * (256 - down) + lower * down) >> 16
    return blended


def _colour(random: Random, level: int) -> Integers:
    """A background colour [3]: light; at higher levels also darker and more saturated."""
    darkest = 216 - 120 * level // 256
    grey = random.between(darkest, 250)
    tint = 12 + 60 * level // 256
    return np.array([min(255, max(40, grey + random.between(-tint, tint))) for _ in range(3)], np.int64)


def _background(random: Random, level: int, size: int) -> Integers:
    """A background [size, size, 3]: plain, a gradient, or soft blotches between two colours."""
    first, second = _colour(random, level), _colour(random, level)
    kind = random.between(0, 255)
    down, across = np.arange(size, dtype=np.int64)[:, None], np.arange(size, dtype=np.int64)[None, :]
    if kind >= level:
        return np.broadcast_to(first, (size, size, 3)).astype(np.int64)
    if kind % 2:
        along, other = random.between(-256, 256), random.between(-256, 256)
        reach = max(abs(along) + abs(other), 1)
        mixed = 128 + ((2 * across - size) * along + (2 * down - size) * other) * 128 // (reach * size)
    else:
        cells = random.between(2, 12)
        lattice = random.noise(cells + 2, cells + 2, 1)
        step = cells * _ONE // size
        x, y = np.broadcast_arrays(across * step, down * step)
        mixed = _bilinear(lattice, x, y)[..., 0]
    mixed = mixed[..., None]
    blended: Integers = (first * (256 - mixed) + second * mixed) // 256
    return blended


def _light(random: Random, level: int, pixels: Integers) -> Integers:
    """The pixels [size, size, 3] under a light that falls off to one side, with grain."""
    size = len(pixels)
    bright = 256 + random.between(-16 - 60 * level // 256, 12 + 36 * level // 256)
    slope_x, slope_y = (random.between(-level // 4, level // 4) for _ in range(2))
    line = 2 * np.arange(size, dtype=np.int64) + 1 - size
    gain = bright + (line[None, :] * slope_x + line[:, None] * slope_y) // size
    grain = random.between(0, 4 + 24 * level // 256)
    noise = random.noise(size, size, 3) + random.noise(size, size, 3) - 255
    lit: Integers = pixels * gain[..., None] // 256 + noise * grain // 256
    return lit
