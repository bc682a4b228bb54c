"""Reading JSON: what is missing, damaged or of another kind is reported with the path and the advice."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from maple.errors import CheckpointError, DataError, shortened_list
from maple.files import read_json, read_json_lines, replacing, temporary_path, write_text


def test_json_is_read_as_the_kind_that_is_expected(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1]}')
    assert read_json(path) == {"a": [1]}
    with pytest.raises(DataError, match=r"a\.json is damaged: it should hold a JSON array, but holds {.*}; fix it$"):
        read_json(path, list, error=DataError, advice="fix it")


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b""])
def test_damaged_json_is_reported_with_advice(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.json is unreadable or damaged \(.*\); write it again$"):
        read_json(path, advice="write it again")


def test_missing_json_is_reported_as_the_caller_wants_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.json does not exist; train first$"):
        read_json(tmp_path / "a.json", error=DataError, advice="train first")
    with pytest.raises(CheckpointError, match=r"^not a run$"):
        read_json(tmp_path / "a.json", missing="not a run")
    with pytest.raises(CheckpointError, match="unreadable"):
        read_json(tmp_path)


def test_json_lines_are_numbered_and_damaged_ones_raise_or_are_collected(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_json_lines(path) == {}
    path.write_text('{"a": "x\u2028y"}\n\n[1]\n{"b"\n{"c": 2}\n', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"a\.jsonl is damaged: line 3 is not a JSON object; move it away$"):
        read_json_lines(path, advice="move it away")
    problems: dict[int, str] = {}
    objects = read_json_lines(path, on_damage=problems.__setitem__)
    assert objects == {1: {"a": "x\u2028y"}, 5: {"c": 2}}
    assert problems.keys() == {3, 4}
    assert problems[3] == "not a JSON object"
    assert problems[4].startswith("not JSON: ")


def test_lists_are_shortened_for_messages() -> None:
    assert shortened_list(["a", "b"]) == "a, b"
    assert shortened_list(range(1234), 2, separator="; ") == "0; 1 and 1,232 more"
    assert shortened_list(["x" * 100], longest=11) == "xxxx...xxxx"


KILLED = """
import os, signal, sys
from pathlib import Path
from maple.checkpoint import write_tensors
from maple.files import replacing, temporary_path
import torch

folder = Path(sys.argv[1])
with temporary_path(folder, folder=True) as path:
    (path / "model.onnx").touch()
    with replacing(folder / "rows.jsonl") as path:
        path.write_text("half")
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        write_tensors(folder / "prompts.safetensors", {"a": torch.zeros(1)}, {})
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_temporary_files_of_killed_processes_are_removed_by_the_next_writer(tmp_path: Path) -> None:
    own = {".tmpAbCdEf", ".maple-notes.tmp", ".rows.jsonl.abcdefgh.tmp", "a.tmp", ".maple-ABCDEFGH.tmp"}
    for name in own:
        (tmp_path / name).touch()
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, timeout=100)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == len(own) + 3
    with temporary_path(tmp_path) as file, temporary_path(tmp_path, folder=True) as folder:
        write_text(tmp_path / "other.txt", "")
        assert {path.name for path in tmp_path.iterdir()} == {*own, "other.txt", file.name, folder.name}, "in use"
    write_text(tmp_path / "other.txt", "")
    assert {path.name for path in tmp_path.iterdir()} == {*own, "other.txt"}


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError), replacing(tmp_path / ("a" * 255)) as path:
        path.write_text("half, and then \ud800", encoding="utf-8")
    assert list(tmp_path.iterdir()) == []
    write_text(tmp_path / ("a" * 255), "the longest name there can be")
