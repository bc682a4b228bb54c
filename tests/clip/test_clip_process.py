"""Loading leaves the process as it was: random numbers, logging, warnings; and the model frozen."""

import logging
import random
import warnings
from pathlib import Path
from typing import Any

import clip_files as files
import numpy as np
import pytest
import torch
from open_clip.transformer import VisionTransformer

from maple.clip import Backbone, load_clip
from maple.clip.load import backbone_from_state_dict

WAYS = ["maple-tiny", "random", "file", "archive", "open_clip", "transformers", "pretrained", "bf16"]


@pytest.fixture
def load(state: files.State, tmp_path: Path, registered: Any) -> Any:
    """A function from one of WAYS to a backbone; what it loads is written once."""
    name = registered("Tiny-8", files.changed(quick_gelu=False))
    write: dict[str, Any] = {
        "maple-tiny": lambda: ("maple-tiny",),
        "random": lambda: (name, "random:7"),
        "file": lambda: (str(files.save_pickle(state, tmp_path / "w.pt")), "gelu"),
        "archive": lambda: (str(files.save_torchscript(state, tmp_path / "w.pt")),),
        "open_clip": lambda: (str(files.save_open_clip(state, tmp_path / "m")),),
        "transformers": lambda: (str(files.save_transformers(state, tmp_path / "t", "gelu")),),
        "pretrained": lambda: (name, str(files.save_safetensors(state, tmp_path / "w.safetensors"))),
    }
    write["bf16"] = write["pretrained"]
    written: dict[str, tuple[str, ...]] = {}

    def run(way: str) -> Backbone:
        written[way] = arguments = written.get(way) or write[way]()
        return load_clip(*arguments, precision="bf16" if way == "bf16" else "fp32")

    return run


@pytest.mark.parametrize("way", WAYS)
def test_process_state(load: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load(way)  # writes the file; and what other libraries do once, at their import, is theirs
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.INFO)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    filters, default = list(warnings.filters), torch.get_default_dtype()
    load(way)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # type: ignore[arg-type]
    assert (root.handlers, root.level) == ([], logging.INFO)
    assert (list(warnings.filters), torch.get_default_dtype()) == (filters, default)
    assert not seeded
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("way", WAYS)
def test_frozen(load: Any, way: str) -> None:
    model = load(way).model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_logging_is_restored_after_an_error(tmp_path: Path, state: files.State) -> None:
    folder = files.save_open_clip(state, tmp_path / "m", config=files.changed(embed_dim=32))
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with pytest.raises(Exception, match="does not fit"):
        load_clip(str(folder))
    assert (root.handlers, root.level) == (handlers, level)


def test_open_clips_remarks_stay_off_the_screen(
    load: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for way in ("random", "pretrained", "open_clip"):
        load(way)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.parametrize("name", ["maple-tiny", "Tiny-8"])
def test_seeds(name: str, registered: Any) -> None:
    registered("Tiny-8", files.CONFIG)
    torch.rand(3)
    first, again, other = (load_clip(name, f"random:{seed}") for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    assert load_clip(name, "random").fingerprint == load_clip(name, "random:0").fingerprint
    assert torch.equal(files.logits(first), files.logits(again))


def test_the_callers_tensors_stay_the_callers(state: files.State) -> None:
    given = {key: value.clone() for key, value in state.items()}
    backbone = backbone_from_state_dict(given, precision="bf16", device="cpu")
    with torch.no_grad():
        backbone.model.visual.proj.zero_()
        backbone.model.ln_final.weight.zero_()
    assert all(torch.equal(given[key], state[key]) for key in state)
    assert list(given) == list(state)


def test_file_may_change_after_loading(state: files.State, tmp_path: Path) -> None:
    """Nothing stays mapped: weights are the model's own."""
    path = files.save_safetensors(state, tmp_path / "w.safetensors")
    backbone = load_clip(str(path), "gelu")
    before = files.logits(backbone)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(files.logits(backbone), before)


def test_fingerprint_is_of_the_values(state: files.State) -> None:
    backbone = backbone_from_state_dict(state)
    assert isinstance(backbone.model.visual, VisionTransformer)
    assert len(backbone.fingerprint) == 32
    nudged = {**state, "visual.proj": state["visual.proj"] + 1e-4}
    swapped = {**state, "ln_final.bias": state["ln_final.weight"], "ln_final.weight": state["ln_final.bias"]}
    prints = {backbone_from_state_dict(weights).fingerprint for weights in (state, nudged, swapped)}
    assert len(prints) == 3
