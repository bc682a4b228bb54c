"""The published data sets, and `load_dataset`, which reads these and all others.

A new data set with a CoOp-format split file is one line in `CATALOGUE`.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

from maple.data.bundled import TEMPLATE, bundled_names, is_bundled, load_bundled, require_bundled
from maple.data.checks.findings import Finding
from maple.data.checks.verify import describe_missing, differences
from maple.data.folders.class_folders import (
    detect_domains,
    load_domain,
    load_folder,
    rename_classes,
    split_domain,
    split_of,
)
from maple.data.folders.manifests import is_manifest, load_manifest
from maple.data.published.imagenet import read_imagenet, read_numbered, read_synsets
from maple.data.published.split_files import (
    DRAWS,
    Contents,
    drawn_file,
    read_aircraft,
    read_split,
    write_drawn_split,
)
from maple.data.records import DRAWN, Dataset, Item
from maple.data.sources.opening import absent_part, absolute_source, load_source, warn_of_columns
from maple.data.sources.rows import Columns
from maple.errors import ConfigError, DataError, one_of
from maple.files import on_disk
from maple.names import absolute_features, feature_paths, is_features
from maple.plugins import Registry

logger = logging.getLogger(__name__)

_LOWEST_SCALE = 10  # below it, a logit scale may be a logarithm: those of published CLIPs are about 100


def _read_split_file(labels: Path, _images: Path) -> Contents:
    return read_split(labels)


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """Where a published data set is under the data root, how it is read, and its zero-shot template.

    In `folder`, item paths are relative to the folder `images`, and the file `labels` lists the classes; `read` returns
    the contents from the paths of `labels` and `images`. `evaluation_only`: it has a test split only.

    Source: KaiyangZhou/CoOp@ff61507 DATASETS.md (layout); muzairkhattak/multimodal-prompt-learning@69bce21
    trainers/zsclip.py:13-29 (templates).

    Example:
        >>> CATALOGUE["eurosat"].template
        'a centered satellite photo of {}.'
    """

    title: str
    folder: str
    images: str
    labels: str
    template: str
    read: Callable[[Path, Path], Contents] = _read_split_file
    evaluation_only: bool = False


_PHOTO = "a photo of a {}."
_NAMES = "classnames.txt"
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz")
_V2 = "imagenetv2-matched-frequency-format-val"

_OWN: dict[str, DatasetSpec] = {
    "imagenet": DatasetSpec("ImageNet", "imagenet", "images", _NAMES, _PHOTO, read_imagenet),
    "caltech101": DatasetSpec(
        "Caltech101", "caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json", _PHOTO
    ),
    "oxford_pets": DatasetSpec(
        "OxfordPets", "oxford_pets", "images", "split_zhou_OxfordPets.json", "a photo of a {}, a type of pet."
    ),
    "stanford_cars": DatasetSpec("StanfordCars", "stanford_cars", "", "split_zhou_StanfordCars.json", _PHOTO),
    "oxford_flowers": DatasetSpec(
        "Flowers102", "oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json", "a photo of a {}, a type of flower."
    ),
    "food101": DatasetSpec(
        "Food101", "food-101", "images", "split_zhou_Food101.json", "a photo of {}, a type of food."
    ),
    "fgvc_aircraft": DatasetSpec(
        "FGVCAircraft",
        "fgvc_aircraft",
        "images",
        "variants.txt",
        "a photo of a {}, a type of aircraft.",
        lambda labels, _images: read_aircraft(labels),
    ),
    "sun397": DatasetSpec("SUN397", "sun397", "SUN397", "split_zhou_SUN397.json", _PHOTO),
    "dtd": DatasetSpec("DTD", "dtd", "images", "split_zhou_DescribableTextures.json", "{} texture."),
    "eurosat": DatasetSpec(
        "EuroSAT", "eurosat", "2750", "split_zhou_EuroSAT.json", "a centered satellite photo of {}."
    ),
    "ucf101": DatasetSpec(
        "UCF101", "ucf101", "UCF-101-midframes", "split_zhou_UCF101.json", "a photo of a person doing {}."
    ),
    "imagenetv2": DatasetSpec("ImageNetV2", "imagenetv2", _V2, _NAMES, _PHOTO, read_numbered, True),
    "imagenet_sketch": DatasetSpec("ImageNetSketch", "imagenet-sketch", "images", _NAMES, _PHOTO, read_synsets, True),
    "imagenet_a": DatasetSpec("ImageNetA", "imagenet-adversarial", "imagenet-a", _NAMES, _PHOTO, read_synsets, True),
    "imagenet_r": DatasetSpec("ImageNetR", "imagenet-rendition", "imagenet-r", _NAMES, _PHOTO, read_synsets, True),
}


def _outside_dataset(source: str, loaded: object) -> DatasetSpec:
    if not isinstance(loaded, DatasetSpec):
        raise ConfigError(f"{source} is {loaded!r:.80}; it must be a maple.data.DatasetSpec")
    return loaded


CATALOGUE = Registry("maple.datasets", "data set", _OWN, _outside_dataset)
"""The data sets with a fixed layout: the published ones, and those of installed packages (entry points)."""

_CROSS10 = [
    *("caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft", "sun397", "dtd"),
    *("eurosat", "ucf101"),
]
DATASET_GROUPS: dict[str, list[str]] = {
    "paper11": ["imagenet", *_CROSS10],
    "cross10": _CROSS10,
    "imagenet-variants": ["imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"],
}
"""The papers' lists: base-to-novel and few-shot; the targets of cross-dataset; those of domain generalization."""


