"""The evaluation transform: from an RGB image to the input of a CLIP vision tower, with Pillow and NumPy alone."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maple.errors import ConfigError, one_of

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float32]

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_MAX_ASPECT = 64


class InputTransform:
    """The checked settings of a tower's input, and the normalisation of its pixels."""

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float], interpolation: str) -> None:
        if size < 1:
            raise ConfigError(f"image size is {size}; it must be at least 1 pixel")
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != 3:
                raise ConfigError(f"image {name} is {tuple(values)}; give three numbers, for red, green and blue")
        if min(std) <= 0:
            raise ConfigError(f"image std is {tuple(std)}; its three numbers must be above 0")
        if interpolation not in RESAMPLING:
            raise ConfigError(one_of("interpolation", interpolation, RESAMPLING))
        self.size = size
        self.interpolation = interpolation
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self._mean = np.array(self.mean, dtype=np.float32).reshape(3, 1, 1)
        self._std = np.array(self.std, dtype=np.float32).reshape(3, 1, 1)

    def normalize(self, image: Image.Image) -> Floats:
        """Return the normalised values [3, R, R] of an image of R x R pixels."""
        # In float32 and one operation per step, so that the values equal torchvision's to the bit. NumPy rather than
        # torch, which would start thread pools of its own in the reading threads.
        pixels: NDArray[Any] = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")
        pixels /= np.float32(255)
        pixels -= self._mean
        pixels /= self._std
        return pixels


class EvalView(InputTransform):
    """Resize the shorter side, crop the centre, normalise: the preprocessing that CLIP was evaluated with.

    Needs no torch; `EvalTransform` returns the same values as a tensor.

    Example:
        >>> view = EvalView(224, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
        >>> view(read_image("cat.jpg")).shape
        (3, 224, 224)
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float], interpolation: str = "bicubic") -> None:
        """Prepare images for a tower that reads `size` x `size` pixels.

        Raises:
            ConfigError: a setting is out of its range.

        Source: open_clip 3.3.0 src/open_clip/transform.py `image_transform(is_train=False)`, equal to the bit except
        for images more than 64 times as long as wide.
        """
        super().__init__(size, mean, std, interpolation)

    @classmethod
    def from_preprocessing(cls, preprocessing: Any) -> Self:
        """Return the transform for a `Backbone.preprocessing`, or for the same fields of an export's manifest."""
        return cls(preprocessing.size, preprocessing.mean, preprocessing.std, preprocessing.interpolation)

    def __call__(self, image: Image.Image) -> Floats:
        """Return the normalised values [3, R, R] of an RGB image."""
        # Resized whole, an extreme strip would fill the memory, although only its middle is seen: cut it first.
        longest = min(image.size) * _MAX_ASPECT
        if max(image.size) > longest:
            left, top = (max(0, (side - longest) // 2) for side in image.size)
            image = image.crop((left, top, left + min(image.width, longest), top + min(image.height, longest)))
        short = min(image.size)
        width, height = (int(self.size * side / short) if side > short else self.size for side in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), RESAMPLING[self.interpolation])
        left, top = round((width - self.size) / 2.0), round((height - self.size) / 2.0)
        return self.normalize(image.crop((left, top, left + self.size, top + self.size)))


class EvalTransform(EvalView):
    """`EvalView` as a tensor.

    Example:
        >>> transform = EvalTransform(224, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
        >>> transform(read_image("cat.jpg")).shape
        torch.Size([3, 224, 224])
    """

    def __call__(self, image: Image.Image, generator: "torch.Generator | None" = None) -> "torch.Tensor":  # type: ignore[override]
        """Return an RGB image as a tensor [3, R, R] float32; `generator` is unused (the signature of training)."""
        del generator
        # Imported here: the ONNX predictor uses this module where torch is not installed.
        import torch

        return torch.from_numpy(super().__call__(image))
