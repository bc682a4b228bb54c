"""Files of precomputed features: what `--features` reads in place of images and of a CLIP."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maple import files
from maple.errors import ClassNamesError, DataError, one_of, pointer_in, shortened
from maple.names import MOST_CLASSES, distinct, feature_paths

SPLITS = ("train", "val", "test")
UNDIVIDED = "features"
_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_METADATA = ("class_names", "backbone", "logit_scale")
_NAMES = ("names", "train_names", "val_names", "test_names")
_SMALL = 2**-10  # the largest value of a row, below which half precision loses too much of the others
_KNOWN = re.compile(r"(train|val|test|text)(_features|_\d+shot)?|(train|val|test)_labels|features|labels")


@dataclass(frozen=True)
class FeatureTable:
    """Features by split, their labels, and the text features of the classes.

    Attributes:
        features, labels: by "train", "val", "test", or "features" where they are not divided: [N, D] float32 as they
            are stored, not normalised, and [N] int64.
        text: [C, D] float32, or None.
        class_names: C names.
        backbone: a free text that says which CLIP computed the features; "" if the file does not say.
        logit_scale: by which cosines are multiplied.

    Example:
        >>> table = read_features("cars.safetensors")
        >>> table.features["train"].shape, len(table.class_names)
        (torch.Size([3136, 512]), 196)
    """

    features: dict[str, Tensor]
    labels: dict[str, Tensor]
    text: Tensor | None
    class_names: tuple[str, ...]
    backbone: str
    logit_scale: float
    embed_dim: int

    def rows(self, paths: Sequence[str]) -> Tensor:
        """The features [n, D] of rows such as "train/17"."""
        return torch.stack([self._row(path) for path in paths])

    def digest(self, path: str) -> str:
        """The SHA-256 (hex) of a row: equal for equal values, also where one file has them in half precision."""
        split, number = self._place(path)
        return self._digests[split][number]

    def _row(self, path: str) -> Tensor:
        split, number = self._place(path)
        return self.features[split][number]

    def _place(self, path: str) -> tuple[str, int]:
        split, _, number = path.rpartition("/")
        if split in self.features and number.isdecimal() and int(number) < len(self.features[split]):
            return split, int(number)
        raise DataError(f"the files of features have no row {path!r}; put back those of the training")

    @cached_property
    def _digests(self) -> dict[str, list[str]]:
        return {split: [sha256(row).hexdigest() for row in _canonical(rows)] for split, rows in self.features.items()}

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of what stands for the CLIP: class names and their text features, D, and the scale."""
        hasher = sha256(json.dumps([self.class_names, self.embed_dim, self.logit_scale]).encode())
        if self.text is not None:
            hasher.update(self.text.numpy().data)
        return hasher.hexdigest()


def read_features(name: str) -> FeatureTable:
    """Read a file of features, or several, separated by commas, whose tensors are merged.

    A file is in safetensors format. For each split train, val and test it may hold features [N, D] (float32, float16
    or bfloat16) under the name of the split, `train_features` or `train_16shot`, and `train_labels` [N], whole numbers
    from 0; or undivided `features` and `labels`; and text features of the classes [C, D] as `text` or `text_features`.
    Its metadata may have `class_names` (a JSON list), `backbone` and `logit_scale` (by default 100). Everything else is
    ignored.

    Raises:
        DataError: a file is missing or unreadable, shapes disagree, a value is not finite, a label is out of range, a
            class has no training row, or two files hold the same.

    Example:
        >>> read_features("train.safetensors,val.safetensors").labels.keys()
        dict_keys(['train', 'val'])
    """
    existing = _existing(name)
    states = tuple((state.st_mtime_ns, state.st_size, state.st_ino) for _, state in existing)
    return _read(tuple(path for path, _ in existing), states)


def _existing(name: str) -> list[tuple[str, os.stat_result]]:
    paths = [os.path.expanduser(path) for path in feature_paths(name)]
    try:
        return [(path, os.stat(files.regular(path))) for path in paths]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); name files of features") from error


