"""Several processes write to one run folder at the same time."""

import errno
import logging
import os
from pathlib import Path

import pytest
from forked import ForkedProcess

from maple.errors import BusyError
from maple.runs import read_rows
from maple.runs.folder import append_row, lock_folder

fcntl = pytest.importorskip("fcntl")


def write_at_once(folder: Path) -> None:
    """Fork writers, which start together when a pipe is closed."""
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
        os.close(reading)
        assert {os.waitpid(writer, 0)[1] for writer in writers} == {0}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs fork")
def test_no_row_is_lost(tmp_path: Path) -> None:
    process = ForkedProcess(write_at_once, tmp_path)
    assert process.wait() == 0, process.stderr
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
