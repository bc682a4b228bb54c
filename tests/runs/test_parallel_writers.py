"""Several processes write to one run folder at the same time."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maple.errors import BusyError
from maple.runs import read_rows
from maple.runs.folder import append_row, lock_folder

fcntl = pytest.importorskip("fcntl")

# One process imports the package and forks the writers, which start together when a pipe is closed.
WRITERS = """
import os, sys
from pathlib import Path
from maple.runs.folder import append_row

folder = Path(sys.argv[1])
for trial in range(15):
    reading, writing = os.pipe()
    writers = []
    for number in range(8):
        writers.append(os.fork())
        if not writers[-1]:
            os.close(writing)
            os.read(reading, 1)
            append_row(folder / str(trial), {"dataset": f"own{number}", "top1": 0.5})
            append_row(folder / str(trial), {"dataset": "shared", "top1": number})  # replaces the one before
            os._exit(0)
    os.close(writing)
    assert {os.waitpid(writer, 0)[1] for writer in writers} == {0}
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs fork")
def test_no_row_is_lost(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", WRITERS, str(tmp_path)], check=True, timeout=100)
    for trial in range(15):
        names = sorted(row["dataset"] for row in read_rows(tmp_path / str(trial)))
        assert names == [*(f"own{number}" for number in range(8)), "shared"], trial


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING), lock_folder(tmp_path):
        append_row(tmp_path, {"dataset": "one"})
    assert f"the file system of {tmp_path} has no locks ({os.strerror(code)})" in caplog.text
    assert read_rows(tmp_path) == [{"dataset": "one"}]


def test_one_process_trains(tmp_path: Path) -> None:
    with lock_folder(tmp_path), pytest.raises(BusyError, match="another process is training in"), lock_folder(tmp_path):
        pass