@lru_cache(maxsize=2)  # a run reads it as its data and as its backbone
def _read(paths: tuple[str, ...], _states: tuple[tuple[int, int, int], ...]) -> FeatureTable:
    where, features, labels, text, metadata = _read_tensors(paths)
    if missing := sorted(features.keys() ^ labels.keys()):
        have, need = ("features", "labels") if missing[0] in features else ("labels", "features")
        raise DataError(f"{where}: {missing[0]} has {have} but no {need}; store both, one label for each row")
    width = next(iter(features.values())).shape[-1]
    for key, value in labels.items():
        if value.shape != features[key].shape[:1]:
            shape = list(value.shape)
            raise DataError(f"{where}: the labels of {key} have shape {shape}; give one for each of its rows")
    class_names = _class_names(where, metadata, labels, text)
    for key in [key for key in ("train", UNDIVIDED) if key in labels]:
        counts = torch.bincount(labels[key], minlength=len(class_names))
        if len(empty := (counts == 0).nonzero()):
            raise DataError(
                f"{where}: {len(empty)} of {len(class_names)} classes have no row in {key}, the first is "
                f"{class_names[int(empty[0])]!r}; every class needs one"
            )
    try:
        scale = float(metadata.get("logit_scale", 100))
    except ValueError:
        scale = math.nan
    if not 0 < scale <= 1e6:
        raise DataError(
            f"{where}: logit_scale is {shortened(metadata['logit_scale'])!r}; it must be a positive number, such as 100"
        )
    return FeatureTable(features, labels, text, class_names, metadata.get("backbone", ""), scale, int(width))


class FeatureRows(NamedTuple):
    """Rows of features without labels: n names, features [n, D] float32, the CLIP that is said to have computed them.

    `source` is what messages call them.

    Example:
        >>> rows = read_rows("new.safetensors")
        >>> rows.names[0], rows.features.shape
        ('cat/1.jpg', torch.Size([40, 512]))
    """

    names: tuple[str, ...]
    features: Tensor
    backbone: str = ""
    source: str = "the rows"


def read_rows(name: str) -> FeatureRows:
    """Read all rows of files as for `read_features`, which need no labels and no classes here.

    They are in the order train, val, test, and are called as the metadata `train_names` and so on say, or `names` of
    undivided features (a JSON list of a text for each row); otherwise "train/17".

    Raises:
        DataError: a file is missing or unreadable, shapes disagree, a value is not finite, or there is not one name
            for each row.

    Example:
        >>> read_rows("more.safetensors").features.shape
        torch.Size([40, 512])
    """
    where, features, _, _, metadata = _read_tensors(tuple(path for path, _ in _existing(name)))
    names: list[str] = []
    splits = [split for split in (*SPLITS, UNDIVIDED) if split in features]
    for split in splits:
        count, key = len(features[split]), "names" if split == UNDIVIDED else f"{split}_names"
        given: Any = [f"{split}/{row}" for row in range(count)]
        if key in metadata:
            try:
                given = files.parse_json(metadata[key])
            except ValueError as error:
                raise DataError(f"{where}: {key} is not a JSON list ({error}); give a text for each row") from error
            if not isinstance(given, list) or len(given) != count or not all(isinstance(each, str) for each in given):
                raise DataError(f"{where}: {key} must be a JSON list of {count} texts, one for each row of {split}")
        names += given
    rows = torch.cat([features[split] for split in splits])
    return FeatureRows(tuple(names), rows, metadata.get("backbone", ""), where)


