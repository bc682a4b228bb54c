"""The data sets that come with the package: drawn when they are read, without a file or a download."""

from collections.abc import Mapping

from maple.data import emoji, icons
from maple.data.records import Dataset

TEMPLATE = "a photo of a {}."
"""The zero-shot template of all of them."""


def is_bundled(name: str) -> bool:
    """Whether a name has the form of a bundled data set's."""
    return name.startswith((emoji.PREFIX, icons.PREFIX))


def load_bundled(name: str, class_names: Mapping[str, str] | None = None) -> Dataset:
    """Load `emoji-GROUP[/STYLE]` or `icons-TOPIC[/STYLE]`; DataError if there is no such group, topic or style."""
    return (icons.load_icons if name.startswith(icons.PREFIX) else emoji.load_emoji)(name, class_names)


def require_bundled(name: str) -> None:
    """Raise DataError unless there is a bundled data set of this name."""
    (icons.topic_and_style if name.startswith(icons.PREFIX) else emoji.group_and_style)(name)


def bundled_names() -> list[str]:
    """Return the names of all bundled data sets, in their default styles."""
    return [
        *(f"{emoji.PREFIX}{group}" for group in emoji.archive().groups),
        *(f"{icons.PREFIX}{topic}" for topic in icons.archive().topics),
    ]
