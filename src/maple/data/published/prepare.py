"""Download a published data set and build CoOp's folder layout."""

import os
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path

from filelock import FileLock, Timeout

from maple import files
from maple.data.catalogue import CATALOGUE
from maple.data.published.download import check_file, download
from maple.data.published.imagenet import read_class_names, sort_archives
from maple.data.published.split_files import read_split
from maple.data.published.unpack import is_archive, unpack
from maple.errors import DataError, DownloadError, one_of

DOWNLOADS = "downloads"
"""The folder under the data root for archives, whether downloaded or put there by the user."""

_DRIVE = "gdrive:"
_NAMES = "classnames.txt"


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file that is published somewhere, and the paths of the layout that it provides; see sources.toml."""

    file: str
    url: str
    gives: tuple[str, ...]
    checksum: str | None = None
    size: int | None = None
    checked_by: str | None = None
    inside: str | None = None
    takes: dict[str, str] = field(default_factory=dict)

    @property
    def page(self) -> str:
        """The address for a browser."""
        file = self.url.removeprefix(_DRIVE)
        return self.url if file == self.url else f"https://drive.google.com/file/d/{file}/view"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a data set is prepared: the paths it needs under the data root, and the files that provide them."""

    home: str
    needs: tuple[str, ...]
    sources: tuple[PublishedFile, ...]
    by_hand: str = ""

    def missing(self, root: Path) -> list[str]:
        """Return the paths that are not there yet; an empty folder counts as missing."""
        paths = {need: root / need for need in self.needs}
        return [need for need, path in paths.items() if not (any(path.iterdir()) if path.is_dir() else path.exists())]


class PrepareProgress:
    """Receives the progress of `prepare`; does nothing by default."""

    def say(self, text: str) -> None:
        """Called with a line about each step."""

    def advance(self, activity: str, done: int, total: int | None) -> None:
        """Called with the bytes of `activity` that are done, and their total if known."""


@cache
def recipes() -> dict[str, Recipe]:
    """Return the recipes of sources.toml by name of the catalogue."""
    text = resources.files("maple").joinpath("assets", "datasets", "sources.toml").read_text(encoding="utf-8")
    loaded = {}
    for name, entry in tomllib.loads(text).items():
        needs = tuple(entry["needs"])
        sources = (
            PublishedFile(**{**values, "gives": tuple(values.get("gives", needs))}) for values in entry["sources"]
        )
        loaded[name] = Recipe(entry["home"], needs, tuple(sources), entry.get("by_hand", "").strip())
    return loaded


def published_address(source: PublishedFile) -> str:
    """Return the download address; for Google Drive, the one that skips the page shown before large files."""
    file = source.url.removeprefix(_DRIVE)
    if file == source.url:
        return source.url
    return f"https://drive.usercontent.google.com/download?id={file}&export=download&confirm=t"


def prepare(
    name: str,
    root: Path,
    *,
    recipe: Recipe | None = None,
    locate: Callable[[PublishedFile], str] = published_address,
    progress: PrepareProgress | None = None,
    keep: bool = False,
    timeout: float = 30.0,
) -> list[str]:
    """Download what `root` lacks of a data set of the catalogue, in CoOp's layout, and return what was added.

    Existing files are never replaced. Archives are downloaded to `root/downloads/NAME`, resumed after an interruption,
    checked against the published checksum if there is one, and removed when unpacked unless `keep`. An archive that the
    user has put there is used instead. Folders get their names only when they are complete. A lock keeps other
    processes out. `recipe` is by default that of `recipes`; `locate` returns the address of a file, for a mirror.

    Raises:
        DataError: the name is unknown, the root is not writable, or another process prepares this data set.
        DownloadError: something is still missing; the message says why, what to download by hand and where to put it.
    """
    recipe = recipe or recipes().get(name)
    if recipe is None:
        raise DataError(one_of("published data set", name, recipes()))
    progress = progress or PrepareProgress()
    before = recipe.missing(root)
    if not before:
        return []
    with _locked_downloads(root, name) as folder:
        _copy_class_names(recipe, root, progress)
        failures: list[str] = []
        if name == "imagenet":
            try:
                sort_archives(root / "imagenet" / "images", progress.say)
            except DataError as error:
                failures.append(str(error))
        # A file may have several sources: when one fails, the next is tried.
        for source in recipe.sources:
            needs = [need for need in recipe.missing(root) if need in source.gives]
            try:
                if needs:
                    _use_source(source, needs, root, folder, locate, progress, timeout)
            except DataError as error:
                failures.append(str(error))
        if missing := recipe.missing(root):
            raise DownloadError(_instructions(name, recipe, missing, root, failures))
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return before


