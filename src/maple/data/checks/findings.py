"""Findings about a data set, and those about its class names, which CLIP reads and which should therefore be words."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from maple.errors import shortened_list
from maple.names import has_lone_surrogate

MAPPED = 'give words with --class-names names.json, as in {"FOLDER": "words"}'
"""How to replace class names that are not words."""

_PLACEHOLDER = re.compile(
    r"(class|cls|label|category|categ|group|type|folder|new[ _-]?folder|untitled|unnamed|id|c|l)[ _-]*\d*",
    re.IGNORECASE,
)
_SYNSET = re.compile(r"n\d{6,9}", re.IGNORECASE)
_CODE = re.compile(r"(?=.*\d)[0-9a-f]{8,}(-[0-9a-f]+)*", re.IGNORECASE)
_JOINED = re.compile(r"[a-z][A-Z]")
_MARKS = frozenset(',;()[]{}<>|\\"#@%&=+*?!~^$`\n\t')
_LONG = 60


def _is_foreign(letter: str) -> bool:
    return letter.isalpha() and not unicodedata.name(letter, "LATIN").startswith("LATIN")


@dataclass(frozen=True)
class Finding:
    """One remark about a data set: its fixed `kind`, such as `unreadable`, and one line for people, with examples.

    The level is `warning` if the result may suffer; `items` are all affected paths, groups of paths, or class names.

    Example:
        >>> Finding("other files", "note", "1 file is not an image: cat/notes.txt", ("cat/notes.txt",)).level
        'note'
    """

    kind: str
    level: Literal["note", "warning"]
    text: str
    items: tuple[Any, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the attributes as plain values."""
        return asdict(self)


def number_of(count: int, word: str, plural: str = "") -> str:
    """Format a count: "1 image", "1,200 images"."""
    return f"{count:,} {word if count == 1 else plural or word + 's'}"


_NO_WORD = f"not a word for what the images show: {MAPPED}"
_CHECKS: tuple[tuple[str, Callable[[str], object], str], ...] = (
    ("undecodable names", has_lone_surrogate, "not Unicode text, its bytes are in another encoding: rename the folder"),
    ("placeholder names", lambda name: _PLACEHOLDER.fullmatch(name.strip()), _NO_WORD),
    ("names without letters", lambda name: not any(letter.isalpha() for letter in name), _NO_WORD),
    (
        "synset names",
        lambda name: _SYNSET.fullmatch(name.strip()),
        f"a WordNet number, which CLIP does not know: {MAPPED}",
    ),
    ("code names", lambda name: _CODE.fullmatch(name.strip()), f"a code, not a word: {MAPPED}"),
    (
        "names in other scripts",
        lambda name: sum(map(_is_foreign, name)) > len(name) / 2,
        "in a script that OpenAI's CLIP hardly knows, unless your CLIP is multilingual: give English words with "
        "--class-names",
    ),
    ("joined names", _JOINED.search, f"several words written as one, which CLIP reads as one: {MAPPED}"),
    ("long names", lambda name: len(name) > _LONG, f"too long for CLIP to understand well, or at all: {MAPPED}"),
    (
        "marked names",
        lambda name: _MARKS & set(name) or name.casefold().endswith((".jpg", ".png", ".zip")),
        "with marks in it (commas, brackets, file name extensions): check it",
    ),
)
"""The kind of each oddity of a class name, its test, and what is wrong."""


def suspicious_names(names: Sequence[str]) -> list[Finding]:
    """Return one finding for each kind of oddity among C class names; none if all are words."""
    findings = []
    reported: set[str] = set()
    for kind, is_odd, problem in _CHECKS:
        if odd := tuple(name for name in names if name not in reported and is_odd(name)):
            reported.update(odd)
            each = "" if len(odd) == 1 else "each "
            text = f"{number_of(len(odd), 'class name')}, {shortened_list(odd)}: {each}{problem}"
            level: Literal["note", "warning"] = "note" if kind in ("joined names", "marked names") else "warning"
            findings.append(Finding(kind, level, text, odd))

    by_letters: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folded = unicodedata.normalize("NFKC", name).casefold()
        by_letters["".join(letter for letter in folded if letter.isalnum()) or folded].append(name)
    if groups := tuple(tuple(group) for group in by_letters.values() if len(group) > 1):
        examples = shortened_list(" = ".join(map(repr, group)) for group in groups)
        text = (
            f"{number_of(len(groups), 'group')} of class names differ only in case, spaces or marks ({examples}): CLIP "
            "can hardly distinguish them; if they mean the same, put their images into one folder"
        )
        findings.append(Finding("doubled names", "warning", text, groups))

    # CLIP reads lower case, and underscores as spaces, so mixed spelling is only a note.
    plain = [name for name in names if name not in reported]
    spellings = {
        "capitals": [name for name in plain if name != name.lower()],
        "lower case": [name for name in plain if name == name.lower()],
        "underscores": [name for name in plain if "_" in name],
        "spaces": [name for name in plain if " " in name.strip()],
    }
    mixed = [
        f"{first} ({shortened_list(spellings[first], 1)}) and {second} ({shortened_list(spellings[second], 1)})"
        for first, second in (("capitals", "lower case"), ("underscores", "spaces"))
        if spellings[first] and spellings[second]
    ]
    if mixed:
        text = f"class names mix {'; '.join(mixed)}; CLIP reads lower case, and underscores as spaces: no harm is done"
        findings.append(Finding("mixed spelling", "note", text))
    return findings
