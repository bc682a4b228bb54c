"""The training transform: random resized crop, random flip, normalisation."""

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from maple.data.images.eval_transform import RESAMPLING, InputTransform
from maple.errors import ConfigError

_CROP_TRIES = 10


class TrainTransform(InputTransform):
    """Random resized crop, random horizontal flip, normalisation; all randomness from the generator passed in.

    Example:
        >>> transform = TrainTransform(224, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
        >>> transform(read_image("cat.jpg"), torch.Generator().manual_seed(0)).shape
        torch.Size([3, 224, 224])
    """

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
        resize: str = "shortest",
        fill: int = 0,
    ) -> None:
        """Crop a part of the area within `scale`, of an aspect within `ratio`, to `size` x `size` pixels.

        `mean` and `std` are those of the backbone, for red, green and blue in 0..1; `flip` is a probability. Where the
        backbone squashes images ("squash"), the part is one of the squashed image; where it fills them to a square
        ("longest", with `fill`), one of the filled image.

        Raises:
            ConfigError: a setting is out of its range.

        Source: muzairkhattak/multimodal-prompt-learning@69bce21 configs/trainers/MaPLe/
        vit_b16_c2_ep5_batch4_2ctx.yaml:9-14; KaiyangZhou/Dassl.pytorch@c61a1b5 dassl/data/transforms/transforms.py.
        """
        super().__init__(size, mean, std, interpolation, resize, fill)
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ConfigError(f"crop scale is {scale}; give two fractions of the area, 0 < smallest <= largest <= 1")
        if not 0 < ratio[0] <= ratio[1]:
            raise ConfigError(f"crop ratio is {ratio}; give two aspects, 0 < narrowest <= widest")
        if not 0 <= flip <= 1:
            raise ConfigError(f"flip probability is {flip}; it must be between 0 and 1")
        self.scale = scale
        self.ratio = ratio
        self.flip = flip

    @property
    def least_side(self) -> int | None:
        """As that of `EvalView`; of an image whose smallest crop is enlarged no more than that of the whole one."""
        return None if self.resize == "none" else max(2 * self.size, math.ceil(self.size / self.scale[0] ** 0.5))

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        """Return one augmented view [3, R, R] of an RGB image; equal generators give equal views."""
        if self.resize == "longest":
            image = self._squared(image)
        if self.resize == "squash":
            side = max(image.size)
            square = crop_box(side, side, self.scale, self.ratio, generator)
            sides = (image.height, image.width) * 2
            top, left, height, width = (part * of / side for part, of in zip(square, sides, strict=True))
            box = (int(top), int(left), max(1, round(height)), max(1, round(width)))
        else:
            box = crop_box(image.height, image.width, self.scale, self.ratio, generator)
        flipped = torch.rand(1, generator=generator).item() < self.flip
        view = transforms.resized_crop(
            image, *box, [self.size, self.size], interpolation=InterpolationMode(self.interpolation), antialias=True
        )
        return torch.from_numpy(self.normalize(transforms.horizontal_flip(view) if flipped else view))

    def _squared(self, image: Image.Image) -> Image.Image:
        """The image in the centre of a square."""
        longest = max(image.size)
        # A square of a long strip's length would fill the memory; four times as many pixels as are seen are enough.
        if longest > 4 * self.size > 0 and min(image.size) * 8 < longest:
            shrunk = [max(1, round(side * 4 * self.size / longest)) for side in image.size]
            image, longest = image.resize((shrunk[0], shrunk[1]), RESAMPLING[self.interpolation]), max(shrunk)
        return self.filled(image, longest)


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """Draw the top, left, height and width of a random crop of an image of `height` x `width` pixels.

    The area is uniform in `scale`, the logarithm of the aspect uniform between those of `ratio`; when ten draws do
    not fit, the largest central crop whose aspect is within `ratio` is taken.

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
