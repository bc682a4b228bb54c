"""Features on disk: a folder of extracted features, the least recently used of which are removed first.

An entry is a safetensors file, named by its key, with the features and, as metadata, what they are of and a checksum.
Entries are written atomically and never changed, and each can be removed at any time, so processes need no locks: two
that compute the same entry both write it.
"""

import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from maple import files
from maple.errors import ConfigError
from maple.places import CACHE_VARIABLE, OFF, cache_folder

logger = logging.getLogger(__name__)

SIZE_VARIABLE = "MAPLE_CACHE_SIZE"
DEFAULT_BYTES = 5 * 1000**3

_SUFFIX = ".safetensors"
_KEY = "maple"
_LONGEST_HEADER = 65536
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("kmgt", 1)}


@dataclass(frozen=True)
class Entry:
    """One file of the cache: its size in bytes, when it was last used (seconds since 1970), and its description.

    The description is empty where the file is damaged.

    Example:
        >>> [entry.description["images"] for entry in FeatureCache.open().entries()]
        [8100, 160]
    """

    path: Path
    size: int
    used: float
    description: dict[str, Any]


@dataclass(frozen=True)
class FeatureCache:
    """The cache in `folder`, of at most `limit` bytes.

    Example:
        >>> cache = FeatureCache(Path("features"), limit=10**9)
        >>> cache.write(key, torch.zeros(8100, 512), {"images": 8100})
        >>> cache.read(key).shape
        torch.Size([8100, 512])
    """

    folder: Path
    limit: int

    @classmethod
    def open(cls) -> "FeatureCache | None":
        """Return the user's cache; None if it is off, or there is no home folder for it.

        It is in `maple.places.cache_folder`; its limit is `$MAPLE_CACHE_SIZE`, else 5 GB.

        Raises:
            ConfigError: the limit is not a size.
        """
        home = cache_folder()
        if home is None:
            return None
        return cls(home / "features", _parse_size(os.environ.get(SIZE_VARIABLE, "")))

    @property
    def is_writable(self) -> bool:
        """Whether entries can be added, as far as the permissions of the folder, or of where it will be made, say."""
        existing = next(place for place in (self.folder, *self.folder.absolute().parents) if os.path.exists(place))
        return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)

    def read(self, key: str) -> Tensor | None:
        """Return the features of an entry, and note its use; None if there is none.

        One that cannot be read, or is damaged, counts as none, with a warning.
        """
        path = self._path(key)
        try:
            # Read whole, as a file that another process removes meanwhile cannot be opened twice.
            content = path.read_bytes()
            about = _metadata(content)
            # A copy, since how memory is aligned may change the last bits of a product.
            features = load(content)["features"].clone()
            if about["key"] != key or about["sha256"] != _digest(features):
                raise ValueError("its content is not what was written")
        except (FileNotFoundError, NotADirectoryError):  # the latter is reported when it is written
            return None
        except OSError as error:
            logger.warning("%s cannot be read (%s), and is computed again", path, error.strerror or error)
            return None
        except (SafetensorError, ValueError, KeyError) as error:
            logger.warning("%s is damaged, and is computed again: %s", path, error)
            return None
        with suppress(OSError):  # the cache of another user, or removed by another process
            os.utime(path)
        return features

    def write(self, key: str, features: Tensor, description: dict[str, Any]) -> None:
        """Add an entry of features [N, D], on the CPU, and remove those used least recently beyond the limit.

        Features that are larger than the limit are not kept. A folder that cannot be written is reported once.
        """
        path = self._path(key)
        try:
            if features.nbytes <= self.limit:
                about = json.dumps({"key": key, "sha256": _digest(features), "description": description})
                # The disk is not waited for: after a loss of power, the checksum detects what did not reach it.
                with files.replacing(path, flush=False) as temporary:
                    temporary.write_bytes(save({"features": features}, metadata={_KEY: about}))
                self._shrink(keep=path)
        except OSError as error:
            _warn_once(str(self.folder), error.strerror or str(error))

    def entries(self, *, describe: bool = True) -> list[Entry]:
        """Return the entries, the most recently used first; without their descriptions if these are not needed."""
        entries = []
        for path in self._files():
            with suppress(OSError):  # removed meanwhile
                status = path.stat()
                description = _description(path) if describe else {}
                entries.append(Entry(path, status.st_size, status.st_mtime, description))
        return sorted(entries, key=lambda entry: (-entry.used, entry.path.name))

    def clear(self, older_than: float = 0.0) -> tuple[int, int]:
        """Remove the entries that were not used within `older_than` days: their number, and their size in bytes.

        Raises:
            ConfigError: an entry cannot be removed.
        """
        count = size = 0
        for entry in self.entries(describe=False):
            if entry.used <= time.time() - older_than * 86400 or not older_than:
                try:
                    entry.path.unlink(missing_ok=True)
                except OSError as error:
                    raise ConfigError(
                        f"{entry.path} cannot be removed ({error.strerror}); change the permissions of its folder"
                    ) from error
                count, size = count + 1, size + entry.size
        if self.folder.is_dir():
            with suppress(OSError), files.temporary_path(self.folder):
                pass  # whoever makes a temporary file there removes those of processes that were killed
        return count, size

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _files(self) -> Iterator[Path]:
        with suppress(OSError):
            yield from (path for path in self.folder.iterdir() if re.fullmatch(r"[0-9a-f]{64}", path.stem))

    def _shrink(self, keep: Path) -> None:
        entries = self.entries(describe=False)
        excess = sum(entry.size for entry in entries) - self.limit
        for entry in reversed(entries):
            if excess > 0 and entry.path != keep:
                with suppress(OSError):  # removed meanwhile, or in use on a system where that prevents it
                    entry.path.unlink()
                excess -= entry.size


def _digest(features: Tensor) -> str:
    shape = f"{features.dtype}{list(features.shape)}"
    return sha256(shape.encode() + features.contiguous().numpy().tobytes()).hexdigest()


def _metadata(content: bytes) -> dict[str, Any]:
    """What is written next to the features, from the beginning of a file; ValueError if it is not there."""
    length = int.from_bytes(content[:8], "little")
    header = files.parse_json(content[8 : 8 + min(length, _LONGEST_HEADER)])
    try:
        about = files.parse_json(header["__metadata__"][_KEY])
        if isinstance(about, dict) and isinstance(about["description"], dict):
            return about
    except (KeyError, TypeError):
        pass
    raise ValueError("it does not say what it is of")


def _description(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            description: dict[str, Any] = _metadata(file.read(_LONGEST_HEADER + 8))["description"]
            return description
    except (OSError, ValueError):
        return {}


def _parse_size(text: str) -> int:
    if not text.strip():
        return DEFAULT_BYTES
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if parts is None or parts[2] not in _UNITS:
        raise ConfigError(f"{SIZE_VARIABLE} is {text!r}; give a size, such as 5GB, 500MB or 2GiB")
    return int(float(parts[1]) * _UNITS[parts[2]])


@cache
def _warn_once(folder: str, reason: str) -> None:
    logger.warning(
        "%s: features cannot be kept there (%s), so they are computed each time; set %s to another folder, or to %s",
        *(folder, reason, CACHE_VARIABLE, OFF),
    )
