"""Lists of class names: checked, and written as the words that a text tower reads."""

from collections import Counter
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
    """The names, none of which may say the same words as another.

    Raises:
        ClassNamesError: the list or a name is empty, or the same words come twice.
    """
    times = Counter(name.strip() for name in clean_class_names(names))
    if twice := [name for name, count in times.items() if count > 1]:
        raise ClassNamesError(f"{', '.join(map(repr, twice))} is named more than once; name every class once")
    return names
