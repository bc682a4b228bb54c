"""Near-duplicate images: a difference hash, and small copies to verify the candidates."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

_SIDE = 8
_MAX_BITS = 7
"""Of the 64 bits of the hash: so at least one of its eight bytes is equal, which `_near_duplicate_pairs` relies on."""
_MIN_CORRELATION = 0.96
"""Of the small copies, each about its own mean."""
_MAX_SHIFT = 16.0
"""Of 255: the largest difference of the mean colours, channel by channel."""
_MIN_CONTRAST = 3.0
"""Of 255: the standard deviation below which an image is too plain to be recognised by its shape."""
_SMALL = 16
_BIT_COUNTS = np.array([value.bit_count() for value in range(256)], dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class ImageHash:
    """A perceptual hash of an image; a `plain` one has too little contrast to be compared.

    `bits` is the difference hash, 64 bits as eight bytes: each pixel of a grey 9 x 8 copy against its right neighbour;
    `small` is a 16 x 16 copy in colour, [768] bytes.
    """

    bits: bytes
    small: bytes
    plain: bool


def image_hash(image: Image.Image) -> ImageHash:
    """Hash an RGB image. Changes of size, format and quality hardly change the hash; mirroring and cropping do.

    Source: the difference hash is that of N. Krawetz, "Kind of Like That", 2013.
    """
    grey = np.asarray(image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes()
    small = np.asarray(image.resize((_SMALL, _SMALL), Image.Resampling.BOX))
    return ImageHash(bits, small.tobytes(), bool(grey.std() < _MIN_CONTRAST))


def are_near_duplicates(first: ImageHash, second: ImageHash) -> bool:
    """Return whether few bits of two hashes differ and their small copies agree."""
    return bool(near_duplicate_groups([first, second]))


def near_duplicate_groups(hashes: Sequence[ImageHash]) -> list[tuple[int, ...]]:
    """Group near duplicates, as sorted indices (transitive: connected components of near-duplicate pairs)."""
    parent = list(range(len(hashes)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for first, second in _near_duplicate_pairs(hashes):
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(hashes)):
        groups[root(index)].append(index)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _near_duplicate_pairs(hashes: Sequence[ImageHash]) -> Iterator[tuple[int, int]]:
    """Yield every pair of near duplicates."""
    indices = np.array([index for index, image in enumerate(hashes) if not image.plain], dtype=np.int64)
    if len(indices) < 2:
        return
    bits = np.array([list(hashes[index].bits) for index in indices], dtype=np.uint8)
    small = np.stack([np.frombuffer(hashes[index].small, np.uint8).reshape(-1, 3) for index in indices])
    means = small.mean(axis=1, dtype=np.float32)
    # Hashes that differ in at most 7 bits share a byte, so only those that do are compared: not all n^2 pairs.
    for byte in range(_SIDE):
        for value in np.unique(bits[:, byte]):
            bucket = np.flatnonzero(bits[:, byte] == value)
            for place, first in enumerate(bucket[:-1]):
                rest = bucket[place + 1 :]
                # A pair that shares an earlier byte has been compared before.
                rest = rest[(bits[rest, :byte] != bits[first, :byte]).all(axis=1)]
                rest = rest[_BIT_COUNTS[bits[rest] ^ bits[first]].sum(axis=1) <= _MAX_BITS]
                rest = rest[np.abs(means[rest] - means[first]).max(axis=1, initial=0.0) <= _MAX_SHIFT]
                if not len(rest):
                    continue
                copy = (small[first] - means[first]).reshape(-1)
                others = (small[rest] - means[rest][:, None]).reshape(len(rest), -1)
                lengths = np.linalg.norm(others, axis=1) * np.linalg.norm(copy)
                correlations = others @ copy / np.maximum(lengths, 1e-6)
                for second in rest[correlations >= _MIN_CORRELATION]:
                    yield int(indices[first]), int(indices[second])
