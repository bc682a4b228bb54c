"""The published data sets that can be read, and the one door to all data: `load_dataset`.

A new data set with a CoOp-format split file is one line in `CATALOGUE`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maple.data.emoji import PREFIX, TEMPLATE, archive, load_emoji
from maple.data.folders import load_folder, rename_classes
from maple.data.records import Dataset, Item
from maple.errors import DataError, one_of


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """Where a published data set lies under the data root, and its zero-shot template.

    `folder` is its folder; `images` the folder inside it that the split's paths start from; `split` the split file.

    Source: KaiyangZhou/CoOp@ff61507 DATASETS.md (layout); muzairkhattak/multimodal-prompt-learning@69bce21
    trainers/zsclip.py:13-29 (templates).
    """

    title: str
    folder: str
    images: str
    split: str
    template: str


CATALOGUE: dict[str, DatasetSpec] = {
    "caltech101": DatasetSpec(
        "Caltech101", "caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json", "a photo of a {}."
    ),
    "dtd": DatasetSpec("DTD", "dtd", "images", "split_zhou_DescribableTextures.json", "{} texture."),
    "eurosat": DatasetSpec(
        "EuroSAT", "eurosat", "2750", "split_zhou_EuroSAT.json", "a centered satellite photo of {}."
    ),
    "food101": DatasetSpec(
        "Food101", "food-101", "images", "split_zhou_Food101.json", "a photo of {}, a type of food."
    ),
    "oxford_flowers": DatasetSpec(
        "Flowers102", "oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json", "a photo of a {}, a type of flower."
    ),
    "oxford_pets": DatasetSpec(
        "OxfordPets", "oxford_pets", "images", "split_zhou_OxfordPets.json", "a photo of a {}, a type of pet."
    ),
    "stanford_cars": DatasetSpec(
        "StanfordCars", "stanford_cars", "", "split_zhou_StanfordCars.json", "a photo of a {}."
    ),
    "sun397": DatasetSpec("SUN397", "sun397", "SUN397", "split_zhou_SUN397.json", "a photo of a {}."),
    "ucf101": DatasetSpec(
        "UCF101", "ucf101", "UCF-101-midframes", "split_zhou_UCF101.json", "a photo of a person doing {}."
    ),
}

_PARTS = ("train", "val", "test")
_ROW_FORM = '["path/of/image.jpg", label number, "class name"]'


def load_dataset(
    name_or_folder: str,
    root: Path | None,
    *,
    class_names: Mapping[str, str] | None = None,
    seed: int = 0,
    val_fraction: float = 0.0,
    test_fraction: float = 0.25,
) -> Dataset:
    """Read a published data set by its name under `root`, or any folder of class-named folders.

    A name of `CATALOGUE` is read from its split file, `emoji-GROUP[/STYLE]` is drawn from the bundled emoji; write
    `./NAME` for a folder of that name. For a folder,
    see `load_folder`; only there do `seed` and the fractions matter. `class_names` maps published names, or
    folder names, to the names to use instead.

    Raises:
        ConfigError: a fraction is out of range.
        DataError: the name is unknown and no such folder exists, `root` or a file under it is missing, the split
            file is malformed, or `class_names` names a class that does not exist.
    """
    if name_or_folder in CATALOGUE:
        return _load_published(name_or_folder, CATALOGUE[name_or_folder], root, class_names)
    if name_or_folder.startswith(PREFIX):
        return load_emoji(name_or_folder, class_names)
    folder = Path(name_or_folder).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"{one_of('data set', name_or_folder, known_names())}; or give the path of an existing folder "
            "that holds one folder of images per class"
        )
    return load_folder(
        folder, class_names=class_names, seed=seed, val_fraction=val_fraction, test_fraction=test_fraction
    )


def known_names() -> list[str]:
    """The names of all data sets: the published ones, then the bundled emoji groups."""
    return [*CATALOGUE, *(f"{PREFIX}{group}" for group in archive().groups)]


def template_of(name: str) -> str | None:
    """The zero-shot template of a data set of the catalogue; None for a user's folder."""
    if name in CATALOGUE:
        return CATALOGUE[name].template
    return TEMPLATE if name.startswith(PREFIX) else None


def read_split(path: Path) -> tuple[dict[str, tuple[Item, ...]], tuple[str, ...]]:
    """Read a CoOp-format split file: the items of its parts "train", "val", "test", and the class names by label.

    Raises:
        DataError: the file is missing or not JSON, a part or row is malformed, a label has two names, or the
            labels over all parts are not 0..C-1.

    Source: muzairkhattak/multimodal-prompt-learning@69bce21 datasets/oxford_pets.py `read_split`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: the split file is missing; put the published {path.name} there") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); fetch the published file again") from error
    if not isinstance(content, dict) or any(not isinstance(content.get(part), list) for part in _PARTS):
        raise DataError(f'{path}: must be a JSON object with the lists "train", "val" and "test"')
    names: dict[int, str] = {}
    parts: dict[str, tuple[Item, ...]] = {}
    for part in _PARTS:
        items = [_item(row, f"{path}: {part}[{index}]") for index, row in enumerate(content[part])]
        for index, item in enumerate(items):
            known = names.setdefault(item.label, item.class_name)
            if known != item.class_name:
                raise DataError(
                    f"{path}: {part}[{index}] calls class {item.label} {item.class_name!r}, an earlier row calls it "
                    f"{known!r}; give every label one name"
                )
        parts[part] = tuple(items)
    absent = sorted(set(range(max(names, default=-1) + 1)) - set(names))
    if absent:
        raise DataError(f"{path}: labels {absent[:10]} have no items; labels must be 0 to C-1 without gaps")
    return parts, tuple(names[label] for label in sorted(names))


def _item(row: Any, where: str) -> Item:
    match row:
        case [str(path), int(label), str(name)] if path and name and label >= 0 and not isinstance(label, bool):
            return Item(path, label, name)
    raise DataError(f"{where} is {row!r}; a row must be {_ROW_FORM}")


def _load_published(name: str, spec: DatasetSpec, root: Path | None, class_names: Mapping[str, str] | None) -> Dataset:
    if root is None:
        raise DataError(
            f"data set {name!r} is read from a data root: give the folder that holds {spec.folder}/ as --data-root or "
            "in the variable MAPLE_DATA (root=... from Python), or name a folder of class-named folders instead"
        )
    root = root.expanduser()
    folder = root / spec.folder
    images = folder / spec.images
    for path, what in ((root, "the data root"), (folder, f"the folder of {spec.title}"), (images, "its image folder")):
        if not path.is_dir():
            raise DataError(
                f"{path}: {what} is missing; {spec.title} is expected as {images} with {folder / spec.split} beside it"
            )
    parts, names = read_split(folder / spec.split)
    dataset = Dataset(name, images, parts["train"], parts["val"], parts["test"], names)
    first = dataset.file([*dataset.train[:1], *dataset.val[:1], *dataset.test[:1]][0])
    # One look at the disk tells a wrong layout before hours of training do.
    if not first.is_file():
        raise DataError(f"{first}: the first image of {spec.title} is missing; unpack its images in {images}")
    return rename_classes(dataset, class_names)
