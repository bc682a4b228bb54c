"""Griffe's extension for the API page: sections of docstrings as Griffe reads them, one entry for each name.

The package writes "Example:" for one example, and "a, b: both" for arguments that belong together. Griffe takes the
first for a note without code, and the second for an argument of that name, without a type or a default.
"""

import re
from typing import Any

import griffe

_SECTION = re.compile(r"^(?P<indent> *)(?P<title>Args|Attributes):\n(?P<body>(?:(?P=indent) +\S.*\n?|\s*\n)+)", re.M)
_GROUP = re.compile(r"(\w+(?:, \w+)+): ")


class Sections(griffe.Extension):
    """Rewrite docstrings when they are collected."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of any object."""
        if obj.docstring is not None:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = _SECTION.sub(_one_entry_each, text)


def _one_entry_each(section: re.Match[str]) -> str:
    """A section in which each name has an entry of its own; those of a group after the first refer to it."""
    lines = section["body"].splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    entries: list[list[str]] = []
    for line in lines:
        if line.strip() and len(line) - len(line.lstrip()) == indent:
            entries.append([line])
        elif entries:
            entries[-1].append(line)
    written: list[str] = []
    for first, *more in entries:
        group = _GROUP.match(first, indent)
        if group is None:
            written += [first, *more]
            continue
        name, *others = group[1].split(", ")
        written += [f"{' ' * indent}{name}: {first[group.end() :]}", *more]
        written += [f"{' ' * indent}{other}: see `{name}`." for other in others]
    return f"{section['indent']}{section['title']}:\n" + "\n".join(written) + "\n"
