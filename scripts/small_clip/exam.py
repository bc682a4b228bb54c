"""Zero-shot accuracy on scenes that no training step draws."""

from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torch import Tensor

from maple.data.emoji.scenes import EmojiArchive, render_scene, scene_seed
from small_clip.captions import PLAIN_TEMPLATE

EVAL_INDEX = 1_000_000  # scenes from this number on are for measurement only
EVAL_DIFFICULTY = 0.5


class Exam:
    """Zero-shot classification over all names of a group, on scenes that no training step draws."""

    def __init__(
        self, archive: EmojiArchive, groups: tuple[str, ...], scenes: int, difficulty: float = EVAL_DIFFICULTY
    ):
        mean, std = (torch.tensor(v)[:, None, None] for v in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
        self.names = {group: [concept.name for concept in archive.concepts(group)] for group in groups}
        self.images: dict[tuple[str, str], Tensor] = {}
        for style in archive.styles:
            for group in groups:
                images = [
                    render_scene(
                        archive.glyph(style, concept.code),
                        scene_seed(style, concept.code, EVAL_INDEX + number),
                        difficulty=difficulty,
                    )
                    for concept in archive.concepts(group)
                    for number in range(scenes)
                ]
                pixels = torch.stack([pixels_of(image) for image in images])
                self.images[style, group] = (pixels.float() / 255 - mean) / std
        self.scenes = scenes

    @torch.no_grad()
    def measure(self, model: Any, tokenize: Any) -> dict[str, dict[str, float]]:
        """Top-1 accuracy in per cent by group and style."""
        table: dict[str, dict[str, float]] = {}
        for group, names in self.names.items():
            text = model.encode_text(tokenize([PLAIN_TEMPLATE.format(name) for name in names]), normalize=True)
            labels = torch.arange(len(names)).repeat_interleave(self.scenes)
            for style in sorted({style for style, _ in self.images}):
                features = torch.cat(
                    [model.encode_image(part, normalize=True) for part in self.images[style, group].split(256)]
                )
                right = (features @ text.T).argmax(1) == labels
                table.setdefault(group, {})[style] = round(100 * right.float().mean().item(), 1)
        return table


def pixels_of(image: Image.Image) -> Tensor:
    """An image as uint8 (3, height, width)."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1)
