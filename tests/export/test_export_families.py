"""Exports of methods on the towers of other families: the logits of PyTorch, without it."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from export_helpers import NAMES, write_prompts
from tower_families import family, images

from maple.checkpoint import load_prompts
from maple.clip import Backbone
from maple.errors import ExportError
from maple.export import export_run
from maple.inference.onnx_predictor import OnnxPredictor

METHODS = {
    "SigLIP": {"name": "vpt", "vision_prompt_length": 3, "vision_prompt_depth": 2},
    "EVA-02": {"name": "maple", "prompt_depth": 3},
    "convolutions": {"name": "coop", "prompt_length": 2},
}


def test_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary positions, prompts and attention pooling, for the names of the training: an image graph takes seconds."""
    monkeypatch.setattr(Backbone, "uses_clip_tokenizer", False)  # the text graph is that of every CLIP
    backbone = family("Perception Encoder")
    path = write_prompts(tmp_path, backbone, {"name": "maple", "prompt_depth": 2})
    assert export_run(path, tmp_path / "exported", backbone=backbone).difference < 1e-4
    method, exported = load_prompts(path, backbone), OnnxPredictor.load(tmp_path / "exported")
    found = exported.probabilities(exported.encode_images(images().numpy()), exported.encode_class_names(NAMES))[0]
    expected = method.predict_logits(images()).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_torchscript(name: str, tmp_path: Path) -> None:
    backbone = family(name)
    path = write_prompts(tmp_path, backbone, METHODS[name])
    assert export_run(path, tmp_path / "exported", "torchscript", backbone=backbone).difference < 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of torch.jit
        loaded = torch.jit.load(str(tmp_path / "exported" / "model.pt"))
        found = loaded(images(5))
    expected = load_prompts(path, backbone).predict_logits(images(5))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("format", ["openclip", "transformers", "openai"])
def test_a_plain_clip_of_another_tower_is_refused(format: str, tmp_path: Path) -> None:
    backbone = family("EVA-02")
    path = write_prompts(tmp_path, backbone, {"name": "clip_lora", "encoder": "vision"})
    with pytest.raises(ExportError, match=f"{format}: this backbone is not .*use format=onnx"):
        export_run(path, tmp_path / "exported", format, backbone=backbone)
    assert not (tmp_path / "exported").exists()
