"""Findings about what was not read in a folder of images, such as links that lead nowhere, or not as classes."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from maple.data.checks.findings import Finding, number_of
from maple.data.images.formats import media_format, unread_advice, unread_format
from maple.errors import shortened_list

_LINK, _UNREACHABLE = "link", "file"
_FINDINGS = {_LINK: "broken links", _UNREACHABLE: "unreachable files"}
"""The kinds of findings; "unread images" for formats."""


def unread_kind(path: Path) -> str:
    """Return what a file is that may be meant to be an image, but cannot be read: "link", "HEIC"; "" for others."""
    if os.path.exists(path):
        return unread_format(path) or media_format(path)
    return _LINK if os.path.islink(path) else _UNREACHABLE


def unread_images(root: Path, paths: Iterable[Path]) -> list[Finding]:
    """Return a finding for each `unread_kind` among the files below `root` that were not read as images."""
    by_kind: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        if kind := unread_kind(path):
            by_kind[kind].append(path)
    findings = []
    for kind, files in by_kind.items():
        counts = Counter(str(file.parent.relative_to(root.parent if file.parent == root else root)) for file in files)
        places = shortened_list(f"{count:,} in {folder}" for folder, count in counts.most_common())
        example = str(files[0].relative_to(root))
        if kind == _LINK:
            problem = "leads nowhere" if len(files) == 1 else "lead nowhere"
            example += f" -> {os.readlink(files[0])}"
            advice = "is the drive or share mounted, was the content fetched (`git annex get`, `dvc pull`)?"
        elif kind == _UNREACHABLE:
            problem, advice = "cannot be reached", "check the permissions of these folders"
        else:
            problem, advice = "cannot be read here", unread_advice(kind)
        count = number_of(len(files), kind if kind in _FINDINGS else f"{kind} file")
        text = f"{count} {problem} ({places}; {example}): {advice}"
        items = tuple(str(file.relative_to(root)) for file in files)
        findings.append(Finding(_FINDINGS.get(kind, "unread images"), "warning", text, items))
    return findings


def nested_classes(inside: Mapping[str, Sequence[str]]) -> list[Finding]:
    """Return a finding about class folders that hold images in folders only, which may be meant to be the classes.

    It is a note where the folders inside are rather dates, cameras or sources: they have digits in their names, several
    classes have the same, or most class folders hold images themselves.

    Args:
        inside: for each class, the folder inside its own that each image is in; "" for none.
    """
    nested = {name: sorted(set(folders)) for name, folders in inside.items() if "" not in folders}
    nested = {name: folders for name, folders in nested.items() if len(folders) > 1}
    if not nested:
        return []
    counts = Counter(folder for folders in inside.values() for folder in set(folders) - {""})
    are_words = not any(character.isdecimal() for folder in counts for character in folder)
    are_classes = are_words and max(counts.values()) == 1 and 2 * len(nested) >= len(inside)
    examples = shortened_list(
        (f"{name}: {shortened_list(folders)}" for name, folders in nested.items()), separator="; "
    )
    text = f"{number_of(len(nested), 'class folder')} {'holds' if len(nested) == 1 else 'hold'} only folders "
    text += f"({examples}): their images are of the class {shortened_list(map(repr, nested))}"
    if are_classes:
        text += (
            "; if the folders inside are the classes, give a table of path and label (.csv), or put them next to each "
        )
        text += "other in one folder"
    return [Finding("nested folders", "warning" if are_classes else "note", text, tuple(nested))]
