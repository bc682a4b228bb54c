"""Exports with text towers that read padding, have a class token, or a tokenizer that is not CLIP's."""

from pathlib import Path

import numpy as np
import pytest
from export_helpers import NAMES, write_prompts
from text_backbones import text_backbone
from tower_families import family, images

from maple import build_method
from maple.checkpoint import load_prompts
from maple.export import export_run
from maple.export.onnx_folder import _sentences
from maple.inference.onnx_predictor import OnnxPredictor
from maple.methods import Method


def check(method: Method, exported: OnnxPredictor, names: tuple[str, ...]) -> None:
    method.set_class_names(names)
    encoded = exported.encode_images(images().numpy())
    found, _ = exported.probabilities(encoded, exported.encode_class_names(names))
    expected = method.predict_logits(images()).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_new_names_where_padding_is_read(tmp_path: Path) -> None:
    """CoCa's class token follows the padding, so that sentences of the graph have one length."""
    backbone = family("CoCa")
    path = write_prompts(tmp_path, backbone, {"name": "deep_language", "prompt_length": 2, "prompt_depth": 2})
    assert export_run(path, tmp_path / "exported", backbone=backbone).difference < 1e-4
    method, exported = load_prompts(path, backbone), OnnxPredictor.load(tmp_path / "exported")
    for names in (("owl", NAMES[0]), ("a rather long name of a thing",)):
        check(method, exported, names)


@pytest.mark.parametrize("kind", ["bert", "mt5"])
def test_a_tokenizer_of_its_own_leaves_trained_names_alone(kind: str) -> None:
    method = build_method({"name": "coop", "prompt_length": 2}, text_backbone(kind), NAMES)
    sentences, refusal = _sentences(method)
    assert sentences is None
    assert refusal == "the export has no text tower, as its tokenizer is not CLIP's; use PyTorch for new names"
