"""From an RGB image to the tensor a CLIP vision tower reads, in training and in evaluation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from maple.data.images.eval_transform import EvalView, ToInput, middle
from maple.errors import ConfigError

INTERPOLATIONS: dict[str, InterpolationMode] = {
    "bicubic": InterpolationMode.BICUBIC,
    "bilinear": InterpolationMode.BILINEAR,
}

_CROP_TRIES = 10


@dataclass(frozen=True)
class Cut:
    """Which pixels of an image a view shows.

    Attributes:
        top, left, height, width: the box that is cut out of the image.
        resized: height and width that it is resized to.
        window: top and left of the R x R pixels of these that are shown.
        flipped: whether left and right change places.
    """

    top: int
    left: int
    height: int
    width: int
    resized: tuple[int, int]
    window: tuple[int, int] = (0, 0)
    flipped: bool = False


class TrainTransform(ToInput):
    """Random resized crop, random horizontal flip, normalisation; all randomness from the generator passed in."""

    def __init__(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        interpolation: str = "bicubic",
    ) -> None:
        """Crop a part of the area within `scale`, of an aspect within `ratio`, to `size` x `size` pixels.

        `mean` and `std` are those of the backbone, for red, green and blue in 0..1; `flip` is a probability.

        Raises:
            ConfigError: a setting is out of its range.

        Source: muzairkhattak/multimodal-prompt-learning@69bce21 configs/trainers/MaPLe/
        vit_b16_c2_ep5_batch4_2ctx.yaml:9-14; KaiyangZhou/Dassl.pytorch@c61a1b5 dassl/data/transforms/transforms.py.
        """
        super().__init__(size, mean, std, interpolation)
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ConfigError(f"crop scale is {scale}; give two fractions of the area, 0 < smallest <= largest <= 1")
        if not 0 < ratio[0] <= ratio[1]:
            raise ConfigError(f"crop ratio is {ratio}; give two aspects, 0 < narrowest <= widest")
        if not 0 <= flip <= 1:
            raise ConfigError(f"flip probability is {flip}; it must be between 0 and 1")
        self.scale = scale
        self.ratio = ratio
        self.flip = flip

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        """Return one augmented view [3, R, R] of an RGB image; equal generators give equal views."""
        return torch.from_numpy(self.normalised(self.render(image, self.cut(image.height, image.width, generator))))

    def cut(self, height: int, width: int, generator: torch.Generator) -> Cut:
        """Draw a view of an image of `height` x `width` pixels."""
        top, left, crop_height, crop_width = crop_box(height, width, self.scale, self.ratio, generator)
        flipped = torch.rand(1, generator=generator).item() < self.flip
        return Cut(top, left, crop_height, crop_width, (self.size, self.size), flipped=flipped)

    def render(self, image: Image.Image, cut: Cut) -> Image.Image:
        """Return the R x R pixels of a view."""
        cropped = transforms.resized_crop(
            image,
            *(cut.top, cut.left, cut.height, cut.width, list(cut.resized)),
            interpolation=INTERPOLATIONS[self.interpolation],
            antialias=True,
        )
        return transforms.horizontal_flip(cropped) if cut.flipped else cropped  # type: ignore[no-any-return]


class EvalTransform(EvalView):
    """An evaluation view as a tensor."""

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:  # type: ignore[override]
        """Return an RGB image as a tensor [3, R, R]; a generator is accepted and not used."""
        del generator
        return torch.from_numpy(super().__call__(image))

    def cut(self, height: int, width: int, generator: torch.Generator | None = None) -> Cut:
        """Return what is seen of an image of `height` x `width` pixels: the same as `__call__` shows."""
        del generator
        left, top, right, bottom = middle(width, height)
        height, width = bottom - top, right - left
        longer = int(self.size * max(height, width) / min(height, width))
        resized = (self.size, longer) if width >= height else (longer, self.size)
        window = (round((resized[0] - self.size) / 2.0), round((resized[1] - self.size) / 2.0))
        return Cut(top, left, height, width, resized, window)

    def render(self, image: Image.Image, cut: Cut | None = None) -> Image.Image:
        """Return the R x R pixels that are seen; there is one cut of each image, so it is accepted and not used."""
        del cut
        return super().render(image)


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """Draw the top, left, height and width of a random crop of an image of `height` x `width` pixels.

    The area is uniform in `scale`, the logarithm of the aspect uniform between those of `ratio`; when ten draws do
    not fit, the largest central crop whose aspect lies within `ratio` is taken.

    Source: torchvision `RandomResizedCrop.get_params`, same draws in the same order, from `generator`.
    """
    log_ratio = torch.log(torch.tensor(ratio, dtype=torch.float32))
    for _ in range(_CROP_TRIES):
        area = (
            height
            * width
            * torch.empty(1, dtype=torch.float32).uniform_(scale[0], scale[1], generator=generator).item()
        )
        log_aspect = torch.empty(1, dtype=torch.float32).uniform_(
            log_ratio[0].item(), log_ratio[1].item(), generator=generator
        )
        aspect = torch.exp(log_aspect).item()
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(torch.randint(0, height - crop_height + 1, size=(1,), generator=generator).item())
            left = int(torch.randint(0, width - crop_width + 1, size=(1,), generator=generator).item())
            return top, left, crop_height, crop_width
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        crop_width = max(1, round(height * ratio[1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
