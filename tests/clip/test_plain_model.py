"""The packaged CLIP in PyTorch's own modules equals what open_clip builds of it, and is used without open_clip."""

import subprocess
import sys
import warnings
from importlib import resources
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from maple import load_clip
from maple.checkpoint import save_prompts
from maple.clip import Backbone
from maple.clip.plain_model import PlainCLIP
from maple.clip.tokenization.published_tokenizer import PublishedTokenizer
from maple.errors import BackboneError
from maple.methods import build_method

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16, "mlp_ratio": 3.0},
    "text_cfg": {"context_length": 12, "vocab_size": 50, "width": 24, "heads": 2, "layers": 2},
}
PREDICT = """
import sys
from maple.cli import main
try:
    main()
finally:
    slow = {"open_clip", "torchvision", "timm", "transformers", "torch._dynamo", "sympy", "scipy",
            "sklearn", "pandas", "matplotlib", "huggingface_hub", "accelerate", "jinja2", "onnxruntime", "ray"}
    print("imported:", sorted(slow & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def packaged() -> Backbone:
    return load_clip("maple-small")


@pytest.fixture(scope="module")
def of_open_clip() -> Backbone:
    with resources.as_file(resources.files("maple").joinpath("assets", "small_clip")) as folder:
        return load_clip(str(folder))


def test_the_packaged_clip_equals_that_of_open_clip(packaged: Backbone, of_open_clip: Backbone) -> None:
    assert (type(packaged.model), type(of_open_clip.model)) == (PlainCLIP, open_clip.CLIP)
    for name in ("fingerprint", "preprocessing", "activation", "logit_scale", "embed_dim", "parameter_count"):
        assert getattr(packaged, name) == getattr(of_open_clip, name), name
    assert packaged.uses_clip_tokenizer
    assert packaged.text.context_length == of_open_clip.text.context_length
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    sentences = ["a photo of a cat.", "Ünïcödé &amp; naïve CAFÉ", ""]
    ids = of_open_clip.tokenize(sentences)
    assert torch.equal(packaged.tokenize(sentences), ids)
    assert packaged.token_texts(ids[1, :9].tolist()) == of_open_clip.token_texts(ids[1, :9].tolist())
    with torch.no_grad():
        assert torch.equal(packaged.image.plain(images), of_open_clip.image.plain(images))
        assert torch.equal(packaged.text.plain(ids), of_open_clip.text.plain(ids))
        states = [clip.image.enter(clip.image.embed(images)) for clip in (packaged, of_open_clip)]
        blocks = [clip.image.block(0, each) for clip, each in zip((packaged, of_open_clip), states, strict=True)]
    assert torch.equal(*blocks)


@pytest.mark.parametrize("activation", [{}, {"quick_gelu": True}])
def test_a_model_of_any_size_equals_that_of_open_clip(activation: dict[str, bool]) -> None:
    theirs = open_clip.CLIP(**CONFIG, **activation).eval()
    mine = PlainCLIP({**CONFIG, **activation}, theirs.state_dict()).eval()
    images, ids = torch.randn(3, 3, 32, 32), torch.randint(50, (4, 12))
    with torch.no_grad():
        torch.testing.assert_close(mine.encode_image(images), theirs.encode_image(images))
        torch.testing.assert_close(mine.encode_text(ids), theirs.encode_text(ids))
        with warnings.catch_warnings(action="ignore"):
            traced = torch.jit.trace_module(mine, {"encode_image": images[:2], "encode_text": ids[:2]})
        torch.testing.assert_close(traced.encode_image(images), mine.encode_image(images))
        torch.testing.assert_close(traced.encode_text(ids), mine.encode_text(ids))


def test_other_weights_are_refused() -> None:
    state = dict(open_clip.CLIP(**CONFIG).state_dict())
    for changed in ({"ln_final.bias": torch.zeros(3)}, {"more": torch.zeros(1)}):
        with pytest.raises(BackboneError, match=f"not those of the configuration: {next(iter(changed))}"):
            PlainCLIP(CONFIG, {**state, **changed})


def test_a_tokenizer_without_its_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maple.clip.tokenization.published_tokenizer.find_spec", lambda _: None)
    with pytest.raises(BackboneError, match="open_clip_torch, which is not installed"):
        PublishedTokenizer(77)


def test_predicting_with_the_packaged_clip_imports_nothing_slow(packaged: Backbone, tmp_path: Path) -> None:
    method = build_method({"name": "maple", "prompt_depth": 2}, packaged, ("cat", "dog"))
    save_prompts(tmp_path / "prompts.safetensors", method)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.jpg")
    command = [sys.executable, "-c", PREDICT, "predict", tmp_path, tmp_path / "red.jpg", "--classes", "red,blue"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=False)
    assert "red.jpg" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "imported: []"