def load_dataset(
    name_or_path: str,
    root: Path | None,
    *,
    class_names: Mapping[str, str] | None = None,
    seed: int = 0,
    val_fraction: float = 0.0,
    test_fraction: float = 0.25,
    drop_empty: bool = False,
    min_classes: int = 2,
    image_column: str | None = None,
    label_column: str | None = None,
    on_finding: Callable[[Finding], None] | None = None,
) -> Dataset:
    """Read a published data set by its name under `root`, or a user's own images by their path.

    A name of `CATALOGUE` is read from its folder, `emoji-GROUP[/STYLE]` is rendered from the bundled emoji and
    `icons-TOPIC[/STYLE]` from the bundled icons; write
    `./NAME` for a folder of that name. A path is that of a folder of class folders (`load_folder`), of a folder of
    domains and one of them, as in `pacs:photo` (`load_domain`), of a CSV or JSON-lines file (`load_manifest`), or of a
    Parquet or Arrow file, an archive or shards, which are unpacked first, as is `hf:OWNER/NAME` (`load_source`);
    `image_column` and `label_column` name columns of these. `seed` and the fractions apply to all of these only.
    `class_names` maps published names, folder names or labels to the names to use; `drop_empty` leaves out class
    folders without images instead of refusing them; `min_classes=1` accepts images of one class, for an evaluation
    among other names; each finding about images that are not read is passed to `on_finding`, by default to the log.

    Raises:
        ConfigError: a fraction is out of range.
        DataError: the name is unknown and there is no such folder or file, `root` or a file under it is missing or
            malformed, or `class_names` names a class that does not exist.

    Example:
        >>> load_dataset("emoji-animals", None).counts()
        {'train': 5024, 'val': 628, 'test': 1570, 'classes': 157}
    """
    columns = Columns(image_column, label_column)
    if name_or_path in CATALOGUE or is_bundled(name_or_path) or is_features(name_or_path):
        warn_of_columns(columns, name_or_path)
    if name_or_path in CATALOGUE:
        published = load_published(name_or_path, root)
        _warn_if_different(name_or_path, published)
        return rename_classes(published, class_names)
    if is_bundled(name_or_path):
        return load_bundled(name_or_path, class_names)
    fractions = {"val_fraction": val_fraction, "test_fraction": test_fraction}
    options: dict[str, Any] = {"class_names": class_names, "seed": seed, **fractions}
    if is_features(name_or_path):
        from maple.data.features import load_features  # imports torch, which images do not need

        rows, table = load_features(name_or_path, seed=seed, **fractions)
        if on_finding and table.logit_scale < _LOWEST_SCALE:
            scale = table.logit_scale
            text = f"logit_scale is {scale:.3g}: is this the logarithm? Its exponential is {exp(scale):.0f}"
            on_finding(Finding("logit scale", "warning", text))
        return rename_classes(rows, class_names)
    remaining: dict[str, Any] = {"drop_empty": drop_empty, "min_classes": min_classes, "on_finding": on_finding}
    if (unpacked := load_source(name_or_path, columns=columns, **options, **remaining)) is not None:
        return unpacked
    path = on_disk(Path(name_or_path).expanduser())
    if is_manifest(path):
        options |= {"image_column": image_column, "label_column": label_column}
        return load_manifest(path, **options, min_classes=min_classes)
    if domain := split_domain(name_or_path):
        warn_of_columns(columns, name_or_path)
        return load_domain(*domain, **options, on_finding=on_finding)
    if os.path.islink(path) and not os.path.exists(path):
        raise DataError(f"{path}: is a link to {path.readlink()}, which is not there; is the drive or share mounted?")
    if not path.is_dir():
        raise _unknown(name_or_path)
    warn_of_columns(columns, name_or_path)
    if detected := detect_domains(path):
        domains, shared = map(", ".join, detected)
        if all(split and split[0] != "train" for split in map(split_of, detected[0])):
            raise DataError(
                f"{path}: holds {domains}, but no train folder next to them; rename one to train, or give one of them, "
                f"such as {path / detected[0][0]}"
            )
        logger.warning(
            "%s: all its folders hold the same folders (%s). If these are the classes, and %s domains, give the data "
            "set as %s:%s",
            *(path, shared, domains, path, detected[0][0]),
        )
    return load_folder(path, **options, drop_empty=drop_empty, min_classes=min_classes, on_finding=on_finding)


