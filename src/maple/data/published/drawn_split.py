"""A split drawn here, for the data sets whose published split was drawn at random: when the file cannot be had.

It has the classes, names and counts of the published split but other images in its parts, so its results are not those
of papers; data sets read with it say so in their name.

Source: KaiyangZhou/CoOp@ff61507 datasets/dtd.py `read_and_split_data`, and datasets/caltech101.py, eurosat.py for the
names. Departs: images are sorted before they are shuffled, by a generator of their own, so that a seed gives one split
on every machine.
"""

import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

from maple import files
from maple.data.folders.class_folders import is_ignored
from maple.data.images.reading import is_image_file
from maple.data.published.split_files import PARTS, Contents
from maple.data.records import Item
from maple.errors import DataError

DRAWN = " (drawn split)"
"""What is added to the name of a data set that is read with such a split."""

_TRAIN, _VAL = 0.5, 0.2
_FEWEST = 3


@dataclass(frozen=True, slots=True)
class Draw:
    """How a split is drawn: folders that are no classes, and the names of folders that are called otherwise."""

    ignored: frozenset[str] = frozenset()
    names: dict[str, str] = field(default_factory=dict)


DRAWS = {
    "caltech101": Draw(
        frozenset({"BACKGROUND_Google", "Faces_easy"}),
        {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"},
    ),
    "food101": Draw(),
    "dtd": Draw(),
    "eurosat": Draw(
        names={
            "AnnualCrop": "Annual Crop Land",
            "HerbaceousVegetation": "Herbaceous Vegetation Land",
            "Highway": "Highway or Road",
            "Industrial": "Industrial Buildings",
            "Pasture": "Pasture Land",
            "PermanentCrop": "Permanent Crop Land",
            "Residential": "Residential Buildings",
            "SeaLake": "Sea or Lake",
        }
    ),
}


def drawn_file(labels: Path) -> Path:
    """Where the drawn split stands in for the published file `labels`: beside it."""
    return labels.with_name(labels.name.replace("split_zhou_", "split_drawn_"))


def draw_split(images: Path, draw: Draw, seed: int) -> Contents:
    """Half of the images of each class folder of `images` for training, a fifth for validation, the rest for testing.

    Classes are numbered in the order of their folders' names.

    Raises:
        DataError: the folder is missing or unreadable, has no class folders, or a class too few images for three parts.
    """
    rng = random.Random(seed)
    parts: dict[str, list[Item]] = {part: [] for part in PARTS}
    names: list[str] = []
    for folder in _folders(images):
        if folder in draw.ignored:
            continue
        found = sorted(name for name in _listed(images / folder) if is_image_file(images / folder / name))
        if len(found) < _FEWEST:
            raise DataError(
                f"{images / folder}: has {len(found)} images, too few for train, val and test; unpack the images again"
            )
        rng.shuffle(found)
        name, train = draw.names.get(folder, folder), round(len(found) * _TRAIN)
        val = train + round(len(found) * _VAL)
        for part, some in zip(PARTS, (found[:train], found[train:val], found[val:]), strict=True):
            parts[part] += [Item(f"{folder}/{image}", len(names), name) for image in some]
        names.append(name)
    if not names:
        raise DataError(f"{images}: holds no folders of classes; unpack the images of the data set there")
    return Contents(tuple(parts["train"]), tuple(parts["val"]), tuple(parts["test"]), tuple(names))


def write_drawn(labels: Path, images: Path, draw: Draw, seed: int) -> Path:
    """Draw a split and write it beside where the published file `labels` would lie; the same one again changes nothing.

    Raises:
        DataError: the published file is there, another draw is there, or the images cannot be split.
    """
    path = drawn_file(labels)
    if labels.exists():
        raise DataError(f"{labels}: the published split is there, and is what is read; nothing need be drawn")
    contents = draw_split(images, draw, seed)
    rows = {
        part: [[item.path, item.label, item.class_name] for item in items]
        for part, items in zip(PARTS, contents[:3], strict=True)
    }
    text = json.dumps({"drawn": {"seed": seed, "by": "maple data split"}, **rows})
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise DataError(
            f"{path}: another split was drawn before, and runs may have used it; remove the file to draw a new one"
        )
    try:
        files.write_text(path, text)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}); choose a data root that can") from error
    return path


def _folders(images: Path) -> list[str]:
    return sorted(name for name in _listed(images) if (images / name).is_dir())


def _listed(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if not is_ignored(name)]
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be listed ({error.strerror}); unpack the images of the data set there"
        ) from error
