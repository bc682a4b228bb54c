"""Weights are read once, into the memory where they stay."""

from pathlib import Path

import clip_files as files
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from maple.clip import load_clip
from maple.clip.backbone import fingerprint
from maple.clip.checkpoints import formats
from maple.clip.initialisation import uninitialised
from maple.clip.load import backbone_from_state_dict
from maple.clip.weights import load_weights

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def build(vision_width: int = 64, layers: int = 1) -> open_clip.CLIP:
    vision = {"image_size": 32, "layers": layers, "width": vision_width, "patch_size": 16, "head_width": 64}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    return open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)


def test_nothing_is_drawn_for_weights_that_are_replaced() -> None:
    before = torch.get_rng_state()
    with uninitialised():
        nn.Linear(8, 8), nn.Embedding(8, 8), nn.MultiheadAttention(8, 2), nn.Conv2d(3, 4, 2)
        nn.init.normal_(torch.empty(3), std=0.1)
        nn.init.kaiming_uniform_(torch.empty(3, 3))
    assert torch.equal(torch.get_rng_state(), before)
    with uninitialised(False):
        nn.Linear(8, 8)
    assert not torch.equal(torch.get_rng_state(), before)


def test_tensors_become_the_models_own_without_a_copy() -> None:
    state = {key: value.clone() for key, value in build().state_dict().items()}
    with uninitialised():
        model = build()
    load_weights(model, state, "test")
    for key, value in model.state_dict().items():
        assert value.data_ptr() == state[key].data_ptr()
        assert torch.equal(value, state[key])
    assert isinstance(model.token_embedding.weight, nn.Parameter)


def test_what_lies_badly_or_in_another_type_is_copied() -> None:
    given = {key: value.clone() for key, value in build().state_dict().items()}
    state = dict(given)
    flat = torch.cat([torch.zeros(1), given["token_embedding.weight"].flatten()])
    state["token_embedding.weight"] = flat[1:].view(49408, 64)  # four bytes off, inside a larger tensor
    state["visual.proj"] = given["visual.proj"].T.contiguous().T
    state["text_projection"] = given["text_projection"].double()
    model = build()
    load_weights(model, state, "test")
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert value.is_contiguous()
        assert value.data_ptr() % 64 == 0
        assert value.untyped_storage().nbytes() == value.numel() * 4
        assert torch.equal(value, given[key])


def test_the_callers_tensors_stay_its_own(state: files.State) -> None:
    given = {key: value.clone() for key, value in state.items()}
    backbone = backbone_from_state_dict(given)
    for value in given.values():
        value.zero_()
    assert fingerprint(backbone.model.state_dict()) == backbone.fingerprint


def test_a_file_is_mapped_anew_for_every_few_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{number}": torch.randn(10, number + 1) for number in range(9)}
    tensors |= {"scalar": torch.tensor(3.5), "half": torch.randn(7).half(), "none": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "w.safetensors")
    opened, plain = [], formats.safe_open
    monkeypatch.setattr(formats, "safe_open", lambda *args: (opened.append(1), plain(*args))[1])
    monkeypatch.setattr(formats, "_MAPPED_BYTES", 500)
    found = formats.read_tensors(tmp_path / "w.safetensors")
    expected = load_file(tmp_path / "w.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in expected.items())
    assert 3 < len(opened) < len(tensors)


def test_peak_memory_of_loading_is_little_more_than_the_weights(tmp_path: Path) -> None:
    try:
        CLEAR.write_text("5")
    except OSError:
        pytest.skip("needs Linux's /proc/self/clear_refs")
    path = tmp_path / "w.safetensors"
    save_file({key: value.contiguous() for key, value in build(512, layers=6).state_dict().items()}, path)
    load_clip("maple-tiny")  # what is allocated once, whatever is loaded
    CLEAR.write_text("5")  # the peak counts from here
    before = _kilobytes("VmRSS")
    backbone = load_clip(str(path), "gelu")
    peak = (_kilobytes("VmHWM") - before) * 1024
    assert backbone.parameter_count * 4 > 50 * 1024**2
    assert peak < 1.2 * path.stat().st_size


def _kilobytes(name: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))
