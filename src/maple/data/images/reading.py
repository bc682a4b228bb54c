"""Reading images of every kind as RGB."""

import io
import logging
import math
import re
import struct
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, JpegImagePlugin

from maple.data.images.formats import (
    CAMERA_RAW,
    DRAFT,
    HEAD_BYTES,
    SIXTEEN_BITS,
    extension_of,
    format_of,
    has_raw_name,
    is_read,
    why_unread,
)
from maple.errors import DVC_POINTER, ConfigError, ImageError, shortened
from maple.files import on_disk

logger = logging.getLogger(__name__)

MAX_PIXELS = 178_956_970
"""The size above which Pillow itself refuses an image as a decompression bomb."""

_LARGE = 80_000_000
"""Images of more pixels are read at half their width and height."""
_MEMORY = 1.25 * 1024**3
"""The most bytes that decoding one image may need, as `_decoding_bytes` estimates them."""
_BAND = 2**18
"""The number of pixels that are converted at once."""
_MOST_RLE_BYTES = 4 * 1024**2
"""Of a run-length encoded BMP, which Pillow decodes in Python, a run at a time."""

_PNG_IMAGE_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHOLE_FILE_BYTES = {"WEBP": 16, "AVIF": 16, "HEIC": 16}
"""The bytes per pixel of decoders that also hold the whole file."""
_ORIENTATION = 0x0112
_SUBFILE_TYPE, _SUB_IFDS, _DNG_VERSION = 254, 330, 50706
_BITS, _STRIP_ROWS, _TILE_COLUMNS, _TILE_ROWS = 258, 278, 322, 323
_PHOTOMETRIC, _SAMPLE_FORMAT = 262, 339
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, (1,), (2,)


def read_image(
    source: str | Path | bytes | BinaryIO,
    *,
    max_pixels: int = MAX_PIXELS,
    least_side: int | None = None,
    name: str | None = None,
) -> Image.Image:
    """Read an image file, encoded bytes or a binary stream as RGB: decoded, upright by its EXIF data, first frame.

    JPEG, PNG, WebP, AVIF, GIF, BMP, TIFF and binary PNM are read, and HEIC where pillow-heif is installed. Transparent
    pixels are blended with white. Deep greyscale keeps its shades: 16-bit values are scaled by 255 / 65535; integers
    outside 0..65535 and floats outside 0..255 are stretched from minimum to maximum; floats within 0..1 are scaled by
    255; signed 8-bit integers are stretched if one is below zero. The size is checked in the header, before decoding;
    more than 80 megapixels are read at half the width and height, so that one image takes at most about 1 GB of memory.
    A camera RAW file gives its preview, with `info["camera RAW"]`. Thread-safe; changes no setting of Pillow.

    With `least_side`, a JPEG is decoded at a half, a quarter or an eighth of its width and height, as long as its
    shorter side keeps that number of pixels. That takes a fraction of the time; `info["draft"]` then holds the width
    and the height of the whole image, and what they were divided by.

    Raises:
        ImageError: the source is missing, a folder, empty, not an image of these formats, a pointer of git-lfs,
            git-annex or DVC, damaged, truncated, or has more than `max_pixels` pixels, or more than its format can
            decode in about 1 GB. The message begins with the path, or with `name`, which bytes or a stream may be given
            ("<bytes>" or "<stream>" if there is none).
        ConfigError: `max_pixels` or `least_side` is below 1.

    Source: departs from KaiyangZhou/Dassl.pytorch@c61a1b5 dassl/data/data_manager.py and dassl/utils/tools.py
    `read_image` (PIL open, convert to RGB), which ignores the EXIF orientation, shows hidden colours below transparent
    pixels, and clips 16-bit values to white. Plain RGB and 8-bit grey images are equal.

    Example:
        >>> read_image("cat.jpg").size
        (640, 480)
    """
    if max_pixels < 1:
        raise ConfigError(f"max_pixels is {max_pixels}; it must be at least 1")
    if least_side is not None and least_side < 1:
        raise ConfigError(f"least_side is {least_side}; it must be at least 1, or None for the whole size")
    if isinstance(source, bytes):
        name = name or "<bytes>"
        if not source:
            raise ImageError(f"{name}: is empty (0 bytes); give an encoded image")
        return _read(io.BytesIO(source), name, max_pixels, least_side)
    if isinstance(source, str | Path):
        with _open_file(Path(source)) as file:
            return _read(file, str(source), max_pixels, least_side)
    name = name or getattr(source, "name", None)
    stream = source if source.seekable() else io.BytesIO(source.read())
    return _read(stream, name if isinstance(name, str) else "<stream>", max_pixels, least_side)


