"""Keeping decoded images of a data set in memory, and identifying images without decoding them."""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from maple.data.images.reading import MAX_PIXELS, read_image
from maple.errors import ConfigError, ImageError
from maple.files import on_disk, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

Features = Callable[[Sequence[str]], "Tensor"]
"""Returns the features [n, D] of paths."""
STORE_BYTES = 2 * 1024**3
"""The default byte budget of an `ImageStore`."""


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
        least_side: int | None = None,
        read: Callable[[str], Image.Image] | None = None,
        identify: Callable[[str], str | None] | None = None,
        features: Features | None = None,
    ) -> None:
        """Keep up to `max_bytes` of decoded images (0: none) of the files below `root`.

        `least_side` is that of `read_image`: JPEGs may be decoded at a part of their size. `read` returns the image of
        a path, for images that are rendered instead of stored, and `identify` a text that is equal for equal images,
        without rendering; see `content_id`. `features` returns those of paths that have no images.

        Raises:
            ConfigError: `max_bytes` is negative.
        """
        if max_bytes < 0:
            raise ConfigError(f"max_bytes is {max_bytes}; it must be 0 (keep nothing) or more")
        self.root = root
        self.max_bytes = max_bytes
        self.max_pixels = max_pixels
        self.least_side = least_side
        self._read = read
        self._identify = identify
        self.features = features
        self.decodes = 0
        self.used_bytes = 0
        self._images: dict[str, Image.Image] = {}
        self._states: dict[str, tuple[int, int, int]] = {}
        self._digests: dict[str, str] = {}
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
            if self.max_bytes and not self._read:
                self._file_if_unchanged(path)  # notes the state of the file that the kept image was decoded from
            try:
                if self._read:
                    image = self._read(path)
                else:
                    limits = {"max_pixels": self.max_pixels, "least_side": self.least_side}
                    try:
                        image = read_image(self.root / path, **limits)  # type: ignore[arg-type]
                    except ImageError as error:
                        from maple.data.sources.unpacked import name_row  # imports this module

                        raise name_row(error, self.root / path) from error.__cause__
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

    def content_id(self, path: str) -> str | None:
        """Return a text that identifies the content of an image, not its place, without decoding it.

        None if that is impossible: the file cannot be read, which `get` reports, or it has changed since this store
        first used it, or a rendered image has no identification.
        """
        if self._read is not None:
            return None if self._identify is None else self._identify(path)
        file = self._file_if_unchanged(path)
        if file is None:
            return None
        if path not in self._digests:  # of the state that `_file_if_unchanged` has noted; views share it
            try:
                self._digests[path] = sha256_of(file)
            except OSError:
                return None
        return f"file:{self._digests[path]}"

    def is_unchanged(self, path: str) -> bool:
        """Return whether the file is, by size and time, as it was when this store first used it."""
        return self._read is not None or self._file_if_unchanged(path) is not None

    def _file_if_unchanged(self, path: str) -> Path | None:
        try:
            file = on_disk(self.root / path)
            status = file.stat()
        except (OSError, ValueError):
            return None
        state = (status.st_mtime_ns, status.st_size, status.st_ino)
        return file if self._states.setdefault(path, state) == state else None

    def __reduce__(self) -> tuple[Callable[[], "ImageStore"], tuple[()]]:
        options = {
            "max_pixels": self.max_pixels,
            "least_side": self.least_side,
            "read": self._read,
            "identify": self._identify,
            "features": self.features,
        }
        return partial(ImageStore, self.root, self.max_bytes, **options), ()  # type: ignore[arg-type]
