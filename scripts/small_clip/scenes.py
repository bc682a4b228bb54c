"""Batches of random scenes of the drawings that pretraining sees, composed by tensor operations."""

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from small_clip.corpus import Corpus

REVERSED = 0.35  # share of the drawings of one colour that are light on a dark ground
TILED = 0.3  # share of them that have a square ground of their own, like the icon of an app


class Scenes:
    """Batches of random scenes, composed by tensor operations on the device of the generator."""

    def __init__(self, corpus: Corpus, generator: torch.Generator) -> None:
        self.generator, self.device = generator, generator.device
        arrays = corpus.masks, corpus.colours, corpus.drawings[:, 2], corpus.drawings[:, 3]
        tensors = (torch.from_numpy(np.array(array)).to(self.device) for array in arrays)
        self.masks, self.colours, self.in_colours, self.places = tensors
        self.mean = torch.tensor(OPENAI_DATASET_MEAN, device=self.device)[:, None, None]
        self.std = torch.tensor(OPENAI_DATASET_STD, device=self.device)[:, None, None]

    def uniform(self, low: Tensor | float, high: Tensor | float, *shape: int) -> Tensor:
        """Uniform numbers between `low` and `high`."""
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)

    def batch(self, drawings: Tensor, hardest: float, widening: float) -> Tensor:
        """Normalised images (batch, 3, 64, 64) of rows of the corpus; difficulty is uniform up to `hardest`."""
        count = len(drawings)
        level = self.uniform(0, hardest, count)
        drawn, alpha, in_colours = self.inked(drawings, level)
        ground = self.ground(level)
        if widening:
            drawn, alpha = self.widen(drawn, alpha, in_colours, widening)
        drawn = self.jitter(drawn)
        reversed_, tiled = (~in_colours & (self.uniform(0, 1, count) < share) for share in (REVERSED, TILED))
        tile = self.ground(level[tiled])
        drawn[reversed_], tile[reversed_[tiled]] = 1 - drawn[reversed_], 1 - tile[reversed_[tiled]]
        ground[reversed_ & ~tiled] = 1 - ground[reversed_ & ~tiled]
        drawn[tiled] = torch.lerp(tile, drawn[tiled], alpha[tiled])
        alpha[tiled] = 1
        placed = self.place(torch.cat([drawn * alpha, alpha], 1), level)
        image = placed[:, :3] + ground * (1 - placed[:, 3:])
        return (self.light(image, level) - self.mean) / self.std

    def inked(self, drawings: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Colours and opacity of the drawings, and whether their colours are their own.

        The others get a dark ink, the more colourful the harder.
        """
        count = len(drawings)
        places, coloured = self.places[drawings], self.in_colours[drawings] == 1
        drawn, alpha = (torch.empty(count, channels, 64, 64, device=self.device) for channels in (3, 1))
        glyphs = self.colours[places[coloured]].permute(0, 3, 1, 2).float() / 255
        drawn[coloured], alpha[coloured] = glyphs[:, :3], glyphs[:, 3:]
        alpha[~coloured] = self.masks[places[~coloured]][:, None].float() / 255
        wide = level[~coloured, None]
        shade = self.uniform(0, 0.1 + 0.5 * wide, len(wide), 1)
        ink = (shade + (0.1 + 0.6 * wide) * self.uniform(-1, 1, len(wide), 3)).clamp(0, 0.75)
        drawn[~coloured] = ink[:, :, None, None].expand(-1, -1, 64, 64)
        return drawn, alpha, coloured

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
        cells = int(torch.randint(3, 13, (1,), generator=self.generator, device=self.device))
        blotches = F.interpolate(self.uniform(0, 1, count, 1, cells, cells), size=(64, 64), mode="bilinear")
        corners = F.interpolate(self.uniform(0, 1, count, 1, 2, 2), size=(64, 64), mode="bilinear", align_corners=True)
        plain, gradient = (self.uniform(0, 1, count, 1, 1, 1) for _ in range(2))
        mixed = torch.where(gradient < 0.5, corners, blotches) * (plain < level[:, None, None, None])
        return torch.lerp(colours[0], colours[1], mixed).expand(-1, 3, 64, 64).clone()

    def light(self, image: Tensor, level: Tensor) -> Tensor:
        """Light that falls off to one side, and grain."""
        count, level = len(image), level[:, None, None, None]
        line = torch.linspace(-1, 1, 64, device=self.device)
        bright = 1 + self.uniform((-16 - 60 * level) / 256, (12 + 36 * level) / 256, count, 1, 1, 1)
        slopes = [level / 4 * self.uniform(-1, 1, count, 1, 1, 1) for _ in range(2)]
        gain = bright + line.view(1, 1, 1, 64) * slopes[0] + line.view(1, 1, 64, 1) * slopes[1]
        grain = (4 + 24 * level) / 256 * self.uniform(0, 0.4, count, 1, 1, 1)
        noise = torch.randn(image.shape, generator=self.generator, device=self.device)
        return (image * gain + noise * grain).clamp(0, 1)

    def jitter(self, drawn: Tensor) -> Tensor:
        """Colours scaled per channel and pulled a little to or from grey."""
        count = len(drawn)
        gains = 1 + 0.15 * self.uniform(-1, 1, count, 3, 1, 1)
        saturation = self.uniform(0.6, 1.3, count, 1, 1, 1)
        grey = drawn.mean(1, keepdim=True)
        return (torch.lerp(grey, drawn, saturation) * gains + 0.05 * self.uniform(-1, 1, count, 1, 1, 1)).clamp(0, 1)

    def widen(self, drawn: Tensor, alpha: Tensor, in_colours: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """A share of the glyphs in another manner: grey, drawn by their edges, posterised, inverted or blurred.

        Glyphs of one colour are not inverted here, where they would vanish in their grounds.
        """
        drawn, alpha = drawn.clone(), alpha.clone()
        kind = self.uniform(0, 1, len(drawn)) / share * 6
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
                colour = torch.where(in_colours[chosen, None, None, None], 1 - colour, colour)
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