def to_rgb(image: Image.Image, name: str = "<image>", *, shared: bool = False) -> Image.Image:
    """Convert a Pillow image as `read_image` does: RGB, decoded, upright, transparency on white.

    With `shared`, an image that is RGB already keeps its pixels, instead of a copy of them.

    Raises:
        ImageError: it cannot be decoded, or holds floats that are not finite; the message begins with `name`.
    """
    try:
        image.load()
        tags: Any = getattr(image, "tag_v2", {})
        inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
        unsigned = image.mode == "I" and bool(tags) and tags.get(_SAMPLE_FORMAT, _UNSIGNED) == _UNSIGNED
        if image.mode == "L" and tags.get(_SAMPLE_FORMAT) == _SIGNED:
            values = np.asarray(image).view(np.int8)
            if values.min() < 0:
                signed = Image.fromarray(values.astype(np.int32))
                signed.info, image = image.info, signed
        halved = image.width * image.height > _LARGE
        method = _TRANSPOSE.get(_orientation(image, name))
        if method is not None and not halved:
            image = image.transpose(method)
        rgb = _to_rgb(image, halved=halved, shared=shared, unsigned=unsigned, inverted=inverted)
        return rgb.transpose(method) if method is not None and halved else rgb
    except _NoValueError as error:
        raise ImageError(f"{name}: {error}") from None
    except Exception as error:
        raise ImageError(
            f"{name}: cannot be decoded, damaged or truncated ({_reason(error)}); replace or remove the file"
        ) from error


def _open_file(path: Path) -> IO[bytes]:
    path = on_disk(path)
    try:
        status = path.stat()
    except FileNotFoundError as error:
        problem = "there is no such file; check the path and the data root"
        if path.is_symlink():
            fetch = "is its drive mounted, was its content fetched (`git annex get`, `dvc pull`)?"
            problem = f"is a link to {path.readlink()}, which is not there; {fetch}"
        elif path.with_name(f"{path.name}.dvc").is_file():
            problem = f"is not here, but {path.name}.dvc is, {DVC_POINTER}"
        raise ImageError(f"{path}: {problem}") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        shown = shortened(str(path), 500)
        raise ImageError(f"{shown}: cannot be reached ({reason}); check the path and its permissions") from error
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


def _read(stream: IO[bytes], name: str, max_pixels: int, least_side: int | None) -> Image.Image:
    stream.seek(0)
    head = stream.read(HEAD_BYTES)
    kind = format_of(head, short=True)
    if not is_read(kind):
        raise ImageError(f"{name}: {why_unread(head, kind, name)}")
    try:
        return _decode(stream, head, kind, name, max_pixels, least_side)
    except ImageError as error:
        if kind != "PNG" or error.__cause__ is None:
            raise
        # Pillow refuses a PNG for its text or its colour profile if these are large; neither is used here.
        try:
            return _decode(_without_metadata(stream), head, kind, name, max_pixels, None)
        except ImageError as still:
            raise (still if still.__cause__ is None else error) from error.__cause__


