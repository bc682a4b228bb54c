"""The formats of image files: recognised by their first bytes, and by the extensions of their names."""

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, features

from maple.errors import pointer_problem
from maple.files import regular

CAMERA_RAW = "camera RAW"
"""The format of a camera's own files, and the key of `info` in an image that is only the preview of one."""
DRAFT = "draft"
"""The key of `info` in an image that was decoded at a part of its size: its width, its height, and their divisor."""
SIXTEEN_BITS = "16 bits"
"""The key of `info` in an image whose file has 16 bits for each colour."""

# The formats that are read, with Pillow's names, and their extensions. Only the decoder of the format by whose
# signature a file begins is started: others of Pillow's run programs (EPS), open formats within formats without a check
# of the size (IPTC, ICO, ICNS), or take a minute for one image (XPM, plain PNM, QOI, FITS).
_READABLE = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "HEIC": (".heic", ".heif", ".hif", ".heics", ".heifs"),
}
_FORMATS = {extension: kind for kind, extensions in _READABLE.items() for extension in extensions}
_UNREAD_FORMATS = {
    **dict.fromkeys((".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".sr2", ".srf", ".orf"), CAMERA_RAW),
    **dict.fromkeys((".rw2", ".raf", ".pef", ".srw", ".x3f", ".mrw", ".3fr", ".iiq", ".erf", ".kdc"), CAMERA_RAW),
    **dict.fromkeys((".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), "JPEG 2000"),
    **{f".{name.lower()}": name for name in ("BLP", "CUR", "DCX", "DDS", "EPS", "FITS", "ICNS", "ICO", "PCX", "PSD")},
    **{f".{name.lower()}": name for name in ("QOI", "SGI", "TGA", "XBM", "XPM")},
    **dict.fromkeys((".dcm", ".dicom"), "DICOM"),
    **dict.fromkeys((".nii", ".nii.gz"), "NIfTI"),
    ".jxl": "JPEG XL",
    ".exr": "OpenEXR",
}
"""The other formats that are recognised, to name them, by extension; camera RAW files that are TIFFs have a preview."""
_MEDIA = {
    **dict.fromkeys((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".3gp"), "video"),
    **dict.fromkeys((".npy", ".npz"), "NumPy"),
    ".pdf": "PDF",
    ".svg": "SVG",
    ".svgz": "SVG",
}
_MARKS: dict[str, tuple[bytes, ...]] = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"MM*\0", b"II\0*"),
    CAMERA_RAW: (b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FUJIFILMCCD", b"FOVb", b"\0MRM"),
    "JPEG 2000": (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
    "JPEG XL": (b"\0\0\0\x0cJXL ",),
    "BLP": (b"BLP1", b"BLP2"),
    "DDS": (b"DDS ",),
    "EPS": (b"%!PS", b"\xc5\xd0\xd3\xc6"),
    "FITS": (b"SIMPLE  =",),
    "ICNS": (b"icns",),
    "OpenEXR": (b"v/1\x01",),
    "PSD": (b"8BPS",),
    "QOI": (b"qoif",),
    "Radiance HDR": (b"#?RADIANCE",),
    "XPM": (b"/* XPM */",),
}
"""The first bytes of formats, long enough not to begin a text or an archive."""
_LATER_MARKS = {"DICOM": (128, b"DICM"), "NIfTI": (344, b"n+1\0")}
"""The marks of formats that do not begin with them, and their place."""
_SHORT_MARKS: dict[str, tuple[bytes, ...]] = {
    "BMP": (b"BM",),
    "PPM": (b"P4", b"P5", b"P6", b"Pf"),
    "plain PNM": (b"P1", b"P2", b"P3"),
    "ICO": (b"\0\0\1\0",),
    "CUR": (b"\0\0\2\0",),
    "IPTC": (b"\x1c",),
    "PDF": (b"%PDF",),
    "SGI": (b"\x01\xda",),
    "XBM": (b"#define",),
}
# In this order: a page may hold an SVG.
_MARKUP = {b"<html": "HTML", b"<!doctype html": "HTML", b"<svg": "SVG"}
_ISO_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"crx ",), CAMERA_RAW),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"),
}
_ADVICE = {
    "DVC pointer": "fetch the files themselves with `dvc pull`",
    "HEIC": "convert to JPEG, or install a decoder (pip install pillow-heif)",
    "HTML": "give the image that the page shows",
    "video": "save single frames as JPEG",
    "DICOM": "convert to PNG with the window (the range of values to see) applied",
    "NIfTI": "convert to PNG, one for each slice, with the window (the range of values to see) applied",
    "NumPy": "if it holds images, save them as PNG",
}
"""What to do with images of a format, if not just to convert them."""
HEAD_BYTES = 512
"""The number of bytes by which a format is recognised."""


def is_image_file(path: Path) -> bool:
    """Return whether `path` is a regular file with the extension or the signature of a readable format.

    The image is not decoded: a damaged one is reported when it is read.
    """
    # Other than Path.is_file, it does not raise where a folder is not accessible or a share does not respond.
    return os.path.isfile(path) and (has_image_name(path.name) or is_read(format_of(_head_of(path))))


def has_image_name(name: str) -> bool:
    """Return whether a file name has the extension of a readable format; the file is not opened."""
    kind = _FORMATS.get(extension_of(name))
    return kind is not None and (kind != "HEIC" or is_read(kind))


def has_raw_name(name: str) -> bool:
    """Return whether a file name has the extension of a camera RAW format."""
    return _UNREAD_FORMATS.get(extension_of(name)) == CAMERA_RAW


def unread_format(path: Path) -> str:
    """Return the format of an image file that cannot be read here, such as "ICO" or "HEIC"; "" for all other files.

    The pointer `1.jpg.dvc` of a missing image counts as one.
    """
    if not os.path.isfile(path) or is_image_file(path):
        return ""
    if path.suffix == ".dvc":
        return "DVC pointer" if has_image_name(path.stem) and not path.with_suffix("").exists() else ""
    return probable_format(path.name, _head_of(path))


def probable_format(name: str, head: bytes) -> str:
    """Return the format that a file has by its name, or else by its first bytes; "" if neither is that of an image."""
    extension = extension_of(name)
    return _FORMATS.get(extension) or _UNREAD_FORMATS.get(extension) or format_of(head)


def media_format(path: Path) -> str:
    """Return "video", "SVG", "PDF" or "NumPy" for a file that may hold images but is none; "" for all other files."""
    head = _head_of(path)
    if head.startswith(b"\x93NUMPY"):
        return "NumPy"
    if head.startswith(b"%PDF") or b"<svg" in head:
        return "PDF" if head.startswith(b"%PDF") else "SVG"
    is_video = head.startswith((b"\x1aE\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3")) or head[8:12] == b"AVI "
    is_video = is_video or (head[4:8] == b"ftyp" and not format_of(head))
    return "video" if is_video else _MEDIA.get(extension_of(path.name), "")


def _head_of(path: Path) -> bytes:
    try:
        with regular(path).open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""


def unread_advice(kind: str) -> str:
    """Say what to do with images of a format that is not read."""
    return _ADVICE.get(kind, "convert to JPEG or PNG")


def why_unread(head: bytes, kind: str, name: str) -> str:
    """Say what a file is that is not of a readable format, and what to do."""
    if problem := pointer_problem(head):
        return f"is {problem}"
    kind = kind or _UNREAD_FORMATS.get(extension_of(name), "")
    if kind:
        readable = "JPEG, PNG, WebP, AVIF, GIF, BMP, TIFF or binary PNM"
        return f"is not an image of a format that is read here ({readable}), but {kind}; {unread_advice(kind)}"
    kind = next((markup for mark, markup in _MARKUP.items() if mark in head.lower()), "")
    but = f", but {kind}" if kind else ", despite its name" if extension_of(name) in _FORMATS else ""
    return f"is not an image that Pillow can read{but}; {_ADVICE.get(kind, 'convert it to JPEG or PNG, or remove it')}"


def extension_of(name: str) -> str:
    """Return the extension of a file name with its dot, in lower case; of .nii.gz, both."""
    name = name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else name[name.rfind(".") :]


def format_of(head: bytes, *, short: bool = False) -> str:
    """The format that a file of these first bytes has; "" if unknown. A short mark may also begin a text."""
    if head[4:8] == b"ftyp":
        end = int.from_bytes(head[:4], "big")
        brands = {head[place : place + 4] for place in (8, *range(16, min(end, HEAD_BYTES), 4))}
        return next((kind for brand, kind in _ISO_BRANDS.items() if brand in brands), "")
    if head[:4] == b"RIFF":
        return "WEBP" if head[8:12] == b"WEBP" else ""
    marks = _MARKS | _SHORT_MARKS if short else _MARKS
    kind = next((kind for kind, starts in marks.items() if head.startswith(starts)), "")
    return kind or next((kind for kind, (place, mark) in _LATER_MARKS.items() if head.startswith(mark, place)), "")


@cache
def is_read(kind: str) -> bool:
    """Whether images of a format are read: HEIC, AVIF and WebP depend on what is installed."""
    # JPEG, PNG, GIF, BMP and PNM; `init` imports forty formats more, which takes as long as the rest of Pillow.
    Image.preinit()
    if kind in _READABLE and kind not in Image.OPEN:
        Image.init()
    if kind == "HEIC":
        return find_spec("pillow_heif") is not None
    decodes = kind not in ("WEBP", "AVIF") or bool(features.check(kind.lower()))
    return kind in _READABLE and kind in Image.OPEN and decodes
