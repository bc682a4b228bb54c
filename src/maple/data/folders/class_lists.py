"""Files that name the classes of numbered labels."""

from collections.abc import Sequence
from pathlib import Path

from maple.errors import DataError, shortened_list
from maple.names import nfc, words_of

CLASS_NAMES = ("classnames.txt", "class_names.txt")
"""Files that name classes, and nothing else."""
CLASS_LISTS = (*CLASS_NAMES, "classes.txt", "labels.txt")
"""Files next to the images that name the classes of numbered labels: one a line, the first for 0."""


def read_class_list(folder: Path, files: Sequence[str] = CLASS_LISTS) -> list[str] | None:
    """Return the names in the class list of a folder, one of `files`, in the order of their numbers; None without one.

    Raises:
        DataError: it cannot be read, names nothing, or names a class twice.
    """
    path = next((folder / name for name in files if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        names = [nfc(line.strip()) for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); write one class name a line") from error
    while names and not names[-1]:
        names.pop()
    return checked_class_names(names, str(path))


def checked_class_names(names: Sequence[str], where: str) -> list[str]:
    """Return the names; DataError if there are none, one is empty, or one is there twice."""
    if not names or not all(words_of(name) for name in names):
        number = next((number for number, name in enumerate(names) if not words_of(name)), 0)
        raise DataError(f"{where}: has no name for class {number}; name every class")
    repeated = (
        [name for number, name in enumerate(names) if name in names[:number]] if len(set(names)) < len(names) else []
    )
    if repeated:
        raise DataError(
            f"{where}: names {shortened_list(map(repr, repeated))} more than once; give each class its own name"
        )
    return list(names)


def name_of_number(number: int, class_names: Sequence[str], where: str) -> str:
    """Return the name of a class; DataError if there is no such number."""
    if not 0 <= number < len(class_names):
        raise DataError(
            f"{where} has the label {number}, but there are {len(class_names)} class names, for 0 to "
            f"{len(class_names) - 1}; add the others"
        )
    return class_names[number]
