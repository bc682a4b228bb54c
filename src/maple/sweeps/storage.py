"""Finished runs in an object store: where machines that share no folder leave their results.

Only the small files of a run travel (settings, prompts, history, rows, predictions), never a resume state.
"""

import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from maple.errors import ConfigError
from maple.files import FAILURE

_STAYS = ("resume.safetensors", ".lock", FAILURE)
_LAST = "prompts.safetensors"
"""Its presence means that a run has finished, so it is written after everything else."""


class Storage:
    """A folder at an fsspec URL, such as s3://bucket/sweep or gs://bucket/sweep."""

    def __init__(self, url: str) -> None:
        """Open it.

        Raises:
            ConfigError: the protocol is unknown, its package is missing, or the place cannot be reached.
        """
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._files, place = fsspec.core.url_to_fs(self.url)
            self._place = str(place).rstrip("/")
            self._files.makedirs(self._place, exist_ok=True)
        except (ImportError, ValueError, OSError) as error:
            raise ConfigError(
                f"the storage {url!r} cannot be opened ({error}); give an fsspec URL that every machine reaches, such "
                "as s3://bucket/folder, and install the package of its protocol (s3fs, gcsfs, adlfs)"
            ) from error

    def holds(self, name: str) -> bool:
        """Whether the run of this name has been left here, whole."""
        return bool(self._files.exists(f"{self._place}/{name}/{_LAST}"))

    def put(self, folder: Path) -> None:
        """Leave a finished run here."""
        found = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _stays(path)]
        for path in sorted(found, key=lambda path: path.name == _LAST):
            target = f"{self._place}/{folder.name}/{path.relative_to(folder).as_posix()}"
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(path), target)

    def get(self, name: str, root: Path) -> None:
        """Fetch a run that is whole into `root`, its prompts last."""
        start = f"{self._place}/{name}/"
        inside = [str(path).partition(start)[2] for path in self._files.find(start)]
        for path in sorted(inside, key=lambda path: path == _LAST):
            target = (root / name / path).resolve()
            if not path or not target.is_relative_to((root / name).resolve()):
                raise ConfigError(f"{self.url} holds a file outside of {name}: {path!r}; it is not a run of ours")
            target.parent.mkdir(parents=True, exist_ok=True)
            self._fetch(f"{start}{path}", target)

    def scratch(self) -> Path:
        """Where a machine works on runs that end up here: kept, so that an interrupted one goes on."""
        return Path(tempfile.gettempdir()) / f"maple-sweep-{sha256(self.url.encode()).hexdigest()[:12]}"

    def _fetch(self, source: str, target: Path) -> None:
        from maple import files

        def write(temporary: Path) -> Any:
            return self._files.get_file(source, str(temporary))

        files.write_with(target, write)


def _stays(path: Path) -> bool:
    return path.name in _STAYS or path.name.endswith(".tmp")
