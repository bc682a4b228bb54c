"""Example images to try: of the model's own data set if it can be read, else of the packaged emoji."""

import io
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from maple.config.settings import DataSettings
from maple.data import Dataset, load_dataset
from maple.data.catalogue import short_name, template_of
from maple.data.emoji import load_emoji
from maple.data.saved_split import SAVED_SPLIT, read_saved_split
from maple.errors import MapleError
from maple.files import read_json
from maple.names import words_of
from maple.serve.responses import ExampleImage, ExampleList

logger = logging.getLogger(__name__)

_MAX_EXAMPLES = 8
_MAX_SIDE = 512
_EMOJI = ("emoji-animals", "emoji-food")


def trained_dataset(run: Path, about: Mapping[str, Any], data_root: str | None) -> Dataset | None:
    """Read the data set of a run; None if it cannot be read.

    The user's own images are read from the folder of a run alone, which says how they are divided. A prompts file or an
    export may be from elsewhere: of these, only a data set of the catalogue is read.
    """
    data, dataset = DataSettings(), about.get("dataset")
    with suppress(MapleError, KeyError, TypeError):  # of a prompts file or an export, or damaged
        data = DataSettings(**read_json(run / "config.json")["data"])
    root = data.root or data_root
    try:
        if (run / SAVED_SPLIT).is_file():
            columns = {"image_column": data.image_column, "label_column": data.label_column}
            # A few examples are not worth unpacking, or fetching, a source again.
            return read_saved_split(run / SAVED_SPLIT, restore=False, columns=columns)
        if isinstance(dataset, str) and template_of(dataset) is not None and not about.get("own_images"):
            names = data.class_names or None
            return load_dataset(dataset, None if root is None else Path(root), class_names=names)
    except (MapleError, OSError) as error:
        logger.debug("no examples of %s: %s", dataset, error)
    return None


def find_examples(dataset: Dataset | None, trained_names: Sequence[str]) -> ExampleList:
    """Find a few images of different classes, of trained and other classes in turn.

    They are test images if there are any; large ones are scaled down to 512 pixels.

    Args:
        dataset: see `trained_dataset`; without one, or if its images cannot be read, they are the packaged emoji.
    """
    images: list[tuple[str, bool, bytes]] = []
    if dataset is not None:
        source, images = short_name(dataset.name), _example_images(dataset, trained_names, _MAX_EXAMPLES)
    if not images:
        count = _MAX_EXAMPLES // len(_EMOJI)
        source = "the packaged emoji"
        images = [image for name in _EMOJI for image in _example_images(load_emoji(name), trained_names, count)]
    examples = [
        ExampleImage(id=index, class_name=name, trained=trained, png=png)
        for index, (name, trained, png) in enumerate(images)
    ]
    return ExampleList(source=source if examples else None, examples=examples)


def _example_images(dataset: Dataset, trained_names: Sequence[str], count: int) -> list[tuple[str, bool, bytes]]:
    """The class name, whether it is a trained one, and the PNG of at most `count` images."""
    trained_words = {words_of(name) for name in trained_names}
    # Reversed, so that the first item of each class remains.
    items = {item.label: item for item in reversed(dataset.test or dataset.val or dataset.train)}
    store = dataset.store(max_bytes=0)
    trained: list[int] = []
    others: list[int] = []
    for label in sorted(items):
        (trained if words_of(dataset.class_names[label]) in trained_words else others).append(label)
    images: list[tuple[str, bool, bytes]] = []
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
        images.append((name, words_of(name) in trained_words, buffer.getvalue()))
    return images


def _spread(labels: Sequence[int], count: int) -> list[int]:
    """At most `count` of the labels, evenly spaced."""
    wanted = min(count, len(labels))
    return [labels[index * len(labels) // wanted] for index in range(wanted)]
