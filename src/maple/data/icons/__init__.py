"""The bundled icons, by topic (the data set) and style (the domain): another drawing in every image of a class.

`icons-objects/neon` is the topic of objects in the style of neon tubes; `icons-objects` alone is the style of ink. An
item's path is `STYLE/TOPIC/NAME/DRAWING`; its image is rendered from that path alone. Training and test images show
different drawings, by different makers: what is learned on a class is what it looks like in a style, not one drawing.
"""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maple import __version__
from maple.data.folders.class_folders import rename_classes
from maple.data.icons.archive import IconArchive
from maple.data.icons.styles import STYLES
from maple.data.records import Dataset, Item
from maple.data.scenes import Random, render_scene
from maple.errors import DataError, one_of

PREFIX = "icons-"
DEFAULT_STYLE = "ink"
DIFFICULTY = 0.25
"""How varied the scenes are; see `render_scene`."""
VALIDATION = 100
"""Validation images show training drawings in other scenes: their numbers start here."""


@cache
def archive() -> IconArchive:
    """Return the bundled drawings, opened once per process."""
    return IconArchive()


def draw(path: str) -> Image.Image:
    """Render the image of an item's path, RGB, 64 x 64 pixels; DataError if it is not STYLE/TOPIC/NAME/DRAWING."""
    style, topic, name, number = (*path.split("/"), "", "", "")[:4]
    if style not in STYLES or not number.isdecimal():
        raise DataError(f"{path!r} is not an icon; it must be STYLE/TOPIC/NAME/DRAWING, as in neon/objects/key/3")
    random = Random(int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big"))
    drawing = archive().drawing(topic, name, int(number) % VALIDATION)
    square = Image.fromarray(STYLES[style](drawing, random).astype(np.uint8))
    return render_scene(square, random.bits(), difficulty=DIFFICULTY)


def identify(path: str) -> str:
    """Return a text that is equal for equal images, without rendering: the path and what else decides the pixels."""
    return f"icons:{__version__}:{DIFFICULTY}:{path}"


def topic_and_style(name: str) -> tuple[str, str]:
    """Parse `icons-TOPIC` or `icons-TOPIC/STYLE`; DataError if there is no such topic or style."""
    topic, _, style = name.removeprefix(PREFIX).partition("/")
    style = style or DEFAULT_STYLE
    if topic not in archive().topics:
        raise DataError(one_of("data set", name, [f"{PREFIX}{known}" for known in archive().topics]))
    if style not in STYLES:
        raise DataError(one_of(f"style of {PREFIX}{topic}", style, STYLES))
    return topic, style


def load_icons(name: str, class_names: Mapping[str, str] | None = None) -> Dataset:
    """Load `icons-TOPIC` or `icons-TOPIC/STYLE`: 16 training, 4 validation and 6 test images per name.

    Raises as `topic_and_style`.
    """
    topic, style = topic_and_style(name)
    names = archive().names(topic)
    train, test = archive().train_count, archive().test_count
    numbers = {"train": range(train), "val": range(VALIDATION, VALIDATION + 4), "test": range(train, train + test)}
    splits: dict[str, Any] = {
        split: tuple(
            Item(f"{style}/{topic}/{shown}/{number}", label, shown)
            for label, shown in enumerate(names)
            for number in drawings
        )
        for split, drawings in numbers.items()
    }
    root = Path(f"{PREFIX}{topic}/{style}")
    dataset = Dataset(root.as_posix(), root, class_names=names, read=draw, identify=identify, **splits)
    return rename_classes(dataset, class_names)
