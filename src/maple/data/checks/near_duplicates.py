"""Near-duplicate images: a difference hash, and small copies to verify the candidates."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

_SIDE = 8
_MAX_BITS = 7
"""Of the 64 bits of the hash: so at least one of its eight bytes is equal, which `near_duplicate_groups` relies on."""
_MIN_CORRELATION = 0.96
"""Of the small copies, each about its own mean."""
_MAX_SHIFT = 16.0
"""Of 255: the largest difference of the mean colours, channel by channel."""
_MIN_CONTRAST = 3.0
"""Of 255: the standard deviation below which an image is too plain to be recognised by its shape."""
_SMALL = 16
_BLOCK = 4096
"""The number of images whose small copies are compared at once."""
_FEW_PIXELS = 64
"""Images with a shorter side than this, such as drawn digits, hold so little that different ones correlate."""
_MAX_DIFFERENCE = 48.0
"""Of 255: the largest difference in brightness of small copies, each about its mean, if both images have few pixels."""
_BIT_COUNTS = np.array([value.bit_count() for value in range(2**16)], dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class ImageHash:
    """A perceptual hash of an image; a `plain` one has too little contrast to be compared.

    `bits` is the difference hash, 64 bits as eight bytes: each pixel of a grey 9 x 8 copy against its right neighbour;
    `small` is a 16 x 16 copy in colour, [768] bytes; `few_pixels` is that of an image hardly larger.
    """

    bits: bytes
    small: bytes
    plain: bool
    few_pixels: bool = False


def image_hash(image: Image.Image) -> ImageHash:
    """Hash an RGB image. Changes of size, format and quality hardly change the hash; mirroring and cropping do.

    Source: the difference hash is that of N. Krawetz, "Kind of Like That", 2013.
    """
    grey = np.asarray(image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes()
    small = np.asarray(image.resize((_SMALL, _SMALL), Image.Resampling.BOX))
    return ImageHash(bits, small.tobytes(), bool(grey.std() < _MIN_CONTRAST), min(image.size) < _FEW_PIXELS)


def are_near_duplicates(first: ImageHash, second: ImageHash) -> bool:
    """Return whether few bits of two hashes differ and their small copies agree."""
    return bool(near_duplicate_groups([first, second]))


def near_duplicate_groups(hashes: Sequence[ImageHash]) -> list[tuple[int, ...]]:
    """Group near duplicates, as sorted indices (transitive: connected components of near-duplicate pairs)."""
    indices = np.array([index for index, image in enumerate(hashes) if not image.plain], dtype=np.int64)
    if len(indices) < 2:
        return []
    bits = np.array([list(hashes[index].bits) for index in indices], dtype=np.uint8)
    words = bits.view(np.uint16)
    small = np.stack([np.frombuffer(hashes[index].small, np.uint8).reshape(-1, 3) for index in indices])
    means = small.mean(axis=1, dtype=np.float32)
    few_pixels = np.array([hashes[index].few_pixels for index in indices])
    # Hashes that differ in at most 7 bits share a byte, so only those that do are compared: not all n^2 pairs.
    buckets = [{value: np.flatnonzero(column == value) for value in np.unique(column)} for column in bits.T]
    is_free = np.ones(len(indices), dtype=bool)

    def take_near(first: int) -> list[int]:
        """The free near duplicates of an image, which are then no longer free."""
        taken: list[int] = []
        for byte, by_value in enumerate(buckets):
            rest = by_value[bits[first, byte]]
            rest = by_value[bits[first, byte]] = rest[is_free[rest]]
            rest = rest[_BIT_COUNTS[words[rest] ^ words[first]].sum(axis=1) <= _MAX_BITS]
            rest = rest[np.abs(means[rest] - means[first]).max(axis=1, initial=0.0) <= _MAX_SHIFT]
            copy = (small[first] - means[first]).reshape(-1)
            for start in range(0, len(rest), _BLOCK):
                block = rest[start : start + _BLOCK]
                others = (small[block] - means[block][:, None]).reshape(len(block), -1)
                lengths = np.linalg.norm(others, axis=1) * np.linalg.norm(copy)
                near = others @ copy / np.maximum(lengths, 1e-6) >= _MIN_CORRELATION
                if few_pixels[first]:
                    differences = np.abs((others - copy).reshape(len(block), -1, 3).mean(axis=2)).max(axis=1)
                    near &= (differences <= _MAX_DIFFERENCE) | ~few_pixels[block]
                taken += block[near].tolist()
                is_free[block[near]] = False
        return taken

    # An image that has joined a group is not compared again, so that a group of n copies takes about n comparisons.
    groups = []
    for start in range(len(indices)):
        if is_free[start]:
            is_free[start] = False
            group = [start]
            for member in group:
                group += take_near(member)
            if len(group) > 1:
                groups.append(tuple(sorted(int(indices[member]) for member in group)))
    return groups
