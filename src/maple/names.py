"""Lists of class names: checked, and written as the words that a text tower reads."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set

from maple.errors import ClassNamesError, shortened


def clean_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """Check a list of class names and write them as words: underscores become spaces.

    Raises:
        ClassNamesError: no list, an empty list, or a name that is not a string with something in it.
    """
    if isinstance(names, str):
        raise ClassNamesError(f"class names must be a list of strings, not the one string {names!r}; write [{names!r}]")
    if isinstance(names, Set | Mapping) or not hasattr(names, "__len__"):
        raise ClassNamesError(f"class names are {type(names).__name__}; give a list of strings")
    if not len(names):
        raise ClassNamesError("the list of class names is empty; at least one is needed")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not words_of(name):
            raise ClassNamesError(f"class name {index} is {name!r}; every name must be a string with a word in it")
    return tuple(name.replace("_", " ") for name in names)


def names_in(text: str) -> list[str]:
    """The class names of a text, with commas or new lines between them; a name that holds a comma is in double quotes.

    As in a line of CSV: "dog, small", hound. The last comma of a line may be left, and so may empty lines.

    Raises:
        ClassNamesError: a quoted name does not end, or goes on after its end.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
    found: list[str] = []
    line: list[str] = []
    place = 0
    while place <= len(text):
        part = _NAME.match(text, place)
        if part is None:
            raise ClassNamesError(
                f"the class names {shortened(text[place:].strip(), 40)!r} cannot be told apart; write a name that "
                'holds a comma or begins with a double quote in double quotes, as in "dog, small", hound'
            )
        quoted, plain, end = part.groups()
        line.append(plain.strip() if quoted is None else " ".join(quoted.replace('""', '"').split("\n")).strip())
        if end != ",":
            found += line[:-1] if quoted is None and not line[-1] else line
            line = []
        place = part.end() + (not end)
    return found


# A name in double quotes, or one without commas that does not begin with them; then a comma, a new line or the end.
_NAME = re.compile(r'[^\S\n]*(?:"([^"]*(?:""[^"]*)*)"[^\S\n]*|((?:[^\s",][^,\n]*)?))(,|\n|\Z)')


def distinct(names: Sequence[str]) -> Sequence[str]:
    """The names, none of which may say the same words as another, capital letters aside.

    Raises:
        ClassNamesError: the list or a name is empty, or the same words come twice.
    """
    spellings: dict[str, list[str]] = defaultdict(list)
    for name in clean_class_names(names):
        spellings[words_of(name)].append(name.strip())
    if twice := [" and ".join(sorted({repr(one) for one in same})) for same in spellings.values() if len(same) > 1]:
        raise ClassNamesError(
            f"{', '.join(twice)} is named more than once (capital letters aside); name every class once"
        )
    return names


def words_of(name: str) -> str:
    """What two names have in common that say the same words to a text tower: no capitals, no spaces but single ones."""
    return " ".join(name.replace("_", " ").lower().split())


def has_lone_surrogate(text: str) -> bool:
    """Whether a part of the text is no Unicode: a lone surrogate, or what stands for a byte of another encoding."""
    return _HALF.search(text) is not None


def replace_lone_surrogates(text: str) -> str:
    """The text with a replacement character for each half one, so that it can be written as UTF-8."""
    return _HALF.sub("\N{REPLACEMENT CHARACTER}", text)


_HALF = re.compile("[\ud800-\udfff]")
