"""Batches of random emoji scenes, composed by tensor operations."""

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from maple.data.emoji.scenes import Concept, EmojiArchive

SEEN_STYLES = ("openmoji", "noto", "fluent")


class Scenes:
    """Batches of random scenes, composed by tensor operations."""

    def __init__(self, archive: EmojiArchive, concepts: tuple[Concept, ...], generator: torch.Generator) -> None:
        self.generator = generator
        glyphs = [[np.array(archive.glyph(style, c.code)) for c in concepts] for style in SEEN_STYLES]
        # (styles, concepts, 4, 64, 64), 82 MB
        self.glyphs = torch.from_numpy(np.array(glyphs)).permute(0, 1, 4, 2, 3).contiguous()
        self.mean = torch.tensor(OPENAI_DATASET_MEAN)[:, None, None]
        self.std = torch.tensor(OPENAI_DATASET_STD)[:, None, None]

    def uniform(self, low: Tensor | float, high: Tensor | float, *shape: int) -> Tensor:
        """Uniform numbers between `low` and `high`."""
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def batch(self, styles: Tensor, concepts: Tensor, hardest: float, widening: float) -> Tensor:
        """Normalised images (batch, 3, 64, 64); difficulty per image is uniform up to `hardest`."""
        count = len(styles)
        glyph = self.glyphs[styles, concepts].float() / 255
        level = self.uniform(0, hardest, count)
        drawn, alpha = glyph[:, :3], glyph[:, 3:]
        if widening:
            drawn, alpha = self.widen(drawn, alpha, widening)
        drawn = self.jitter(drawn)
        placed = self.place(torch.cat([drawn * alpha, alpha], 1), level)
        image = placed[:, :3] + self.ground(level) * (1 - placed[:, 3:])
        return (self.light(image, level) - self.mean) / self.std

    def place(self, glyph: Tensor, level: Tensor) -> Tensor:
        """The glyphs turned, scaled and moved."""
        count = len(glyph)
        scale = self.uniform(0.84 - 0.39 * level, 0.94 + 0.11 * level, count)
        turn = self.uniform(-1, 1, count) * (5 + 69 * level) / 256
        cosine, sine = (1 - turn**2) / (1 + turn**2), 2 * turn / (1 + turn**2)
        room = 0.02 + (1 - scale).clamp_min(1 / 16) * level / 2
        x, y = (2 * room * self.uniform(-1, 1, count) for _ in range(2))
        rows = torch.stack([cosine, sine, -(cosine * x + sine * y), -sine, cosine, sine * x - cosine * y], 1)
        grid = F.affine_grid((rows / scale[:, None]).view(count, 2, 3), list(glyph.shape), align_corners=False)
        return F.grid_sample(glyph, grid, align_corners=False)

    def ground(self, level: Tensor) -> Tensor:
        """Backgrounds: plain, a gradient, or soft blotches of two colours."""
        count, wide = len(level), level[:, None]
        colours = []
        for _ in range(2):
            grey = self.uniform((216 - 120 * wide) / 255, torch.full_like(wide, 250 / 255), count, 1)
            tint = (12 + 60 * wide) / 255 * self.uniform(-1, 1, count, 3)
            colours.append((grey + tint).clamp(40 / 255, 1)[:, :, None, None])
        cells = int(torch.randint(3, 13, (1,), generator=self.generator))
        blotches = F.interpolate(self.uniform(0, 1, count, 1, cells, cells), size=(64, 64), mode="bilinear")
        corners = F.interpolate(self.uniform(0, 1, count, 1, 2, 2), size=(64, 64), mode="bilinear", align_corners=True)
        plain, gradient = (self.uniform(0, 1, count, 1, 1, 1) for _ in range(2))
        mixed = torch.where(gradient < 0.5, corners, blotches) * (plain < level[:, None, None, None])
        return torch.lerp(colours[0], colours[1], mixed)

    def light(self, image: Tensor, level: Tensor) -> Tensor:
        """Light that falls off to one side, and grain."""
        count, level = len(image), level[:, None, None, None]
        line = torch.linspace(-1, 1, 64)
        bright = 1 + self.uniform((-16 - 60 * level) / 256, (12 + 36 * level) / 256, count, 1, 1, 1)
        slopes = [level / 4 * self.uniform(-1, 1, count, 1, 1, 1) for _ in range(2)]
        gain = bright + line.view(1, 1, 1, 64) * slopes[0] + line.view(1, 1, 64, 1) * slopes[1]
        grain = (4 + 24 * level) / 256 * self.uniform(0, 0.4, count, 1, 1, 1)
        noise = torch.randn(image.shape, generator=self.generator)
        return (image * gain + noise * grain).clamp(0, 1)

    def jitter(self, drawn: Tensor) -> Tensor:
        """Colours scaled per channel and pulled a little to or from grey."""
        count = len(drawn)
        gains = 1 + 0.15 * self.uniform(-1, 1, count, 3, 1, 1)
        saturation = self.uniform(0.6, 1.3, count, 1, 1, 1)
        grey = drawn.mean(1, keepdim=True)
        return (torch.lerp(grey, drawn, saturation) * gains + 0.05 * self.uniform(-1, 1, count, 1, 1, 1)).clamp(0, 1)

    def widen(self, drawn: Tensor, alpha: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """A share of the glyphs in another manner: grey, drawn by their edges, posterised, inverted or blurred."""
        drawn, alpha = drawn.clone(), alpha.clone()
        kind = torch.rand(len(drawn), generator=self.generator) / share * 6
        for number in range(6):
            chosen = ((kind >= number) & (kind < number + 1)).nonzero()[:, 0]
            if not len(chosen):
                continue
            colour, cover = drawn[chosen], alpha[chosen]
            if number == 0:
                colour = colour.mean(1, keepdim=True).expand_as(colour)
            elif number in (1, 2):
                colour, cover = self.outline(colour, cover)
            elif number == 3:
                colour = (colour * 3).round() / 3
            elif number == 4:
                colour = 1 - colour
            else:
                both = F.avg_pool2d(torch.cat([colour * cover, cover], 1), 5, 1, 2)
                colour, cover = both[:, :3] / both[:, 3:].clamp_min(1e-3), both[:, 3:]
            drawn[chosen], alpha[chosen] = colour, cover
        return drawn, alpha

    def outline(self, colour: Tensor, cover: Tensor) -> tuple[Tensor, Tensor]:
        """Dark lines where the drawing changes, nothing between."""
        laid = torch.cat([colour * cover, cover], 1)
        steepness = (F.max_pool2d(laid, 3, 1, 1) + F.max_pool2d(-laid, 3, 1, 1)).amax(1, keepdim=True)
        threshold = self.uniform(0.15, 0.45, len(colour), 1, 1, 1)
        lines = ((steepness - threshold) * 4).clamp(0, 1)
        ink = self.uniform(0, 0.25, len(colour), 1, 1, 1).expand_as(colour)
        return ink, lines
