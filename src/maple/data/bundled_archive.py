"""Drawings that come with the package: an index, and sheets of drawings in a zip file."""

import io
import json
import threading
import zipfile
from functools import cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, ClassVar, Self

from PIL import Image

from maple.errors import DataError


class BundledArchive:
    """The drawings in a folder of the package's assets; opened on first use. Thread-safe.

    Attributes:
        contents: what the drawings are, which is also the name of the folder.
        zip_name: the file of the sheets, `NAME.webp` each.
        mode: Pillow's mode of the sheets.
    """

    contents: ClassVar[str]
    zip_name: ClassVar[str]
    mode: ClassVar[str]

    def __init__(self) -> None:
        self._sheets: dict[str, Image.Image] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        """Pickle as an unopened archive."""
        return type(self), ()

    @cached_property
    def _index(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._asset("index.json").read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise DataError(
                f"the index of the bundled {self.contents} cannot be read ({error}); install maple-clip again"
            ) from error

    def _sheet(self, name: str) -> Image.Image:
        with self._lock:
            if name not in self._sheets:
                try:
                    with self._asset(self.zip_name).open("rb") as file, zipfile.ZipFile(file) as archive:
                        content = archive.read(f"{name}.webp")
                    self._sheets[name] = Image.open(io.BytesIO(content)).convert(self.mode)
                except (OSError, KeyError, zipfile.BadZipFile) as error:
                    raise DataError(
                        f"the bundled {self.contents} cannot be read ({error}); install maple-clip again"
                    ) from error
            return self._sheets[name]

    def _asset(self, name: str) -> Traversable:
        return resources.files("maple").joinpath("assets", self.contents, name)