def _read_tensors(
    paths: tuple[str, ...],
) -> tuple[str, dict[str, Tensor], dict[str, Tensor], Tensor | None, dict[str, str]]:
    """What messages call the files, their features and labels by split, the text features, and the metadata."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        _add_file(path, tensors, metadata)
    where = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    text = tensors.pop("text", None)
    labels = {name.removesuffix("_labels"): value for name, value in tensors.items() if name.endswith("_labels")}
    features = {name: value for name, value in tensors.items() if not name.endswith("_labels")}
    if not features or (UNDIVIDED in features and len(features) > 1):
        raise DataError(
            f"{where}: holds {', '.join(sorted(features)) or 'no features'}; store train, val or test, each with its "
            "labels (train_labels), or undivided features and labels"
        )
    width = next((value.shape[1] for value in features.values() if value.ndim == 2), "D")
    for key, value in [*features.items(), *([] if text is None else [("text", text)])]:
        if value.ndim != 2 or not value.numel() or value.shape[1] != width:
            raise DataError(f"{where}: {key} has shape {list(value.shape)}; it must be [rows, {width}], as all others")
        if not bool(torch.isfinite(value).all()):
            row = int((~torch.isfinite(value)).any(dim=1).nonzero()[0])
            raise DataError(f"{where}: row {row} of {key} has a value that is not finite; compute it again")
    return where, features, labels, text, metadata


def _canonical(rows: Tensor) -> list[bytes]:
    """The bytes of each row [D] in half precision, zeros without a sign: equal for a file in either precision.

    Rows that half precision cannot hold, because values are too large or all are very small, are kept in single.
    """
    half = rows.half()
    fits = torch.isfinite(half).all(dim=1) & (rows.abs().amax(dim=1) > _SMALL)
    kept = (short if is_half else full for is_half, short, full in zip(fits.tolist(), half, rows, strict=True))
    return [(row + 0).numpy().tobytes() for row in kept]


def _add_file(path: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Add what a file holds, under the names of the first spelling: train, train_labels, text, features."""
    try:
        with safe_open(path, framework="pt") as opened:
            stored = opened.metadata() or {}
            stored_tensors = {key: opened.get_tensor(key) for key in opened.keys() if _KNOWN.fullmatch(key)}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        if problem := pointer_in(path):
            raise DataError(f"{path}: is {problem}") from error
        raise DataError(f"{path}: is not a readable safetensors file ({error}); write it again") from error
    for key, value in stored_tensors.items():
        is_labels = key.endswith("labels")
        name = key if is_labels or key == UNDIVIDED else key.split("_")[0]
        name = f"{UNDIVIDED}_labels" if name == "labels" else name
        allowed = _INTEGERS if is_labels else _TYPES
        if value.dtype not in allowed:
            raise DataError(f"{path}: " + one_of(f"type of {key}", value.dtype, allowed))
        value = value.to(torch.int64 if is_labels else torch.float32).contiguous()
        if name in tensors and not (name == "text" and torch.equal(tensors[name], value)):
            raise DataError(f"{path}: {key} is given twice; leave one out")
        tensors[name] = value
    for key in _METADATA:
        if key in stored and metadata.setdefault(key, stored[key]) != stored[key]:
            raise DataError(f"{path}: has another {key} than the files before it; features of one kind belong together")
    for key in _NAMES:
        if key in stored and metadata.setdefault(key, stored[key]) is not stored[key]:
            raise DataError(f"{path}: {key} is given twice; leave one out")


def _class_names(
    where: str, metadata: dict[str, str], labels: dict[str, Tensor], text: Tensor | None
) -> tuple[str, ...]:
    """The names of the classes, by default "class 0", "class 1" ...; every label is checked to be one of them."""
    low, high = min(int(value.min()) for value in labels.values()), max(int(value.max()) for value in labels.values())
    if (given := metadata.get("class_names")) is not None:
        try:
            listed = files.parse_json(given)
            if not isinstance(listed, list):
                raise ValueError(f"it is {shortened(given)}, not a JSON list")
            names = tuple(listed)
            distinct(names)
        except (TypeError, ValueError, ClassNamesError) as error:
            raise DataError(f"{where}: class_names is not a list of different names ({error})") from error
    else:
        count = high + 1 if text is None else len(text)
        names = tuple(f"class {label}" for label in range(min(count, MOST_CLASSES)))
    if text is not None and len(text) != len(names):
        raise DataError(f"{where}: text has {len(text)} rows for {len(names)} classes; give one for each class")
    if low < 0 or high >= len(names):
        raise DataError(
            f"{where}: a label is {low if low < 0 else high}; labels must be 0 to {len(names) - 1}, one for each class"
        )
    if len(names) < 2:
        raise DataError(f"{where}: has only one class, {names[0]!r}, but a classifier needs at least two")
    return names


def features_place(name: str) -> Path:
    """The folder of the first file."""
    return Path(feature_paths(name)[0]).expanduser().parent
