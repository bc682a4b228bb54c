"""Draw a small folder of class folders: coloured shapes on plain backgrounds, the same on every machine.

Usage: python scripts/draw_shapes.py FOLDER [--per-class 40]
"""

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 210)}
SHAPES = ("circle", "square", "triangle")
SIDE = 96


def draw(colour: tuple[int, int, int], shape: str, rng: random.Random) -> Image.Image:
    """Draw an image of SIDE x SIDE pixels with random position, size, background and shade."""
    background = tuple(rng.randint(190, 255) for _ in range(3))
    image = Image.new("RGB", (SIDE, SIDE), background)
    half = rng.randint(14, 34)
    x, y = (rng.randint(half, SIDE - half) for _ in range(2))
    shade = tuple(max(0, min(255, value + rng.randint(-30, 30))) for value in colour)
    box = (x - half, y - half, x + half, y + half)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, fill=shade)
    elif shape == "square":
        pen.rectangle(box, fill=shade)
    else:
        pen.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=shade)
    return image


def main() -> None:
    """Write FOLDER/CLASS/NUMBER.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-class", type=int, default=40)
    arguments = parser.parse_args()
    for name, colour in COLOURS.items():
        for shape in SHAPES:
            folder = arguments.folder / f"{name} {shape}"
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(arguments.per_class):
                rng = random.Random(f"{name} {shape} {number}")
                draw(colour, shape, rng).save(folder / f"{number:03d}.png")
    print(f"{len(COLOURS) * len(SHAPES)} classes of {arguments.per_class} images in {arguments.folder}")


if __name__ == "__main__":
    main()
