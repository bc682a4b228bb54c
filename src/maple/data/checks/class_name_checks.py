"""Class names that CLIP will not make much of: it reads them, so they should be words."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

from maple.data.checks.findings import Finding, number_of, some
from maple.names import has_lone_surrogate

_PLACEHOLDER = re.compile(
    r"(class|cls|label|category|categ|group|type|folder|new[ _-]?folder|untitled|unnamed|id|c|l)[ _-]*\d*",
    re.IGNORECASE,
)
_SYNSET = re.compile(r"n\d{6,9}", re.IGNORECASE)
_CODE = re.compile(r"(?=.*\d)[0-9a-f]{8,}(-[0-9a-f]+)*", re.IGNORECASE)
_JOINED = re.compile(r"[a-z][A-Z]")
_LONG = 60
MAPPED = 'give words with --class-names names.json, as in {"FOLDER": "words"}'
"""What to do about names that are no words."""


def suspicious_names(names: Sequence[str]) -> list[Finding]:
    """What is odd about C class names, one finding for each kind of oddity; none where all are words."""
    checks = (
        (
            "undecodable names",
            has_lone_surrogate,
            "no Unicode text, its bytes are of another encoding: rename the folder",
        ),
        ("placeholder names", _placeholders, f"no word for what the pictures show: {MAPPED}"),
        ("names without letters", _letterless, f"no word for what the pictures show: {MAPPED}"),
        ("synset names", _synsets, f"a WordNet number, which CLIP does not know: {MAPPED}"),
        ("code names", _codes, f"a code, not a word: {MAPPED}"),
        ("joined names", _joined, f"several words run together, which CLIP reads as one: {MAPPED}"),
        ("long names", _long, f"too long for CLIP to make much of, or to read at all: {MAPPED}"),
        ("marked names", _marked, "with marks in it (commas, brackets, ends of file names): check it"),
    )
    found = []
    told: set[str] = set()
    for kind, is_odd, why in checks:
        if odd := tuple(name for name in names if name not in told and is_odd(name)):
            told.update(odd)
            each = "" if len(odd) == 1 else "each "
            text = f"{number_of(len(odd), 'class name')}, {some(odd)}: {each}{why}"
            found.append(Finding(kind, "note" if kind in ("joined names", "marked names") else "warning", text, odd))
    return [*found, *_doubles(names), *_styles(names, told)]


def _placeholders(name: str) -> bool:
    return _PLACEHOLDER.fullmatch(name.strip()) is not None


def _letterless(name: str) -> bool:
    return not any(letter.isalpha() for letter in name)


def _synsets(name: str) -> bool:
    return _SYNSET.fullmatch(name.strip()) is not None


def _codes(name: str) -> bool:
    return _CODE.fullmatch(name.strip()) is not None


def _joined(name: str) -> bool:
    return _JOINED.search(name) is not None


def _long(name: str) -> bool:
    return len(name) > _LONG


def _marked(name: str) -> bool:
    return any(mark in name for mark in ',;()[]{}<>|\\"#@%&=+*?!~^$`\n\t') or name.casefold().endswith(
        (".jpg", ".png", ".zip")
    )


def _doubles(names: Sequence[str]) -> list[Finding]:
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[_bare(name)].append(name)
    groups = tuple(tuple(group) for group in alike.values() if len(group) > 1)
    if not groups:
        return []
    told = some(" = ".join(map(repr, group)) for group in groups)
    text = (
        f"{number_of(len(groups), 'group')} of class names differ only in case, spaces or marks ({told}): CLIP can "
        "hardly tell them apart; if they mean the same, put their images into one folder"
    )
    return [Finding("doubled names", "warning", text, groups)]


def _styles(names: Sequence[str], told: set[str]) -> list[Finding]:
    """Names of several spellings; CLIP reads all in lower case and underscores as spaces, so it is but a note."""
    plain = [name for name in names if name not in told]
    kinds = {
        "capitals": [name for name in plain if name != name.lower()],
        "lower case": [name for name in plain if name == name.lower()],
        "underscores": [name for name in plain if "_" in name],
        "spaces": [name for name in plain if " " in name.strip()],
    }
    mixed = [
        f"{first} ({some(kinds[first], 1)}) and {second} ({some(kinds[second], 1)})"
        for first, second in (("capitals", "lower case"), ("underscores", "spaces"))
        if kinds[first] and kinds[second]
    ]
    if not mixed:
        return []
    text = f"class names mix {'; '.join(mixed)}; CLIP reads lower case, and underscores as spaces, so nothing is lost"
    return [Finding("mixed spelling", "note", text)]


def _bare(name: str) -> str:
    folded = unicodedata.normalize("NFKC", name).casefold()
    return "".join(letter for letter in folded if letter.isalnum()) or folded
