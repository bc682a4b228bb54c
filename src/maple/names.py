"""Lists of class names: checked, and written as the words that a text tower reads."""

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set

from maple.errors import ClassNamesError


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
