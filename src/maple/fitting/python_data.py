"""Data sets in the memory of a program, kept in the cache so that a fit of them can be resumed and evaluated."""

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from maple.data.sources.rows import Columns, Row, Source, is_missing, named_splits, read_label
from maple.data.sources.unpacked import store_rows
from maple.errors import DataError
from maple.inference.sources.array_images import to_images
from maple.inference.sources.python_data import is_split, open_data

_ADVICE = 'name it, as in layer={{"data": {{"{column}": NAME}}}} of fit_settings, or leave out the others'


def keep_data(data: Any, columns: Columns | None = None) -> Path:
    """Write the images of a data set in memory into the cache; return the folder, which `load_dataset` reads.

    Encoded images and files are copied as they are; PIL images, arrays and tensors are written as PNG, which loses
    nothing of 8 bits. The folder is named by its content: equal data sets have the same folder. It is kept until
    `maple cache clear`.

    Args:
        data: a `datasets.Dataset` or `DatasetDict`, a data set of torchvision, or a frame. The splits of a
            `DatasetDict`, or of a column `split`, are used.

    Raises:
        ConfigError: there is no cache.
        DataError: it is not a data set with labels, an image cannot be read, or there is no room on the disk.

    Example:
        >>> fit(fit_settings(keep_data(torchvision.datasets.ImageFolder("pets"))), Path("runs/pets"))
    """
    return store_rows(_PythonSource(data, columns or Columns()))


class _PythonSource(Source):
    """The rows of a data set in memory."""

    def __init__(self, data: Any, columns: Columns) -> None:
        self.text, self._columns = f"a {type(data).__name__} in memory", replace(columns, advice=_ADVICE)
        self._splits: dict[str, Any] = dict(data) if is_split(data) else {"": data}

    @property
    def name(self) -> str:
        return "images"

    def identity(self) -> Mapping[str, Any]:
        raise NotImplementedError("data in memory are identified by their content")

    def rows(self, columns: Columns, *, labelled: bool) -> Iterator[Row]:
        del columns, labelled
        named = named_splits(self._splits, self.text)
        for split, name in ((split, name) for split, names in named.items() for name in names):
            part = self._splits[name]
            data = open_data(part, self._columns)
            if data is None:
                raise DataError(
                    f"the source is {type(part).__name__}; give a path or the name of a data set, a datasets.Dataset, "
                    "a data set of torchvision, or a frame with columns of images and labels"
                )
            labels = data.read_labels()
            splits = (data.read_splits() if not split else None) or [split] * len(labels)
            for number, (image, label, own_split) in enumerate(zip(data.images, labels, splits, strict=True)):
                where = f"{name}/{number}" if name else f"row {number}"
                yield Row(where, own_split, read_label(label, None, where), _encoded(image))


def _encoded(image: Any) -> bytes | Path | None:
    """The encoded bytes of an image, or its file; None if there is none."""
    if isinstance(image, Mapping):
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if is_missing(image):
        return None
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path) and "://" not in str(image):
        return Path(image).expanduser()
    sources: Iterable[Any] = to_images([image])
    content = io.BytesIO()
    next(iter(sources)).read().save(content, "PNG")
    return content.getvalue()
