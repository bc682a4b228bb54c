"""Open a user's image folder, and suggest what was meant when it cannot be read as a data set."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from maple.data.catalogue import known_names, load_dataset
from maple.data.checks.findings import Finding, number_of
from maple.data.folders.class_folders import (
    class_folder_names,
    detect_domains,
    rename_classes,
    split_domain,
    split_folders,
    split_of,
)
from maple.data.folders.listing import is_ignored, list_folder
from maple.data.folders.manifests import SUFFIXES, is_manifest
from maple.data.folders.unused import unread_images, unread_kind
from maple.data.images.formats import has_image_name, is_image_file
from maple.data.records import Dataset
from maple.data.sources.opening import names_source
from maple.errors import DataError, shortened_list
from maple.files import on_disk
from maple.names import is_features, nfc

_FORM = "FOLDER/CLASS/image.jpg, one folder of images for each class"
_ARCHIVES = (".rar", ".7z", ".gz", ".bz2", ".xz", ".zst")


def open_source(
    source: str,
    root: Path | None = None,
    *,
    class_names: Mapping[str, str] | None = None,
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
) -> tuple[Dataset, list[Finding]]:
    """Read a data set as `load_dataset` does, without its empty classes, and report unexpected files.

    Raises:
        DataError: as `load_dataset`; if it looks like a common mistake, the message says what may have been meant.

    Example:
        >>> dataset, remarks = open_source("pets", seed=1)
        >>> [remark.text for remark in remarks]
        ['1 class folder (fish) holds no image and is left out']
    """
    check_source(source)
    findings: list[Finding] = []
    dataset = load_dataset(
        *(source, root),
        seed=seed,
        drop_empty=True,
        image_column=image_column,
        label_column=label_column,
        on_finding=findings.append,
    )
    if names_source(source):
        if class_names:
            findings = [finding for finding in findings if finding.kind != "numbered classes"]
        return rename_classes(dataset, class_names), findings
    domain, path = split_domain(source), on_disk(Path(source).expanduser())
    if domain:
        findings += unexpected_files(domain[0] / domain[1])
    elif source not in known_names() and path.is_dir():
        if empty := sorted(class_folder_names(path) - {nfc(name) for name in dataset.class_names}):
            verb = "holds no image and is" if len(empty) == 1 else "hold no image and are"
            text = f"{number_of(len(empty), 'class folder')} ({shortened_list(empty)}) {verb} left out"
            findings.append(Finding("empty classes", "warning", text, tuple(empty)))
            class_names = {old: new for old, new in (class_names or {}).items() if nfc(old) not in empty}
        findings += unexpected_files(path)
    return rename_classes(dataset, class_names), findings


def check_source(source: str) -> None:
    """Refuse what cannot be a data set, and suggest what was meant.

    Raises:
        DataError: the source is empty, unreachable, an archive, an image, or a folder of another structure.
    """
    if is_features(source) or source in known_names() or source.partition("/")[0] in known_names():
        return
    if source.strip() and "\0" not in source and names_source(source):
        return
    path = on_disk(Path(source).expanduser())
    if not source.strip():
        raise DataError(f"no data set is given; give the path of a folder: {_FORM}")
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{source!r:.200} cannot be reached ({reason}); give the path of a folder: {_FORM}") from error
    if is_folder:
        _check_folder(path)
    elif exists and not is_manifest(path):
        if path.name.casefold().endswith(_ARCHIVES):
            raise DataError(
                f"{source}: is an archive of a kind that is not read; unpack it first, and give the folder: {_FORM}"
            )
        if is_image_file(path):
            raise DataError(f"{source}: is an image; give the folder that holds the class folders: {_FORM}")
        raise DataError(
            f"{source}: is a file; give a folder ({_FORM}), a table of path and label that ends in "
            f"{', '.join(SUFFIXES)}, a Parquet or Arrow file, or a zip or tar archive"
        )
    elif not exists and not split_domain(source) and not os.path.islink(path):
        raise DataError(
            f"{source}: there is no such folder or file; give a folder ({_FORM}), FOLDER:DOMAIN for a folder of "
            "domains that hold these, a .csv or .jsonl file with the columns path and label, a Parquet file, an "
            "archive, shards/{0000..0012}.tar, or hf:OWNER/NAME"
        )


def _check_folder(root: Path) -> None:
    children = list_folder(root)
    folders = [child for child in children if os.path.isdir(child)]
    unread = "".join(f"; {finding.text}" for finding in unread_images(root, children))
    if not folders:
        images = [child.name for child in children if is_image_file(child)]
        held = f"{number_of(len(images), 'image')} ({shortened_list(images)}) but no class folders"
        raise DataError(
            f"{root}: holds {held if images else 'no folders'}; put the images of each class into their own folder: "
            f"{_FORM}{unread}"
        )
    if len(folders) == 1:
        inner = [child.name for child in list_folder(folders[0]) if os.path.isdir(child)]
        if len(inner) > 1:
            raise DataError(
                f"{root}: holds one folder, {folders[0].name!r}, and that holds {number_of(len(inner), 'folder')} "
                f"({shortened_list(inner)}); if these are the classes, give {root / folders[0].name}"
            )
        raise DataError(
            f"{root}: holds only one class, {folders[0].name!r}, but a classifier needs at least two; expected {_FORM}"
            f"{unread}"
        )
    if detected := detect_domains(root):
        domains, shared = detected
        if all(map(split_of, shared)):
            raise DataError(
                f"{root}: its classes are divided inside ({domains[0]}/{shared[0]}, {domains[0]}/{shared[1]}); turn "
                f"the folders around: {shared[0]}/{domains[0]}, {shared[1]}/{domains[0]}"
            )
        raise DataError(
            f"{root}: looks like a folder of domains ({shortened_list(domains)}) that all hold the same classes "
            f"({shortened_list(shared)}); name one of them: {root}:{domains[0]}. If {domains[0]} and {domains[1]} are "
            "the classes, remove the folders inside, or give a table of path and label (.csv)"
        )


def unexpected_files(root: Path) -> list[Finding]:
    """Report what a folder of classes holds in addition to their images: system files, stray images, other files."""
    system, outside, others = [], [], []
    class_parents = {root}
    if splits := split_folders(root).values():
        class_parents |= {folder for split in splits for folder in (split, *split.parents)}
        others_here = (child for child in list_folder(root) if os.path.isdir(child) and child not in class_parents)
        outside += [f"{child.name}/" for child in others_here]
    for place, folders, names in os.walk(root):
        folder = Path(place)
        system += [str((folder / name).relative_to(root)) for name in (*folders, *names) if is_ignored(name)]
        folders[:] = sorted(name for name in folders if not is_ignored(name))
        for name in sorted(name for name in names if not is_ignored(name)):
            path = str((folder / name).relative_to(root))
            if folder in class_parents and has_image_name(name):
                outside.append(path)
            elif not is_image_file(folder / name) and not unread_kind(folder / name):
                others.append(path)
    kinds: tuple[tuple[str, Literal["note", "warning"], list[str], str], ...] = (
        ("system files", "note", system, "hidden or of the system"),
        ("stray images", "warning", outside, "outside the class folders"),
        ("other files", "note", others, "not images"),
    )
    findings = []
    for kind, level, paths, problem in kinds:
        if paths:
            count = number_of(len(paths), "file or folder", "files and folders")
            findings.append(Finding(kind, level, f"{count} {problem}, not used: {shortened_list(paths)}", tuple(paths)))
    return findings
