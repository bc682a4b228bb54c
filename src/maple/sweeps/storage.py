"""Object storage for finished runs, where machines do not share a folder.

Only the small files of a run are stored (settings, prompts, history, rows, predictions), never a resume state.
"""

import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from maple import files
from maple.errors import ConfigError
from maple.files import FAILURE

_NOT_STORED = ("resume.safetensors", ".lock", FAILURE)
_LAST = "prompts.safetensors"
"""Its presence marks a run as finished, so it is written after everything else."""


class Storage:
    """A folder at an fsspec URL, such as s3://bucket/sweep or gs://bucket/sweep."""

    def __init__(self, url: str) -> None:
        """Open the storage.

        Raises:
            ConfigError: the protocol is unknown, its package is missing, or the location cannot be reached.
        """
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._filesystem, base = fsspec.core.url_to_fs(self.url)
            self._base = str(base).rstrip("/")
            self._filesystem.makedirs(self._base, exist_ok=True)
        except (ImportError, ValueError, OSError) as error:
            raise ConfigError(
                f"the storage {url!r} cannot be opened ({error}); give an fsspec URL that every machine reaches, such "
                "as s3://bucket/folder, and install the package of its protocol (s3fs, gcsfs, adlfs)"
            ) from error

    def contains(self, name: str) -> bool:
        """Whether the finished run of this name is stored completely."""
        return bool(self._filesystem.exists(f"{self._base}/{name}/{_LAST}"))

    def put(self, folder: Path) -> None:
        """Store a finished run."""
        paths = [
            path
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in _NOT_STORED and not path.name.endswith(".tmp")
        ]
        for path in sorted(paths, key=lambda path: path.name == _LAST):
            target = f"{self._base}/{folder.name}/{path.relative_to(folder).as_posix()}"
            self._filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._filesystem.put_file(str(path), target)

    def get(self, name: str, root: Path) -> None:
        """Download a stored run into `root`, its prompts last.

        Raises:
            ConfigError: the storage lists a file outside of the run.
        """
        start = f"{self._base}/{name}/"
        relative_paths = [str(path).partition(start)[2] for path in self._filesystem.find(start)]
        for path in sorted(relative_paths, key=lambda path: path == _LAST):
            source, target = f"{start}{path}", (root / name / path).resolve()
            if not path or not target.is_relative_to((root / name).resolve()):
                raise ConfigError(f"{self.url} lists a file outside of {name}: {path!r}; it is not a maple run")

            def download(temporary: Path, source: str = source) -> Any:
                return self._filesystem.get_file(source, str(temporary))

            files.write_with(target, download)

    def scratch(self) -> Path:
        """The local folder for runs of this storage; it is kept, so that an interrupted run can be resumed."""
        return Path(tempfile.gettempdir()) / f"maple-sweep-{sha256(self.url.encode()).hexdigest()[:12]}"
