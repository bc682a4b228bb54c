"""Repositories of a hub that runs on this machine: found, fetched, cached, and missing."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import clip_files as files
import huggingface_hub
import huggingface_hub.utils._http as hub_http
import pytest
import torch
from conftest import point_hub_to
from huggingface_hub import constants

from maple.clip import load_clip
from maple.errors import BackboneError
from maple.hub_client import offline


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client waits longer and longer between attempts; not here."""
    monkeypatch.setattr(hub_http.time, "sleep", lambda _: None)


def same(backbone: Any, state: files.State, *, quick_gelu: bool) -> None:
    expected = files.expected_logits(state, quick_gelu=quick_gelu)
    torch.testing.assert_close(files.logits(backbone), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_open_clip_repository(hub: Any, state: files.State, weights: str, quick_gelu: bool) -> None:
    files.save_open_clip(state, hub.root / "lab" / "tiny", weights=weights, config=files.changed(quick_gelu=quick_gelu))
    backbone = load_clip("hf-hub:lab/tiny")
    same(backbone, state, quick_gelu=quick_gelu)
    assert list(backbone.preprocessing.mean) == files.PREPROCESS["mean"]
    assert backbone.name == "hf-hub:lab/tiny"


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("shard", ["5MB", "5GB"])
def test_transformers_repository(hub: Any, state: files.State, activation: str, shard: str) -> None:
    folder = files.save_transformers(state, hub.root / "lab" / "tiny", activation, shard=shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard == "5MB")
    backbone = load_clip("lab/tiny")
    same(backbone, state, quick_gelu=activation == "quick_gelu")
    assert list(backbone.preprocessing.std) == files.PREPROCESS["std"]


def test_same_fingerprint_from_either_kind_of_repository(hub: Any, state: files.State) -> None:
    files.save_open_clip(state, hub.root / "lab" / "one")
    files.save_transformers(state, hub.root / "lab" / "two", "gelu")
    assert load_clip("lab/one").fingerprint == load_clip("lab/two").fingerprint


def test_a_second_load_downloads_nothing(hub: Any, state: files.State) -> None:
    files.save_open_clip(state, hub.root / "lab" / "tiny")
    load_clip("lab/tiny")
    hub.asked.clear()
    load_clip("lab/tiny")
    assert not [line for line in hub.asked if line.startswith("GET")]


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
@pytest.mark.usefixtures("impatient")
def test_what_was_fetched_once_loads_without_a_network(
    hub: Any, state: files.State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = hub.root / "lab" / "tiny"
    if kind == "open_clip":
        files.save_open_clip(state, folder)
    else:
        files.save_transformers(state, folder, "gelu")
    first = load_clip("lab/tiny").fingerprint
    point_hub_to(monkeypatch, 9, tmp_path / "cache")  # the discard port: nothing answers
    assert load_clip("lab/tiny").fingerprint == first


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_what_other_programs_have_fetched_loads_offline(
    hub: Any, state: files.State, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """They fetch other files, and leave no note of those that the repository does not have."""
    folder = hub.root / "lab" / "tiny"
    if kind == "open_clip":
        files.save_open_clip(state, folder, weights="open_clip_pytorch_model.bin")
    else:
        files.save_transformers(state, folder, "gelu")
    for file in folder.iterdir():
        huggingface_hub.hf_hub_download("lab/tiny", file.name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    same(load_clip("lab/tiny"), state, quick_gelu=kind == "open_clip" and bool(files.CONFIG.get("quick_gelu")))


def test_weights_of_transformers_next_to_a_description_of_open_clip(hub: Any, state: files.State) -> None:
    folder = files.save_transformers(state, hub.root / "lab" / "both", "gelu", shard="5MB")
    described = {"model_cfg": files.changed(quick_gelu=False), "preprocess_cfg": files.PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    same(load_clip("lab/both"), state, quick_gelu=False)
    same(load_clip(str(folder)), state, quick_gelu=False)


def test_threads_that_are_offline_at_the_same_time() -> None:
    first, second = offline(), offline()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert constants.HF_HUB_OFFLINE
    second.__exit__(None, None, None)
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.usefixtures("impatient")
def test_unreachable_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_hub_to(monkeypatch, 9, tmp_path / "cache")
    with pytest.raises(BackboneError, match=r"'lab/tiny' is not a folder here, .* be downloaded.*give its folder"):
        load_clip("lab/tiny")


def test_a_host_without_an_address_is_asked_once(
    hub: Any, state: files.State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No minute of retries: what is in the cache loads at once, the rest is an error at once."""
    files.save_open_clip(state, hub.root / "lab" / "tiny")
    first = load_clip("lab/tiny").fingerprint
    hub.asked.clear()
    asked = []

    def no_address(host: str, *_: Any, **__: Any) -> Any:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    assert load_clip("lab/tiny").fingerprint == first
    assert asked == ["127.0.0.1"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    for name in ("lab/other", "ViT-B-16"):
        with pytest.raises(
            BackboneError,
            match=r"127\.0\.0\.1 cannot be resolved \(no network\?\), and its files",
        ):
            load_clip(name)
    assert len(asked) == 3
    assert not hub.asked
    assert not constants.HF_HUB_OFFLINE


def test_offline_mode(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match=r"cannot be downloaded from the hub"):
        load_clip("lab/tiny")
    assert not hub.asked


def test_unknown_repository(hub: Any) -> None:
    with pytest.raises(BackboneError, match=r"'lab/none' is not a folder here, .*no such") as caught:
        load_clip("hf-hub:lab/none")
    assert "\n" not in str(caught.value)
    assert hub.asked


def test_malformed_repository_name() -> None:
    with pytest.raises(BackboneError, match="cannot be downloaded from the hub"):
        load_clip("hf-hub:a/b/c")


def test_repository_of_something_else(hub: Any) -> None:
    (hub.root / "lab" / "readme").mkdir(parents=True)
    (hub.root / "lab" / "readme" / "README.md").write_text("hello")
    with pytest.raises(BackboneError, match=r"neither open_clip_config.json nor config.json"):
        load_clip("lab/readme")


def test_repository_without_weights(hub: Any, state: files.State) -> None:
    folder = files.save_open_clip(state, hub.root / "lab" / "bare")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"open_clip_config.json but none of open_clip_model.safetensors"):
        load_clip("lab/bare")


def test_tokenizer_of_its_own_is_fetched(hub: Any, state: files.State) -> None:
    """A model with another tokenizer brings it along; a sentence that it would cut is refused."""
    folder = hub.root / "lab" / "own"
    files.save_open_clip(
        state, folder, config=files.changed(text={"hf_tokenizer_name": "elsewhere", "context_length": 77})
    )
    _save_word_tokenizer(folder)
    backbone = load_clip("lab/own")
    assert backbone.tokenize(["cat dog"])[0, :4].tolist() == [2, 5, 6, 3]
    with pytest.raises(Exception, match="needs 78 tokens, but this CLIP reads at most 77"):
        backbone.tokenize(["cat " * 76])
    assert backbone.tokenize(["cat " * 75])[0, -1] == 3


def _save_word_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[SOS]", "[EOS]", "a", "cat", "dog"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[SOS] $A [EOS]", None, [("[SOS]", 2), ("[EOS]", 3)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    wrapped.save_pretrained(folder)


def test_truncated_download_is_an_error(hub: Any, state: files.State) -> None:
    folder = files.save_open_clip(state, hub.root / "lab" / "cut")
    path = folder / "open_clip_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BackboneError, match=r"open_clip_model.safetensors cannot be read as CLIP weights"):
        load_clip("lab/cut")


def test_index_without_a_map(hub: Any, state: files.State) -> None:
    folder = files.save_transformers(state, hub.root / "lab" / "odd", "gelu", shard="5MB")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": None}))
    with pytest.raises(BackboneError, match="needs a weight_map"):
        load_clip("lab/odd")
    shutil.rmtree(folder)
