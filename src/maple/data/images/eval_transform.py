"""The evaluation transform: from an RGB image to the input of a CLIP vision tower, with Pillow and NumPy alone."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maple.data.images.formats import DRAFT
from maple.errors import ConfigError, one_of

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float32]

RESAMPLING = {
    name: Image.Resampling[name.upper()] for name in ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")
}
RESIZES = ("shortest", "longest", "squash", "none")
_MAX_ASPECT = 64


class InputTransform:
    """The checked settings of a tower's input, and the normalisation of its pixels."""

    def __init__(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str,
        resize: str = "shortest",
        fill: int = 0,
    ) -> None:
        if size < 1:
            raise ConfigError(f"image size is {size}; it must be at least 1 pixel")
        if resize not in RESIZES:
            raise ConfigError(one_of("resize", resize, RESIZES))
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != 3:
                raise ConfigError(f"image {name} is {tuple(values)}; give three numbers, for red, green and blue")
        if min(std) <= 0:
            raise ConfigError(f"image std is {tuple(std)}; its three numbers must be above 0")
        if interpolation not in RESAMPLING:
            raise ConfigError(one_of("interpolation", interpolation, RESAMPLING))
        self.size = size
        self.interpolation = interpolation
        self.resize = resize
        self.fill = fill
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self._mean = np.array(self.mean, dtype=np.float32).reshape(3, 1, 1)
        self._std = np.array(self.std, dtype=np.float32).reshape(3, 1, 1)

    def filled(self, image: Image.Image, side: int) -> Image.Image:
        """The image in the centre of one of which no side is shorter than `side`, of the level `fill`."""
        width, height = max(image.width, side), max(image.height, side)
        filled = Image.new("RGB", (width, height), (self.fill,) * 3)
        filled.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return filled

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
    """Resize, crop the centre, normalise: the preprocessing that a CLIP was evaluated with.

    Needs no torch; `EvalTransform` returns the same values as a tensor.

    Example:
        >>> view = EvalView(224, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
        >>> view(read_image("cat.jpg")).shape
        (3, 224, 224)
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        *,
        resize: str = "shortest",
        resize_size: int | None = None,
        fill: int = 0,
        crop_offset: str = "rounded",
    ) -> None:
        """Prepare images for a tower that reads `size` x `size` pixels; see `maple.clip.Preprocessing`.

        Raises:
            ConfigError: a setting is out of its range.

        Source: open_clip 3.3.0 src/open_clip/transform.py `image_transform(is_train=False)`, equal to the bit except
        for images more than 64 times as long as wide of which only the middle is seen. transformers 5.24
        image_processing_backends.py, up to the rounding of resized pixels.
        """
        super().__init__(size, mean, std, interpolation, resize, fill)
        self.resize_size = resize_size or size
        self.crop_offset = crop_offset

    @property
    def least_side(self) -> int | None:
        """The shorter side, in pixels, at which a JPEG may be decoded: see `read_image`. None if none is resized.

        Twice what is seen: the image is then still resized by a factor of two, which hides most of the difference.
        """
        return None if self.resize == "none" else 2 * max(self.size, self.resize_size)

    @classmethod
    def from_preprocessing(cls, preprocessing: Any) -> Self:
        """Return the transform for a `Backbone.preprocessing`, or for the same fields of an export's manifest."""
        return cls(
            preprocessing.size,
            preprocessing.mean,
            preprocessing.std,
            preprocessing.interpolation,
            resize=preprocessing.resize,
            resize_size=preprocessing.resize_size,
            fill=preprocessing.fill,
            crop_offset=preprocessing.crop_offset,
        )

    def __call__(self, image: Image.Image) -> Floats:
        """Return the normalised values [3, R, R] of an RGB image."""
        # Resized whole, an extreme strip would fill the memory, although only its middle is seen: cut it first.
        *whole, divisor = image.info.get(DRAFT, (*image.size, 1))
        longest = min(image.size) * _MAX_ASPECT
        if self.resize == "shortest" and max(image.size) > longest:
            left, top = (max(0, (side - longest) // 2) for side in image.size)
            image = image.crop((left, top, left + min(image.width, longest), top + min(image.height, longest)))
            whole, divisor = [*image.size], 1
        width, height = self._resized((whole[0], whole[1]))
        if (width, height) != image.size:
            # The sides of a draft are rounded up. Resized as they are, all would be moved by up to a pixel.
            box = None if divisor == 1 else (0, 0, whole[0] / divisor, whole[1] / divisor)
            image = image.resize((width, height), RESAMPLING[self.interpolation], box=box)
        if width < self.size or height < self.size:
            image = self.filled(image, self.size)
        return self.normalize(self._centre(image))

    def _resized(self, sides: tuple[int, int]) -> tuple[int, int]:
        """The width and height of an image of these sides after resizing."""
        target = self.resize_size
        if self.resize == "squash":
            return target, target
        if self.resize == "none":
            return sides
        if self.resize == "longest":
            # Half a pixel of a very thin image would be none.
            width, height = (max(1, round(side / (max(sides) / target))) for side in sides)
        else:
            short = min(sides)
            width, height = (int(target * side / short) if side > short else target for side in sides)
        return width, height

    def _centre(self, image: Image.Image) -> Image.Image:
        halves = ((side - self.size) / 2.0 for side in image.size)
        left, top = (int(half) if self.crop_offset == "floor" else round(half) for half in halves)
        return image.crop((left, top, left + self.size, top + self.size))


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
