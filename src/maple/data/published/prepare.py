"""Fetching a published data set and building the folder layout that people have."""

import os
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from maple import files
from maple.data.catalogue import CATALOGUE
from maple.data.published.download import check_file, download
from maple.data.published.ilsvrc import sort_archives
from maple.data.published.imagenet import read_class_names
from maple.data.published.split_files import read_split
from maple.data.published.unpack import is_archive, unpack
from maple.errors import DataError, DownloadError, one_of

DOWNLOADS = "downloads"
"""The folder under the data root that archives are fetched to, and that a user puts archives into by hand."""

_DRIVE = "gdrive:"
_NAMES = "classnames.txt"
Locate = Callable[["Source"], str]


@dataclass(frozen=True, slots=True)
class Source:
    """One file that is published somewhere, and which paths of the layout it gives; see sources.toml."""

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
    """How a data set is prepared: the paths it needs under the data root, and who has them."""

    home: str
    needs: tuple[str, ...]
    sources: tuple[Source, ...]
    by_hand: str = ""

    def missing(self, root: Path) -> list[str]:
        """The paths that are not there yet."""
        return [need for need in self.needs if not _is_there(root / need)]


def _is_there(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


class Watcher(Protocol):
    """What watches a preparation."""

    def say(self, text: str) -> None:
        """Something has happened."""

    def advance(self, what: str, done: int, total: int | None) -> None:
        """So many bytes of `what` are done."""


class Unwatched:
    """Shows nothing."""

    def say(self, text: str) -> None:
        """Show nothing."""

    def advance(self, what: str, done: int, total: int | None) -> None:
        """Show nothing."""


@cache
def recipes() -> dict[str, Recipe]:
    """The table of sources, by name of the catalogue."""
    text = resources.files("maple").joinpath("assets", "datasets", "sources.toml").read_text(encoding="utf-8")
    made = {}
    for name, entry in tomllib.loads(text).items():
        needs = tuple(entry["needs"])
        sources = tuple(_source(needs, values) for values in entry["sources"])
        made[name] = Recipe(entry["home"], needs, sources, entry.get("by_hand", "").strip())
    return made


def _source(needs: tuple[str, ...], values: dict[str, Any]) -> Source:
    return Source(**{**values, "gives": tuple(values.get("gives", needs))})


def published_address(source: Source) -> str:
    """Where a source is published; of Google Drive, the address that skips the page before large files."""
    file = source.url.removeprefix(_DRIVE)
    if file == source.url:
        return source.url
    return f"https://drive.usercontent.google.com/download?id={file}&export=download&confirm=t"


def prepare(
    name: str,
    root: Path,
    *,
    recipe: Recipe | None = None,
    locate: Locate = published_address,
    watcher: Watcher | None = None,
    keep: bool = False,
    timeout: float = 30.0,
) -> list[str]:
    """Fetch what `root` lacks of a data set of the catalogue, and put it into CoOp's layout; return what was added.

    What is there already stays as it is. Archives are fetched to `root/downloads/NAME`, resumed where they were
    interrupted, checked against the published checksum where there is one, and removed when unpacked unless `keep`.
    An archive that a user has put there is used instead of fetching it. Folders get their names only when they are
    complete. Two processes do not get in each other's way.

    Args:
        recipe: what to fetch, by default that of `recipes`.
        locate: gives the address of a source: another mirror, say.

    Raises:
        DataError: the name is unknown, the root cannot be written, or another process prepares this data set.
        DownloadError: something is still missing; the message says why, what to fetch by hand and where to put it.
    """
    if name not in CATALOGUE:
        raise DataError(one_of("published data set", name, CATALOGUE))
    recipe, watcher = recipe or recipes()[name], watcher or Unwatched()
    before = recipe.missing(root)
    if not before:
        return []
    with _alone(root, name) as folder:
        failures: list[str] = []
        _copy_names(recipe, root, watcher)
        if name == "imagenet":
            failures += _attempt(sort_archives, root / "imagenet" / "images", watcher.say)
        for source in recipe.sources:
            wanted = [need for need in recipe.missing(root) if need in source.gives]
            if wanted:
                fetch = partial(_fetched, source, locate=locate, watcher=watcher, timeout=timeout)
                failures += _attempt(_use, source, wanted, root, folder, fetch, watcher)
        if missing := recipe.missing(root):
            raise DownloadError(_by_hand(name, recipe, missing, root, failures))
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return before


def _attempt(act: Callable[..., object], *arguments: object) -> list[str]:
    """What went wrong, if anything: another source may do better."""
    try:
        act(*arguments)
    except DataError as error:
        return [str(error)]
    return []


@contextmanager
def _alone(root: Path, name: str) -> Iterator[Path]:
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


def _copy_names(recipe: Recipe, root: Path, watcher: Watcher) -> None:
    """ImageNet and its variants share one classnames.txt: take it from the neighbour that has it."""
    for need in recipe.missing(root):
        if need.endswith(f"/{_NAMES}"):
            for spec in CATALOGUE.values():
                other = root / spec.folder / _NAMES
                if spec.labels == _NAMES and other.is_file():
                    _place_file(other, root / need)
                    watcher.say(f"{root / need}: copied from {other}")
                    break


def _use(
    source: Source, wanted: list[str], root: Path, folder: Path, fetch: Callable[[Path], None], watcher: Watcher
) -> None:
    """Put what is wanted of one source into place, fetching it unless it lies there."""
    file = folder / source.file
    by_hand = file.exists()
    if by_hand:
        watcher.say(f"{file}: found, not fetched")
        check_file(file, checksum=source.checksum, size=source.size)
    else:
        fetch(file)
    try:
        if is_archive(file):
            _place_content(source, file, wanted, root, watcher)
        else:
            _check_labels(file)
            _place_file(file, root / wanted[0])
    except DataError:
        if not by_hand:
            file.unlink()  # or it would be found again
        raise
    for need in wanted:
        watcher.say(f"{root / need}: done")


def _fetched(source: Source, file: Path, *, locate: Locate, watcher: Watcher, timeout: float) -> None:
    address = locate(source)
    watcher.say(f"{source.file}: fetching from {address}")
    download(
        address,
        file,
        checksum=source.checksum,
        size=source.size,
        on_bytes=lambda done, total: watcher.advance(source.file, done, total),
        timeout=timeout,
    )


def _place_content(source: Source, archive: Path, wanted: list[str], root: Path, watcher: Watcher) -> None:
    with _unpacked(archive, root / wanted[0], watcher, source.inside) as unpacked:
        found = {need: _find(unpacked, source.takes.get(need, Path(need).name), archive) for need in wanted}
        for need, path in found.items():
            (root / need).parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, root / need)