def _decode(
    stream: IO[bytes], head: bytes, kind: str, name: str, max_pixels: int, least_side: int | None
) -> Image.Image:
    is_raw = head[8:10] == b"CR" or has_raw_name(name)
    # Decoders raise nearly any exception on damaged input (struct.error, zlib.error, KeyError, SyntaxError ...).
    try:
        image = _open(stream, kind)
        width, height = image.size
        if width * height <= max_pixels:
            needed = _decoding_bytes(image, kind, stream)
    except Exception as error:
        problem = f"is damaged ({_reason(error)}); replace or remove the file"
        if isinstance(error, SyntaxError) and kind in ("BMP", "PPM"):  # two letters, which may begin a text
            problem = why_unread(head, "", name)
        elif is_raw:
            problem = f"is a camera RAW file without a preview that can be read ({_reason(error)}); convert it to JPEG"
        elif kind == "TIFF":
            problem = f"is damaged, or a TIFF of an unusual kind ({_reason(error)}); replace it, or convert it to PNG"
        raise ImageError(f"{name}: {problem}") from error
    size = f"{width} x {height} pixels"
    if width * height > max_pixels:
        raise ImageError(f"{name}: has {size}, more than the allowed {max_pixels}; scale it down")
    if needed > _MEMORY:
        raise ImageError(
            f"{name}: has {size}, which take {needed / 1e9:.1f} GB of memory to decode in this format, more than the "
            f"allowed {_MEMORY / 1e9:.1f}; scale it down, or save it as a baseline JPEG"
        )
    if kind == "JPEG" and (least_side or width * height > _LARGE):
        sides = (width // 2, height // 2) if width * height > _LARGE else image.size
        # Pillow takes the smallest of libjpeg's scales at which both sides have at least these lengths.
        image.draft(image.mode, (min(sides[0], least_side or sides[0]), min(sides[1], least_side or sides[1])))
    # The mode of the file's pixels, such as "RGB;16B", is the arguments of most decoders, or the first of them.
    arguments = str(image.tile[0][3]) if image.tile else ""
    is_slow_pnm = bool(image.tile) and image.tile[0][0] == "ppm"
    rgb = to_rgb(_read_pnm(stream, image, name) if is_slow_pnm else image, name, shared=True)
    if kind == "JPEG" and least_side and image.size != (width, height):
        whole = (width, height) if rgb.size == image.size else (height, width)
        rgb.info[DRAFT] = (*whole, image.decoderconfig[0])
    # NEF, ARW and others begin with a reduced image, and keep the image itself in a sub-folder.
    tags = getattr(image, "tag_v2", {})
    if kind == "TIFF" and (is_raw or _DNG_VERSION in tags or (tags.get(_SUBFILE_TYPE) == 1 and _SUB_IFDS in tags)):
        rgb.info[CAMERA_RAW] = True
        _warn_of_previews(extension_of(name) if has_raw_name(name) else "TIFF")
    if image.mode == "I" or image.mode.startswith("I;16") or ";16" in arguments:
        rgb.info[SIXTEEN_BITS] = True
    return rgb


@cache
def _warn_of_previews(kind: str) -> None:
    logger.warning(
        "%s files of a camera are read as their small preview; convert them to JPEG for the whole image", kind
    )


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


class _Jpeg(JpegImagePlugin.JpegImageFile):
    """A JPEG without the resolution in its EXIF data, where Pillow prints a warning if these are damaged."""

    def _read_dpi_from_exif(self) -> None:
        pass


def _open(stream: IO[bytes], kind: str) -> ImageFile.ImageFile:
    """Return the undecoded image.

    As `PIL.Image.open`, but without its size warning, which cannot be silenced in one thread only.
    """
    stream.seek(0)
    if kind == "HEIC":
        heic: ImageFile.ImageFile = import_module("pillow_heif").HeifImageFile(stream)
        return heic
    image = (_Jpeg if kind == "JPEG" else Image.OPEN[kind][0])(stream, "")
    if kind == "PNG" and "transparency" in image.info:
        # The transparent colour is stored in the depth of the file, and Pillow decodes to 8 bits.
        key, depth = image.info["transparency"], image.tile[0][3]
        if depth == "RGB;16B":
            image.info["transparency"] = tuple(value >> 8 for value in key)
        elif depth in ("L;2", "L;4"):
            image.info["transparency"] = key * (85 if depth == "L;2" else 17)
    if image.tile and image.tile[0][0] == "bmp_rle" and stream.seek(0, io.SEEK_END) > _MOST_RLE_BYTES:
        raise ValueError(f"it is run-length encoded and larger than {_MOST_RLE_BYTES:,} bytes")
    return image


def _decoding_bytes(image: ImageFile.ImageFile, kind: str, stream: IO[bytes]) -> float:
    """The memory in bytes that decoding an image takes at most; an estimate, from measurements of the decoders."""
    pixels = image.width * image.height
    if kind in _WHOLE_FILE_BYTES:
        return pixels * _WHOLE_FILE_BYTES[kind] + stream.seek(0, io.SEEK_END)
    # Four for an RGB image, and for its copy, of a quarter of the pixels if it is large.
    needed: float = pixels * (5 if pixels > _LARGE else 8)
    if isinstance(image, JpegImagePlugin.JpegImageFile) and pixels > _LARGE:
        needed = pixels * 2
    if isinstance(image, JpegImagePlugin.JpegImageFile) and "progressive" in image.info:
        # libjpeg keeps all coefficients, of two bytes, of channels of which some may be of lower resolution.
        samples = [horizontal * vertical for _, horizontal, vertical, _ in image.layer]
        needed += pixels * 2 * sum(samples) / max(samples)
    if kind == "TIFF" and image.tile and image.tile[0][0] == "libtiff":
        tags: Any = getattr(image, "tag_v2", {})
        rows = tags.get(_TILE_ROWS) or tags.get(_STRIP_ROWS) or image.height
        columns = tags.get(_TILE_COLUMNS) or image.width
        needed += 2 * min(rows, image.height) * min(columns, image.width) * sum(tags.get(_BITS, (8,))) / 8
    return needed


def _read_pnm(stream: IO[bytes], header: ImageFile.ImageFile, name: str) -> Image.Image:
    """A binary PGM or PPM whose largest value is not 255 or 65535: as Pillow, which takes a minute for it."""
    width, height, channels = *header.size, len(header.getbands())
    arguments: Any = header.tile[0][3]
    white, most = 65535 if header.mode == "I" else 255, arguments[-1]
    stored = np.dtype(np.uint8 if most < 256 else ">u2")
    pixels = np.empty((height, width, channels), np.uint16 if header.mode == "I" else np.uint8)
    stream.seek(header.tile[0][2])
    step = max(1, _BAND // width)
    for top in range(0, height, step):
        band = pixels[top : top + step]
        data = stream.read(band.size * stored.itemsize)
        if len(data) < band.size * stored.itemsize:
            raise ImageError(f"{name}: is damaged or truncated (its pixels end early); replace or remove the file")
        values = np.frombuffer(data, stored).reshape(band.shape).astype(np.float64)
        band[:] = np.minimum(np.rint(values / most * white), white)
    return Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])


