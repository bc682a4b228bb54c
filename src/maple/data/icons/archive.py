"""The bundled drawings of icons, by topic and name."""

import numpy as np

from maple.data.bundled_archive import BundledArchive
from maple.data.scenes import Integers
from maple.errors import DataError, one_of


class IconArchive(BundledArchive):
    """The bundled drawings: some for training and some for the test of each name; opened on first use. Thread-safe."""

    contents, zip_name, mode = "icons", "drawings.zip", "L"

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
        drawing: Integers = np.asarray(self._sheet(topic).crop((left, top, left + side, top + side)), np.int64)
        return drawing
