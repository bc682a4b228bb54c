"""From an RGB image to the values that a CLIP vision tower reads in evaluation, with PIL and NumPy alone."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maple.errors import ConfigError, one_of

Floats = NDArray[np.float32]

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_MAX_ASPECT = 64


class ToInput:
    """The settings of a tower's input, checked, and the last step from pixels to normalised values."""

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float], interpolation: str) -> None:
        if size < 1:
            raise ConfigError(f"image size is {size}; it must be at least 1 pixel")
        for what, values in (("mean", mean), ("std", std)):
            if len(values) != 3:
                raise ConfigError(f"image {what} is {tuple(values)}; give three numbers, for red, green and blue")
        if min(std) <= 0:
            raise ConfigError(f"image std is {tuple(std)}; its three numbers must be above 0")
        if interpolation not in RESAMPLING:
            raise ConfigError(one_of("interpolation", interpolation, RESAMPLING))
        self.size = size
        self.interpolation = interpolation
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        # In float32 and with one operation per step, so that the values equal torchvision's to the bit.
        self._mean = np.array(self.mean, dtype=np.float32).reshape(3, 1, 1)
        self._std = np.array(self.std, dtype=np.float32).reshape(3, 1, 1)

    def normalised(self, image: Image.Image) -> Floats:
        """The values [3, R, R] of an image of R x R pixels."""
        # NumPy rather than torch: in loader threads it starts no thread pools of its own.
        pixels: NDArray[Any] = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")
        pixels /= np.float32(255)
        pixels -= self._mean
        pixels /= self._std
        return pixels


class EvalView(ToInput):
    """Resize of the shorter side, central crop, normalisation: what CLIP itself was evaluated with."""

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float], interpolation: str = "bicubic") -> None:
        """Prepare images for a tower that reads `size` x `size` pixels.

        Raises:
            ConfigError: a setting is out of its range.

        Source: open_clip 3.3.0 src/open_clip/transform.py `image_transform(is_train=False)`, equal to the bit but for
        strips of an image, more than 64 times as long as wide.
        """
        super().__init__(size, mean, std, interpolation)

    @classmethod
    def from_preprocessing(cls, preprocessing: Any) -> Self:
        """The transform for a tower's `Backbone.preprocessing`, or for the same fields of an export's manifest."""
        return cls(preprocessing.size, preprocessing.mean, preprocessing.std, preprocessing.interpolation)

    def __call__(self, image: Image.Image) -> Floats:
        """Return an RGB image as values [3, R, R]."""
        return self.normalised(self.render(image))

    def render(self, image: Image.Image) -> Image.Image:
        """Return the R x R pixels that are seen of an RGB image."""
        box = middle(*image.size)
        if box != (0, 0, *image.size):
            image = image.crop(box)
        short = min(image.size)
        width, height = (int(self.size * side / short) if side > short else self.size for side in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), RESAMPLING[self.interpolation])
        left, top = round((width - self.size) / 2.0), round((height - self.size) / 2.0)
        return image.crop((left, top, left + self.size, top + self.size))


def middle(width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is left of a strip without its far ends: resized whole, it would fill the
    memory, and only the middle is seen."""
    longest = min(width, height) * _MAX_ASPECT
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return left, top, left + min(width, longest), top + min(height, longest)
