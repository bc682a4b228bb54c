"""Small image files for the tests of data."""

from pathlib import Path

from PIL import Image


def save_image(path: Path, shade: int = 0, size: tuple[int, int] = (12, 10)) -> Path:
    """Write a small image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade % 256, 40, 90)).save(path)
    return path
