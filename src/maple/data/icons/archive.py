"""The bundled drawings of icons, by topic and name."""

import io
import json
import threading
import zipfile
from functools import cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

import numpy as np
from PIL import Image

from maple.data.scenes import Integers
from maple.errors import DataError, one_of


class IconArchive:
    """The bundled drawings: some for training and some for the test of each name; opened on first use. Thread-safe."""

    def __init__(self) -> None:
        self._sheets: dict[str, Integers] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["IconArchive"], tuple[()]]:
        """Pickle as an unopened archive."""
        return IconArchive, ()

    @cached_property
    def _index(self) -> dict[str, Any]:
        try:
            return dict(json.loads(_asset("index.json").read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise DataError(
                f"the index of the bundled icons cannot be read ({error}); install maple-clip again"
            ) from error

    @property
    def topics(self) -> tuple[str, ...]:
        """The names of the topics."""
        return tuple(self._index["topics"])

    @property
    def train_count(self) -> int:
        """The number of training drawings of a name: they come first."""
        return int(self._index["train"])

    @property
    def test_count(self) -> int:
        """The number of test drawings of a name: they come after the training drawings."""
        return int(self._index["test"])

    def names(self, topic: str) -> tuple[str, ...]:
        """Return the names of a topic, in the order of the archive; DataError if unknown."""
        if topic not in self.topics:
            raise DataError(one_of("topic of icons", topic, self.topics))
        return tuple(row["name"] for row in self._index["topics"][topic])

    def drawing(self, topic: str, name: str, number: int) -> Integers:
        """Return the opacity of a drawing, 0 to 255, [64, 64].

        Raises:
            DataError: there is no such topic, name or number, or the archive is damaged.
        """
        names = self.names(topic)
        if name not in names:
            raise DataError(one_of(f"icon of {topic}", name, names))
        if not 0 <= number < self.train_count + self.test_count:
            raise DataError(f"there is no drawing {number} of {name!r}; there are {self.train_count + self.test_count}")
        side = int(self._index["size"])
        top, left = names.index(name) * side, number * side
        drawing: Integers = self._sheet(topic)[top : top + side, left : left + side].astype(np.int64)
        return drawing

    def _sheet(self, topic: str) -> Any:
        with self._lock:
            if topic not in self._sheets:
                try:
                    with _asset("drawings.zip").open("rb") as file, zipfile.ZipFile(file) as archive:
                        content = archive.read(f"{topic}.webp")
                    self._sheets[topic] = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
                except (OSError, KeyError, zipfile.BadZipFile) as error:
                    raise DataError(f"the bundled icons cannot be read ({error}); install maple-clip again") from error
            return self._sheets[topic]


def _asset(name: str) -> Traversable:
    return resources.files("maple").joinpath("assets", "icons", name)
