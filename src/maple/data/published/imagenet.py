"""ImageNet and its variants: folders of synsets, and a `classnames.txt` with the class name of each synset.

Nothing is cached: the 1.3 million names of ImageNet take about ten seconds to list on a local disk and 250 MiB of
memory, little compared with a training run, and a cached list can be outdated.
"""

import logging
import pickle
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

from maple.data.folders.listing import list_names
from maple.data.images.formats import has_image_name
from maple.data.published.split_files import Contents, read_lines
from maple.data.records import Item
from maple.errors import DataError, DownloadError

logger = logging.getLogger(__name__)

_SYNSET = re.compile(r"n\d{8}")
_UNREADABLE = (tarfile.TarError, pickle.UnpicklingError)
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
    """Read `images/train/SYNSET/*` and `images/val/SYNSET/*` as training and test split, without a validation split.

    Labels follow the sorted synsets; items are sorted by synset, then by file name, so that a sample is the same on
    every machine.

    Raises:
        DataError: a folder is missing, the two splits differ in their synsets, or a synset has no name or no images.

    Source: muzairkhattak/multimodal-prompt-learning@69bce21 datasets/imagenet.py. Departs: file names are sorted
    (there, the order is the file system's, and with it the sample); the test images do not double as validation images.
    """
    names = read_class_names(names_file)
    train, test = images / "train", images / "val"
    synsets, others = (_synset_folders(folder, names, names_file) for folder in (train, test))
    if synsets != others:
        lacking, missing = test, set(synsets) - set(others)
        if set(others) > set(synsets):
            lacking, missing = train, set(others) - set(synsets)
        raise DataError(
            f"{lacking} lacks {' '.join(sorted(missing)[:5])}: training and validation images must have the same "
            f"synsets ({len(synsets)} and {len(others)} found), or labels would not agree"
        )
    class_names = tuple(names[synset] for synset in synsets)
    train_items, test_items = (_items(folder, synsets, class_names, images) for folder in (train, test))
    return Contents(train_items, (), test_items, class_names)


def read_synsets(names_file: Path, images: Path) -> Contents:
    """Read `images/SYNSET/*` as a test split over the synsets that have a folder: ImageNet-Sketch, -A and -R.

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
    """Read `images/NUMBER/*` as a test split: ImageNetV2, where folder 0 is the first class of `classnames.txt`.

    Raises:
        DataError: the folders are not one for each class name, numbered from 0, or one has no images.

    Source: muzairkhattak/multimodal-prompt-learning@69bce21 datasets/imagenetv2.py.
    """
    names = read_class_names(names_file)
    numbers = [str(number) for number in range(len(names))]
    folders = _folders(images)
    if set(folders) != set(numbers):
        absent = [number for number in numbers if number not in set(folders)][:5]
        extra = [name for name in folders if name not in set(numbers)][:5]
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
        raise DataError(f"{folder}: holds no folders; put its images into one folder per synset, as in n01440764/")
    unknown = [synset for synset in synsets if synset not in names]
    if unknown:
        raise DataError(
            f"{folder}: {names_file} has no name for {' '.join(unknown[:5])} ({len(unknown)} folders); "
            "remove folders that are not synsets, or complete the file"
        )
    return synsets


def _folders(folder: Path) -> list[str]:
    return [name for name in list_names(folder) if (folder / name).is_dir()]


def _items(folder: Path, synsets: list[str], class_names: tuple[str, ...], root: Path) -> tuple[Item, ...]:
    """All images, sorted by class and by name. Only names are read: ImageNet has 1.3 million files."""
    prefix = folder.relative_to(root).as_posix() + "/" if folder != root else ""
    items: list[Item] = []
    skipped = 0
    for label, (synset, class_name) in enumerate(zip(synsets, class_names, strict=True)):
        files = list_names(folder / synset)
        images = [name for name in files if has_image_name(name)]
        if not images:
            raise DataError(f"{folder / synset}: holds no images; unpack the archive of this class again")
        skipped += len(files) - len(images)
        items += [Item(f"{prefix}{synset}/{name}", label, class_name) for name in images]
    if skipped:
        logger.info("%s: skipped %d files that are not images", folder, skipped)
    return tuple(items)


def sort_archives(images: Path, say: Callable[[str], None] = lambda _text: None) -> None:
    """Unpack the archives of ILSVRC 2012, which only registered users get, into `images/train` and `images/val`.

    A part whose archive is missing, or whose folder exists, is left alone. Folders get their names when complete.

    Raises:
        DownloadError: an archive is damaged, or scipy is not installed (the devkit needs it).
    """
    devkit = images / "ILSVRC2012_devkit_t12.tar.gz"
    for part in ("train", "val"):
        archive = images / f"ILSVRC2012_img_{part}.tar"
        if (images / part).exists() or not archive.exists():
            continue
        if part == "val" and not devkit.exists():
            raise DownloadError(f"{devkit} is missing: it gives the class of each validation image; put it there")
        say(f"{archive}: sorting into {images / part}")
        unfinished = images / f".making-{part}"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            from torchvision.datasets import imagenet

            if part == "train":
                imagenet.parse_train_archive(str(images), folder=unfinished.name)
            else:
                if not (images / imagenet.META_FILE).exists():
                    imagenet.parse_devkit_archive(str(images))
                imagenet.parse_val_archive(str(images), folder=unfinished.name)
            unfinished.rename(images / part)
        except ImportError as error:
            raise DownloadError(f"{archive} cannot be sorted into folders ({error}): pip install scipy") from error
        except (RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, *_UNREADABLE) as error:
            raise DownloadError(f"{archive} cannot be sorted into folders: {error}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
