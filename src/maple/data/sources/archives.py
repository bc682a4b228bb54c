"""Zip and tar archives of class folders."""

import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from maple.data.folders.listing import is_ignored, list_folder
from maple.data.images.formats import has_image_name, is_image_file
from maple.data.published.unpack import DAMAGED, UNPUBLISHED, is_archive, unpack
from maple.data.sources.rows import MAX_IMAGE_BYTES, Columns, Row, Source
from maple.errors import DataError, DownloadError, shortened_list

_MOST_FILES = 2_000_000
_MOST_RATIO = 100
_LEAST_LIMIT = 1 << 30


class ArchiveSource(Source):
    """An archive that holds what a folder of images would.

    Example:
        >>> [row.name for row in ArchiveSource("pets.zip", Path("pets.zip")).rows(Columns(), labelled=False)]
        ['pets.zip#cat/1.jpg', 'pets.zip#dog/1.jpg']
    """

    def __init__(self, text: str, path: Path, note: str = "") -> None:
        self.text, self.path, self.note = text, path, note

    def identity(self) -> Mapping[str, Any]:
        status = self.path.stat()
        return {"archive": [str(self.path.resolve()), status.st_size, status.st_mtime_ns]}

    def unpack_into(self, folder: Path) -> Path:
        """Unpack into a new folder, and return the folder in it that holds the class folders, or a table.

        Raises:
            DataError: the archive is damaged, encrypted or unsafe, or holds only other archives, or no images.
        """
        size = self.path.stat().st_size
        try:
            unpack(self.path, folder, max_bytes=max(_LEAST_LIMIT, _MOST_RATIO * size), max_files=_MOST_FILES)
        except DownloadError as error:
            # A user's own archive was not published.
            raise DataError(
                str(error).replace(UNPUBLISHED, "it is not unpacked; make it again without that")
            ) from error
        # An archive of a folder holds that folder, perhaps in another one of the same name.
        while True:
            children = list_folder(folder)
            inner = [child for child in children if child.is_dir()]
            if len(inner) != 1 or any(is_image_file(child) for child in children if not child.is_dir()):
                break
            if not any(child.is_dir() for child in list_folder(inner[0])) and not _tables(inner[0]):
                break
            folder = inner[0]
        if not any(child.is_dir() for child in children) and not _tables(folder):
            names = sorted(child.name for child in children)
            if archives := [name for name in names if is_archive(Path(name))]:
                raise DataError(
                    f"{self.text}: holds no images but archives ({shortened_list(archives)}); unpack it, and give one "
                    "of these, or a folder of class folders"
                )
            held = f"{len(names)} files ({shortened_list(names)})" if names else "nothing"
            raise DataError(
                f"{self.text}: holds {held} but no class folders; put the images of each class into their own folder: "
                "CLASS/image.jpg"
            )
        return folder

    def rows(self, columns: Columns, *, labelled: bool) -> Iterator[Row]:
        del columns
        with self.path.open("rb") as file:
            is_zip = file.read(4) in (b"PK\3\4", b"PK\5\6")
        try:
            for name, size, read in _zip_members(self.path) if is_zip else _tar_members(self.path):
                path = name.replace("\\", "/")
                if has_image_name(path) and not any(map(is_ignored, path.split("/"))):
                    where = f"{self.text}#{path}"
                    content: bytes | DataError
                    try:
                        if size > MAX_IMAGE_BYTES:
                            raise DataError(f"{where}: has {size:,} bytes, too many for an image; remove it")
                        content = read()
                    except DataError as error:
                        content = error
                    except (*DAMAGED, NotImplementedError, RuntimeError) as error:
                        if not is_zip:  # nothing after a damaged member of a tar archive can be found
                            raise
                        content = DataError(f"{where}: cannot be read, it is damaged or encrypted ({error})")
                    yield Row(where, "", os.path.basename(os.path.dirname(path)) or None if labelled else None, content)
        except (*DAMAGED, NotImplementedError, RuntimeError, OSError) as error:
            raise DataError(
                f"{self.path}: cannot be read, it is damaged or encrypted ({error}); make it again"
            ) from error


def _tables(folder: Path) -> list[Path]:
    return [child for child in list_folder(folder) if child.suffix.lower() in (".csv", ".tsv", ".jsonl", ".parquet")]


def _zip_members(path: Path) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    with zipfile.ZipFile(path) as archive:
        for info in sorted(archive.infolist(), key=lambda info: info.filename):
            if not info.is_dir():
                yield info.filename, info.file_size, lambda info=info: archive.read(info)  # type: ignore[misc]


def _tar_members(path: Path) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    def read(opened: IO[bytes] | None) -> bytes:
        return opened.read() if opened else b""

    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # which tarfile would keep
            if member.isreg():
                yield member.name, member.size, lambda member=member: read(archive.extractfile(member))  # type: ignore[misc]