def require_possible(name_or_path: str) -> None:
    """Raise DataError unless this is a data set's name, a path (perhaps of another machine), or in this folder."""
    if is_bundled(name_or_path):
        require_bundled(name_or_path)
        return
    is_path = "/" in name_or_path or os.sep in name_or_path
    if is_features(name_or_path) and not is_path:
        if absent := place_of_absent(name_or_path, None):
            raise DataError(f"{absent}: there is no such file of features; give the path of one that exists")
        return
    if (
        name_or_path in CATALOGUE
        or absolute_source(name_or_path)
        or is_path
        or on_disk(Path(name_or_path).expanduser()).exists()
        or split_domain(name_or_path)
    ):
        return
    raise _unknown(name_or_path)


def _unknown(name: str) -> DataError:
    return DataError(
        one_of(
            *("data set", name, known_names()),
            "; or give the path of an existing folder that holds one folder of images per class, FOLDER:DOMAIN for a "
            "folder of domains that hold these, a .csv or .jsonl file with the columns path and label, a Parquet file, "
            "an archive, shards, or hf:OWNER/NAME",
        )
    )


def place_of_absent(name_or_path: str, root: Path | None) -> str | None:
    """Return where a data set is expected, if it is not there; None if it is there, or rendered."""
    if name_or_path in CATALOGUE:
        spec = CATALOGUE[name_or_path]
        if root is None:
            return f"{spec.folder}/ in root=DIR or MAPLE_DATA, which are not given"
        folder = root.expanduser() / spec.folder / spec.images
        return None if folder.is_dir() else str(folder)
    if is_features(name_or_path):
        absent = (path for path in feature_paths(name_or_path) if not Path(path).expanduser().exists())
        return ",".join(absent) or None
    if absolute_source(name_or_path):
        return absent_part(name_or_path)
    if is_bundled(name_or_path) or split_domain(name_or_path) or Path(name_or_path).expanduser().exists():
        return None
    return name_or_path


def known_names() -> list[str]:
    """Return the names of all data sets: the published ones, then the bundled ones."""
    return [*CATALOGUE, *bundled_names()]


def template_of(name: str) -> str | None:
    """Return the zero-shot template of a data set of the catalogue; None for a user's own images."""
    if name in CATALOGUE:
        return CATALOGUE[name].template
    return TEMPLATE if is_bundled(name) else None


def canonical_name(name_or_path: str) -> str:
    """Return the same text for the same data set: names of the catalogue unchanged, paths as absolute paths."""
    if template_of(name_or_path) is not None:
        return name_or_path
    if is_features(name_or_path):
        return absolute_features(name_or_path)
    if absolute := absolute_source(name_or_path):
        return absolute
    path = on_disk(Path(name_or_path).expanduser())
    if path.exists():
        return str(path.resolve())
    domain = split_domain(name_or_path)
    return f"{domain[0].resolve()}:{domain[1]}" if domain else name_or_path


