"""Data sets of other libraries, recognised by what they offer, so that none of these libraries is needed here.

Data sets of Hugging Face and torchvision, pandas and polars frames, and whatever gives (image, label) by number.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maple.data import load_dataset
from maple.data.folders.manifests import SPLIT_FORM
from maple.data.records import Dataset
from maple.data.sources.hub import feature_kinds, feature_names, undecoded
from maple.data.sources.rows import (
    SPLIT_COLUMN,
    Columns,
    choose_image_column,
    choose_label_column,
    choose_split_column,
    is_missing,
    no_labels,
    read_label,
    read_split,
)
from maple.errors import DataError, one_of, shortened_list
from maple.inference.sources.image_sources import ImageSource

ADVICE = 'name it, as in settings={{"data": {{"{column}": NAME}}}}, or leave out the others'
_LOADER = "a DataLoader, which gives transformed batches; give its dataset"
_LISTED = {
    "torchvision.DatasetFolder": "samples",
    "torchvision.Places365": "imgs",
    **dict.fromkeys(("torchvision.CIFAR10", "torchvision.MNIST", "torchvision.USPS"), "targets"),
    **dict.fromkeys(("torchvision.SEMEION", "torchvision.STL10", "torchvision.SVHN"), "labels"),
    **dict.fromkeys(("torchvision.CLEVRClassification", "torchvision.DTD", "torchvision.FGVCAircraft"), "_labels"),
    **dict.fromkeys(("torchvision.Flowers102", "torchvision.Food101", "torchvision.OxfordIIITPet"), "_labels"),
    "torchvision.SUN397": "_labels",
    "torchvision.LFWPeople": "targets",
}
"""Where the classes that define `__getitem__` list the labels that it returns, alone or after the path of the image."""
_LOADERS = "torchvision.datasets.folder"
"""The module of the loaders that read a file as it is."""


class InputError(DataError, ValueError):
    """Images or labels of another form than required; a ValueError too, as numerical programs expect."""


class Lazy(Sequence[Any]):
    """A sequence whose items are made when they are asked for.

    Example:
        >>> Lazy(3, lambda number: number * number)[2]
        4
    """

    def __init__(self, length: int, get: Any) -> None:
        self._length, self._get = length, get

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: Any) -> Any:
        if not -self._length <= number < self._length:
            raise IndexError(number)
        return self._get(int(number) % self._length)


class PythonData:
    """Images of a data set of another library, each read when its turn comes, and their labels.

    `images` is a sequence, or an iterator for a data set that is streamed; `read_labels` returns a name or a number for
    each, and `read_splits` "train", "val" or "test" for each, or None where no column divides the images. Their errors
    name the row.
    """

    def __init__(
        self,
        images: Sequence[Any] | Iterator[Any],
        read_labels: Callable[[], list[Any]],
        read_splits: Callable[[], list[str] | None] = lambda: None,
    ) -> None:
        self.images, self.read_labels, self.read_splits = images, read_labels, read_splits


def open_data(value: Any, columns: Columns | None = None) -> PythonData | None:
    """Return the images and labels of a data set of another library; None for anything else.

    Args:
        value: a `datasets.Dataset` (mapped or streamed), a pandas or polars frame with a column of images, a data set
            of torchvision or PyTorch or a part of it (`Subset`), or any object or list that gives (image, label) by
            number.

    Raises:
        InputError: it is several splits, a loader of batches, or has no length or no items.
        DataError: which column is meant is not clear.

    Example:
        >>> data = open_data(torchvision.datasets.CIFAR10("data"))
        >>> len(data.images), data.read_labels()[:2]
        (50000, ['frog', 'truck'])
    """
    columns = columns or Columns(advice=ADVICE)
    if isinstance(value, torch.utils.data.DataLoader):
        raise InputError(f"this is {_LOADER}: loader.dataset")
    if is_split(value):
        splits = ", ".join(map(str, value))
        raise InputError(f"this has the splits {splits}; give one of them, as in data[{next(iter(value))!r}]")
    if hasattr(value, "features") and hasattr(value, "select_columns"):
        return _open_hugging_face(value, columns)
    if is_frame(value):
        return _open_frame(value, columns)
    is_torch = isinstance(value, torch.utils.data.Dataset)
    if is_torch and not hasattr(value, "__len__"):
        raise InputError("this data set of PyTorch has no length; give the images and the labels as lists")
    if is_torch or _gives_pairs(value):
        return _open_numbered(value)
    return None


def is_split(value: Any) -> bool:
    """Whether a value is a mapping of splits, such as a `datasets.DatasetDict`."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(
            hasattr(part, "features") or is_frame(part) or isinstance(part, torch.utils.data.Dataset)
            for part in value.values()
        )
    )


def is_frame(value: Any) -> bool:
    """Whether a value is a frame of pandas or polars that holds more than numbers."""
    if not hasattr(value, "columns") or not (hasattr(value, "iloc") or hasattr(value, "get_column")):
        return False
    kinds = [getattr(each, "kind", "") for each in getattr(value, "dtypes", ())]
    return not (kinds and all(kind in tuple("biufc") for kind in kinds))


