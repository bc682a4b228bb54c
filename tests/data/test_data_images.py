"""Images of every awkward kind, and the store."""

import contextlib
import io
import pickle
import struct
import subprocess
import threading
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from data_helpers import save_image
from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin

from maple.data import ImageStore, read_image
from maple.data.images import reading
from maple.data.images.formats import is_image_file, unread_format
from maple.data.images.reading import to_rgb
from maple.errors import ConfigError, ImageError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def png(width: int, height: int, bit_depth: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    """Return a PNG whose header may promise more than its data holds."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def half_red_half_blue(mode: str = "RGB") -> Image.Image:
    """Return an image 8 wide, 4 high: left half red, right half blue."""
    image = Image.new("RGB", (8, 4), RED)
    image.paste(BLUE, (4, 0, 8, 4))
    return image.convert(mode)


def encoded(image: Image.Image, extension: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, extension, **options)
    return buffer.getvalue()


def near(pixel: object, colour: tuple[int, int, int], tolerance: int = 12) -> bool:
    return bool(np.abs(np.subtract(pixel, colour)).max() <= tolerance)


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm"])
def test_ordinary_images_are_those_of_pil(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"x.{extension}"
    half_red_half_blue().save(path)
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (8, 4))
    with Image.open(path) as expected:
        assert np.array_equal(np.asarray(image), np.asarray(expected.convert("RGB")))
    assert type(image) is Image.Image


@pytest.mark.parametrize(
    ("sides", "least_side", "drafted"),
    [
        ((640, 480), None, (640, 480)),
        ((640, 480), 241, (640, 480)),
        ((640, 480), 240, (320, 240)),
        ((644, 480), 119, (161, 120)),
        ((480, 640), 1, (60, 80)),
    ],
)
def test_a_jpeg_is_decoded_at_a_scale_that_keeps_its_shorter_side(
    sides: tuple[int, int], least_side: int | None, drafted: tuple[int, int]
) -> None:
    scene = Image.radial_gradient("L").convert("RGB").resize(sides)
    content = encoded(scene, "JPEG", quality=95)
    image = read_image(content, least_side=least_side)
    assert image.size == drafted
    assert image.info.get("draft") == (None if drafted == sides else (*sides, sides[0] // drafted[0]))
    assert type(image) is Image.Image
    expected = read_image(content).resize(drafted, Image.Resampling.BOX)
    assert np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16)).mean() < 1.0
    # Other formats have no such scales.
    assert read_image(encoded(scene, "PNG"), least_side=least_side).size == sides


def test_a_draft_that_is_turned_knows_its_whole_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.new("RGB", (642, 480), RED), "JPEG", exif=exif)
    image = read_image(content, least_side=100)
    assert (image.size, image.info["draft"]) == ((120, 161), (480, 642, 4))


def test_the_least_side_is_a_number_of_pixels() -> None:
    with pytest.raises(ConfigError, match="least_side is 0; it must be at least 1, or None for the whole size"):
        read_image(b"x", least_side=0)


def test_an_image_of_the_user_is_copied() -> None:
    given = half_red_half_blue()
    image = to_rgb(given)
    given.putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) != (1, 2, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_modes_become_rgb_as_pil_does(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.jpg" if mode in ("CMYK", "YCbCr") else "x.png")
    half_red_half_blue(mode).save(path)
    image = read_image(path)
    with Image.open(path) as expected:
        assert np.array_equal(np.asarray(image), np.asarray(expected.convert("RGB")))


def test_cmyk_colours_are_not_inverted() -> None:
    image = read_image(encoded(half_red_half_blue("CMYK"), "jpeg", quality=95, subsampling=0))
    assert near(image.getpixel((0, 0)), RED, 20)


def test_transparency_is_laid_on_white() -> None:
    rgba = half_red_half_blue("RGBA")
    rgba.putpixel((0, 0), (0, 0, 0, 0))
    palette = half_red_half_blue("P")
    red_index = palette.getpixel((0, 0))
    grey = Image.new("LA", (2, 1), (0, 0))
    keyed = half_red_half_blue()
    files: dict[str, tuple[bytes, tuple[int, int, int]]] = {
        "rgba": (encoded(rgba, "png"), RED),
        "palette": (encoded(palette, "png", transparency=red_index), WHITE),
        "palette_alphas": (encoded(palette, "png", transparency=bytes([0] * 256)), WHITE),
        "keyed": (encoded(keyed, "png", transparency=RED), WHITE),
        "grey": (encoded(grey, "png"), WHITE),
        "webp": (encoded(Image.new("RGBA", (2, 1), (9, 9, 9, 0)), "webp", lossless=True), WHITE),
    }
    for name, (data, second) in files.items():
        image = read_image(data)
        assert image.mode == "RGB"
        assert image.getpixel((0, 0)) == WHITE, name
        assert image.getpixel((1, 0)) == second, name


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    image = read_image(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "png"))
    assert near(image.getpixel((0, 0)), (127, 127, 127), 1)


@pytest.mark.parametrize("extension", ["png", "tiff", "ppm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(extension: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    image = read_image(encoded(Image.fromarray(values), extension))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_sixteen_bit_colour_is_scaled() -> None:
    data = png(1, 1, bit_depth=16, rows=b"\0" + struct.pack(">HHH", 65535, 32896, 0))
    assert near(read_image(data).getpixel((0, 0)), (255, 128, 0), 1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[-100, 0, 100]], dtype=np.int32), [0, 128, 255]),
        (np.array([[0, 1_000_000]], dtype=np.int32), [0, 255]),
        (np.array([[7, 7]], dtype=np.int32), [0, 0]),
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.2, 255.0]], dtype=np.float32), [0, 100, 255]),
        (np.array([[-1.0, 0.0, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[5000.0, 5000.0]], dtype=np.float32), [0, 0]),
    ],
)
def test_deep_grey_values_keep_their_shades(values: np.ndarray, expected: list[int]) -> None:
    image = read_image(encoded(Image.fromarray(values), "tiff"))
    assert np.asarray(image)[0, :, 2].tolist() == expected


def tiff(values: np.ndarray, photometric: int, *, compressed: bool = False) -> bytes:
    """Return a TIFF of one band of these values, little-endian, of which zero is white if `photometric` is 0."""
    height, width = values.shape
    data = zlib.compress(values.tobytes()) if compressed else values.tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = [(256, width), (257, height), (258, 8 * values.itemsize), (259, 8 if compressed else 1), (262, photometric)]
    tags += [(273, 8), (277, 1), (278, height), (279, len(data)), (339, kind)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 51, 255]], np.uint8),
        np.array([[0, 257 * 51, 65535]], np.uint16),
        np.array([[0.0, 0.2, 1.0]], np.float32),
        np.array([[-1.0, -0.6, 1.0]], np.float32),
    ],
)
def test_grey_of_which_zero_is_white_is_not_inverted(values: np.ndarray, compressed: bool) -> None:
    assert np.asarray(read_image(tiff(values, 1, compressed=compressed)))[0, :, 0].tolist() == [0, 51, 255]
    assert np.asarray(read_image(tiff(values, 0, compressed=compressed)))[0, :, 0].tolist() == [255, 204, 0]
    assert np.asarray(to_rgb(Image.open(io.BytesIO(tiff(values, 0)))))[0, :, 0].tolist() == [255, 204, 0]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 858_993_459, 2**32 - 1]], np.uint32), [0, 51, 255]),
        (np.array([[0, 257 * 51, 65535]], np.uint32), [0, 51, 255]),
        (np.array([[-128, -77, 127]], np.int8), [0, 51, 255]),
        (np.array([[0, 51, 127]], np.int8), [0, 51, 127]),
    ],
)
def test_integers_do_not_wrap(values: np.ndarray, expected: list[int], compressed: bool) -> None:
    assert np.asarray(read_image(tiff(values, 1, compressed=compressed)))[0, :, 0].tolist() == expected


def test_floats_that_are_no_numbers_are_refused() -> None:
    data = encoded(Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32)), "tiff")
    with pytest.raises(ImageError, match=r"pixels without a value .*fill them"):
        read_image(data)


@pytest.mark.parametrize("extension", ["gif", "webp", "png", "tiff"])
def test_the_first_frame_of_an_animation_is_taken(extension: str) -> None:
    options = {"lossless": True} if extension == "webp" else {}
    frames = [Image.new("RGB", (4, 4), BLUE), Image.new("RGB", (4, 4), RED)]
    data = encoded(frames[1], extension, save_all=True, append_images=frames[:1], **options)
    image = read_image(data)
    assert image.size == (4, 4)
    assert image.getpixel((1, 1)) == RED


@pytest.mark.parametrize("extension", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(extension: str, orientation: int) -> None:
    image = half_red_half_blue().resize((64, 32), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = read_image(encoded(image, extension, exif=exif))
    assert upright.size == ((64, 32) if orientation < 5 else (32, 64))
    far = {1: (60, 16), 2: (4, 16), 3: (4, 16), 4: (60, 16), 5: (16, 60), 6: (16, 60), 7: (16, 4), 8: (16, 4)}
    assert near(upright.getpixel(far[orientation]), BLUE)


def test_unreadable_exif_costs_no_image() -> None:
    data = encoded(half_red_half_blue(), "png", exif=b"Exif\0\0garbage that is no TIFF header")
    assert read_image(data).size == (8, 4)


def _truncated_jpeg(path: Path) -> None:
    data = encoded(Image.effect_noise((200, 200), 90), "jpeg")
    path.write_bytes(data[: len(data) // 2])


def _truncated_png(path: Path) -> None:
    data = encoded(Image.effect_noise((200, 200), 90), "png")
    path.write_bytes(data[: len(data) // 2])


def _corrupt_png(path: Path) -> None:
    data = bytearray(encoded(Image.effect_noise((50, 50), 90), "png"))
    data[60:90] = b"\xff" * 30
    path.write_bytes(bytes(data))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut.jpg": (_truncated_jpeg, "damaged or truncated"),
    "cut.png": (_truncated_png, "damaged or truncated"),
    "corrupt.png": (_corrupt_png, "damaged"),
    "head.jpg": (lambda path: path.write_bytes(b"\xff\xd8\xff"), "is damaged"),
    "head.png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "damaged"),
    "text.jpg": (
        lambda path: path.write_text("these are words\n" * 50),
        "is not an image that Pillow can read, despite its name",
    ),
    "page.png": (
        lambda path: path.write_text("<!DOCTYPE html><html>404</html>"),
        "is not an image that Pillow",
    ),
    "zeros.jpg": (lambda path: path.write_bytes(bytes(4096)), "is not an image|damaged"),
    "drawing.eps": (
        lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "is not an image",
    ),
    "empty.jpg": (lambda path: path.touch(), r"is empty \(0 bytes\)"),
    "folder.jpg": (lambda path: path.mkdir(), "is a folder"),
    "missing.jpg": (lambda _: None, "there is no such file"),
    "bomb.png": (lambda path: path.write_bytes(png(60_000, 60_000)), "60000 x 60000 pixels, more than the allowed"),
    "big.png": (lambda path: path.write_bytes(png(13_400, 13_400)), "13400 x 13400 pixels, more than the allowed"),
    "short.png": (lambda path: path.write_bytes(png(64, 64)), "damaged or truncated"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unusable_images_are_named_with_problem_and_fix(tmp_path: Path, name: str) -> None:
    make, message = BROKEN[name]
    path = tmp_path / name
    make(path)
    with pytest.raises(ImageError, match=message) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("extension", ["jpeg", "png", "gif", "webp", "tiff", "bmp", "ppm"])
def test_damage_anywhere_gives_an_image_or_an_image_error(extension: str) -> None:
    whole = encoded(Image.effect_noise((16, 16), 60).convert("RGB"), extension)
    random = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole[: int(random.integers(1, len(whole) + 1))])
        for position in random.integers(0, len(data), 4):
            data[position] = int(random.integers(256))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(ImageError):
                assert read_image(bytes(data), max_pixels=10**6).mode == "RGB"


def test_the_pixel_limit_can_be_changed_and_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (100, 100)), "png")
    with pytest.raises(ImageError, match="100 x 100 pixels, more than the allowed 9999"):
        read_image(data, max_pixels=9999)
    # PIL would warn at once, or refuse, with its own limit so low; ours alone decides.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_image(data, max_pixels=10_000).size == (100, 100)
    with pytest.raises(ConfigError, match="max_pixels is 0"):
        read_image(data, max_pixels=0)


def test_settings_of_pil_are_left_alone() -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    read_image(encoded(half_red_half_blue(), "png"))
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


class _Pipe(io.BytesIO):
    def seekable(self) -> bool:
        return False


def test_bytes_and_streams_are_read_too(tmp_path: Path) -> None:
    data = encoded(half_red_half_blue(), "png")
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with path.open("rb") as file:
        sources = [data, io.BytesIO(data), _Pipe(data), file, str(path), path]
        assert len({read_image(source).tobytes() for source in sources}) == 1
        assert not file.closed
    with pytest.raises(ImageError, match=r"^<bytes>: "):
        read_image(b"no image")
    with pytest.raises(ImageError, match=r"^<stream>: "):
        read_image(io.BytesIO(b""))


def test_image_files_are_recognised(tmp_path: Path) -> None:
    assert is_image_file(save_image(tmp_path / "a.JPEG"))
    (tmp_path / "b").write_bytes(encoded(half_red_half_blue(), "webp"))
    assert is_image_file(tmp_path / "b")
    for name in ("notes.txt", "table.csv", "paper.pdf", "clip.mpg", "data.h5"):
        (tmp_path / name).write_text("RIFF GIF BM %PDF")
        assert not is_image_file(tmp_path / name)
    (tmp_path / "folder.jpg").mkdir()
    assert not is_image_file(tmp_path / "folder.jpg")
    assert not is_image_file(tmp_path / "nowhere.jpg")


def test_a_store_decodes_once_within_its_budget(tmp_path: Path) -> None:
    for name in "abc":
        save_image(tmp_path / f"{name}.png", size=(10, 10))
    store = ImageStore(tmp_path, max_bytes=800)
    for _ in range(3):
        for name in "abc":
            assert store.get(f"{name}.png").size == (10, 10)
    assert store.decodes == 2 + 3
    assert store.used_bytes == 800
    assert store.get("a.png") is store.get("a.png")
    with pytest.raises(ImageError, match=r"nowhere.png: there is no such file"):
        store.get("nowhere.png")
    with pytest.raises(ConfigError, match="max_bytes is -1"):
        ImageStore(tmp_path, max_bytes=-1)


def test_threads_share_a_store(tmp_path: Path) -> None:
    for index in range(5):
        save_image(tmp_path / f"{index}.png", index, size=(200, 200))
    store = ImageStore(tmp_path)
    barrier = threading.Barrier(8)

    def work(_: int) -> int:
        barrier.wait()
        return sum(store.get(f"{index}.png").width for index in range(5))

    with ThreadPoolExecutor(8) as executor:
        assert set(executor.map(work, range(8))) == {1000}
    assert store.decodes == 5


def test_a_store_survives_pickling_empty(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    store = ImageStore(tmp_path, max_bytes=5000, max_pixels=1000)
    store.get("a.png")
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.root, copy.max_bytes, copy.max_pixels, copy.decodes) == (tmp_path, 5000, 1000, 0)
    assert copy.get("a.png").tobytes() == store.get("a.png").tobytes()


@pytest.mark.parametrize(
    "values",
    [
        np.arange(1_500_000, dtype=np.uint32).reshape(1000, 1500).astype(np.uint16),
        np.arange(-700_000, 800_000, dtype=np.int32).reshape(1500, 1000),
        np.linspace(-3, 900, 1_500_000, dtype=np.float32).reshape(500_000, 3),
        np.linspace(0, 1, 1_500_000, dtype=np.float32).reshape(1000, 1500),
    ],
)
def test_deep_grey_is_converted_in_bands(values: np.ndarray) -> None:
    """Equal to the conversion of the whole, with little additional memory."""
    low, high = (0, 65535) if values.dtype == np.uint16 else (float(values.min()), float(values.max()))
    expected = np.rint((values.astype(np.float64) - low) / (high - low) * 255).astype(np.uint8)
    image = Image.fromarray(values)
    tracemalloc.start()
    found = to_rgb(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(np.asarray(found), np.stack([expected] * 3, axis=2))
    # A fixed sum for one band, whatever the image's size: float64 values, and their copies.
    assert peak < 24 * reading._BAND


def test_a_short_text_is_no_damaged_image() -> None:
    with pytest.raises(ImageError, match="<bytes>: is not an image that Pillow can read; convert"):
        read_image(b"x\n")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG; convert it to JPEG or PNG"),
        (b"<!DOCTYPE html><body><svg></svg>", "HTML; give the image that the page shows"),
        (b"<HTML><p>Not found", "HTML"),
    ],
)
def test_a_page_and_a_drawing_are_named(content: bytes, kind: str) -> None:
    with pytest.raises(ImageError, match=f"<bytes>: is not an image that Pillow can read, but {kind}"):
        read_image(content)


TOO_MUCH = 3_000_000
"""Bytes of text, more than Pillow reads in a PNG."""


def _large_metadata() -> dict[str, bytes]:
    text = PngImagePlugin.PngInfo()
    text.add_text("plain", "x" * TOO_MUCH)
    files = {"tEXt": encoded(half_red_half_blue(), "png", pnginfo=text)}
    for name in ("zTXt", "iTXt"):
        text = PngImagePlugin.PngInfo()
        add = text.add_text if name == "zTXt" else text.add_itxt
        add("XML:com.adobe.xmp", "x" * TOO_MUCH, zip=True)
        files[name] = encoded(half_red_half_blue(), "png", pnginfo=text)
        # After the pixels, where Pillow reads it only as it decodes.
        length = struct.unpack(">I", files[name][33:37])[0] + 12
        files[f"{name} last"] = files[name][:33] + files[name][33 + length : -12] + files[name][33 : 33 + length]
        files[f"{name} last"] += files[name][-12:]
    files["iCCP"] = encoded(half_red_half_blue(), "png", icc_profile=bytes(TOO_MUCH))
    files["animation"] = encoded(
        half_red_half_blue(),
        "png",
        icc_profile=bytes(TOO_MUCH),
        save_all=True,
        append_images=[Image.new("RGB", (8, 4))],
    )
    for extension in ("jpeg", "webp", "tiff"):
        options = {"lossless": True} if extension == "webp" else {"quality": 100, "subsampling": 0}
        files[f"{extension} profile"] = encoded(
            half_red_half_blue(), extension, icc_profile=bytes(TOO_MUCH), **(options if extension != "tiff" else {})
        )
    files["webp xmp"] = encoded(half_red_half_blue(), "webp", lossless=True, xmp=bytes(TOO_MUCH))
    files["jpeg xmp"] = encoded(half_red_half_blue(), "jpeg", xmp=b"x" * 60_000, quality=100, subsampling=0)
    return files


@pytest.mark.parametrize(("name", "data"), _large_metadata().items(), ids=_large_metadata())
def test_pixels_are_read_whatever_the_size_of_the_metadata(name: str, data: bytes) -> None:
    found, expected = np.asarray(read_image(data)).astype(int), np.asarray(half_red_half_blue())
    assert np.abs(found - expected).max() <= (3 if name.startswith("jpeg") else 0)


def test_an_orientation_survives_large_metadata() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(encoded(half_red_half_blue(), "png", exif=exif, icc_profile=bytes(TOO_MUCH))).size == (4, 8)


def test_a_size_limit_holds_with_large_metadata() -> None:
    with pytest.raises(ImageError, match="8 x 4 pixels, more than the allowed 20"):
        read_image(encoded(half_red_half_blue(), "png", icc_profile=bytes(TOO_MUCH)), max_pixels=20)


POINTERS = {
    "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n": "is a git-lfs pointer; .*`git lfs pull`",
    "/annex/objects/SHA256E-s9--00.jpg\n": "is a git-annex pointer; .*`git annex get`",
    "../../.git/annex/objects/1/2/SHA256E-s9--0.jpg/SHA256E-s9--0.jpg": "is a git-annex pointer; .*`git annex get`",
    "outs:\n- md5: 00\n  size: 9\n  hash: md5\n  path: 1.jpg\n": "is a DVC pointer; .*`dvc pull`",
    "md5: 00\nfrozen: true\nouts:\n- etag: 00\n  path: 1.jpg\n": "is a DVC pointer; .*`dvc pull`",
}


@pytest.mark.parametrize("content", POINTERS)
def test_pointers_say_how_to_fetch_the_image(tmp_path: Path, content: str) -> None:
    path = tmp_path / "1.jpg"
    path.write_text(content)
    for source in (path, content.encode()):
        with pytest.raises(ImageError, match=POINTERS[content]):
            read_image(source)


def test_missing_images_say_how_to_fetch_them(tmp_path: Path) -> None:
    (tmp_path / "1.jpg.dvc").write_text("outs:\n- md5: 00\n  path: 1.jpg\n")
    with pytest.raises(ImageError, match=r"1.jpg: is not here, but 1.jpg.dvc is, a DVC pointer; .*`dvc pull`"):
        read_image(tmp_path / "1.jpg")
    assert unread_format(tmp_path / "1.jpg.dvc") == "DVC pointer"
    (tmp_path / "2.jpg").symlink_to("/nowhere/annex/2.jpg")
    with pytest.raises(
        ImageError, match=r"2.jpg: is a link to /nowhere/annex/2.jpg, which is not there; .*git annex get"
    ):
        read_image(tmp_path / "2.jpg")


UNREAD: dict[str, bytes] = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "HEIC": struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic",
    "JPEG XL": b"\0\0\0\x0cJXL \r\n\x87\n",
    "PSD": b"8BPS\0\1" + bytes(20),
    "QOI": b"qoif" + bytes(20),
    "DICOM": bytes(128) + b"DICM\2\0\0\0UL",
    "NIfTI": struct.pack("<I", 348) + bytes(340) + b"n+1\0",
    "XPM": b"/* XPM */\nstatic char *x[] = {",
    "FITS": b"SIMPLE  =                    T",
    "camera RAW": b"IIRO\x08\0\0\0" + bytes(20),
    "ICNS": encoded(half_red_half_blue(), "ICNS"),
    "JPEG 2000": encoded(half_red_half_blue(), "JPEG2000"),
}
SHORT = {
    # A format within a format, as Pillow reads it: IPTC with a JPEG inside.
    "IPTC": b"\x1c\x03\x3c\0\2\1\0" + b"\x1c\x08\x0a\0\x04" + encoded(half_red_half_blue(), "jpeg"),
    "ICO": encoded(half_red_half_blue(), "ICO"),
    "plain PNM": b"P3\n2 1\n255\n255 0 0 0 0 255\n",
    "XBM": b"#define x_width 8\n#define x_height 1\n",
    "SGI": encoded(half_red_half_blue(), "SGI"),
}


@pytest.mark.parametrize("name", [*UNREAD, *SHORT])
def test_other_formats_are_named_and_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def started(*_: object) -> None:
        raise AssertionError("another program or decoder was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(Image, "open", started)
    content = (UNREAD | SHORT)[name]
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(
            ImageError, match=rf"is not an image of a format that is read here \(JPEG.*\), but {name}; conv"
        ):
            read_image(source)
    unnamed = tmp_path / "x"
    unnamed.write_bytes(content)
    assert unread_format(unnamed) == ("" if name in SHORT else name)
    assert not is_image_file(unnamed)


@pytest.mark.parametrize("name", ["x.ico", "x.TGA", "x.nef", "x.jp2", "x.psd", "x.DCM", "x.nii.gz", "x.svgz", "x.npy"])
def test_other_formats_are_known_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bytes(100))
    assert bool(unread_format(tmp_path / name)) == (name not in ("x.svgz", "x.npy"))
    assert not is_image_file(tmp_path / name)
    with pytest.raises(ImageError, match=r"convert (it )?to (JPEG or )?PNG"):
        read_image(tmp_path / name)


@pytest.mark.parametrize("extension", ["jpeg", "png", "webp"])
def test_damaged_exif_data_are_silent(extension: str, recwarn: pytest.WarningsRecorder) -> None:
    """The orientation is found, or ignored, without the warnings that Pillow prints."""
    warnings.simplefilter("always")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker" * 20
    whole = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    for data, size in ((whole, (4, 8)), (whole[:50], (4, 8)), (whole[:20], (8, 4)), (b"Exif\0\0II*\0\xff\xff", (8, 4))):
        assert read_image(encoded(half_red_half_blue(), extension, exif=data)).size == size
    assert not recwarn.list


def test_a_transparent_grey_of_any_depth_becomes_white() -> None:
    def keyed(depth: int, rows: bytes, key: bytes, colour: int = 0) -> list[list[int]]:
        data = png(2, 1, bit_depth=depth, colour=colour, rows=rows)
        chunk = struct.pack(">I", len(key)) + b"tRNS" + key + struct.pack(">I", zlib.crc32(b"tRNS" + key))
        return np.asarray(read_image(data[:33] + chunk + data[33:]))[0].tolist()

    white, dark = [255] * 3, [51] * 3
    assert keyed(16, b"\0" + struct.pack(">HH", 1000, 257 * 51), struct.pack(">H", 1000)) == [white, dark]
    assert keyed(8, b"\0\x07\x33", struct.pack(">H", 7)) == [white, dark]
    assert keyed(4, b"\0\x73", struct.pack(">H", 7)) == [white, dark]
    assert keyed(2, b"\0\x10", struct.pack(">H", 0)) == [white, [85] * 3]
    colours = b"\0" + struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 257 * 51, 257 * 51, 257 * 51)
    assert keyed(16, colours, struct.pack(">3H", 0x1234, 0x5678, 0x9ABC), colour=2) == [white, dark]


@pytest.mark.parametrize(("most", "dtype"), [(15, "u1"), (100, "u1"), (1023, ">u2"), (4095, ">u2"), (65535, ">u2")])
def test_binary_pnm_of_any_depth(most: int, dtype: str) -> None:
    values = np.array([0, most // 2, most], dtype)
    expected = np.rint(np.rint(values / most * 65535) / 257 if most > 255 else values / most * 255).tolist()
    grey = read_image(f"P5\n# made by hand\n3 1 {most}\n".encode() + values.tobytes())
    assert np.asarray(grey)[0, :, 0].tolist() == expected
    colour = read_image(f"P6 1 1 {most}\n".encode() + values.tobytes())
    assert np.asarray(colour)[0, 0].tolist() == np.rint(values / most * 255).tolist()
    if most not in (255, 65535):
        with pytest.raises(ImageError, match="damaged or truncated"):
            read_image(f"P6 2 1 {most}\n".encode() + values.tobytes())


@pytest.mark.parametrize(
    ("extension", "mode"),
    [
        *(("jpeg", mode) for mode in ("RGB", "L", "CMYK")),
        *(("png", mode) for mode in ("RGB", "RGBA", "L", "I;16")),
        *(("tiff", mode) for mode in ("RGB", "RGBA", "L", "I;16", "CMYK")),
    ],
)
def test_large_images_are_read_at_half_their_size(extension: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (120, 81), "teal")
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.full((81, 120), 30_000, np.uint16)) if mode == "I;16" else image.convert(mode)
    data = encoded(image, extension, exif=exif)
    whole = read_image(data)
    monkeypatch.setattr(reading, "_LARGE", 9000)
    monkeypatch.setattr(reading, "_BAND", 500)
    half = read_image(data)
    assert whole.size == (81, 120)
    assert half.size == (41, 60)
    assert near(half.getpixel((20, 20)), whole.getpixel((40, 40)), 2)


def test_what_takes_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MEMORY", 1e6)
    assert read_image(encoded(Image.new("RGB", (200, 200)), "webp")).size == (200, 200)
    with pytest.raises(ImageError, match=r"has 300 x 300 pixels, which take 0.0 GB of memory to decode in this format"):
        read_image(encoded(Image.new("RGB", (300, 300)), "webp"))


def test_a_long_run_length_encoding_is_refused() -> None:
    header = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 0, 0, 0, 1078, 40, 8, 4, 1, 8, 1, 0, 0, 0, 256, 0)
    palette = b"".join(struct.pack("<I", shade * 0x10101) for shade in range(256))
    rows = bytes([8, 200, 0, 0]) * 4
    assert read_image(header + palette + rows + bytes([0, 1])).getpixel((0, 0)) == (200, 200, 200)
    with pytest.raises(ImageError, match="run-length encoded and larger than"):
        read_image(header + palette + bytes(5_000_000))


def _raw_preview(**tags: object) -> bytes:
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        directory[int(tag[1:])] = value
    return encoded(half_red_half_blue(), "tiff", tiffinfo=directory)


def test_previews_of_camera_raw_files_are_marked(tmp_path: Path) -> None:
    assert read_image(_raw_preview(t254=1, t50706=b"\1\4\0\0")).info["camera RAW"]
    assert read_image(_raw_preview(t254=1, t330=8)).info["camera RAW"]
    for extension in ("DNG", "nef", "CR2", "arw"):
        path = tmp_path / f"x.{extension}"
        path.write_bytes(_raw_preview(t254=1))
        assert is_image_file(path)
        assert read_image(path).info["camera RAW"]
    assert "camera RAW" not in read_image(_raw_preview(t254=1)).info
    (tmp_path / "x.nef").write_bytes(b"MM\0*\0\0\0\x08" + bytes(50))
    with pytest.raises(ImageError, match="camera RAW file without a preview that can be read"):
        read_image(tmp_path / "x.nef")
