"""Lists of class names: checked, and written as the words that a text tower reads."""

import csv
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
        if not isinstance(name, str) or not name.replace("_", " ").strip():
            raise ClassNamesError(f"class name {index} is {name!r}; every name must be a string with a word in it")
    return tuple(name.replace("_", " ") for name in names)


def names_in(text: str) -> list[str]:
    """The class names of a text, with commas or new lines between them; a name that holds a comma is in double quotes.

    As in a line of CSV: "dog, small", hound. The last comma of a line may be left, and so may empty lines.

    Raises:
        ClassNamesError: a quoted name does not end, or goes on after its end.
    """
    found: list[str] = []
    try:
        for row in csv.reader(text.replace("\r\n", "\n").split("\n"), skipinitialspace=True, strict=True):
            names = [name.strip() for name in row]
            found += names[:-1] if names and not names[-1] else names
    except csv.Error as error:
        raise ClassNamesError(
            f"the class names {shortened(text, 60)!r} cannot be told apart ({error}); write a name that holds a comma "
            'or begins with a double quote in double quotes, as in "dog, small", hound'
        ) from error
    return found


def distinct(names: Sequence[str]) -> Sequence[str]:
    """The names, none of which may say the same words as another, capital letters aside.

    Raises:
        ClassNamesError: the list or a name is empty, or the same words come twice.
    """
    spellings: dict[str, list[str]] = defaultdict(list)
    for name in clean_class_names(names):
        spellings[" ".join(name.lower().split())].append(name.strip())
    if twice := [" and ".join(sorted({repr(one) for one in same})) for same in spellings.values() if len(same) > 1]:
        raise ClassNamesError(
            f"{', '.join(twice)} is named more than once (capital letters aside); name every class once"
        )
    return names


def holds_half_character(text: str) -> bool:
    """Whether a part of the text is no Unicode: a lone surrogate, or what stands for a byte of another encoding."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)
