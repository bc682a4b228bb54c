"""Zero-shot accuracy on images that no training step draws."""

from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torch import Tensor

from maple.data import icons
from maple.data.emoji.archive import EmojiArchive, scene_seed
from maple.data.icons.styles import STYLES
from maple.data.scenes import render_scene
from small_clip.captions import PLAIN_TEMPLATE

EVAL_INDEX = 1_000_000  # scenes of emoji from this number on are for measurement only


class Exam:
    """Zero-shot classification over all names of a group of emoji or a topic of icons.

    Attributes:
        names: the class names of each group or topic that was added.
    """

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}
        self._images: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}

    def add_emoji(self, group: str, scenes: int, difficulty: float) -> None:
        """Scenes of a group in each style of the bundled emoji."""
        archive = EmojiArchive()
        self.names[group] = [concept.name for concept in archive.concepts(group)]
        for style in archive.styles:
            images = [
                render_scene(
                    archive.glyph(style, concept.code),
                    scene_seed(style, concept.code, EVAL_INDEX + number),
                    difficulty=difficulty,
                )
                for concept in archive.concepts(group)
                for number in range(scenes)
            ]
            labels = torch.arange(len(self.names[group])).repeat_interleave(scenes)
            self._images.setdefault(group, {})[style] = (pixels_of(images), labels)

    def add_icons(self, topic: str, drawings: int) -> None:
        """The first test drawings of each class of a topic, in each style."""
        archive = icons.archive()
        names = self.names[topic] = list(archive.names(topic))
        numbers = range(archive.train_count, archive.train_count + drawings)
        for style in STYLES:
            images = [icons.draw(f"{style}/{topic}/{name}/{number}") for name in names for number in numbers]
            labels = torch.arange(len(names)).repeat_interleave(drawings)
            self._images.setdefault(topic, {})[style] = (pixels_of(images), labels)

    @torch.no_grad()
    def measure(self, model: Any, tokenize: Any) -> dict[str, dict[str, float]]:
        """Top-1 accuracy in per cent by group or topic, and style."""
        mean, std = (torch.tensor(v)[:, None, None] for v in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
        table: dict[str, dict[str, float]] = {}
        for group, names in self.names.items():
            text = model.encode_text(tokenize([PLAIN_TEMPLATE.format(name) for name in names]), normalize=True)
            for style, (pixels, labels) in self._images[group].items():
                features = torch.cat(
                    [
                        model.encode_image((part.float() / 255 - mean) / std, normalize=True)
                        for part in pixels.split(256)
                    ]
                )
                right = (features @ text.T).argmax(1) == labels
                table.setdefault(group, {})[style] = round(100 * right.float().mean().item(), 1)
        return table


def pixels_of(images: list[Image.Image]) -> Tensor:
    """Images as uint8 [N, 3, height, width]."""
    flat = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images]
    return torch.stack(flat).view(len(images), images[0].height, images[0].width, 3).permute(0, 3, 1, 2)