def _without_metadata(stream: IO[bytes]) -> IO[bytes]:
    """A PNG with only the chunks that its pixels and its orientation need."""
    stream.seek(0)
    kept = [stream.read(8)]
    while len(header := stream.read(8)) == 8:
        length = int.from_bytes(header[:4], "big") + 4
        if header[4:] in _PNG_IMAGE_CHUNKS:
            kept += header, stream.read(length)
        else:
            stream.seek(length, io.SEEK_CUR)
    return io.BytesIO(b"".join(kept))


def _orientation(image: Image.Image, name: str) -> int:
    """The EXIF orientation, 1 to 8, of a decoded image; damaged EXIF data must not cost it.

    Pillow prints a warning for those, which cannot be silenced in one thread only, and so is not asked.
    """
    exif = image.info.get("exif")
    with suppress(struct.error):
        data = re.sub(rb"^(Exif\0\0)+", b"", exif) if isinstance(exif, bytes) else b""
        order = {b"II": "<", b"MM": ">"}.get(data[:2])
        if order:
            (start,) = struct.unpack_from(f"{order}I", data, 4)
            (count,) = struct.unpack_from(f"{order}H", data, start)
            for index in range(count):
                tag, kind, _, value = struct.unpack_from(f"{order}HHIH", data, start + 2 + 12 * index)
                if tag == _ORIENTATION and kind == 3:
                    return int(value)
    # It may also be in XMP or text, which Pillow reads without warnings.
    others = Image.new("1", (1, 1))
    others.info = {key: value for key, value in image.info.items() if key != "exif"}
    try:
        return int(others.getexif().get(_ORIENTATION, 1))
    except Exception:
        logger.debug("%s: unreadable metadata; the orientation is ignored", name, exc_info=True)
        return 1


