"""Pictures to try: from the model's own data set where it can be read, or the packaged emoji."""

import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from maple.data import Dataset, load_dataset, short_name
from maple.data.emoji import load_emoji
from maple.errors import MapleError
from maple.names import words_of

logger = logging.getLogger(__name__)

COUNT = 8
_SIDE = 512
_EMOJI = ("emoji-animals", "emoji-food")


@dataclass(frozen=True)
class Example:
    """A picture, encoded as PNG, and what it shows."""

    class_name: str
    trained: bool
    png: bytes


@dataclass(frozen=True)
class ExampleSet:
    """Some pictures, and where they are from."""

    source: str
    examples: tuple[Example, ...]


NO_EXAMPLES = ExampleSet("", ())


@dataclass(frozen=True)
class Origin:
    """The data set that a model was trained on, as far as is known.

    Attributes:
        root: the folder that holds the data sets.
        class_names: other words for folder names.
    """

    dataset: str | None
    root: Path | None = None
    class_names: Mapping[str, str] | None = None


def origin_of(run: Path, about: Mapping[str, Any], data_root: str | None) -> Origin:
    """Where the data of a run lies: as its folder says, else under `data_root`."""
    dataset = None if about.get("own_images") else about.get("dataset")
    data: Any = {}
    try:
        data = json.loads((run / "config.json").read_text(encoding="utf-8"))["data"]
        root, names = data.get("root"), data.get("class_names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        root, names = None, None
    root = root if isinstance(root, str) else data_root
    return Origin(
        dataset if isinstance(dataset, str) else None,
        None if root is None else Path(root),
        names if isinstance(names, dict) and names else None,
    )


def find_examples(origin: Origin, trained: Sequence[str], count: int = COUNT) -> ExampleSet:
    """At most `count` pictures of different classes, trained ones and others by turns.

    They are test images, where there are any; larger ones are scaled down to 512 pixels.
    """
    if origin.dataset:
        try:
            dataset = load_dataset(origin.dataset, origin.root, class_names=origin.class_names)
            if found := _pictures(dataset, trained, count):
                return ExampleSet(short_name(dataset.name), tuple(found))
        except (MapleError, OSError) as error:
            logger.debug("no examples of %s: %s", origin.dataset, error)
    emoji = [_pictures(load_emoji(name), trained, count // len(_EMOJI)) for name in _EMOJI]
    return ExampleSet("the packaged emoji", tuple(chain(*emoji)))


def _pictures(dataset: Dataset, trained: Sequence[str], count: int) -> list[Example]:
    known = {words_of(name) for name in trained}
    items = {item.label: item for item in reversed(dataset.test or dataset.val or dataset.train)}
    store = dataset.store(max_bytes=0)
    sides: tuple[list[int], list[int]] = ([], [])
    for label in sorted(items):
        sides[words_of(dataset.class_names[label]) not in known].append(label)
    by_turns = [label for pair in zip_longest(*(_spread(side, count) for side in sides)) for label in pair]
    found: list[Example] = []
    for label in by_turns:
        if label is None or len(found) == count:
            continue
        try:
            image = store.get(items[label].path).copy()
        except MapleError:
            continue
        name = dataset.class_names[label].replace("_", " ")
        found.append(Example(name, words_of(name) in known, _encoded(image)))
    return found


def _spread(labels: Sequence[int], count: int) -> list[int]:
    """At most `count` of the labels, evenly spaced."""
    wanted = min(count, len(labels))
    return [labels[index * len(labels) // wanted] for index in range(wanted)]


def _encoded(image: Image.Image) -> bytes:
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
