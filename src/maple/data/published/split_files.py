"""Published splits that list every image: CoOp's split files, FGVC-Aircraft's lists; and splits drawn in their place.

A split is drawn if the published one was drawn at random and its file is not available. It has the same classes, names
and counts but other images in its splits, so its results are not comparable with those of papers; the names of data
sets that are read with it say so.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from maple import files
from maple.data.folders.listing import list_names
from maple.data.images.formats import is_image_file
from maple.data.records import SPLIT_NAMES, Item
from maple.errors import DataError, shortened

_ROW_FORM = '["path/of/image.jpg", label number, "class name"]'
_AGAIN = "fetch the published file again"


class Contents(NamedTuple):
    """The items of a data set's three splits, and its class names by label."""

    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]
    class_names: tuple[str, ...]


def read_split(path: Path) -> Contents:
    """Read a CoOp-format split file.

    Raises:
        DataError: the file is missing or not JSON, a split or row is malformed, a label has two names, or the labels
            over all splits are not 0..C-1.

    Source: muzairkhattak/multimodal-prompt-learning@69bce21 datasets/oxford_pets.py `read_split`.
    """
    missing = f"{path}: the split file is missing; put the published {path.name} there"
    content: dict[str, Any] = files.read_json(path, error=DataError, missing=missing, advice=_AGAIN)
    if any(not isinstance(content.get(split), list) for split in SPLIT_NAMES):
        raise DataError(f'{path}: must be a JSON object with the lists "train", "val" and "test"')
    names: dict[int, str] = {}
    splits: dict[str, tuple[Item, ...]] = {}
    for split in SPLIT_NAMES:
        items = []
        for index, row in enumerate(content[split]):
            match row:
                case [str(file), int(label), str(name)] if file and name and label >= 0 and not isinstance(label, bool):
                    if "\\" in file:  # written on Windows by CoOp's code, which leaves the first separator there
                        file = file.replace("\\", "/").lstrip("/")
                    item = Item(file, label, name)
                case _:
                    raise DataError(f"{path}: {split}[{index}] is {shortened(repr(row))}; a row must be {_ROW_FORM}")
            earlier = names.setdefault(item.label, item.class_name)
            if earlier != item.class_name:
                raise DataError(
                    f"{path}: {split}[{index}] calls class {item.label} {item.class_name!r}, an earlier row calls it "
                    f"{earlier!r}; give every label one name"
                )
            items.append(item)
        splits[split] = tuple(items)
    if not names:
        raise DataError(f"{path}: holds no images in any of its splits; {_AGAIN}")
    # Not up to the largest label, which may be huge: of C labels, one of 0 to C-1 is missing if another is larger.
    if absent := [label for label in range(len(names)) if label not in names]:
        raise DataError(f"{path}: labels {absent[:10]} have no items; labels must be 0 to C-1 without gaps")
    return Contents(**splits, class_names=tuple(names[label] for label in sorted(names)))


def read_aircraft(names_file: Path) -> Contents:
    """Read FGVC-Aircraft: `variants.txt` lists the classes, `images_variant_SPLIT.txt` next to it the images.

    A line of a list is the number of an image (`0034309`, for `0034309.jpg`), a space and its variant. Labels follow
    the order of `variants.txt`, items that of the lists.

    Raises:
        DataError: a file is missing or not text, or a line is malformed; the line is named.

    Source: muzairkhattak/multimodal-prompt-learning@69bce21 datasets/fgvc_aircraft.py.
    """
    labels: dict[str, int] = {}
    for number, name in read_lines(names_file):
        if name in labels:
            raise DataError(f"{names_file}: line {number} repeats the variant {name!r}; {_AGAIN}")
        labels[name] = len(labels)
    splits: dict[str, tuple[Item, ...]] = {}
    for split in SPLIT_NAMES:
        path = names_file.with_name(f"images_variant_{split}.txt")
        items = []
        for number, line in read_lines(path):
            image, _, name = line.partition(" ")
            if name not in labels:
                raise DataError(
                    f"{path}: line {number} is {line!r}; it must be an image number, a space and a variant of "
                    f"{names_file.name}"
                )
            items.append(Item(f"{image}.jpg", labels[name], name))
        splits[split] = tuple(items)
    return Contents(**splits, class_names=tuple(labels))


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Iterate over (number from 1, stripped text) of the lines that are not blank; DataError if not readable text."""
    try:
        text = files.regular(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: the file is missing; put the published {path.name} there") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}); {_AGAIN}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if stripped := line.strip():
            yield number, stripped


_TRAIN_FRACTION, _VAL_FRACTION = 0.5, 0.2
_FEWEST = 3


@dataclass(frozen=True, slots=True)
class Draw:
    """How a split is drawn: folders that are not classes, and the class names that differ from their folders."""

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
    """Return the path of the drawn split that replaces the published file `labels`, in the same folder."""
    return labels.with_name(labels.name.replace("split_zhou_", "split_drawn_"))


def draw_split(images: Path, draw: Draw, seed: int) -> Contents:
    """Draw half of the images of each class folder for training, a fifth for validation, the rest for testing.

    Raises:
        DataError: the folder is missing or unreadable, has no class folders, or a class has too few images.

    Source: KaiyangZhou/CoOp@ff61507 datasets/dtd.py `read_and_split_data`, and datasets/caltech101.py, eurosat.py for
    the names. Departs: images are sorted before they are shuffled, by a private generator, so that a seed gives the
    same split on every machine.
    """
    rng = random.Random(seed)
    splits: dict[str, list[Item]] = {split: [] for split in SPLIT_NAMES}
    names: list[str] = []
    for folder in list_names(images):
        if folder in draw.ignored or not (images / folder).is_dir():
            continue
        paths = [name for name in list_names(images / folder) if is_image_file(images / folder / name)]
        if len(paths) < _FEWEST:
            raise DataError(
                f"{images / folder}: has {len(paths)} images, too few for train, val and test; unpack the images again"
            )
        rng.shuffle(paths)
        name, train = draw.names.get(folder, folder), round(len(paths) * _TRAIN_FRACTION)
        val = train + round(len(paths) * _VAL_FRACTION)
        for split, chosen in zip(SPLIT_NAMES, (paths[:train], paths[train:val], paths[val:]), strict=True):
            splits[split] += [Item(f"{folder}/{path}", len(names), name) for path in chosen]
        names.append(name)
    if not names:
        raise DataError(f"{images}: holds no folders of classes; unpack the images of the data set there")
    return Contents(**{split: tuple(items) for split, items in splits.items()}, class_names=tuple(names))


def write_drawn_split(labels: Path, images: Path, draw: Draw, seed: int) -> Path:
    """Draw a split and write it to `drawn_file(labels)`; drawing the same one again changes nothing.

    Raises:
        DataError: the published file or another drawn split exists, or the images cannot be split.
    """
    path = drawn_file(labels)
    if labels.exists():
        raise DataError(f"{labels}: the published split is there and will be read; no split needs to be drawn")
    contents = draw_split(images, draw, seed)
    rows = {
        split: [[item.path, item.label, item.class_name] for item in getattr(contents, split)] for split in SPLIT_NAMES
    }
    text = json.dumps({"drawn": {"seed": seed, "by": "maple data split"}, **rows})
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise DataError(
            f"{path}: another split was drawn before, and runs may have used it; remove the file to draw a new one"
        )
    try:
        files.write_text(path, text)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}); choose a writable data root") from error
    return path
