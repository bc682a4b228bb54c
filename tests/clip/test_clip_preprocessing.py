"""Images are prepared as the checkpoint says: equal to open_clip's transform and to transformers' processors."""

import json
from pathlib import Path
from typing import Any

import clip_files as files
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from maple.clip import load_clip
from maple.clip.backbone import preprocessing_of
from maple.clip.checkpoints.transformers_format import processor_preprocess
from maple.data import EvalTransform
from maple.errors import BackboneError

PROCESSORS: list[dict[str, Any]] = [
    {},
    {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}},
    {"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 2},
    {"size": {"height": 40, "width": 40}, "crop_size": 32},
    {"size": 32, "crop_size": 32, "feature_extractor_type": "CLIPFeatureExtractor"},
    {"do_normalize": False},
    {"do_rescale": False, "image_mean": [100, 110, 120], "image_std": [50, 60, 70]},
    {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
    {"do_resize": False, "crop_size": {"height": 32, "width": 32}},
    {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}},
]


@pytest.mark.parametrize("settings", PROCESSORS)
@pytest.mark.parametrize("shape", [(90, 47), (47, 90), (35, 35), (20, 25), (300, 100)])
def test_images_are_prepared_as_by_the_processor(settings: dict[str, Any], shape: tuple[int, int]) -> None:
    """transformers resizes tensors, ours are Pillow's pixels: each is rounded to whole levels in its own way."""
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    pixels = np.random.default_rng(shape[0]).integers(0, 256, (shape[1] // 5 + 1, shape[0] // 5 + 1, 3), np.uint8)
    image = Image.fromarray(pixels).resize(shape)
    kind = SiglipImageProcessor if "Siglip" in settings.get("image_processor_type", "") else CLIPImageProcessor
    sizes = {"size": {"shortest_edge": 32}, "crop_size": 32}
    full = settings if kind is SiglipImageProcessor else {**sizes, **settings}
    full = {key: value for key, value in full.items() if not key.endswith("_type")}
    if isinstance(full.get("image_mean"), float):
        full |= {key: [full[key]] * 3 for key in ("image_mean", "image_std")}
    expected = kind(**full)(image, return_tensors="pt")["pixel_values"][0]
    preprocessing = preprocessing_of(processor_preprocess(settings, 32, Path("folder")))
    found = EvalTransform.from_preprocessing(preprocessing)(image)
    assert found.shape == expected.shape
    assert torch.cosine_similarity(found.flatten(), expected.float().flatten(), dim=0) > 1 - 1e-4
    level = 1 / 255 / min(preprocessing.std)
    assert (found - expected).abs().max() <= 2.01 * level


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_pad": True}, "pads images"),
        ({"size": {"shortest_edge": 20, "longest_edge": 40}}, "neither a shorter side nor a square"),
        ({"size": {"height": 32, "width": 30}}, "neither a shorter side nor a square"),
        ({"crop_size": {"height": 32, "width": 30}}, "not to a square"),
        ({"crop_size": 40}, "makes images of 40 pixels, but the model reads 32"),
        ({"do_center_crop": False}, "neither cuts images to a square nor"),
        ({"do_center_crop": False, "do_resize": False}, "neither cuts images to a square nor"),
        ({"image_processor_type": "Qwen2VLImageProcessor"}, "type 'Qwen2VL', not CLIP or Siglip or ViT"),
        ({"resample": 9}, "resample 9"),
        ({"rescale_factor": 0}, "not numbers"),
        ({"image_mean": "grey"}, "not numbers"),
    ],
)
def test_a_processor_that_cannot_be_followed_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        processor_preprocess(settings, 32, Path("folder"))


@pytest.mark.parametrize(("resize", "fill"), [("squash", 0), ("longest", 90)])
def test_an_open_clip_folder_says_how_images_are_resized(
    state: files.State, tmp_path: Path, resize: str, fill: int
) -> None:
    folder = files.save_open_clip(state, tmp_path / "m")
    described = json.loads((folder / "open_clip_config.json").read_text())
    described["preprocess_cfg"] |= {"resize_mode": resize, "fill_color": fill}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 100, 3), np.uint8))
    expected = open_clip.create_model_and_transforms(f"local-dir:{folder}")[2](image)
    assert torch.equal(EvalTransform.from_preprocessing(load_clip(str(folder)).preprocessing)(image), expected)
    described["preprocess_cfg"]["resize_mode"] = "stretch"
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    with pytest.raises(BackboneError, match="unknown resize_mode 'stretch'; choose one of: shortest, longest"):
        load_clip(str(folder))


def test_a_tag_says_how_images_are_resized(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """DFN's ViT-H squashes: its tag is read with a file of a small model in place of its weights."""
    from maple.clip.checkpoints import open_clip_models

    monkeypatch.setattr(open_clip_models, "_download_weights", lambda _name, tag, _published: tmp_path / f"{tag}.pt")
    config = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}}
    config["text_cfg"] = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    monkeypatch.setattr(open_clip, "get_model_config", lambda _: json.loads(json.dumps(config)))
    for tag, resize in (("dfn5b", "squash"), ("laion2b_s32b_b79k", "shortest")):
        architecture = "ViT-H-14-quickgelu" if tag == "dfn5b" else "ViT-H-14"
        torch.save(open_clip.CLIP(**config).state_dict(), tmp_path / f"{tag}.pt")
        assert load_clip(architecture, tag).preprocessing.resize == resize
