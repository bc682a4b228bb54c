"""The hub, played by a folder: what is asked of it, and what is said when it refuses."""

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from typer.testing import CliRunner

from maple import PromptClassifier
from maple.cli import app
from maple.errors import CheckpointError
from maple.inference import hub
from maple.inference.classifier import NotTrainedError


class Hub:
    """What `HfApi` and `hf_hub_download` do, with a folder in the hub's place."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, Any]] = []
        self.failure: Exception | None = None

    def __call__(self, token: str | None) -> "Hub":
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        if self.failure is not None:
            raise self.failure
        self.calls.append(("create_repo", (repo_id, private, exist_ok)))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_branch(self, repository: str, *, branch: str, exist_ok: bool) -> None:
        self.calls.append(("create_branch", (repository, branch, exist_ok)))

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, revision: str | None, **options: Any
    ) -> Any:
        self.calls.append(("upload_folder", (repo_id, commit_message, revision, options)))
        shutil.copytree(folder_path, self.root / repo_id / (revision or "main"))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def download(self, repository: str, file: str, *, revision: Any = None, token: Any = None, **options: Any) -> str:
        if self.failure is not None:
            raise self.failure
        self.calls.append(("download", (repository, file, revision, token, options)))
        return str(self.root / repository / (revision or "main") / file)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", made)
    monkeypatch.setattr(hub, "hf_hub_download", made.download)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])  # whether or not there is a network here
    return made


def test_push_and_load(fake: Hub, prompts: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (3, 30, 40, 3)).astype(np.uint8)
    made = PromptClassifier.from_pretrained(prompts, device="cpu")
    address = made.push_to_hub("me/pets", private=True, token="secret", commit_message="First", create_pr=True)
    assert address == "https://hub/me/pets/commit/1"
    assert fake.calls == [
        ("token", "secret"),
        ("create_repo", ("me/pets", True, True)),
        ("upload_folder", ("me/pets", "First", None, {"create_pr": True})),
    ]
    pushed = fake.root / "me" / "pets" / "main"
    assert {path.name for path in pushed.iterdir()} == {"prompts.safetensors", "README.md"}
    card = (pushed / "README.md").read_text()
    assert 'from_pretrained("me/pets")' in card
    assert "secret" not in card
    options = {"cache_dir": "cache", "force_download": True, "local_files_only": False}
    loaded = PromptClassifier.from_pretrained("hf-hub:me/pets", token="secret", device="cpu", **options)
    assert fake.calls[-1] == ("download", ("me/pets", "prompts.safetensors", None, "secret", options))
    assert np.array_equal(loaded.predict_proba(images), made.predict_proba(images))


def test_a_branch(fake: Hub, prompts: Path) -> None:
    made = PromptClassifier.from_pretrained(prompts, device="cpu")
    made.push_to_hub("pets", branch="v2")
    assert ("create_branch", ("me/pets", "v2", True)) in fake.calls
    loaded = PromptClassifier.from_pretrained("me/pets", revision="v2", device="cpu")
    assert loaded.class_names_ == made.class_names_


@pytest.mark.usefixtures("fake")
def test_predict_from_the_hub(prompts: Path, pictures: Path) -> None:
    PromptClassifier.from_pretrained(prompts, device="cpu").push_to_hub("me/pets")
    outputs = [
        CliRunner().invoke(app, ["predict", run, str(pictures / "a.png"), "--device", "cpu"], catch_exceptions=False)
        for run in ("hf-hub:me/pets", str(prompts))
    ]
    assert outputs[0].exit_code == 0
    assert outputs[0].stdout == outputs[1].stdout


def refusals() -> list[Exception]:
    """What the hub's client raises; the network's errors are of one HTTP library or another."""
    answer: Any = SimpleNamespace(headers={}, request=None)
    network = type("ConnectError", (Exception,), {"__module__": "httpx"})
    return [
        HfHubHTTPError("401 Unauthorized\nmore", response=answer),
        RepositoryNotFoundError("401 Unauthorized\nmore", response=answer),
        network("401 Unauthorized"),
        ValueError("401 Unauthorized"),
    ]


@pytest.mark.parametrize("failure", refusals(), ids=lambda failure: type(failure).__name__)
def test_refusals_are_told_in_a_line(fake: Hub, prompts: Path, failure: Exception) -> None:
    made = PromptClassifier.from_pretrained(prompts, device="cpu")
    fake.failure = failure
    with pytest.raises(CheckpointError, match=r"^nothing was pushed to 'me/pets': 401 Unauthorized$"):
        made.push_to_hub("me/pets")
    with pytest.raises(CheckpointError, match=r"^'me/pets' is not a run folder or prompts .* hub: 401 Unauthorized$"):
        PromptClassifier.from_pretrained("me/pets")


def test_a_bug_is_no_refusal(fake: Hub) -> None:
    fake.failure = KeyError("bug")
    with pytest.raises(KeyError, match="bug"):
        PromptClassifier.from_pretrained("me/pets")


def test_saving_can_push(fake: Hub, prompts: Path, tmp_path: Path) -> None:
    """With the arguments of huggingface_hub's mixin; other files of the folder stay."""
    made = PromptClassifier.from_pretrained(prompts, device="cpu")
    folder = tmp_path / "pets"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert made.save_pretrained(folder, push_to_hub=True, private=True) == "https://hub/me/pets/commit/1"
    assert (folder / "config.json").read_text() == "{}"
    assert ("create_repo", ("pets", True, True)) in fake.calls
    assert 'from_pretrained("me/pets")' in (fake.root / "me" / "pets" / "main" / "README.md").read_text()


def test_saving_over_a_file_is_refused(prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "pets").write_text("mine")
    with pytest.raises(CheckpointError, match=r"pets is a file; give a folder"):
        PromptClassifier.from_pretrained(prompts, device="cpu").save_pretrained(tmp_path / "pets")
    assert (tmp_path / "pets").read_text() == "mine"


def test_nothing_learned_is_nothing_pushed(fake: Hub) -> None:
    with pytest.raises(NotTrainedError, match="has learned nothing yet"):
        PromptClassifier().push_to_hub("me/pets")
    assert not fake.root.exists()


def test_a_name_of_the_hub_without_its_prefix_is_told() -> None:
    """The command takes names for folders."""
    with pytest.raises(CheckpointError, match=r"no run folder or prompts file me/pets; .* is written hub:me/pets"):
        CliRunner().invoke(app, ["predict", "me/pets", "a.png"], catch_exceptions=False)
