"""The same classes in several domains: `root/DOMAIN/CLASS/image`, written `root:DOMAIN`."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from maple.data.folders import PART_NAMES, children, class_folders, load_folder
from maple.data.images import has_image_name
from maple.data.records import Dataset
from maple.errors import DataError, one_of

logger = logging.getLogger(__name__)


def split_domain(text: str) -> tuple[Path, str] | None:
    """Take `root:DOMAIN` apart; None where the text is no such thing: no colon, or no folder before it."""
    root, colon, domain = text.rpartition(":")
    folder = Path(root).expanduser()
    if not colon or Path(text).expanduser().exists() or not folder.is_dir():
        return None
    return folder, domain


def warn_of_domains(root: Path) -> None:
    """Warn if `root` looks like a folder of domains that is about to be read as one of classes."""
    if found := like_domains(root):
        domains, common = found
        logger.warning(
            "%s: all its folders hold the same folders (%s). If these are the classes, and %s domains, "
            "give the data set as %s:%s",
            root,
            ", ".join(common),
            ", ".join(domains),
            root,
            domains[0],
        )


def like_domains(root: Path) -> tuple[list[str], list[str]] | None:
    """The folders of `root` and the folders that all of these hold, if it looks like a folder of domains.

    It does if it has at least two folders, other than train, val and test, which share at least two and hold no image
    beside them.

    Raises:
        DataError: a folder cannot be listed.
    """
    common: set[str] | None = None
    folders = [child for child in children(root) if child.is_dir()]
    if all(folder.name.casefold() in PART_NAMES for folder in folders):
        return None
    for folder in folders:
        inside = set()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        inside.add(entry.name)
                    elif has_image_name(entry.name):
                        return None
        except OSError as error:
            raise DataError(f"{folder}: cannot be listed ({error.strerror}); make the folder readable") from error
        common = inside if common is None else common & inside
    if common and len(folders) > 1 and len(common) > 1:
        return [folder.name for folder in folders], sorted(common)
    return None


def load_domain(
    root: Path,
    domain: str,
    *,
    class_names: Mapping[str, str] | None = None,
    seed: int = 0,
    val_fraction: float = 0.0,
    test_fraction: float = 0.25,
) -> Dataset:
    """Read one domain of a folder of domains, as `load_folder` does, but over the classes of all domains.

    So labels agree between domains, and a class that a domain lacks is still a possible answer there. The data set is
    called ROOT/DOMAIN.

    Raises:
        ConfigError: a fraction is negative, or they sum to 1 or more.
        DataError: no such domain, or whatever `load_folder` refuses in it.
    """
    domains = {child.name: child for child in children(root) if child.is_dir()}
    if domain not in domains:
        raise DataError(f"{root}: {one_of('domain', domain, domains or ['(the folder holds no folders)'])}")
    classes = {name: sorted(class_folders(folder)) for name, folder in domains.items()}
    shared = sorted({name for names in classes.values() for name in names})
    for name, own in classes.items():
        if absent := sorted(set(shared) - set(own)):
            logger.warning("%s: domain %s has no folders of %s", root, name, ", ".join(absent))
    return load_folder(
        domains[domain],
        name=f"{root.resolve().name}/{domain}",
        classes=shared,
        class_names=class_names,
        seed=seed,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
    )
