"""The bundled benchmark: emoji rendered into scenes, by group (the data set) and style (the domain).

`emoji-animals/twemoji` is the group of animals in the style of Twemoji; `emoji-animals` alone means the same. An item's
path is `STYLE/CODE/NUMBER`; its image is rendered from that path alone, so it is the same on every machine and needs no
file.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from maple import __version__
from maple.data.emoji.archive import EmojiArchive, scene_seed
from maple.data.folders.class_folders import rename_classes
from maple.data.records import Dataset, Item
from maple.data.scenes import render_scene
from maple.errors import DataError, one_of

PREFIX = "emoji-"
DEFAULT_STYLE = "twemoji"
DIFFICULTY = 0.25
"""How varied the scenes are; see `render_scene`."""
SCENES = {"train": range(32), "val": range(100, 104), "test": range(200, 210)}
"""The numbers of each concept's scenes in each split. Those from 1,000,000 on are for measuring the small CLIP."""


@cache
def archive() -> EmojiArchive:
    """Return the bundled emoji, opened once per process."""
    return EmojiArchive()


def draw(path: str) -> Image.Image:
    """Render the image of an item's path, RGB, 64 x 64 pixels; DataError if it is not an emoji's STYLE/CODE/NUMBER."""
    style, _, rest = path.partition("/")
    code, _, number = rest.partition("/")
    if not number.isdecimal():
        raise DataError(f"{path!r} is not an emoji scene; it must be STYLE/CODE/NUMBER, as in twemoji/1f436/7")
    return render_scene(archive().glyph(style, code), scene_seed(style, code, int(number)), difficulty=DIFFICULTY)


def identify(path: str) -> str:
    """Return a text that is equal for equal images, without rendering: the path and what else decides the pixels."""
    return f"emoji:{__version__}:{DIFFICULTY}:{path}"


def group_and_style(name: str) -> tuple[str, str]:
    """Parse `emoji-GROUP` or `emoji-GROUP/STYLE`; DataError if there is no such group or style."""
    group, _, style = name.removeprefix(PREFIX).partition("/")
    style = style or DEFAULT_STYLE
    if group not in archive().groups:
        raise DataError(one_of("data set", name, [f"{PREFIX}{known}" for known in archive().groups]))
    if style not in archive().styles:
        raise DataError(one_of(f"style of {PREFIX}{group}", style, archive().styles))
    return group, style


def load_emoji(name: str, class_names: Mapping[str, str] | None = None) -> Dataset:
    """Load `emoji-GROUP` or `emoji-GROUP/STYLE`: 32 training, 4 validation and 10 test scenes per concept.

    Raises as `group_and_style`.
    """
    group, style = group_and_style(name)
    concepts = archive().concepts(group)
    splits: dict[str, Any] = {
        split: tuple(
            Item(f"{style}/{concept.code}/{number}", label, concept.name)
            for label, concept in enumerate(concepts)
            for number in numbers
        )
        for split, numbers in SCENES.items()
    }
    root = Path(f"{PREFIX}{group}/{style}")
    names = tuple(concept.name for concept in concepts)
    dataset = Dataset(root.as_posix(), root, class_names=names, read=draw, identify=identify, **splits)
    return rename_classes(dataset, class_names)