class _NoValueError(Exception):
    """Pixels that are not finite numbers."""


def _to_rgb(image: Image.Image, *, halved: bool, shared: bool, unsigned: bool, inverted: bool) -> Image.Image:
    """Convert a decoded image, in bands, since conversions need several times the memory of the image.

    Of deep greyscale, Pillow takes `unsigned` 32-bit integers for signed ones, and leaves `inverted` shades, of which
    zero is white, as they are.
    """
    deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    transparent = image.has_transparency_data or image.mode == "La"
    if not (deep or transparent or halved):
        # `convert` would copy the pixels of an RGB file, which takes up to half as long again as decoding them.
        return image._new(image.im) if shared and image.mode == "RGB" else image.convert("RGB")
    rows = max(2, _BAND // image.width // 2 * 2)
    boxes = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    low, high = _range(image, boxes, unsigned) if deep else (0.0, 0.0)
    size = ((image.width + 1) // 2, (image.height + 1) // 2) if halved else image.size
    result = Image.new("RGB", size)
    for box in boxes:
        band = image.crop(box)
        if deep:
            band = _to_grey(band, low, high, unsigned, inverted).convert("RGB")
        elif transparent:
            band = band.convert("LA").convert("RGBA") if band.mode == "La" else band.convert("RGBA")
            band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB")
        else:
            band = band.convert("RGB")
        result.paste(band.reduce(2) if halved else band, (0, box[1] // 2 if halved else box[1]))
    return result


def _values(image: Image.Image, unsigned: bool) -> npt.NDArray[Any]:
    values = np.asarray(image)
    return values.view(np.uint32) if unsigned else values


def _range(image: Image.Image, boxes: list[tuple[int, int, int, int]], unsigned: bool) -> tuple[float, float]:
    """The values of a deep greyscale image that become black and white; see `read_image` for the scale."""
    limits = []
    for box in boxes:
        values = _values(image.crop(box), unsigned)
        limits.append((float(values.min()), float(values.max())))
        if not all(map(math.isfinite, limits[-1])):
            raise _NoValueError(
                "has pixels without a value (NaN or infinite); fill them, as with the smallest value of the image, and "
                "save it again"
            )
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    if image.mode != "F":
        return (0.0, 65535.0) if low >= 0 and high <= 65535 else (low, high)
    if low >= 0 and high <= 255:
        return 0.0, 1.0 if high <= 1 else 255.0
    return low, high


def _to_grey(image: Image.Image, low: float, high: float, unsigned: bool, inverted: bool) -> Image.Image:
    """Scale a deep greyscale image to 8 bits; a transparent colour becomes white."""
    values = _values(image, unsigned)
    shades: npt.NDArray[np.float64] = values.astype(np.float64)
    shades -= low
    shades /= high - low or 1.0
    shades *= 255
    scaled = np.rint(shades, out=shades).astype(np.uint8)
    if inverted:
        scaled = 255 - scaled
    key = image.info.get("transparency")
    if isinstance(key, int):
        scaled[values == key] = 255
    return Image.fromarray(scaled)