def labelled(value: Any, columns: Columns, *, split: str) -> tuple[Any, list[Any]]:
    """Return the images and the labels of a data set that has both; a text names one as for `maple train`.

    Args:
        split: "train" or "test": of a data set that is divided, by name or by a column `split`, this part is taken.

    Raises:
        InputError, DataError: it has no labels, or a row has none; or nothing is in this split.
    """
    if isinstance(value, str | Path):
        options: dict[str, Any] = {"image_column": columns.image, "label_column": columns.label, "min_classes": 1}
        dataset = load_dataset(str(value), None, test_fraction=0.0, **options)
        items = getattr(dataset, split) if not dataset.drawn_split else dataset.train
        if not items:
            raise InputError(f"{value}: has no images in its {split} split")
        return [_item_source(dataset, item.path) for item in items], [item.class_name for item in items]
    if is_split(value):
        if split not in value:
            example = f"data[{next(iter(value))!r}]"
            raise InputError(f"{one_of('split', split, value)}; give one of them, as in {example}")
        value = value[split]
    data = open_data(value, columns)
    if data is None:
        raise InputError(
            f"no labels are given, and {type(value).__name__} has none; give y, or a data set with labels: a folder of "
            "class folders, a datasets.Dataset, a data set of torchvision, or a frame with a column of labels"
        )
    images = data.images if isinstance(data.images, Sequence) else list(data.images)
    labels = data.read_labels()
    if (splits := data.read_splits()) is not None:
        chosen = [number for number, each in enumerate(splits) if each == split]
        if not chosen:
            advice = "give the rows to use without that column"
            raise InputError(f"no row is in the {split} split by the column {SPLIT_COLUMN!r}; {advice}")
        labels = [labels[number] for number in chosen]
        parts = images
        images = Lazy(len(chosen), lambda number: parts[chosen[number]])
    if absent := [number for number, label in enumerate(labels) if label is None]:
        raise InputError(
            f"{len(absent)} of {len(labels)} images have no label (row {shortened_list(absent)}); leave them out before"
        )
    return images, labels


def _item_source(dataset: Dataset, path: str) -> ImageSource:
    store = dataset.store(max_bytes=0)
    return ImageSource(path, partial(store.get, path), partial(store.content_id, path))


def _open_hugging_face(data: Any, columns: Columns) -> PythonData:
    features = data.features
    if features is None:
        raise InputError("this streamed data set has no features; give its images and labels as lists")
    kinds, where = feature_kinds(features), "this data set"
    image = choose_image_column(kinds, columns, where)
    stored = undecoded(data, image)

    def read_labels() -> list[Any]:
        label = choose_label_column(kinds, image, columns, where)
        if label is None:
            raise no_labels(kinds, columns, where)
        names = feature_names(features, label)
        rows = stored.select_columns([label])
        return [read_label(row[label], names, f"row {number}") for number, row in enumerate(rows)]

    def read_splits() -> list[str] | None:
        column = choose_split_column(kinds, image, columns.label)
        names = feature_names(features, column) if column else None
        return _read_splits([row[column] for row in stored.select_columns([column])], names) if column else None

    if hasattr(stored, "__len__"):
        chosen = stored.select_columns([image])
        return PythonData(Lazy(len(stored), lambda number: chosen[number][image]), read_labels, read_splits)
    return PythonData((row[image] for row in stored.select_columns([image])), read_labels, read_splits)


def _open_frame(frame: Any, columns: Columns) -> PythonData:
    names = [str(name) for name in frame.columns]
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise InputError(f"the frame has the column {repeated!r} twice; rename one")
    values = {name: list(frame[column]) for name, column in zip(names, frame.columns, strict=True)}
    kinds = {name: _kind_of_values(column) for name, column in values.items()}
    image = names[0] if len(names) == 1 and columns.image is None else choose_image_column(kinds, columns, "the frame")
    cells = values[image]

    def read_labels() -> list[Any]:
        label = choose_label_column(kinds, image, columns, "the frame")
        if label is None:
            raise no_labels(kinds, columns, "the frame")
        return [read_label(value, None, f"row {number}") for number, value in enumerate(values[label])]

    def read_splits() -> list[str] | None:
        column = choose_split_column(kinds, image, columns.label)
        return _read_splits(values[column], None) if column else None

    return PythonData(cells, read_labels, read_splits)


def _read_splits(values: Sequence[Any], names: Sequence[str] | None) -> list[str] | None:
    """The split of each row; None where all rows have the same, or none, so that nothing is divided.

    Raises:
        DataError: a value is none of train, val and test, or only some rows have one.
    """
    splits = [read_split(value, names, f"row {number}") for number, value in enumerate(values)]
    if len(set(splits)) < 2:
        return None
    if "" in splits:
        raise DataError(f"row {splits.index('')} has no split, but others have one; {SPLIT_FORM}")
    return splits