def _check_labels(file: Path) -> None:
    """Raise DataError unless a split file or a file of class names can be read: their checksums are not published."""
    if file.suffix == ".json":
        read_split(file)
    elif file.name == _NAMES:
        read_class_names(file)


def _place_file(file: Path, target: Path) -> None:
    with files.replacing(target) as temporary:
        shutil.copyfile(file, temporary)


@contextmanager
def _unpacked(archive: Path, beside: Path, watcher: Watcher, inside: str | None) -> Iterator[Path]:
    """The content of an archive, in a folder beside where it will go, so that moving it there is one step."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    for leftover in beside.parent.glob(".unpacking-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=beside.parent, prefix=".unpacking-"))
    try:
        _unpack_into(archive, folder / "outer", watcher)
        if inside is None:
            yield folder / "outer"
        else:
            _unpack_into(_find(folder / "outer", inside, archive), folder / "inner", watcher)
            yield folder / "inner"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpack_into(archive: Path, folder: Path, watcher: Watcher) -> None:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        watcher.advance(f"unpacking {archive.name}", done, None)

    unpack(archive, folder, on_bytes=advance)


def _find(folder: Path, name: str, archive: Path) -> Path:
    """The file or folder of that name that lies highest."""
    level = [folder]
    while level:
        children = sorted(child for parent in level for child in parent.iterdir() if child.name != "__MACOSX")
        for child in children:
            if child.name == name:
                return child
        level = [child for child in children if child.is_dir()]
    shown = ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing"
    raise DownloadError(f"{archive}: holds no {name} (but {shown}); it is not what was published")


def _by_hand(name: str, recipe: Recipe, missing: list[str], root: Path, failures: list[str]) -> str:
    lines = [f"{name} is not complete: {', '.join(str(root / need) for need in missing)} still missing"]
    lines += [f"  failed: {failure}" for failure in failures]
    if recipe.by_hand:
        lines += recipe.by_hand.format(root=root).splitlines()
    places: dict[str, list[Source]] = {}
    for source in recipe.sources:
        if set(source.gives) & set(missing):
            places.setdefault(source.file, []).append(source)
    if places:
        lines.append(f"By hand (the page of the data set is {recipe.home}): get, put, and run this command again")
    for file, sources in places.items():
        gives = ", ".join(need for need in sources[0].gives if need in missing)
        check = f" ({sources[0].checksum})" if sources[0].checksum else ""
        pages = " or ".join(source.page for source in sources)
        lines.append(f"  for {gives}: {pages}{check}\n    as {root / DOWNLOADS / name / file}")
    return "\n".join(lines)
