"""Where pictures come from: files, folders, addresses, standard input."""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NoReturn

from PIL import Image

from maple.data import read_image
from maple.data.folders.class_folders import walk_files
from maple.data.images.reading import has_image_name, is_image_file
from maple.errors import ConfigError, DataError, ImageError
from maple.inference.fetch import MAX_BYTES, fetch_bytes, is_address

STDIN = "-"


@dataclass(frozen=True)
class ImageSource:
    """A picture that has not been read yet: what to call it, and how to read it (RGB, upright).

    `read` raises a DataError (an ImageError, mostly) where it cannot be.
    """

    name: str
    read: Callable[[], Image.Image]


def find_images(
    sources: Sequence[str], *, recursive: bool = False, stdin: BinaryIO | None = None
) -> Iterator[ImageSource]:
    """Iterate over the pictures of files, folders, http(s) addresses and `-` (one encoded image from `stdin`).

    Sources come in their order, the pictures of a folder in that of their names, file systems apart. Nothing is read
    before the picture is, and no list of a folder tree is kept. Files of a folder that are no images are left out;
    whatever else cannot be read becomes a picture whose `read` says why.

    Raises:
        ConfigError: no source, an empty one, or `-` twice (at the call).
    """
    if not sources or not all(sources):
        raise ConfigError("a picture is needed: an image file, a folder, an http(s) address, or - for standard input")
    if list(sources).count(STDIN) > 1:
        raise ConfigError("standard input (-) holds one picture; name it once")

    def found() -> Iterator[ImageSource]:
        for source in sources:
            if source == STDIN:
                yield ImageSource("<stdin>", partial(_read_stdin, stdin))
            elif is_address(source):
                yield ImageSource(source, partial(_read_address, source))
            else:
                for path in _matching(source):
                    if Path(path).expanduser().is_dir():
                        yield from _of_folder(path, recursive)
                    else:
                        yield ImageSource(path, partial(read_image, Path(path).expanduser()))

    return found()


def keep_fetched(pictures: Iterator[ImageSource]) -> Iterator[ImageSource]:
    """The same pictures, of which those that can be read only once, or slowly, keep what was read."""
    for picture in pictures:
        once = is_address(picture.name) or picture.name == "<stdin>"
        yield ImageSource(picture.name, _Kept(picture.read)) if once else picture


class _Kept:
    """Reads once and gives the same image, or the same error, from then on."""

    def __init__(self, read: Callable[[], Image.Image]) -> None:
        self._read = read
        self._result: Image.Image | DataError | None = None

    def __call__(self) -> Image.Image:
        if self._result is None:
            try:
                self._result = self._read()
            except DataError as error:
                self._result = error
        if isinstance(self._result, DataError):
            raise self._result
        return self._result


def _matching(source: str) -> list[str]:
    """The paths that a pattern (`*`, `?`, `[...]`) means, sorted, where no shell has put them in; else the path."""
    if not glob.has_magic(source) or Path(source).expanduser().exists():
        return [source]
    return sorted(glob.glob(os.path.expanduser(source))) or [source]


def _of_folder(source: str, recursive: bool) -> Iterator[ImageSource]:
    folder = Path(source).expanduser()
    unreadable: list[DataError] = []
    empty = True
    for file in walk_files(folder, recursive=recursive, on_unreadable=unreadable.append):
        while unreadable:
            yield _failing(str(folder), unreadable.pop(0))
        # A broken link or a pipe that is named as a picture is told, when it is read.
        if is_image_file(file) or (has_image_name(file.name) and not file.is_file()):
            empty = False
            yield ImageSource(str(file), partial(read_image, file))
    for error in unreadable:
        yield _failing(str(folder), error)
    if empty and not unreadable:
        hint = "" if recursive else "; --recursive also looks into the folders below it"
        yield _failing(source, DataError(f"{source}: holds no images{hint}"))


def _failing(name: str, error: DataError) -> ImageSource:
    def fail() -> NoReturn:
        raise error

    return ImageSource(name, fail)


def _read_address(url: str) -> Image.Image:
    content = fetch_bytes(url)
    try:
        return read_image(content)
    except ImageError as error:
        raise _renamed(error, url) from error


def _read_stdin(stream: BinaryIO | None) -> Image.Image:
    if stream is None:
        raise ImageError("<stdin>: is closed; pipe an encoded image into the command")
    if stream.isatty():
        raise ImageError("<stdin>: no picture comes from a terminal; pipe an encoded image into the command")
    content = stream.read(MAX_BYTES + 1)
    if not content:
        raise ImageError("<stdin>: is empty (0 bytes); pipe an encoded image into the command")
    if len(content) > MAX_BYTES:
        raise ImageError(f"<stdin>: more than the allowed {MAX_BYTES:,} bytes; save it and give the file")
    try:
        return read_image(content)
    except ImageError as error:
        raise _renamed(error, "<stdin>") from error


def _renamed(error: ImageError, name: str) -> ImageError:
    """The error of unnamed bytes under the name of where they came from."""
    return ImageError(str(error).replace("<bytes>", name, 1))