def _kind_of_values(values: Sequence[Any]) -> str:
    """The kind of a column, as in `choose_image_column`, by its first value that is there."""
    value = next((each for each in values if not is_missing(each)), None)
    if isinstance(value, Mapping):
        return "encoded" if {"bytes", "path"} & set(value) else "struct"
    if isinstance(value, bytes | bytearray):
        return "bytes"
    if isinstance(value, str | Path):
        return "text"
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return "integer"
    if hasattr(value, "convert") or isinstance(value, np.ndarray | torch.Tensor):
        return "image"
    return type(value).__name__


def _gives_pairs(value: Any) -> bool:
    """Whether an object gives (image, label) by number."""
    if isinstance(value, str | bytes | np.ndarray | torch.Tensor | Mapping) or hasattr(value, "__array__"):
        return False
    if not hasattr(value, "__getitem__") or not hasattr(value, "__len__") or not len(value):
        return False
    first = value[0]
    return isinstance(first, tuple) and len(first) == 2 and not isinstance(first[0], int | float)


def _open_numbered(data: Any) -> PythonData:
    if not len(data):
        raise InputError("the data set is empty; give some images")
    if not (isinstance(first := data[0], tuple | list) and len(first) >= 2):
        raise InputError(f"the items of the data set are {type(first).__name__}; they must be (image, label)")
    paths, targets = _stored(data)

    def read_labels() -> list[Any]:
        listed = targets if targets is not None else [data[number][1] for number in range(len(data))]
        labels = [read_label(label, None, f"item {number}") for number, label in enumerate(listed)]
        names = _names(data, dict(enumerate(labels)))
        return [read_label(label, names, f"item {number}") for number, label in enumerate(labels)]

    get = (lambda number: paths[number]) if paths is not None else (lambda number: data[number][0])
    return PythonData(Lazy(len(data), get), read_labels)


def _names(data: Any, labels: Mapping[int, Any]) -> list[str] | None:
    """The class names of a torchvision data set, or of what it is a part of, unless the labels are not their numbers.

    Args:
        labels: the label of each item, by its number.
    """
    classes = getattr(data, "classes", None)
    if classes is None and isinstance(data, torch.utils.data.Subset):
        if len(data) != len(data.indices):
            return None
        inner = {int(data.indices[number]): label for number, label in labels.items()}
        names = _names(data.dataset, inner)
        first = {label: number for number, label in reversed(inner.items())}
        is_changed = _definition(data) != "torch.Subset" and any(
            read_label(data.dataset[number][1], None, f"item {number}") != label for label, number in first.items()
        )
        return None if is_changed else names
    if _definition(data) == "torchvision.OxfordIIITPet" and data._target_types == ["binary-category"]:
        classes = data.bin_classes
    if not isinstance(classes, Sequence) or isinstance(classes, str) or not classes:
        return None
    candidates = (getattr(data, name, None) for name in dict.fromkeys(_LISTED.values()))
    listed = next((each for each in candidates if each is not None and len(each) == len(data)), None)
    if listed is not None and len(set(labels.values())) != len(classes):
        entries = ((label, _label_in(listed[number])) for number, label in labels.items())
        if any(entry != label for label, entry in entries):
            return None  # the labels are made of others, as by target_transform
    return [str(name[0] if isinstance(name, tuple | list) else name) for name in classes]


def _definition(data: Any) -> str:
    """The package and the class that define `__getitem__` of a data set: its class, or one that this inherits from."""
    owner = next(each for each in type(data).__mro__ if "__getitem__" in vars(each))
    return f"{owner.__module__.partition('.')[0]}.{owner.__qualname__}"


def _stored(data: Any) -> tuple[list[str] | None, list[Any] | None]:
    """The paths of the image files, which are read without the transform, and the labels, where they are listed.

    None unless `__getitem__` is known to return these: other classes may change what they list.
    """
    definition = _definition(data)
    if definition == "torch.Subset":
        paths, targets = _stored(data.dataset)
        chosen = [int(index) for index in data.indices]
        chosen_paths = [paths[index] for index in chosen] if paths else None
        return chosen_paths, [targets[index] for index in chosen] if targets else None
    listed = getattr(data, _LISTED.get(definition, ""), None)
    if listed is None or len(listed) != len(data) or getattr(data, "_target_types", ["category"]) != ["category"]:
        return None, None
    paths = None
    if definition == "torchvision.DatasetFolder" and data.loader.__module__ == _LOADERS:
        paths = [str(path) for path, _ in listed]
    # A joint `transforms` may change the label, as target_transform does.
    changes = data.target_transform or type(data.transforms).__name__ not in ("NoneType", "StandardTransform")
    return paths, None if changes else list(map(_label_in, listed))


def _label_in(entry: Any) -> Any:
    """The label in an entry of a list of labels, or of paths and labels."""
    label = entry[1] if isinstance(entry, tuple) else entry
    return label.item() if hasattr(label, "item") else label
