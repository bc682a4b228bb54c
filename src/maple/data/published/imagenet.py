"""ImageNet and its variants: folders of synsets, and a `classnames.txt` that gives each synset its words.

Nothing is cached: the 1.3 million names of ImageNet take some ten seconds to list on a local disk and 250 MiB to hold,
little beside a training run, and a list that is kept can be wrong.
"""

import logging
import os
import re
from pathlib import Path

from maple.data.folders.class_folders import is_ignored
from maple.data.images.reading import has_image_name
from maple.data.published.split_files import Contents, read_lines
from maple.data.records import Item
from maple.errors import DataError

logger = logging.getLogger(__name__)

_SYNSET = re.compile(r"n\d{8}")
_FORM = "each line must be a synset, a space and its class name, as in 'n01440764 tench'"


def read_class_names(path: Path) -> dict[str, str]:
    """Read `classnames.txt`: the class name of each synset, in the order of the file.

    Two synsets may share a name, as they do in the published file.

    Raises:
        DataError: the file is missing, or a line is malformed or repeats a synset.

    Source: KaiyangZhou/CoOp@ff61507 DATASETS.md (names copied from CLIP's prompt engineering notebook).
    """
    if not path.is_file():
        raise DataError(
            f"{path}: the file of class names is missing. `maple data prepare` fetches it; by hand, it is CoOp's "
            "classnames.txt (the ImageNet section of its DATASETS.md links it), the same for ImageNet and its variants"
        )
    names: dict[str, str] = {}
    for number, line in read_lines(path):
        synset, _, name = line.partition(" ")
        if not _SYNSET.fullmatch(synset) or not name.strip():
            raise DataError(f"{path}: line {number} is {line!r}; {_FORM}")
        if synset in names:
            raise DataError(f"{path}: line {number} repeats synset {synset}; {_FORM}")
        names[synset] = name
    if not names:
        raise DataError(f"{path}: is empty; {_FORM}")
    return names


def read_imagenet(names_file: Path, images: Path) -> Contents:
    """Read `images/train/SYNSET/*` and `images/val/SYNSET/*`: training and test part; there is no validation part.

    Labels follow the sorted synsets; items are sorted by synset, then by file name, so that a sample is the same on
    every machine.

    Raises:
        DataError: a folder is missing, the two parts differ in their synsets, or a synset has no name or no images.

    Source: muzairkhattak/multimodal-prompt-learning@69bce21 datasets/imagenet.py. Departs: file names are sorted
    (there, the order is the file system's, and with it the sample); the test images are no validation images as well.
    """
    names = read_class_names(names_file)
    train, test = images / "train", images / "val"
    synsets = _synset_folders(train, names, names_file)
    others = _synset_folders(test, names, names_file)
    if synsets != others:
        lacking = [f"{train} lacks {' '.join(sorted(set(others) - set(synsets))[:5])}"] * (set(others) > set(synsets))
        lacking = lacking or [f"{test} lacks {' '.join(sorted(set(synsets) - set(others))[:5])}"]
        raise DataError(
            f"{lacking[0]}: training and validation images must have the same synsets "
            f"({len(synsets)} and {len(others)} found), or labels would not agree"
        )
    class_names = tuple(names[synset] for synset in synsets)
    train_items, test_items = (_items(part, synsets, class_names, images) for part in (train, test))
    return Contents(train_items, (), test_items, class_names)


def read_synsets(names_file: Path, images: Path) -> Contents:
    """Read `images/SYNSET/*` as a test part over the synsets that are there: ImageNet-Sketch, -A and -R.

    Raises:
        DataError: a folder is missing, or a synset has no name or no images.

    Source: muzairkhattak/multimodal-prompt-learning@69bce21 datasets/imagenet_sketch.py, imagenet_a.py, imagenet_r.py.
    Departs: there the images double as training items.
    """
    names = read_class_names(names_file)
    synsets = _synset_folders(images, names, names_file)
    class_names = tuple(names[synset] for synset in synsets)
    return Contents((), (), _items(images, synsets, class_names, images), class_names)


def read_numbered(names_file: Path, images: Path) -> Contents:
    """Read `images/NUMBER/*` as a test part: ImageNetV2, where folder 0 is the first class of `classnames.txt`.

    Raises:
        DataError: there are other folders than one for each class name, numbered from 0, or one has no images.

    Source: muzairkhattak/multimodal-prompt-learning@69bce21 datasets/imagenetv2.py.
    """
    names = read_class_names(names_file)
    numbers = [str(number) for number in range(len(names))]
    found = _folders(images)
    if set(found) != set(numbers):
        absent = [number for number in numbers if number not in set(found)][:5]
        extra = [name for name in found if name not in set(numbers)][:5]
        raise DataError(
            f"{images}: must hold the folders 0 to {len(names) - 1}, one for each line of {names_file}; "
            f"missing: {' '.join(absent) or 'none'}; not known: {' '.join(extra) or 'none'}"
        )
    class_names = tuple(names.values())
    return Contents((), (), _items(images, numbers, class_names, images), class_names)


def _synset_folders(folder: Path, names: dict[str, str], names_file: Path) -> list[str]:
    """The synsets that have a folder, sorted."""
    synsets = _folders(folder)
    if not synsets:
        raise DataError(
            f"{folder}: holds no folders; its images must lie in one folder for each synset, as in n01440764/"
        )
    unknown = [synset for synset in synsets if synset not in names]
    if unknown:
        raise DataError(
            f"{folder}: {names_file} has no name for {' '.join(unknown[:5])} ({len(unknown)} folders); "
            "remove what is no synset, or complete the file"
        )
    return synsets


def _folders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not is_ignored(entry.name) and entry.is_dir())
    except FileNotFoundError as error:
        raise DataError(f"{folder}: the folder is missing; unpack or link the images there") from error
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); make the folder readable") from error


def _items(folder: Path, synsets: list[str], class_names: tuple[str, ...], root: Path) -> tuple[Item, ...]:
    """All images, by class and by name. Only names are looked at: ImageNet has 1.3 million files."""
    prefix = folder.relative_to(root).as_posix() + "/" if folder != root else ""
    items: list[Item] = []
    skipped = 0
    for label, (synset, class_name) in enumerate(zip(synsets, class_names, strict=True)):
        try:
            files = sorted(name for name in os.listdir(folder / synset) if not name.startswith("."))
        except OSError as error:
            raise DataError(f"{folder / synset}: cannot be listed ({error.strerror}); make it readable") from error
        images = [name for name in files if has_image_name(name)]
        if not images:
            raise DataError(f"{folder / synset}: holds no images; unpack the archive of this class again")
        skipped += len(files) - len(images)
        items += [Item(f"{prefix}{synset}/{name}", label, class_name) for name in images]
    if skipped:
        logger.info("%s: skipped %d files that are no images", folder, skipped)
    return tuple(items)
