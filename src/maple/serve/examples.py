"""Example images to try: of the model's own data set if it can be read, else of the packaged emoji."""

import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from maple.data import Dataset, load_dataset
from maple.data.catalogue import short_name
from maple.data.emoji import load_emoji
from maple.errors import MapleError
from maple.names import words_of

logger = logging.getLogger(__name__)

_MAX_EXAMPLES = 8
_MAX_SIDE = 512
_EMOJI = ("emoji-animals", "emoji-food")


@dataclass(frozen=True)
class ExampleImage:
    """An image, encoded as PNG, and its class."""

    class_name: str
    trained: bool
    png: bytes


@dataclass(frozen=True)
class ExampleSet:
    """Example images, and the name of their data set. Empty by default."""

    source: str = ""
    examples: tuple[ExampleImage, ...] = ()


@dataclass(frozen=True)
class TrainedDataset:
    """The data set that a model was trained on, as far as it is known.

    Attributes:
        root: the folder that holds the data sets.
        class_names: class names for folder names.
    """

    dataset: str | None
    root: Path | None = None
    class_names: Mapping[str, str] | None = None


def trained_dataset(run: Path, about: Mapping[str, Any], data_root: str | None) -> TrainedDataset:
    """The data set of a run, where the run's config.json says, else under `data_root`."""
    dataset = None if about.get("own_images") else about.get("dataset")
    root = names = None
    try:
        data = json.loads((run / "config.json").read_text(encoding="utf-8"))["data"]
        root, names = data.get("root"), data.get("class_names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # a prompts file or an export has no such file; then the data set's default place is tried
    root = root if isinstance(root, str) else data_root
    return TrainedDataset(
        dataset if isinstance(dataset, str) else None,
        None if root is None else Path(root),
        names if isinstance(names, dict) and names else None,
    )


def find_examples(trained_on: TrainedDataset, trained_names: Sequence[str], count: int = _MAX_EXAMPLES) -> ExampleSet:
    """Find at most `count` images of different classes, of trained and other classes in turn.

    They are test images if there are any; large ones are scaled down to 512 pixels.

    Example::

        find_examples(TrainedDataset("emoji-food/twemoji"), ["red apple", "green apple"]).source  # emoji-food/twemoji
    """
    if trained_on.dataset:
        try:
            dataset = load_dataset(trained_on.dataset, trained_on.root, class_names=trained_on.class_names)
            if images := _example_images(dataset, trained_names, count):
                return ExampleSet(short_name(dataset.name), tuple(images))
        except (MapleError, OSError) as error:
            logger.debug("no examples of %s: %s", trained_on.dataset, error)
    emoji = [_example_images(load_emoji(name), trained_names, count // len(_EMOJI)) for name in _EMOJI]
    return ExampleSet("the packaged emoji", tuple(chain(*emoji)))


def _example_images(dataset: Dataset, trained_names: Sequence[str], count: int) -> list[ExampleImage]:
    trained_words = {words_of(name) for name in trained_names}
    # Reversed, so that the first item of each class remains.
    items = {item.label: item for item in reversed(dataset.test or dataset.val or dataset.train)}
    store = dataset.store(max_bytes=0)
    trained: list[int] = []
    others: list[int] = []
    for label in sorted(items):
        (trained if words_of(dataset.class_names[label]) in trained_words else others).append(label)
    images: list[ExampleImage] = []
    for label in chain(*zip_longest(_spread(trained, count), _spread(others, count))):
        if label is None or len(images) == count:
            continue
        try:
            image = store.get(items[label].path).copy()
        except MapleError:
            continue
        image.thumbnail((_MAX_SIDE, _MAX_SIDE))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        name = dataset.class_names[label].replace("_", " ")
        images.append(ExampleImage(name, words_of(name) in trained_words, buffer.getvalue()))
    return images


def _spread(labels: Sequence[int], count: int) -> list[int]:
    """At most `count` of the labels, evenly spaced."""
    wanted = min(count, len(labels))
    return [labels[index * len(labels) // wanted] for index in range(wanted)]
