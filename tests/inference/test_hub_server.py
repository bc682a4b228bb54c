"""Prompts go to a hub and come back, by its protocol: a server on this machine takes the hub's place."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hub_server import TOKEN, Hub, running_hub
from huggingface_hub import constants
from typer.testing import CliRunner

from maple import PromptClassifier
from maple.checkpoint import read_prompts
from maple.cli import app
from maple.errors import CheckpointError, ConfigError

# The hub's client sends bytes in a way that its HTTP library is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_push_and_predict_from_a_hub(hub: Hub, prompts: Path, pictures: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (3, 30, 40, 3)).astype(np.uint8)
    made = PromptClassifier.from_pretrained(prompts, device="cpu")
    address = made.push_to_hub("acme/pets")
    assert address.startswith(f"{hub.url}/acme/pets/commit/")
    files = hub.repositories["acme/pets"]["main"]
    assert files.keys() == {"README.md", "prompts.safetensors"}
    for name in ("acme/pets", "hub:acme/pets", "hf-hub:acme/pets"):
        loaded = PromptClassifier.from_pretrained(name, device="cpu", cache_dir=tmp_path / name.replace(":", "-"))
        assert np.array_equal(loaded.predict_proba(images), made.predict_proba(images))
    run = CliRunner().invoke
    outputs = [
        run(app, ["predict", source, str(pictures / "a.png"), "--device", "cpu"], catch_exceptions=False)
        for source in ("hub:acme/pets", str(prompts))
    ]
    assert outputs[0].exit_code == 0, outputs[0].output
    assert outputs[0].stdout == outputs[1].stdout


def test_the_command_pushes_no_path_of_this_machine(hub: Hub, prompts: Path, tmp_path: Path) -> None:
    from maple.checkpoint import read_tensors, write_tensors

    tensors, content = read_tensors(prompts)
    place = str(tmp_path / "private" / "pets")
    content["info"] |= {"dataset": place, "data": {"dataset": place, "shots": 4}}
    write_tensors(tmp_path / "prompts.safetensors", tensors, content)
    result = CliRunner().invoke(app, ["push", str(tmp_path / "prompts.safetensors"), "acme/pets", "--branch", "v2"])
    assert result.exit_code == 0, result.output
    assert "next: maple predict hub:acme/pets image.jpg" in result.output
    for pushed in hub.repositories["acme/pets"]["v2"].values():
        assert str(tmp_path).encode() not in pushed
    (tmp_path / "again.safetensors").write_bytes(hub.repositories["acme/pets"]["v2"]["prompts.safetensors"])
    assert read_prompts(tmp_path / "again.safetensors").info["data"] == {"dataset": "pets", "shots": 4}


@pytest.mark.usefixtures("hub")
def test_refusals_of_a_hub(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"'acme/none' is not a run folder .* cannot be fetched from the hub"):
        PromptClassifier.from_pretrained("hub:acme/none")
    with pytest.raises(CheckpointError, match=r"'hub:pets' does not name a repository .* write hub:OWNER/NAME"):
        PromptClassifier.from_pretrained("hub:pets")
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(CheckpointError, match="nothing was pushed to 'acme/pets'"):
        CliRunner().invoke(app, ["push", str(prompts), "acme/pets"], catch_exceptions=False)


@pytest.mark.usefixtures("hub")
def test_a_gallery(prompts: Path, tmp_path: Path) -> None:
    PromptClassifier.from_pretrained(prompts, device="cpu").push_to_hub("acme/pets")
    index, page = tmp_path / "gallery.toml", tmp_path / "gallery.html"
    local = tmp_path / "mine.safetensors"
    local.write_bytes(prompts.read_bytes())
    index.write_text(
        'title = "Ours <b>"\n[[prompts]]\nsource = "hub:acme/pets"\nnote = "<script>"\n'
        '[[prompts]]\nsource = "mine.safetensors"\n[[prompts]]\nsource = "nowhere"\n',
        encoding="utf-8",
    )
    result = CliRunner().invoke(app, ["gallery", str(index), "--output", str(page)])
    assert result.exit_code == 1, result.output
    assert "nowhere is left out: there is no run folder or prompts file" in result.output
    text = page.read_text(encoding="utf-8")
    assert "Ours &lt;b&gt;" in text
    assert "<script>" not in text
    assert "maple predict hub:acme/pets image.jpg" in text
    assert "2 entries" in text
    assert "http" not in text.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("title = 1", "needs a title"),
        ('title = "x"\nprompts = []', "needs a title"),
        ("[[prompts]]\nnote = 'x'", r"prompts\[0\] has no source"),
        ("[[prompts]]\nsource = 'x'\nurl = 'y'", r"prompts\[0\]: unknown entry 'url'; choose one of: source, note"),
        ("titel = 'x'", "unknown entry 'titel'"),
        ("title =", "is not valid TOML"),
    ],
)
def test_malformed_indexes(tmp_path: Path, content: str, message: str) -> None:
    from maple.gallery import read_gallery

    (tmp_path / "index.toml").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_gallery(tmp_path / "index.toml")
    with pytest.raises(ConfigError, match="there is no such file"):
        read_gallery(tmp_path / "none.toml")
