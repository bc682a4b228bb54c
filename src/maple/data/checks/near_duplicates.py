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
_LEAST_CORRELATION = 0.96
"""Of the small copies, each about its own mean."""
_MOST_SHIFT = 16.0
"""Of 255: how far the mean colours may be apart, channel by channel."""
_LEAST_CONTRAST = 3.0
"""Of 255: the standard deviation below which an image is too plain to be told from others by its shape."""
_SMALL = 16


@dataclass(frozen=True, slots=True)
class ImageHash:
    """How an image looks from afar.

    Attributes:
        bits: the difference hash, 64 bits as eight bytes: each pixel of a grey 9 x 8 copy against its right neighbour.
        small: a 16 x 16 copy in colour, [768] bytes.
        plain: there is too little in it to say that another one is the same.
    """

    bits: bytes
    small: bytes
    plain: bool


def image_hash(image: Image.Image) -> ImageHash:
    """The look of an RGB image. Changes of size, format and quality hardly change it; mirroring and cropping do.

    Source: the difference hash is that of N. Krawetz, "Kind of Like That", 2013.
    """
    grey = np.asarray(image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes()
    small = np.asarray(image.resize((_SMALL, _SMALL), Image.Resampling.BOX))
    return ImageHash(bits, small.tobytes(), bool(grey.std() < _LEAST_CONTRAST))


def are_near_duplicates(one: ImageHash, other: ImageHash) -> bool:
    """Whether two images are near duplicates: few bits differ, and the small copies in colour agree."""
    return bool(near_duplicate_groups([one, other]))


def near_duplicate_groups(looks: Sequence[ImageHash]) -> list[tuple[int, ...]]:
    """Groups of two or more that look the same, as indices in their order; what is like a third is like each other."""
    parent = list(range(len(looks)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for one, other in _near_duplicate_pairs(looks):
        first, second = sorted((root(one), root(other)))
        parent[second] = first
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(looks)):
        groups[root(index)].append(index)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _near_duplicate_pairs(looks: Sequence[ImageHash]) -> Iterator[tuple[int, int]]:
    """Every pair of near duplicates.

    Hashes that differ in few bits have a byte in common, so only those are compared that do.
    """
    places = np.array([place for place, look in enumerate(looks) if not look.plain], dtype=np.int64)
    clear = [looks[place] for place in places]
    if len(clear) < 2:
        return
    bits = np.array([list(look.bits) for look in clear], dtype=np.uint8)
    small = np.stack([np.frombuffer(look.small, np.uint8).reshape(-1, 3) for look in clear])
    means = small.mean(axis=1, dtype=np.float32)
    for byte in range(_SIDE):
        for value in np.unique(bits[:, byte]):
            bucket = np.flatnonzero(bits[:, byte] == value)
            for number, one in enumerate(bucket[:-1]):
                rest = bucket[number + 1 :]
                # A pair with an earlier byte in common has been compared before.
                rest = rest[(bits[rest, :byte] != bits[one, :byte]).all(axis=1)]
                rest = rest[_BIT_COUNTS[bits[rest] ^ bits[one]].sum(axis=1) <= _MOST_BITS]
                rest = rest[np.abs(means[rest] - means[one]).max(axis=1, initial=0.0) <= _MOST_SHIFT]
                if not len(rest):
                    continue
                for other in rest[_correlations(small, means, one, rest) >= _LEAST_CORRELATION]:
                    yield int(places[one]), int(places[other])


def _correlations(
    small: npt.NDArray[np.uint8], means: npt.NDArray[np.float32], one: np.int64, rest: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Of one small copy with others, each about its own mean colour."""
    own = (small[one] - means[one]).reshape(-1)
    others = (small[rest] - means[rest][:, None]).reshape(len(rest), -1)
    lengths = np.linalg.norm(others, axis=1) * np.linalg.norm(own)
    found: npt.NDArray[np.float32] = others @ own / np.maximum(lengths, 1e-6)
    return found


_BIT_COUNTS = np.array([value.bit_count() for value in range(256)], dtype=np.uint8)
