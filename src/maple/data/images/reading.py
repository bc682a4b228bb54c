"""Reading images of every kind as RGB, and keeping decoded images in memory."""

import io
import logging
import math
import struct
import threading
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from maple.errors import ConfigError, ImageError

logger = logging.getLogger(__name__)

MAX_PIXELS = 178_956_970
"""The size above which Pillow itself refuses an image as a decompression bomb."""
STORE_BYTES = 2 * 1024**3
"""The default byte budget of an `ImageStore`."""

# EPS would run Ghostscript on the file; Pillow reads only the headers of the others.
_REFUSED_FORMATS = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
# Signatures that are long enough not to match a text or an archive.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
_Factory = Callable[[IO[bytes], str | bytes], ImageFile.ImageFile]
_Accepts = Callable[[bytes], bool | str]
_BAND = 2**18
"""The number of values of a deep greyscale image that are converted at once."""
_DEEP_INTEGER_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def read_image(source: str | Path | bytes | BinaryIO, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file, encoded bytes or a binary stream as RGB: decoded, upright by its EXIF data, first frame.

    Transparent pixels are blended with white. Deep greyscale keeps its shades: 16-bit values are scaled by 255 / 65535;
    integers outside 0..65535 and floats outside 0..255 are stretched from minimum to maximum; floats within 0..1 are
    scaled by 255. The size is checked in the header, before decoding. Thread-safe; changes no setting of Pillow.

    Raises:
        ImageError: the source is missing, a folder, empty, not an image, damaged, truncated, or has more than
            `max_pixels` pixels. The message begins with the path ("<bytes>" or "<stream>" if there is none).
        ConfigError: `max_pixels` is below 1.

    Source: departs from KaiyangZhou/Dassl.pytorch@c61a1b5 dassl/data/data_manager.py and dassl/utils/tools.py
    `read_image` (PIL open, convert to RGB), which ignores the EXIF orientation, shows hidden colours below transparent
    pixels, and clips 16-bit values to white. Plain RGB and 8-bit grey images are equal.

    Example:
        >>> read_image("cat.jpg").size
        (640, 480)
    """
    if max_pixels < 1:
        raise ConfigError(f"max_pixels is {max_pixels}; it must be at least 1")
    if isinstance(source, bytes):
        if not source:
            raise ImageError("<bytes>: is empty (0 bytes); give an encoded image")
        return _read(io.BytesIO(source), "<bytes>", max_pixels)
    if isinstance(source, str | Path):
        with _open_file(Path(source)) as file:
            return _read(file, str(source), max_pixels)
    name = getattr(source, "name", None)
    stream = source if source.seekable() else io.BytesIO(source.read())
    return _read(stream, name if isinstance(name, str) else "<stream>", max_pixels)


def to_rgb(image: Image.Image, name: str = "<image>") -> Image.Image:
    """Convert a Pillow image as `read_image` does: RGB, decoded, upright, transparency on white.

    Raises:
        ImageError: it cannot be decoded; the message begins with `name`.
    """
    try:
        image.load()
        try:
            upright = ImageOps.exif_transpose(image)
        except Exception:
            # An unreadable EXIF block must not cost a good image.
            logger.debug("%s: unreadable EXIF data; the orientation is ignored", name, exc_info=True)
            upright = image.copy()
        return _to_rgb(upright)
    except Exception as error:
        raise ImageError(
            f"{name}: cannot be decoded, damaged or truncated ({_reason(error)}); replace or remove the file"
        ) from error


def is_image_file(path: Path) -> bool:
    """Return whether `path` is a regular file with the extension of a readable format or the signature of an image.

    The image is not decoded: a damaged one is reported when it is read.
    """
    if not path.is_file():
        return False
    if path.suffix.lower() in _extensions():
        return True
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:
        return False
    return _has_signature(head)


def has_image_name(name: str) -> bool:
    """Return whether a file name has the extension of a readable format; the file is not opened."""
    return name[name.rfind(".") :].lower() in _extensions()


class ImageStore:
    """Decoded images of one data set, each decoded once and kept within a byte budget.

    Images beyond the budget are decoded at each call. Threads may share a store; a pickled copy starts empty. Do not
    change an image in place: every caller gets the same object.

    Example:
        >>> store = ImageStore(Path("pets"), max_bytes=2**30)
        >>> store.get("cat/1.jpg").mode
        'RGB'
    """

    def __init__(
        self,
        root: Path,
        max_bytes: int = STORE_BYTES,
        *,
        max_pixels: int = MAX_PIXELS,
        read: Callable[[str], Image.Image] | None = None,
    ) -> None:
        """Keep up to `max_bytes` of decoded images (0: none) of the files below `root`.

        `read` returns the image of a path, for images that are rendered instead of stored.

        Raises:
            ConfigError: `max_bytes` is negative.
        """
        if max_bytes < 0:
            raise ConfigError(f"max_bytes is {max_bytes}; it must be 0 (keep nothing) or more")
        self.root = root
        self.max_bytes = max_bytes
        self.max_pixels = max_pixels
        self._read = read
        self.decodes = 0
        self.used_bytes = 0
        self._images: dict[str, Image.Image] = {}
        self._busy: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, path: str) -> Image.Image:
        """Return the image `root / path` as `read_image` does, with the same errors."""
        with self._lock:
            kept = self._images.get(path)
            if kept is not None:
                return kept
            busy = self._busy.setdefault(path, threading.Lock())
        # One thread decodes a path; others that request it meanwhile wait for the result.
        with busy:
            with self._lock:
                kept = self._images.get(path)
            if kept is not None:
                return kept
            try:
                image = self._read(path) if self._read else read_image(self.root / path, max_pixels=self.max_pixels)
                size = image.width * image.height * 4  # Pillow stores an RGB pixel in four bytes
                with self._lock:
                    self.decodes += 1
                    if path not in self._images and self.used_bytes + size <= self.max_bytes:
                        self._images[path] = image
                        self.used_bytes += size
            finally:
                with self._lock:
                    self._busy.pop(path, None)
        return image

    def __reduce__(self) -> tuple[Callable[[], "ImageStore"], tuple[()]]:
        return partial(ImageStore, self.root, self.max_bytes, max_pixels=self.max_pixels, read=self._read), ()


def _open_file(path: Path) -> IO[bytes]:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise ImageError(f"{path}: there is no such file; check the path and the data root") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: cannot be reached ({error}); check the path and its permissions") from error
    if path.is_dir():
        raise ImageError(f"{path}: is a folder; give the path of an image file")
    if not path.is_file():
        raise ImageError(f"{path}: is not a regular file; give the path of an image file")
    if status.st_size == 0:
        raise ImageError(f"{path}: is empty (0 bytes); copy the image again or remove the file")
    try:
        return path.open("rb")
    except OSError as error:
        raise ImageError(f"{path}: cannot be opened ({error.strerror}); make the file readable") from error


def _read(stream: IO[bytes], name: str, max_pixels: int) -> Image.Image:
    # Decoders raise nearly any exception on damaged input (struct.error, zlib.error, KeyError, SyntaxError ...).
    try:
        image = _identify(stream)
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: is not an image that Pillow can read, despite its name; convert it to JPEG or PNG, or remove it"
        ) from error
    except Exception as error:
        raise ImageError(f"{name}: is damaged ({_reason(error)}); replace or remove the file") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{name}: has {width} x {height} pixels, more than the allowed {max_pixels}; scale it down")
    return to_rgb(image, name)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _identify(stream: IO[bytes]) -> ImageFile.ImageFile:
    """Return the undecoded image, or raise UnidentifiedImageError.

    As `PIL.Image.open`, but without its size warning, which cannot be silenced in one thread only.
    """
    stream.seek(0)
    head = stream.read(16)
    failure: Exception | None = None
    for factory, accepts in _plugins():
        try:
            accepted = accepts is None or accepts(head)
            if isinstance(accepted, str) or not accepted:
                continue
            stream.seek(0)
            return factory(stream, "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:
            failure = failure or error
    if failure is not None and _has_signature(head):
        raise failure
    raise UnidentifiedImageError


@cache
def _plugins() -> tuple[tuple[_Factory, _Accepts | None], ...]:
    Image.init()
    names = [name for name in Image.ID if name in Image.OPEN and name not in _REFUSED_FORMATS]
    # Formats without a signature accept nearly anything: they come last.
    names.sort(key=lambda name: Image.OPEN[name][1] is None)
    return tuple(Image.OPEN[name] for name in names)


@cache
def _extensions() -> frozenset[str]:
    Image.init()
    readable = (set(Image.OPEN) | {"MPO"}) - _REFUSED_FORMATS
    return frozenset(extension for extension, name in Image.EXTENSION.items() if name in readable)


def _has_signature(head: bytes) -> bool:
    return head.startswith(_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP_INTEGER_MODES or image.mode == "F":
        return Image.fromarray(_to_bytes(np.asarray(image))).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        pixels = image if image.mode == "RGBA" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_bytes(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Convert grey values [H, W], integers or floats, to 8 bits; see `read_image` for the scale."""
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("it holds values that are not finite numbers")
    if np.issubdtype(values.dtype, np.integer):
        low, high = (0.0, 65535.0) if low >= 0 and high <= 65535 else (low, high)
    elif low >= 0 and high <= 255:
        low, high = 0.0, 1.0 if high <= 1 else 255.0
    span = high - low or 1.0
    scaled = np.empty(values.shape, np.uint8)
    rows = max(1, _BAND // values.shape[1])
    # In bands, since float64 needs eight times the memory.
    for top in range(0, len(values), rows):
        shades = values[top : top + rows].astype(np.float64)
        shades -= low
        shades /= span
        shades *= 255
        scaled[top : top + rows] = np.rint(shades, out=shades)
    return scaled
