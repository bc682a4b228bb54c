"""Data sets of the Hugging Face hub, read with the library datasets."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maple.data.folders.class_lists import checked_class_names
from maple.data.sources.rows import (
    Columns,
    Row,
    Source,
    choose_image_column,
    choose_label_column,
    choose_split_column,
    named_splits,
    no_labels,
    read_label,
    read_split,
)
from maple.data.sources.tables import read_content
from maple.errors import DataError, first_line

PREFIX = "hf:"
_NOWHERE = Path()
_FORM = "hf:OWNER/NAME, hf:OWNER/NAME:CONFIG, or hf:OWNER/NAME:CONFIG@REVISION"
_NAME = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^@:]+))?(@(?P<revision>[\w./-]+))?")


class HubSource(Source):
    """A data set of the hub: `hf:OWNER/NAME[:CONFIG][@REVISION]`. Images are streamed; nothing else is kept of them.

    Example:
        >>> source = HubSource("hf:uoft-cs/cifar10")
        >>> next(source.rows(Columns(), labelled=True)).name
        'hf:uoft-cs/cifar10#train/0'
    """

    def __init__(self, text: str) -> None:
        self.text = text
        parsed = _NAME.fullmatch(text.removeprefix(PREFIX))
        if parsed is None:
            raise DataError(f"{text!r:.120} does not name a data set of the hub; write it as {_FORM}")
        self.repo, self.config, self.revision = parsed["repo"], parsed["config"], parsed["revision"]

    @property
    def name(self) -> str:
        return self.repo if self.config is None else f"{self.repo}:{self.config}"

    def identity(self) -> Mapping[str, Any]:
        return {"hub": [self.repo, self.config, self.revision]}

    def rows(self, columns: Columns, *, labelled: bool) -> Iterator[Row]:
        splits = self._load()
        for split, names in named_splits(splits, self.text).items():
            for name in names:
                yield from self._split_rows(splits[name], split, f"{self.text}#{name}", columns, labelled)

    def _split_rows(self, data: Any, split: str, where: str, columns: Columns, labelled: bool) -> Iterator[Row]:
        features = data.features if data.features is not None else {}
        kinds = feature_kinds(features)
        image = choose_image_column(kinds, columns, where)
        label = choose_label_column(kinds, image, columns, where) if labelled else None
        if labelled and label is None and split != "test":
            raise no_labels(kinds, columns, where)
        names = feature_names(features, label)
        self.class_names = self.class_names or (checked_class_names(names, where) if names else None)
        column = choose_split_column(kinds, image, label) if labelled and not split else None
        split_names = feature_names(features, column)
        rows = iter(undecoded(data, image).select_columns([image, *(each for each in (label, column) if each)]))
        number = 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise DataError(
                    f"{where}/{number}: cannot be fetched ({first_line(error)}); repeat the command"
                ) from error
            name = f"{where}/{number}"
            number += 1
            class_name = read_label(row[label], self.class_names, name) if label else None
            own_split = read_split(row[column], split_names, name) if column else split
            yield Row(name, own_split, class_name, read_content(row[image], _NOWHERE, name))

    def _load(self) -> Mapping[str, Any]:
        """The splits of the data set: streamed, or, without network, those that the library has kept."""
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                f"{self.text}: data sets of the hub need datasets; pip install 'maple-clip[datasets]'"
            ) from error
        from maple.hub_client import offline_if_unreachable  # imports the client, which other sources do not need

        errors: list[Exception] = []
        for streaming in (True, False):
            try:
                with offline_if_unreachable(), _as_the_client(datasets):
                    loaded = datasets.load_dataset(self.repo, self.config, revision=self.revision, streaming=streaming)
            except Exception as error:  # noqa: BLE001 - of the library, its builders and the network
                errors.append(error)
            else:
                return loaded if isinstance(loaded, Mapping) else {"train": loaded}
        reason = first_line(errors[0])
        raise DataError(
            f"{self.text}: cannot be loaded from the Hugging Face hub ({reason:.200}); check its name ({_FORM}) and "
            "the network. Without network, give a folder that Dataset.save_to_disk wrote, or its Parquet files"
        ) from errors[0]


@contextmanager
def _as_the_client(datasets: Any) -> Iterator[None]:
    """Let the library read its own cache only, where the client of the hub does; it would retry for half a minute."""
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or constants.HF_HUB_OFFLINE
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def feature_kinds(features: Mapping[str, Any]) -> dict[str, str]:
    """The kinds of columns, as in `choose_image_column`, from the features of a `datasets.Dataset`."""
    kinds = {}
    for name, feature in features.items():
        kind = type(feature).__name__
        dtype = str(getattr(feature, "dtype", kind))
        if kind == "Image":
            kinds[name] = "image"
        elif kind == "ClassLabel":
            kinds[name] = "class" if feature.names else "integer"
        elif isinstance(feature, Mapping):
            kinds[name] = "encoded" if {"bytes", "path"} >= set(feature) else "struct"
        elif dtype.startswith(("int", "uint")):
            kinds[name] = "integer"
        else:
            kinds[name] = {"string": "text", "large_string": "text", "binary": "bytes", "large_binary": "bytes"}.get(
                dtype, dtype
            )
    return kinds


def feature_names(features: Mapping[str, Any], column: str | None) -> Sequence[str] | None:
    """The class names of a column, if it is a ClassLabel."""
    names = getattr(features.get(column or ""), "names", None)
    return list(names) if names else None


def undecoded(data: Any, image: str) -> Any:
    """The same rows with images as they are stored, {bytes, path}, and without a format of PyTorch or NumPy."""
    if hasattr(data, "with_format"):
        data = data.with_format(None)
    feature: Any = (data.features or {}).get(image)
    if type(feature).__name__ == "Image":
        data = data.cast_column(image, feature.__class__(decode=False))
    return data
