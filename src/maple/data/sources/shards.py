"""WebDataset shards: tar archives whose members KEY.jpg, KEY.cls, KEY.json are one sample."""

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from maple.data.folders.class_folders import split_of
from maple.data.folders.class_lists import read_class_list
from maple.data.folders.listing import expand_pattern, list_folder
from maple.data.images.formats import has_image_name
from maple.data.published.unpack import DAMAGED
from maple.data.sources.rows import (
    MAX_IMAGE_BYTES,
    Columns,
    Label,
    Row,
    Source,
    file_state,
    read_label,
)
from maple.data.sources.tables import splits_of_names
from maple.errors import DataError, pointer_in, shortened_list

_TAR = (".tar", ".tar.gz", ".tgz")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 100_000
_LABEL_KEYS = ("label", "cls", "class", "class_name", "category", "target")
_LONGEST_LABEL = 1 << 20
_PEEK = 400
"""The number of members by which a tar archive is recognised."""
_PEEK_FURTHER = 10_000
"""That number where all of these are images of one folder, with captions or metadata next to them."""


def is_shard_name(name: str) -> bool:
    """Whether a file name is that of a tar archive that may be a shard."""
    return name.lower().endswith(_TAR)


def is_pattern(text: str) -> bool:
    """Whether a source names shards by a range, `shards/{0000..0012}.tar`, or by `*` and `?`."""
    is_range = _RANGE.search(text) is not None
    return is_shard_name(text) and (is_range or (glob.has_magic(text) and not os.path.exists(os.path.expanduser(text))))


def shards_of_pattern(text: str) -> list[Path]:
    """Return the shards that a pattern names, whether they are there or not; those of `*` are."""
    texts = [os.path.expanduser(text)]
    while any(map(_RANGE.search, texts)):
        expanded = []
        for each in texts:
            if not (match := _RANGE.search(each)):
                expanded.append(each)
                continue
            first, last = int(match[1]), int(match[2])
            if last < first or (last - first + 1) * len(texts) > _MOST_SHARDS:
                raise DataError(
                    f"{text}: the range {match[0]} names no shards, or too many; write it as {{0000..0012}}"
                )
            width = len(match[1])
            expanded += [f"{each[: match.start()]}{i:0{width}}{each[match.end() :]}" for i in range(first, last + 1)]
        texts = expanded
    return [Path(path) for each in texts for path in expand_pattern(each)]


def holds_samples(path: Path, label_column: str | None = None) -> tuple[bool, str]:
    """Whether a tar archive holds samples, as shards do, and not class folders; and a note where it might be the other.

    Samples are images next to labels, or in no folders. Images in several folders with captions or metadata next to
    them (.txt, .json) are class folders, unless each .json has a label, or `label_column` is one of these extensions.
    """
    images, folders, labelled = set[str](), set[str](), set[str]()
    kinds: dict[str, set[str]] = {}
    last = ""
    with suppress(*DAMAGED, OSError), tarfile.open(path) as archive:
        for number, member in enumerate(each for each in archive if each.isreg()):
            is_one_captioned = len(folders) == 1 and kinds and not any("cls" in each for each in kinds.values())
            if number >= (_PEEK_FURTHER if is_one_captioned else _PEEK):
                break
            last, extension = _split_name(member.name)
            if has_image_name(member.name):
                images.add(last)
                folder = os.path.basename(os.path.dirname(last))
                folders |= {folder} if folder not in ("", ".") and not split_of(folder) else set()
            elif _is_label(extension):
                kinds.setdefault(last, set()).update((extension, *extension.split(".")))
                opened = archive.extractfile(member) if "json" in extension.split(".") else None
                with suppress(DataError):  # of another format, which is reported where it is read
                    label = _json_label(opened.read(_LONGEST_LABEL), label_column, member.name) if opened else None
                    labelled |= {last} if isinstance(label, str | int) and label != "" else set()
        else:
            last = ""
    if not images & kinds.keys():
        return bool(images) and not any("/" in key.removeprefix("./") for key in images | kinds.keys()), ""
    if len(folders) < 2 or any({"cls", label_column} & kinds[key] for key in images & kinds.keys()):
        return True, ""
    if images - {last} <= labelled:
        return True, f"its classes are the labels in its .json files, not its {len(folders)} folders"
    return False, (
        f"its classes are its folders ({shortened_list(sorted(folders))}); the .txt and .json files next to its images "
        "are not read: for samples of WebDataset, add KEY.cls, or a label to every KEY.json"
    )


