"""TorchScript and plain CLIP checkpoints, read as anybody would read them."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from export_helpers import NAMES
from safetensors.torch import load_file

from maple import build_method, load_prompts, save_prompts
from maple.clip import Backbone
from maple.errors import ConfigError, ExportError
from maple.export import export_run


def saved(folder: Path, tiny: Backbone, name: str, **settings: object) -> Path:
    path = folder / f"{name}.safetensors"
    generator = torch.Generator().manual_seed(2)
    save_prompts(path, build_method({"name": name, **settings}, tiny, NAMES, generator=generator), {})
    return path


@pytest.fixture
def views() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(4))


METHODS: dict[str, dict[str, object]] = {"maple": {"prompt_depth": 2}, "linear_probe": {}, "clip_adapter": {}}
WITH_TORCH_ALONE = """
import sys, numpy, torch
views = torch.from_numpy(numpy.load("views.npy"))
for name in sys.argv[1:]:
    module = torch.jit.load(f"{name}/model.pt")
    numpy.save(f"{name}.npy", module(views).detach().numpy())
    assert module.encode_images(views[:1]).shape == (1, 128)
assert not [name for name in sys.modules if name.startswith(("maple", "open_clip"))]
"""


def test_torchscript_needs_torch_alone(tiny: Backbone, tmp_path: Path, views: torch.Tensor) -> None:
    files = {name: saved(tmp_path, tiny, name, **settings) for name, settings in METHODS.items()}
    for name, file in files.items():
        assert export_run(file, tmp_path / name, "torchscript").difference < 1e-3, name
    np.save(tmp_path / "views.npy", views.numpy())
    command = [sys.executable, "-W", "ignore", "-c", WITH_TORCH_ALONE, *files]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    for name, file in files.items():
        with torch.no_grad():
            expected = load_prompts(file, tiny)(views)
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), expected.numpy(), atol=1e-3, err_msg=name)
        assert json.loads((tmp_path / name / "model.json").read_text())["class_names"] == list(NAMES)


def test_open_clip_reads_its_folder(tiny: Backbone, tmp_path: Path, views: torch.Tensor) -> None:
    import open_clip

    file = saved(tmp_path, tiny, "coop", prompt_length=4)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")  # a link to an empty folder is filled
    export_run(file, tmp_path / "out", "openclip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    head = load_file(tmp_path / "out/zero_shot_head.safetensors")
    with torch.no_grad():
        features = model.eval().encode_image(views, normalize=True)
        expected = load_prompts(file, tiny)(views)
    torch.testing.assert_close(head["logit_scale"] * features @ head["class_embeddings"].T, expected, atol=1e-3, rtol=0)


def test_transformers_reads_its_folder(tiny: Backbone, tmp_path: Path, views: torch.Tensor) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    file = saved(tmp_path, tiny, "coop", prompt_length=4)
    export_run(file, tmp_path / "out", "transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = CLIPModel.from_pretrained(tmp_path / "out").eval()
        tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "out")
    head = load_file(tmp_path / "out/zero_shot_head.safetensors")
    sentences = ["a photo of a café.", "two red cars, won't they?"]
    with torch.no_grad():
        outputs = model.vision_model(pixel_values=views)
        features = torch.nn.functional.normalize(model.visual_projection(outputs.pooler_output), dim=-1)
        expected = load_prompts(file, tiny)(views)
        ids = tokenizer(sentences, padding=True, return_tensors="pt")
        text = model.text_projection(model.text_model(**ids).pooler_output)
        plain = tiny.text.plain(tiny.tokenize(sentences))
    torch.testing.assert_close(head["logit_scale"] * features @ head["class_embeddings"].T, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(text, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "format", "message"),
    [
        ("maple", {"prompt_depth": 2}, "openclip", "MaPLe has learned something in the image tower"),
        ("vpt", {"vision_prompt_depth": 2}, "transformers", "use format=onnx, or torchscript"),
        ("clip_adapter", {}, "openclip", "computes more than the cosines of a plain CLIP"),
        ("dept", {}, "openclip", "computes more than the cosines of a plain CLIP"),
        ("tip_adapter", {}, "transformers", "computes more than the cosines of a plain CLIP"),
        ("cocoop", {}, "torchscript", "no module of images alone can hold it"),
        ("cocoop", {}, "openclip", "classes depend on the image"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    name: str, settings: dict[str, object], format: str, message: str, tiny: Backbone, tmp_path: Path
) -> None:
    file = saved(tmp_path, tiny, name, **settings)
    with pytest.raises(ExportError, match=message):
        export_run(file, tmp_path / "out", format)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_wrong_use_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    for output, format, options, message in (
        ("out", "onxx", {}, "unknown format 'onxx'; choose one of: onnx, torchscript, openclip, transformers, openai"),
        ("out", "openclip", {"int8": True}, "int8=True goes with format=onnx only"),
        ("out", "torchscript", {"zero_shot": True}, "zero_shot=True goes with format=onnx only"),
        ("taken", "onnx", {}, "taken exists already"),
        ("taken/file", "onnx", {}, "file exists already"),
    ):
        with pytest.raises(ConfigError, match=message):
            export_run(tmp_path / "no-run", tmp_path / output, format, **options)
    assert (tmp_path / "taken/file").read_text() == "mine"
