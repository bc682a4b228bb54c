"""Do two images look the same? A difference hash, and a small copy to check what the hash suspects."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

_SIDE = 8
_MOST_BITS = 7
"""Of the 64 bits of the hash; so of eight bytes one at least is equal, which is what `_suspects` looks for."""
_LEAST_CORRELATION = 0.985
"""Of the small copies, each about its own mean."""
_MOST_SHIFT = 16.0
"""Of 255: how far the mean colours may be apart, channel by channel."""
_LEAST_CONTRAST = 3.0
"""Of 255: the standard deviation below which an image is too plain to be told from others by its shape."""
_SMALL = 16


@dataclass(frozen=True, slots=True)
class Look:
    """How an image looks from afar.

    Attributes:
        bits: the difference hash, 64 bits as eight bytes: each pixel of a grey 9 x 8 copy against its right neighbour.
        small: a 16 x 16 copy in colour, [768] bytes.
        plain: there is too little in it to say that another one is the same.
    """

    bits: bytes
    small: bytes
    plain: bool


def look_of(image: Image.Image) -> Look:
    """The look of an RGB image. Changes of size, format and quality hardly change it; mirroring and cropping do.

    Source: the difference hash is that of N. Krawetz, "Kind of Like That", 2013.
    """
    grey = np.asarray(image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes()
    small = np.asarray(image.resize((_SMALL, _SMALL), Image.Resampling.BOX))
    return Look(bits, small.tobytes(), bool(grey.std() < _LEAST_CONTRAST))


def alike(one: Look, other: Look) -> bool:
    """Whether two images are near duplicates: few bits differ, and the small copies in colour agree."""
    if one.plain or other.plain or _distance(one.bits, other.bits) > _MOST_BITS:
        return False
    first, second = (np.frombuffer(look.small, np.uint8).reshape(-1, 3).astype(np.float32) for look in (one, other))
    means = first.mean(axis=0), second.mean(axis=0)
    if np.abs(means[0] - means[1]).max() > _MOST_SHIFT:
        return False
    first, second = first - means[0], second - means[1]
    lengths = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float((first * second).sum()) >= _LEAST_CORRELATION * lengths


def alike_groups(looks: Sequence[Look]) -> list[tuple[int, ...]]:
    """Groups of two or more that look the same, as indices in their order; what is like a third is like each other."""
    parent = list(range(len(looks)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for one, other in _suspects(looks):
        if root(one) != root(other) and alike(looks[one], looks[other]):
            parent[max(root(one), root(other))] = min(root(one), root(other))
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(looks)):
        groups[root(index)].append(index)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _suspects(looks: Sequence[Look]) -> Iterator[tuple[int, int]]:
    """The pairs whose hashes differ in at most `_MOST_BITS`; some come more than once."""
    bits = np.array([list(look.bits) for look in looks], dtype=np.uint8).reshape(-1, _SIDE)
    clear = np.array([not look.plain for look in looks], dtype=bool)
    for byte in range(_SIDE):
        order = np.flatnonzero(clear)
        for value in range(256):
            bucket = order[bits[order, byte] == value]
            yield from _near(bits, bucket)


def _near(bits: npt.NDArray[np.uint8], bucket: npt.NDArray[np.intp]) -> Iterator[tuple[int, int]]:
    for place in range(len(bucket) - 1):
        rest = bucket[place + 1 :]
        differing = _BIT_COUNTS[bits[rest] ^ bits[bucket[place]]].sum(axis=1)
        for other in rest[differing <= _MOST_BITS]:
            yield int(bucket[place]), int(other)


def _distance(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_count()


_BIT_COUNTS = np.array([value.bit_count() for value in range(256)], dtype=np.uint8)
