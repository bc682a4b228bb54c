"""The archives of ILSVRC 2012, which only registered users get, sorted into folders of synsets."""

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

from maple.errors import DownloadError


def sort_archives(images: Path, say: Callable[[str], None] = lambda _text: None) -> None:
    """Make `images/train` and `images/val` of the archives that a user has put into `images`, as torchvision does.

    A part whose archive is not there, or that is there already, is left alone. Parts get their names when complete.

    Raises:
        DownloadError: an archive is damaged, or scipy is not installed (the devkit needs it).
    """
    devkit = images / "ILSVRC2012_devkit_t12.tar.gz"
    for part in ("train", "val"):
        archive = images / f"ILSVRC2012_img_{part}.tar"
        if (images / part).exists() or not archive.exists():
            continue
        if part == "val" and not devkit.exists():
            raise DownloadError(f"{devkit} is missing: it says which class each validation image has; put it there")
        say(f"{archive}: sorting into {images / part}")
        making = images / f".making-{part}"
        shutil.rmtree(making, ignore_errors=True)
        try:
            _sort(images, part, making)
            making.rename(images / part)
        except ImportError as error:
            raise DownloadError(f"{archive} cannot be sorted into folders ({error}): pip install scipy") from error
        except (RuntimeError, OSError, tarfile.TarError) as error:
            raise DownloadError(f"{archive} cannot be sorted into folders: {error}") from error
        finally:
            shutil.rmtree(making, ignore_errors=True)


def _sort(images: Path, part: str, making: Path) -> None:
    from torchvision.datasets import imagenet

    if part == "train":
        imagenet.parse_train_archive(str(images), folder=making.name)
        return
    if not (images / imagenet.META_FILE).exists():
        imagenet.parse_devkit_archive(str(images))
    imagenet.parse_val_archive(str(images), folder=making.name)