class ShardSource(Source):
    """Shards of WebDataset, in the order of their names.

    A sample has one image (KEY.jpg, KEY.png ...) and a label: KEY.cls with a number or a name, a value "label" (or
    `data.label_column`) of KEY.json, or KEY.txt with a name. A `classnames.txt` next to the shards names numbers.

    Example:
        >>> [row.name for row in ShardSource("pets.tar", [Path("pets.tar")]).rows(Columns(), labelled=True)]
        ['pets.tar#0001', 'pets.tar#0002']
    """

    def __init__(self, text: str, shards: list[Path], note: str = "") -> None:
        self.text, self.shards, self.note = text, shards, note
        if not shards:
            raise DataError(f"{text}: there are no such shards; give a pattern such as shards/{{0000..0012}}.tar")
        if absent := [str(shard) for shard in shards if not shard.is_file()]:
            raise DataError(
                f"{text}: lacks {len(absent)} of {len(shards)} shards ({shortened_list(absent)}); fetch them"
            )

    @property
    def name(self) -> str:
        is_pattern_text = is_pattern(self.text)
        return (self.shards[0].parent.name if is_pattern_text else Path(self.text).name.partition(".")[0]) or "shards"

    def identity(self) -> Mapping[str, Any]:
        files = [[str(shard.resolve()), *file_state(shard)] for shard in self.shards]
        listed = self._class_list()
        return {"shards": files, **({"class_names": listed} if listed else {})}

    def rows(self, columns: Columns, *, labelled: bool) -> Iterator[Row]:
        self.class_names = self._class_list() if labelled else None
        self.has_labels = False
        for split, shards in splits_of_names(self.shards, self._root, self.text).items():
            for shard in shards:
                for key, sample in _samples(shard):
                    where = f"{shard}#{key}"
                    images = [each for each in sample if has_image_name(f"x.{each}")]
                    if len(images) > 1 and columns.image is None:
                        if all(re.match(r"\d+\.", each) for each in images):
                            stem, extension = os.path.splitext(f"{os.path.basename(key)}.{images[0]}")
                            raise DataError(
                                f"{shard}: keys contain dots ({stem}{extension}): WebDataset ends a key at the first "
                                f"one; write {stem.replace('.', '_')}{extension}"
                            )
                        raise DataError(
                            f"{where} has several images ({shortened_list(sorted(images))}); "
                            + columns.advice.format(column="image_column")
                        )
                    image = columns.image if columns.image is not None else next(iter(images), None)
                    label = self._label(sample, columns, where) if labelled else None
                    yield Row(where, split, label, sample.get(image or ""))

    @property
    def _root(self) -> Path:
        return Path(os.path.commonpath([shard.parent for shard in self.shards]))

    def _class_list(self) -> list[str] | None:
        """The names of numbered labels: next to the first shard, or in the folder that all shards are below."""
        return read_class_list(self.shards[0].parent) or read_class_list(self._root)

    def _label(self, sample: Mapping[str, bytes], columns: Columns, where: str) -> Label:
        """The label of a sample, from the first of its members that has one."""
        extensions = [each for each in sample if _is_label(each)]
        for kind in ("cls", "json", "txt"):
            for extension in (each for each in extensions if kind in each.split(".")):
                if kind == "json":
                    value = _json_label(sample[extension], columns.label, where)
                elif columns.label in (None, extension):
                    value = sample[extension].decode("utf-8-sig", "replace").strip()
                else:
                    continue
                if value is not None and value != "":
                    self.has_labels = True
                    is_number = isinstance(value, str) and kind == "cls" and re.fullmatch(r"-?\d{1,18}", value)
                    return read_label(int(value) if is_number else value, self.class_names, where)
        return None


def _json_label(content: bytes, key: str | None, where: str) -> Any:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: its .json is not JSON ({error}); write an object with a label") from error
    if not isinstance(values, dict):
        return None if isinstance(values, list) else values
    by_key = {name.casefold(): value for name, value in values.items()}
    return by_key.get(key.casefold()) if key else next((by_key[name] for name in _LABEL_KEYS if name in by_key), None)


def _is_label(extension: str) -> bool:
    return extension.split(".")[-1] in ("cls", "json", "txt") or extension.split(".")[0] == "cls"


def _split_name(name: str) -> tuple[str, str]:
    """The key and the extension of a member: up to the first dot of its file name, and after it, in lower case."""
    folder, file = os.path.split(name)
    key, _, extension = file.partition(".")
    return os.path.join(folder, key), extension.lower()


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Iterate over the samples of a shard: consecutive members of one key, by extension; others are skipped."""
    current, sample = None, dict[str, bytes]()
    try:
        if not shard.stat().st_size:
            raise DataError(f"{shard}: is empty (0 bytes); fetch it again")
        with tarfile.open(shard, "r|*") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # which tarfile would keep
                key, extension = _split_name(member.name)
                hidden = os.path.basename(member.name).startswith(".") or "__MACOSX" in member.name.split("/")
                if not member.isreg() or hidden:
                    continue
                if key != current:
                    if sample:
                        yield str(current), sample
                    current, sample = key, {}
                is_image = has_image_name(f"x.{extension}")
                if not is_image and not _is_label(extension):
                    continue
                if extension in sample:
                    raise DataError(f"{shard}: holds {member.name!r} twice; give every sample its own key")
                if member.size > (MAX_IMAGE_BYTES if is_image else _LONGEST_LABEL):
                    raise DataError(
                        f"{shard}: {member.name!r} has {member.size:,} bytes, too many for an image or a label"
                    )
                opened = archive.extractfile(member)
                sample[extension] = opened.read() if opened else b""
                if len(sample[extension]) < member.size:
                    raise EOFError(f"{member.name} ends early")
        if sample:
            yield str(current), sample
    except (*DAMAGED, OSError) as error:
        if problem := pointer_in(shard):
            raise DataError(f"{shard}: is {problem}") from error
        raise DataError(f"{shard}: is damaged, or not a tar archive ({error}); fetch it again") from error


def shards_in(folder: Path) -> list[Path]:
    """Return the tar archives of a folder and of its folders, sorted by name."""
    places = [folder, *(child for child in list_folder(folder) if child.is_dir())]
    return [file for place in places for file in list_folder(place) if file.is_file() and is_shard_name(file.name)]