@contextmanager
def _locked_downloads(root: Path, name: str) -> Iterator[Path]:
    """The folder for the archives of a data set, while no other process prepares it."""
    folder = root / DOWNLOADS / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made ({error.strerror}); choose another data root") from error
    lock = FileLock(folder.with_name(f"{name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DataError(f"{name} is being prepared in {root} by another process; wait for it to finish") from error
    try:
        yield folder
    finally:
        lock.release()


def _copy_class_names(recipe: Recipe, root: Path, progress: PrepareProgress) -> None:
    """Copy classnames.txt, which ImageNet and its variants share, from another of them."""
    copies = [root / spec.folder / _NAMES for spec in CATALOGUE.values() if spec.labels == _NAMES]
    other = next((path for path in copies if path.is_file()), None)
    for need in recipe.missing(root):
        if other and need.endswith(f"/{_NAMES}"):
            _place_file(other, root / need)
            progress.say(f"{root / need}: copied from {other}")


def _use_source(
    source: PublishedFile,
    needs: list[str],
    root: Path,
    folder: Path,
    locate: Callable[[PublishedFile], str],
    progress: PrepareProgress,
    timeout: float,
) -> None:
    """Put what is needed of one source into place, downloading it unless it is there."""
    file = folder / source.file
    from_user = file.exists()
    if from_user:
        progress.say(f"{file}: found, not downloaded")
        check_file(file, checksum=source.checksum, size=source.size)
    else:
        address = locate(source)
        progress.say(f"{source.file}: downloading from {address}")
        download(
            address,
            file,
            checksum=source.checksum,
            size=source.size,
            on_bytes=lambda done, total: progress.advance(source.file, done, total),
            timeout=timeout,
        )
    try:
        if is_archive(file):
            with _unpacked(file, root / needs[0], progress, source.inside) as unpacked:
                paths = {need: _find(unpacked, source.takes.get(need, Path(need).name), file) for need in needs}
                for need, path in paths.items():
                    (root / need).parent.mkdir(parents=True, exist_ok=True)
                    os.rename(path, root / need)
        else:
            # Label files have no published checksum: read them, so that a web page does not pass for one.
            if file.suffix == ".json":
                read_split(file)
            elif file.name == _NAMES:
                read_class_names(file)
            _place_file(file, root / needs[0])
    except DataError:
        if not from_user:
            file.unlink()  # or it would be used again
        raise
    for need in needs:
        progress.say(f"{root / need}: done")


def _place_file(file: Path, target: Path) -> None:
    with files.replacing(target) as temporary:
        shutil.copyfile(file, temporary)


@contextmanager
def _unpacked(archive: Path, target: Path, progress: PrepareProgress, inside: str | None) -> Iterator[Path]:
    """The content of an archive (or of the archive `inside` it), in a temporary folder on the disk of `target`.

    So moving a folder to `target` is one step, and an interrupted one is never taken for complete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(".unpacking-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=".unpacking-"))

    def unpack_to(archive: Path, name: str) -> Path:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress.advance(f"unpacking {archive.name}", done, None)

        unpack(archive, folder / name, on_bytes=advance)
        return folder / name

    try:
        unpacked = unpack_to(archive, "outer")
        yield unpacked if inside is None else unpack_to(_find(unpacked, inside, archive), "inner")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _find(folder: Path, name: str, archive: Path) -> Path:
    """The topmost file of that name, or folder if the name has no suffix."""
    level = [folder]
    while level:
        children = sorted(child for parent in level for child in parent.iterdir() if child.name != "__MACOSX")
        for child in children:
            if child.name == name and child.is_dir() != bool(child.suffix):
                return child
        level = [child for child in children if child.is_dir()]
    shown = ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing"
    raise DownloadError(f"{archive}: holds no {name} (but {shown}); it is not what was published")


def _instructions(name: str, recipe: Recipe, missing: list[str], root: Path, failures: list[str]) -> str:
    """What is missing, why, and how to get it by hand."""
    lines = [f"{name} is not complete: {', '.join(str(root / need) for need in missing)} still missing"]
    lines += [f"  failed: {failure}" for failure in failures]
    if recipe.by_hand:
        lines += recipe.by_hand.format(root=root).splitlines()
    by_file: dict[str, list[PublishedFile]] = {}
    for source in recipe.sources:
        if set(source.gives) & set(missing):
            by_file.setdefault(source.file, []).append(source)
    if by_file:
        lines.append(
            f"By hand (the page of the data set is {recipe.home}): download these files, put them here, and run this "
            "command again"
        )
    for file, sources in by_file.items():
        needs = ", ".join(need for need in sources[0].gives if need in missing)
        check = f" ({sources[0].checksum})" if sources[0].checksum else ""
        pages = " or ".join(source.page for source in sources)
        lines.append(f"  for {needs}: {pages}{check}\n    as {root / DOWNLOADS / name / file}")
    return "\n".join(lines)
