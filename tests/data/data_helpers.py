"""Small image files and members of archives for the tests of data."""

import zipfile
from pathlib import Path

from PIL import Image


def save_image(path: Path, shade: int = 0, size: tuple[int, int] = (12, 10)) -> Path:
    """Write a small image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade % 256, 40, 90)).save(path)
    return path


class UnflaggedInfo(zipfile.ZipInfo):
    """A member of a zip archive whose name is in an encoding that the archive does not tell."""

    def __init__(self, name: str, encoding: str = "utf-8") -> None:
        super().__init__(name)
        self.encoding = encoding

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802
        return self.filename.encode(self.encoding), self.flag_bits & ~0x800
