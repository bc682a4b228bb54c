"""Manners of drawing an icon: the same square image for the same drawing and seed on every machine.

Every style turns the opacity of a drawing into an RGBA square that `render_scene` places in a scene. As there, all
pixels are computed in integer arithmetic.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from maple.data.scenes import Integers, Random

Mask = npt.NDArray[np.uint8]


def ink(mask: Integers, random: Random) -> Integers:
    """A drawing in one dark colour, nothing around it."""
    colour = np.array([random.between(0, 70) for _ in range(3)], np.int64)
    return _laid(np.broadcast_to(colour, (*mask.shape, 3)), mask)


def chalk(mask: Integers, random: Random) -> Integers:
    """Pale chalk on a slate: strokes with gaps, dust around them."""
    side = len(mask)
    slate = np.array([30 + random.between(0, 25), 45 + random.between(0, 30), 42 + random.between(0, 25)], np.int64)
    stick = np.array([random.between(185, 255) for _ in range(3)], np.int64)
    grain = random.noise(side, side)
    coarse = _blur(random.noise(side, side), 2)
    cover = mask * np.clip(grain + 3 * coarse - 300, 0, 255) // 255
    dust = _blur(mask, 4) * random.between(20, 60) // 255
    return _laid(slate + (stick - slate) * np.clip(cover + dust, 0, 255)[..., None] // 255, 255)


def neon(mask: Integers, random: Random) -> Integers:
    """The outline as a glowing tube in front of a dark wall."""
    hue = _bright(random)
    edge = _edge(mask)
    glow = np.clip(_blur(_blur(edge, 3), 3) * 2, 0, 255)
    wall = np.array([random.between(8, 40) for _ in range(3)], np.int64)
    lit = wall + hue * glow[..., None] // 340
    core = hue + (255 - hue) * 2 // 3
    return _laid(np.clip(lit + (core - lit) * edge[..., None] // 255, 0, 255), 255)


def stitch(mask: Integers, random: Random) -> Integers:
    """Cross-stitch: crosses of thread on linen, three pixels each."""
    side = len(mask)
    cells = side // 3
    cover = mask[: 3 * cells, : 3 * cells].reshape(cells, 3, cells, 3).mean(axis=(1, 3)).astype(np.int64)
    sewn = np.kron(cover > 90, np.ones((3, 3), np.int64))
    cross = np.tile(np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]], np.int64), (cells, cells))
    linen = np.array([214, 202, 180], np.int64) + random.between(-20, 20)
    thread = _bright(random) * 3 // 4
    weave = (random.noise(3 * cells, 3 * cells)[..., None] - 128) // 10
    shade = np.where(cross == 1, 0, 60)[..., None]
    sewn_colour = np.clip(thread - shade, 0, 255)
    pixels = np.where(sewn[..., None] == 1, sewn_colour, linen) + weave
    whole = np.full((side, side, 3), linen, np.int64)
    whole[: 3 * cells, : 3 * cells] = pixels
    return _laid(np.clip(whole, 0, 255), 255)


def relief(mask: Integers, random: Random) -> Integers:
    """Carved into stone: only light and shadow at the edges show the shape."""
    side = len(mask)
    height = _blur(mask, 1)
    across, down = ((-1, 0, 1)[random.between(0, 2)] or 1), ((-1, 1)[random.between(0, 1)])
    slope = height - np.roll(height, (down, across), (0, 1))
    stone = np.array([random.between(120, 175) for _ in range(3)], np.int64)
    rough = (_blur(random.noise(side, side), 1) - 128) // 2
    return _laid(np.clip(stone + (slope * 3 // 4 + rough)[..., None], 0, 255), 255)


def dots(mask: Integers, random: Random) -> Integers:
    """A plate of dots: those of the drawing in one family of colours, those around it in another."""
    side = len(mask)
    pixels = np.full((side, side, 3), 235, np.int64)
    figure, ground = _bright(random) * 4 // 5, np.array([random.between(120, 200) for _ in range(3)], np.int64)
    down, across = np.mgrid[0:side, 0:side]
    for row in range(0, side, 3):
        for column in range(0, side, 3):
            x, y = column + random.between(0, 1), row + random.between(0, 1)
            inside = mask[min(y + 1, side - 1), min(x + 1, side - 1)] > 110
            colour = np.clip((figure if inside else ground) + random.between(-35, 35), 0, 255)
            pixels[(down - y - 1) ** 2 + (across - x - 1) ** 2 <= 2] = colour
    return _laid(pixels, 255)


STYLES: dict[str, Callable[[Integers, Random], Integers]] = {
    "ink": ink,
    "chalk": chalk,
    "neon": neon,
    "stitch": stitch,
    "relief": relief,
    "dots": dots,
}


def _laid(colour: Integers, opacity: Integers | int) -> Integers:
    """An RGBA square."""
    alpha = np.broadcast_to(np.asarray(opacity, np.int64), colour.shape[:2])
    return np.concatenate([colour, alpha[..., None]], axis=2)


def _bright(random: Random) -> Integers:
    """A saturated colour: one channel full, one nearly empty, one between."""
    channels = [255, random.between(0, 60), random.between(40, 220)]
    first = random.between(0, 2)
    second = (first + random.between(1, 2)) % 3
    third = 3 - first - second
    return np.array([channels[[first, second, third].index(place)] for place in range(3)], np.int64)


def _blur(values: Integers, radius: int) -> Integers:
    """Means over squares of `2 * radius + 1` pixels, borders repeated."""
    width = 2 * radius + 1
    for axis in (0, 1):
        padded = np.pad(values, [(radius + 1, radius) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        sums = padded.cumsum(axis)
        count = values.shape[axis]
        values = (sums.take(range(width, width + count), axis) - sums.take(range(count), axis)) // width
    return values


def _edge(mask: Integers) -> Integers:
    """The border of a drawing: largest less smallest opacity among neighbours."""
    shifted = [np.roll(mask, (down, across), (0, 1)) for down in (-1, 0, 1) for across in (-1, 0, 1)]
    edge: Integers = np.max(shifted, axis=0) - np.min(shifted, axis=0)
    return edge
