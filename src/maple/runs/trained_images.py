"""The images that a run was trained on, recognised by their content wherever they are met again."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from maple import files
from maple.config import RunSettings
from maple.data import Dataset, Item
from maple.data.catalogue import template_of
from maple.data.folders.class_folders import split_domain
from maple.data.saved_split import SAVED_SPLIT, read_saved_images
from maple.errors import CheckpointError, DataError, shortened
from maple.methods import ZERO_SHOT
from maple.runs.folder import TRAINED_IMAGES, read_settings

_FORMAT = 1


def write_trained_images(folder: Path, dataset: Dataset, items: Iterable[Item]) -> None:
    """Write the size and hash of the files, or rows of features, of these items; of rendered images the paths alone.

    Raises:
        DataError: a file cannot be read.
    """
    images: dict[str, list[int | str] | None] = {}
    for item in items:
        try:
            digest, size = dataset.digest_of(item), dataset.size_of(item)
        except OSError as error:
            problem = f"cannot be read ({error.strerror}); replace or remove the file"
            raise DataError(f"{dataset.file(item)}: {problem}") from error
        images[item.path] = None if digest is None or size is None else [size, digest]
    files.write_json(folder / TRAINED_IMAGES, {"format": _FORMAT, "images": images})


class TrainedImages:
    """The images that the run in `folder` was trained on, to leave them out of an evaluation.

    Zero-shot CLIP was trained on none. A run of an earlier version kept the paths alone: its images are recognised by
    their content as long as they are still where they were, and otherwise by their paths in the data set. `saved` is
    the division of the run, if it has one.

    Raises:
        CheckpointError: a file of the run is damaged.

    Example:
        >>> trained = TrainedImages(Path("runs/first"))
        >>> [item.path for item in dataset.test if trained.contains(dataset, item)]
        []
    """

    def __init__(self, folder: Path) -> None:
        settings = read_settings(folder)
        self._paths: set[str] = set()
        self._contents: dict[int, set[str]] = {}
        path = folder / SAVED_SPLIT
        self.saved = read_saved_images(path) if path.exists() else None
        self._without_content: set[str] = set()
        if settings.method.get("name") == ZERO_SHOT:
            return
        path = folder / TRAINED_IMAGES
        try:
            if path.exists():
                content: dict[str, Any] = files.read_json(path)
                images: dict[str, Any] = content["images"]
                if content["format"] != _FORMAT:
                    problem = f"{path} has format {shortened(repr(content['format']))}"
                    raise CheckpointError(f"{problem}; this version reads {_FORMAT}: upgrade maple")
                self._paths = {str(name) for name in images}
                for size, digest in filter(None, images.values()):
                    self._contents.setdefault(int(size), set()).add(str(digest))
            elif (folder / "items.json").exists():
                content = files.read_json(folder / "items.json")
                self._paths = {str(item["path"]) for item in content["items"]}
                self._read_original_files(settings)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} or items.json next to it is damaged ({shortened(repr(error))})") from error

    def _read_original_files(self, settings: RunSettings) -> None:
        source = settings.data.dataset
        if template_of(source) is not None:
            return
        domain = split_domain(source)
        root = domain[0] / domain[1] if domain else Path(source).expanduser()
        for name in self._paths:
            path = (root.parent if root.is_file() else root) / name
            try:
                self._contents.setdefault(path.stat().st_size, set()).add(files.sha256_of(path))
            except OSError:
                self._without_content.add(name)

    def contains(self, dataset: Dataset, item: Item, *, is_own: bool = False) -> bool:
        """Return whether the run was trained on the image of `item`.

        A benchmark's images are compared by their paths alone: its published split is kept as it is, copies included.

        Args:
            is_own: `dataset` is the run's own, so that a path stands for the same image, as the run's division has it;
                that of a row of features does as long as its content is the same, since rows are counted.
        """
        if is_own and (item.path in self._paths or (self.saved and item.path in self.saved.splits)):
            sizes = self.saved.sizes if self.saved else {}
            if not dataset.has_rows or sizes.get(item.path) == dataset.size_of(item):
                return item.path in self._paths
        if item.path in self._without_content:
            return True
        size = dataset.size_of(item) if self._contents else None
        digests = None if size is None else self._contents.get(size)
        try:
            return digests is not None and dataset.digest_of(item) in digests
        except OSError:  # an unreadable image is reported when it is opened
            return False
