"""Somebody's own images, opened with patience: what a newcomer may have meant, and what lies about besides images."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

from maple.data.catalogue import known_names, load_dataset
from maple.data.checks.findings import Finding, number_of, some
from maple.data.emoji import PREFIX
from maple.data.folders.class_folders import (
    PART_NAMES,
    class_folders,
    detect_domains,
    is_ignored,
    list_folder,
    nfc,
    rename_classes,
    split_domain,
)
from maple.data.folders.manifests import SUFFIXES, is_manifest
from maple.data.images.reading import has_image_name, is_image_file
from maple.data.records import Dataset
from maple.errors import DataError

_FORM = "FOLDER/CLASS/picture.jpg, one folder of pictures for each class"
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".rar", ".7z", ".gz")


def open_source(
    source: str, root: Path | None = None, *, class_names: Mapping[str, str] | None = None, seed: int = 0
) -> tuple[Dataset, list[Finding]]:
    """Read a data set as `load_dataset` does, but without its empty classes; and say what else is there.

    Raises:
        DataError: nothing of the kind, with what the user may have meant; or whatever `load_dataset` refuses.
    """
    check_source(source)
    dataset = load_dataset(source, root, seed=seed, drop_empty=True)
    folder, findings = _own_folder(source), []
    if folder is not None:
        empty = [] if split_domain(source) else sorted(class_folders(folder) - {nfc(n) for n in dataset.class_names})
        if empty:
            verb = "holds no image and is" if len(empty) == 1 else "hold no image and are"
            text = f"{number_of(len(empty), 'class folder')} ({some(empty)}) {verb} left out"
            findings.append(Finding("empty classes", "warning", text, tuple(empty)))
            class_names = {old: new for old, new in (class_names or {}).items() if nfc(old) not in empty}
        findings += unexpected_files(folder)
    return rename_classes(dataset, class_names), findings


def check_source(source: str) -> None:
    """Refuse what cannot be a data set, with what the user may have meant.

    Raises:
        DataError: see there.
    """
    if source in known_names() or source.partition("/")[0] in known_names():
        return
    path = Path(source).expanduser()
    if not source.strip():
        raise DataError(f"no images are named; give the path of a folder: {_FORM}")
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{source!r:.200} cannot be reached ({reason}); give the path of a folder: {_FORM}") from error
    if is_folder:
        _check_folder(path)
    elif exists and not is_manifest(path):
        raise DataError(f"{source}: {_what_it_is(path)}")
    elif not exists and not split_domain(source):
        raise DataError(
            f"{source}: there is no such folder or file; give a folder ({_FORM}), FOLDER:DOMAIN for a folder of "
            "domains that hold these, or a .csv or .jsonl file with the columns path and label"
        )


def _check_folder(root: Path) -> None:
    held = list_folder(root)
    folders = [child for child in held if child.is_dir()]
    if not folders:
        images = [child.name for child in held if is_image_file(child)]
        what = f"{number_of(len(images), 'picture')} ({some(images)}) but no class folders" if images else "no folders"
        raise DataError(f"{root}: holds {what}; put the pictures of each class into a folder of its own: {_FORM}")
    if len(folders) == 1:
        inner = [child.name for child in list_folder(folders[0]) if child.is_dir()]
        if len(inner) > 1:
            raise DataError(
                f"{root}: holds one folder, {folders[0].name!r}, and that holds {number_of(len(inner), 'folder')} "
                f"({some(inner)}); if these are the classes, give {root / folders[0].name}"
            )
        raise DataError(
            f"{root}: holds only one class, {folders[0].name!r}, but a classifier needs at least two; expected {_FORM}"
        )
    if found := detect_domains(root):
        domains, common = found
        if all(name.casefold() in PART_NAMES for name in common):
            raise DataError(
                f"{root}: its classes are divided inside ({domains[0]}/{common[0]}, {domains[0]}/{common[1]}); turn "
                f"the folders around: {common[0]}/{domains[0]}, {common[1]}/{domains[0]}"
            )
        raise DataError(
            f"{root}: looks like a folder of domains ({some(domains)}) that all hold the same classes "
            f"({some(common)}); name one of them: {root}:{domains[0]}. If "
            f"{domains[0]} and {domains[1]} are the classes, leave out the "
            "folders inside, or give a table of path and label (.csv)"
        )


def _what_it_is(path: Path) -> str:
    if path.name.casefold().endswith(_ARCHIVES) or _is_zip(path):
        return f"is an archive; unpack it first, and give the folder: {_FORM}"
    if is_image_file(path):
        return f"is a picture; give the folder that holds the class folders: {_FORM}"
    return f"is a file; give a folder ({_FORM}), or a table of path and label that ends in {', '.join(SUFFIXES)}"


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except OSError:
        return False


def _own_folder(source: str) -> Path | None:
    """The folder of classes (or of train and test) that a source names; None for a table or a data set by name."""
    if domain := split_domain(source):
        return domain[0] / domain[1]
    path = Path(source).expanduser()
    return path if source not in known_names() and path.is_dir() else None


def unexpected_files(root: Path) -> list[Finding]:
    """What lies in a folder of classes and is no image of a class: system files, stray pictures, other files."""
    system, outside, others = [], [], []
    tops = {root}
    parts = [child for child in list_folder(root) if child.is_dir() and child.name.casefold() in PART_NAMES]
    if len(parts) > 1:
        tops |= set(parts)
        outside += [f"{c.name}/" for c in list_folder(root) if c.is_dir() and c not in parts]
    for place, folders, names in os.walk(root):
        here = Path(place)
        system += [str((here / name).relative_to(root)) for name in (*folders, *names) if is_ignored(name)]
        folders[:] = sorted(name for name in folders if not is_ignored(name))
        for name in sorted(names):
            if is_ignored(name):
                continue
            path = (here / name).relative_to(root)
            if here in tops and has_image_name(name):
                outside.append(str(path))
            elif not is_image_file(here / name):
                others.append(str(path))
    findings = []
    for kind, found, why in (
        ("system files", system, "hidden or of the system"),
        ("stray images", outside, "outside the class folders"),
        ("other files", others, "no images"),
    ):
        if found:
            text = f"{number_of(len(found), 'file or folder', 'files and folders')} {why}, not used: {some(found)}"
            level = "warning" if kind == "stray images" else "note"
            findings.append(Finding(kind, level, text, tuple(found)))  # type: ignore[arg-type]
    return findings


def short_name(dataset: str) -> str:
    """The name of a data set; of a folder only the last part, as the rest of its path is nobody's concern."""
    return dataset if dataset.startswith(PREFIX) else Path(dataset).name