def short_name(dataset: str) -> str:
    """Return the name of a data set, of a folder only the last part: the rest of a user's path is private."""
    return dataset if is_bundled(dataset) else Path(dataset).name


def draw_published_split(name: str, root: Path, seed: int) -> Path:
    """Draw a split of a data set whose published split was drawn at random, and return its file.

    Raises:
        DataError: the split of this data set is not random, it exists already, or the images are missing.
    """
    if name not in CATALOGUE:
        raise DataError(one_of("published data set", name, DRAWS))
    if name not in DRAWS:
        raise DataError(
            f"the split of {name} is not drawn from its folders; choose one of: {', '.join(DRAWS)}; or "
            f"`maple data prepare {name}`"
        )
    spec = CATALOGUE[name]
    folder = root.expanduser() / spec.folder
    return write_drawn_split(folder / spec.labels, folder / spec.images, DRAWS[name], seed)


def load_published(name: str, root: Path | None) -> Dataset:
    """Read a data set of `CATALOGUE` as `load_dataset` does, without comparing it with what was published."""
    spec = CATALOGUE[name]
    if root is None:
        raise DataError(
            f"data set {name!r} is read from a data root: give the folder that holds {spec.folder}/ as root=DIR or in "
            "the variable MAPLE_DATA, or name a folder of class-named folders instead"
        )
    root = root.expanduser()
    folder = root / spec.folder
    images, labels = folder / spec.images, folder / spec.labels
    for path, role in ((root, "the data root"), (folder, f"the folder of {spec.title}"), (images, "its image folder")):
        if not path.is_dir():
            archives = sorted(path.name for path in folder.glob("*") if path.name.endswith(_ARCHIVES))
            advice = f"`maple data prepare {name}` says how to get it" if name in _OWN else completion_advice(name)
            if archives:
                advice = f"{', '.join(archives[:3])} in {folder} must be unpacked there first"
            raise DataError(
                f"{path}: {role} is missing; {spec.title} is expected as {images} with {labels} next to it; {advice}"
            )
    title = name
    if spec.read is _read_split_file and not labels.exists():
        drawn = name in DRAWS and drawn_file(labels)
        if not drawn or not drawn.exists():
            alternative = "; without it, `maple data split {name}` draws another at random, not comparable with papers"
            raise DataError(
                f"{labels}: the published {labels.name} is missing; `maple data prepare {name}` fetches it, or says "
                "where to get it" + (alternative.format(name=name) if drawn else "")
            )
        labels, title = drawn, f"{name}{DRAWN}"
    dataset = Dataset(title, images, *spec.read(labels, images))
    first = dataset.file([*dataset.train[:1], *dataset.val[:1], *dataset.test[:1]][0])
    # One file is checked, so that a wrong layout is reported before hours of training.
    if not first.is_file():
        raise DataError(f"{first}: the first image of {spec.title} is missing; unpack its images in {images}")
    return dataset


_warned: set[tuple[str, ...]] = set()


def _warn_if_different(name: str, dataset: Dataset) -> None:
    """Log once what a published data set lacks."""
    if (problems := differences(dataset)) and (name, str(dataset.root), *problems) not in _warned:
        _warned.add((name, str(dataset.root), *problems))
        logger.warning(
            "%s is not the published data set, so results are not comparable with papers: %s; %s",
            *(name, "; ".join(problems), completion_advice(name)),
        )


def require_images(dataset: Dataset, items: Sequence[Item]) -> None:
    """Refuse items of a published split whose images are not on this disk.

    Raises:
        DataError: some are missing; their number and the first are named.
    """
    name = dataset.name.removesuffix(DRAWN)
    # Those of ImageNet and its variants have just been listed.
    listed = name in CATALOGUE and CATALOGUE[name].labels != _NAMES
    if listed and (missing := describe_missing(dataset, items)):
        raise DataError(f"{name}: {missing}; {completion_advice(name)}")


def completion_advice(name: str) -> str:
    """How to complete a published data set."""
    if name not in _OWN:
        return "the package that defines this data set says how to get it"
    return (
        f"`maple data verify {name} --quick` lists what differs; to fetch it again, move {CATALOGUE[name].folder}/ "
        f"away and run `maple data prepare {name}`"
    )
