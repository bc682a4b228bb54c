"""Lists of class names: parsing, checks, the words that a text tower reads; names of feature files and of the hub."""

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import PureWindowsPath

from maple.errors import CheckpointError, ClassNamesError, shortened

HUB_PREFIXES = ("hf-hub:", "hub:")
MOST_CLASSES = 100_000
"""The most classes of one classifier."""


def clean_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """Check a list of class names, and replace underscores by spaces; accents are composed (Unicode's form NFC).

    Raises:
        ClassNamesError: not a list, an empty list, or a name that is not a string with a word in it.
    """
    if isinstance(names, str):
        raise ClassNamesError(f"class names must be a list of strings, not the one string {names!r}; write [{names!r}]")
    if isinstance(names, Set | Mapping) or not hasattr(names, "__len__"):
        raise ClassNamesError(f"class names are {type(names).__name__}; give a list of strings")
    if not len(names):
        raise ClassNamesError("the list of class names is empty; at least one is needed")
    if len(names) > MOST_CLASSES:
        raise ClassNamesError(f"there are {len(names):,} class names; give at most {MOST_CLASSES:,}")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not words_of(name):
            raise ClassNamesError(
                f"class name {index} is {shortened(repr(name))}; every name must be a string with a word in it"
            )
    return tuple(nfc(name).replace("_", " ") for name in names)


def nfc(text: str) -> str:
    """The text with accents as parts of their letters (Unicode's form NFC): file systems use different forms."""
    return unicodedata.normalize("NFC", text)


def names_in(text: str) -> list[str]:
    """Parse class names that are separated by commas or new lines; a name that holds a comma is in double quotes.

    As in CSV: "dog, small", hound. A comma at the end of a line and empty lines are ignored.

    Raises:
        ClassNamesError: a quoted name does not end, or is followed by other text.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
    names: list[str] = []
    line: list[str] = []
    position = 0
    while position <= len(text):
        part = _NAME.match(text, position)
        if part is None:
            raise ClassNamesError(
                f"the class names {shortened(text[position:].strip(), 40)!r} cannot be separated; write a name that "
                'holds a comma or begins with a double quote in double quotes, as in "dog, small", hound'
            )
        quoted, plain, end = part.groups()
        line.append(plain.strip() if quoted is None else " ".join(quoted.replace('""', '"').split("\n")).strip())
        if end != ",":
            names += line[:-1] if quoted is None and not line[-1] else line
            line = []
        position = part.end() + (not end)
    return names


# A name in double quotes, or one without commas that does not begin with them; then a comma, a new line or the end.
_NAME = re.compile(r'[^\S\n]*(?:"([^"]*(?:""[^"]*)*)"[^\S\n]*|((?:[^\s",][^,\n]*)?))(,|\n|\Z)')


def distinct(names: Sequence[str]) -> Sequence[str]:
    """Return the names; ClassNamesError if two are equal but for capital letters, spaces and underscores."""
    spellings: dict[str, list[str]] = defaultdict(list)
    for name in clean_class_names(names):
        spellings[words_of(name)].append(name.strip())
    repeated = [" and ".join(sorted(set(map(repr, same)))) for same in spellings.values() if len(same) > 1]
    if repeated:
        raise ClassNamesError(
            f"{', '.join(repeated)} is named more than once (capital letters aside); name every class once"
        )
    return names


def words_of(name: str) -> str:
    """A key that is equal for names with the same words: lower case, single spaces, no underscores, form NFC."""
    return " ".join(nfc(name).replace("_", " ").lower().split())


class NameRows:
    """The rows of class names in a list; equal names are distinguished by their order.

    A name that differs from one name of the list in capital letters, spaces and underscores alone has its row.

    Raises:
        ClassNamesError: the list or a name is empty.

    Example:
        >>> NameRows(["cat", "sports car"]).find(["Sports_Car", "dog"])
        [1, None]
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._row_of = {key: row for row, key in enumerate(_numbered(names))}
        words = [words_of(name) for name in names]
        counts = Counter(words)
        self._row_of_words = {word: row for row, word in enumerate(words) if counts[word] == 1}

    def find(self, names: Sequence[str]) -> list[int | None]:
        """The row of each name; None for one that is not in the list. Raises as the constructor."""
        return [
            self._row_of.get((name, number), self._row_of_words.get(words_of(name)) if number == 0 else None)
            for name, number in _numbered(names)
        ]


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    numbered = []
    for name in clean_class_names(names):
        numbered.append((name, seen[name]))
        seen[name] += 1
    return numbered


def refuse_long(sentences: Iterable[str]) -> None:
    """Raise ClassNamesError for a text that no CLIP can read, and that tokenizers would need hours for."""
    for sentence in sentences:
        if len(sentence) > _LONGEST:
            raise ClassNamesError(
                f"{shortened(sentence)!r} has {len(sentence):,} characters; give at most {_LONGEST:,}"
            )


def has_lone_surrogate(text: str) -> bool:
    """Whether the text contains a lone surrogate, which may stand for an undecodable byte: not valid Unicode."""
    return _LONE_SURROGATE.search(text) is not None


def replace_lone_surrogates(text: str) -> str:
    """The text with a replacement character for each lone surrogate, so that it can be written as UTF-8."""
    return _LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def escape_lone_surrogates(text: str) -> str:
    """The text with an escape sequence for each lone surrogate, so that different texts stay different."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def without_folders(name: str) -> str:
    """The name of a CLIP or of its weights, and of a path only its last part: paths are not for others.

    Example:
        >>> without_folders("ViT-B-16"), without_folders("/home/me/clips/birds"), without_folders("hf-hub:acme/clip")
        ('ViT-B-16', 'birds', 'hf-hub:acme/clip')
    """
    is_path = not name.startswith("hf-hub:") and ("/" in name or "\\" in name)
    return PureWindowsPath(name).name if is_path else name


def names_hash(names: Sequence[str]) -> str:
    """The SHA-256 (hex) of class names in order."""
    return hashlib.sha256(json.dumps(list(names)).encode("ascii")).hexdigest()


def is_features(name: str) -> bool:
    """Whether a data set is named by one or more files of features, separated by commas."""
    return all(part.strip().lower().endswith(_FEATURES_SUFFIX) for part in name.split(","))


def absolute_features(name: str) -> str:
    """The same files with absolute paths."""
    return ",".join(os.path.abspath(os.path.expanduser(path)) for path in feature_paths(name))


def feature_paths(name: str) -> list[str]:
    """The files that such a name lists."""
    return [name] if os.path.exists(os.path.expanduser(name)) else [part.strip() for part in name.split(",")]


FEATURES = "features:"
"""Begins the name of a backbone of precomputed features; their files follow."""
_FEATURES_SUFFIX = ".safetensors"
_LONGEST = 20_000
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def is_hub_id(name: str) -> bool:
    """Whether a name may be a repository of the hub: OWNER/NAME."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def repository_of(name: str) -> str | None:
    """OWNER/NAME of hub:OWNER/NAME and hf-hub:OWNER/NAME; None for a name without such a prefix.

    Raises:
        CheckpointError: something else follows the prefix.

    Example:
        >>> repository_of("hub:acme/pets")
        'acme/pets'
    """
    for prefix in HUB_PREFIXES:
        if name.startswith(prefix):
            if not is_hub_id(repository := name.removeprefix(prefix)):
                raise CheckpointError(f"{name!r:.120} does not name a repository of the hub; write {prefix}OWNER/NAME")
            return repository
    return None
