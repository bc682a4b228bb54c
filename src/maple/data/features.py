"""Data sets of precomputed features, whose items are rows of tensors."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from maple.data.folders.class_folders import draw_split
from maple.data.records import SPLIT_NAMES, Dataset, Item
from maple.errors import ImageError
from maple.feature_files import UNDIVIDED, FeatureTable, features_place, read_features


def load_features(
    path: str, *, seed: int = 0, val_fraction: float = 0.0, test_fraction: float = 0.25
) -> tuple[Dataset, FeatureTable]:
    """Read a data set from files of features, and the features: see `maple.feature_files.read_features` for the format.

    Items are called by their rows, as in "train/17". Undivided features are divided by `seed` as a folder of images is;
    where there are training and validation rows but no test rows, those of validation are the test.

    Args:
        path: a file, or several, separated by commas.

    Raises:
        DataError: a file cannot be read, or what it holds does not fit together.

    Example:
        >>> dataset, table = load_features("cars.safetensors")
        >>> dataset.counts(), table.rows(["train/17"]).shape
        ({'train': 3136, 'val': 0, 'test': 1635, 'classes': 196}, torch.Size([1, 512]))
    """
    table = read_features(path)
    names = table.class_names
    items = {
        split: [Item(f"{split}/{row}", label, names[label]) for row, label in enumerate(labels.tolist())]
        for split, labels in table.labels.items()
    }
    drawn = UNDIVIDED in items
    if drawn:
        by_class: dict[str, list[str]] = {name: [] for name in names}
        for item in items[UNDIVIDED]:
            by_class[item.class_name].append(item.path)
        divided = draw_split(by_class, seed, val_fraction, test_fraction)
        label_of = {name: label for label, name in enumerate(names)}
        items = {
            split: [Item(path, label_of[name], name) for name, paths in classes.items() for path in paths]
            for split, classes in divided.items()
        }
    elif "train" in items and "val" in items and "test" not in items:
        items["test"] = items.pop("val")
    splits: dict[str, Any] = {split: tuple(items.get(split, ())) for split in SPLIT_NAMES}
    title = features_place(path).name if "," in path else Path(path).stem
    dataset = Dataset(title, features_place(path), class_names=names, drawn_split=drawn, **splits)
    read = partial(_no_image, path)
    return replace(dataset, read=read, identify=table.digest, features=table.rows), table


def _no_image(source: str, path: str) -> NoReturn:
    raise ImageError(f"{path} of {source} is a row of features, not an image; use a method that accepts features")
