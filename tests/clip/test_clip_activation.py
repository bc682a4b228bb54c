"""The activation is known, or asked for; and what training code wraps weights in is taken off."""

from pathlib import Path
from typing import Any

import clip_files as files
import numpy as np
import pytest
import torch

from maple.checkpoint import load_prompts, read_tensors, save_prompts, write_tensors
from maple.clip import load_clip
from maple.clip.backbone_names import is_architecture
from maple.errors import BackboneError, CheckpointError
from maple.methods import build_method


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_file_that_does_not_say_its_activation(
    state: files.State, tmp_path: Path, registered: Any, quick_gelu: bool
) -> None:
    """By itself, and as the weights of an architecture; either way the choice decides, and is needed."""
    path = str(files.save_pickle(state, tmp_path / "w.pt"))
    chosen = "quickgelu" if quick_gelu else "gelu"
    expected = files.expected_logits(state, quick_gelu=quick_gelu)
    name = registered("Tiny-8", {key: value for key, value in files.CONFIG.items() if key != "quick_gelu"})
    for arguments in ((path, chosen), (f"{name}-{chosen}", path)):
        backbone = load_clip(*arguments)
        torch.testing.assert_close(files.logits(backbone), expected, rtol=1e-5, atol=1e-5)
        assert backbone.activation == chosen
    with pytest.raises(BackboneError, match=r"does not say .* take pretrained='quickgelu' or pretrained='gelu'$"):
        load_clip(path)
    with pytest.raises(BackboneError, match=r"does not say .* take Tiny-8-quickgelu or Tiny-8-gelu, not Tiny-8$"):
        load_clip(name, path)


def test_every_architecture_with_blocks_of_clip_can_be_named_with_its_activation() -> None:
    assert is_architecture("ViT-S-32-alt-quickgelu")
    assert is_architecture("ViT-B/32-gelu")
    assert is_architecture("ViT-B-32-quickgelu")
    assert not is_architecture("ViT-B-16-SigLIP-quickgelu"), "its image tower is timm's"
    assert not is_architecture("maple-small-gelu")
    first, second = (load_clip(f"ViT-S-32-alt-{kind}", "random:1") for kind in ("gelu", "quickgelu"))
    assert first.fingerprint == second.fingerprint
    assert (first.activation, second.activation) == ("gelu", "quickgelu")


def test_prompts_do_not_load_with_the_other_activation(state: files.State, tmp_path: Path) -> None:
    path = str(files.save_pickle(state, tmp_path / "w.pt"))
    method = build_method({"name": "coop", "prompt_length": 2}, load_clip(path, "gelu"), ["cat", "dog"])
    prompts = tmp_path / "prompts.safetensors"
    save_prompts(prompts, method)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_prompts(prompts).predict_logits(images), method.predict_logits(images))
    assert load_prompts(prompts, path).backbone.activation == "gelu", "a file that is named again"
    with pytest.raises(CheckpointError, match=r"with the activation gelu, but this backbone, .* with quickgelu"):
        load_prompts(prompts, load_clip(path, "quickgelu"))
    # A file of an earlier version loads as it did: with QuickGELU, for such a file.
    tensors, content = read_tensors(prompts)
    del content["backbone"]["activation"]
    content["backbone"]["pretrained"] = None
    write_tensors(prompts, tensors, {key: value for key, value in content.items() if key != "format"})
    assert load_prompts(prompts).backbone.activation == "quickgelu"


def _prefixed(prefix: str, state: files.State) -> files.State:
    return {f"{prefix}{key}": value for key, value in state.items()}


WRAPPED: dict[str, Any] = {
    "model": lambda state: {"model": state, "epoch": 3},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer_state_dict": {}, "epoch": 3},
    "lightning": lambda state: {"state_dict": _prefixed("model.", state), "epoch": 3, "hyper_parameters": {"a": 1}},
    "compiled": lambda state: _prefixed("_orig_mod.", state),
    "parallel and compiled": lambda state: _prefixed("module._orig_mod.", state),
    "in a wrapper": lambda state: {"model": _prefixed("clip_model.", state)},
    "in two": lambda state: {"state_dict": _prefixed("model.clip.", state)},
    "mask": lambda state: {**state, "attn_mask": torch.zeros(77, 77)},
    "number": lambda state: {"epoch": np.int64(3), "state_dict": state},
    "sizes": lambda state: {**_prefixed("module.", state), "input_resolution": 32},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappings_of_training_code_are_taken_off(state: files.State, tmp_path: Path, kind: str) -> None:
    torch.save(WRAPPED[kind](dict(state)), tmp_path / "w.pt")
    backbone = load_clip(str(tmp_path / "w.pt"), "quickgelu")
    expected = files.expected_logits(state, quick_gelu=True)
    torch.testing.assert_close(files.logits(backbone), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {**_prefixed("model.", state), "criterion.weight": torch.zeros(1)},
            r"tensors begin with 'model\.', and 1 tensors that do not \(criterion\.weight\); save the CLIP alone",
        ),
        (
            lambda state: _prefixed("backbone.", state),
            r"'text_projection' is missing; it begins with backbone\.ln_final",
        ),
        (lambda _: {"text_model.a": torch.zeros(1)}, r"in transformers' layout: give their folder"),
        (lambda _: {"state": {"a": torch.zeros(1)}}, r"'state' is a dict; save the weights alone"),
    ],
)
def test_what_else_is_found_is_named(state: files.State, tmp_path: Path, change: Any, message: str) -> None:
    torch.save(change(dict(state)), tmp_path / "w.pt")
    with pytest.raises(BackboneError, match=message):
        load_clip(str(tmp_path / "w.pt"), "gelu")
