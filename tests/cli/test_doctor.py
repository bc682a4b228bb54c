"""`maple doctor`, and `last` as the name of a run."""

import json
import os
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from maple.cli import app, doctor
from maple.cli.options import newest_run
from maple.errors import ConfigError

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAPLE_CACHE", str(tmp_path))
    monkeypatch.setenv("MAPLE_DATA", str(tmp_path / "none"))
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "features" / "a")
    done = CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False)
    content = json.loads(done.stdout)
    assert set(content) == {"versions", "devices", "caches", "data_root", "extras", "hub"}
    assert {"maple", "python", "torch", "open_clip_torch", "timm", "transformers"} <= set(content["versions"])
    assert content["devices"][0]["device"] == "cpu"
    assert content["caches"][0] == {"name": "cache", "folder": str(tmp_path), "size": 5}
    assert content["data_root"] == f"{tmp_path / 'none'} (MAPLE_DATA), which is not a folder"
    assert content["extras"], "those of the installed package"
    assert all(row["installed"] == (not row["missing"]) for row in content["extras"])
    shown = CliRunner().invoke(app, ["doctor"], catch_exceptions=False).stdout
    assert f"torch            {content['versions']['torch']}" in shown


def test_every_extra_is_explained() -> None:
    extras = set(tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"])
    assert extras - {"test", "docs"} <= set(doctor.EXTRAS)


def test_missing_requirements_of_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = {
        "top": ["always>1", 'new>=2; extra == "x"', 'old>=2; extra == "x"', 'nested[y]; extra == "x"', 'z; extra=="z"'],
        "nested": ['below; extra == "y"', "always"],
    }
    monkeypatch.setattr(doctor.metadata, "requires", requirements.get)
    monkeypatch.setattr(doctor, "_version", {"new": "2.1", "old": "1.0", "nested": "1.0"}.get)
    assert doctor._missing("top", "x") == {"old>=2", "below"}


def make_run(folder: Path, started: str | None, *, finished: bool = True) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if started is not None:
        (folder / "environment.json").write_text(json.dumps({"started": started}))
    if finished:
        (folder / "prompts.safetensors").write_bytes(b"")
        os.utime(folder / "prompts.safetensors", (1.7e9, 1.7e9))  # in 2023


def test_last_is_the_newest_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="last: there is no finished run in runs/"):
        newest_run("last")
    make_run(Path("runs/copied"), None)
    assert newest_run(Path("last")) == Path("runs/copied")
    make_run(Path("runs/sweep/b"), "2025-05-02T10:00:00+00:00")
    make_run(Path("runs/a"), "2025-05-01T10:00:00+00:00")
    make_run(Path("runs/unfinished"), "2026-01-01T10:00:00+00:00", finished=False)
    make_run(Path("runs/a/zero_shot"), "2026-01-01T10:00:00+00:00")
    make_run(Path("last"), "2026-01-01T10:00:00+00:00")
    assert newest_run("last") == "runs/sweep/b"
    for other in ("./last", "runs/a", "hf-hub:ada/last", "last.safetensors"):
        assert newest_run(other) == other


@pytest.mark.parametrize("command", ["predict", "serve", "export", "evaluate", "report", "explain", "inspect"])
def test_every_command_knows_last(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="last: there is no finished run"):
        CliRunner().invoke(app, [command, "last"], catch_exceptions=False)
