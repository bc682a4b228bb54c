"""Methods that change weights alone, merged into plain CLIPs that other libraries read as any other."""

import json
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from shutil import copytree
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from export_helpers import NAMES
from safetensors.torch import load_file
from torch import Tensor

from maple import build_method, load_prompts, save_prompts
from maple.clip import Backbone, load_clip
from maple.clip.backbone_names import ARCHITECTURES
from maple.errors import ExportError
from maple.export import ExportResult, export_run
from maple.methods import Method

OTHERS = ("a grey thing", "lighthouse")
LORA = {"name": "clip_lora", "rank": 3, "alpha": 2.0}
METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "lora-some": {**LORA, "matrices": ["q", "v", "o"], "text_layers": [1], "vision_layers": [0, 2]},
    "lora-text": {**LORA, "encoder": "text", "matrices": ["k", "o"]},
    "lora-vision": {**LORA, "encoder": "vision"},
    "norms": {"name": "two_stage", "vision_start": 1},
    "two_stage-lora": {"name": "two_stage", "tuned": "lora", "sides": "vision", "matrices": ["o", "v"]},
}
TEMPERATURE = 1.6


@pytest.fixture(scope="module")
def made(tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Method]]:
    """A prompts file of each, some way from where it starts, calibrated where it is CLIP-LoRA on all blocks."""
    folder, files = tmp_path_factory.mktemp("merged"), {}
    for name, description in METHODS.items():
        method = build_method(description, tiny, NAMES)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in method.prompt_parameters().values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        method.temperature = TEMPERATURE if name == "lora" else 1.0
        save_prompts(folder / f"{name}.safetensors", method)
        files[name] = folder / f"{name}.safetensors", load_prompts(folder / f"{name}.safetensors", tiny)
    return files


Export = Callable[[str, str], tuple[Path, ExportResult]]


@pytest.fixture(scope="module")
def export(made: dict[str, tuple[Path, Method]], tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The export of a method in a format; each is made once."""
    folder = tmp_path_factory.mktemp("exports")

    @cache
    def exported(name: str, kind: str) -> tuple[Path, ExportResult]:
        written = export_run(made[name][0], folder / name / kind, kind)
        return written.folder, written

    return exported


@pytest.fixture(scope="module")
def views() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(4))


Encode = Callable[[Tensor, Sequence[str]], tuple[Tensor, Tensor, float]]
"""From images and sentences to raw features of both, and the logit scale."""


def by_open_clip(folder: Path) -> Encode:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    ids = open_clip.SimpleTokenizer()
    return lambda images, texts: (model.encode_image(images), model.encode_text(ids(texts)), model.logit_scale.exp())


def by_transformers(folder: Path) -> Encode:
    from transformers import CLIPModel, CLIPTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)

    def encode(images: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor, float]:
        ids = tokenizer(list(texts), padding=True, return_tensors="pt")
        image = model.visual_projection(model.vision_model(pixel_values=images).pooler_output)
        return image, model.text_projection(model.text_model(**ids).pooler_output), model.logit_scale.exp()

    return encode


MLP = ("c_fc", "c_proj")


def by_hand(folder: Path) -> Encode:
    """OpenAI's layout, read from an open file as `clip.load` does: sizes from shapes, heads of 64, QuickGELU."""
    with warnings.catch_warnings(), open(folder / "clip.pt", "rb") as file:
        warnings.simplefilter("ignore")  # torch announces the end of torch.jit
        state = torch.jit.load(file, map_location="cpu").eval().state_dict()
    resolution, context = int(state["input_resolution"]), int(state["context_length"])
    assert int(state["vocab_size"]) == len(state["token_embedding.weight"])

    def norm(states: Tensor, name: str) -> Tensor:
        return F.layer_norm(states, states.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def blocks(states: Tensor, prefix: str, mask: Tensor | None) -> Tensor:
        width = states.shape[-1]
        depth = len({key.split("resblocks.")[1].split(".")[0] for key in state if key.startswith(prefix)})
        for layer in range(depth):
            block, rows = f"{prefix}resblocks.{layer}", states.transpose(0, 1)
            normed = norm(rows, f"{block}.ln_1")
            parts = [state[f"{block}.attn.{name}"] for name in ("in_proj_weight", "in_proj_bias")]
            out = [state[f"{block}.attn.out_proj.{name}"] for name in ("weight", "bias")]
            attended, _ = F.multi_head_attention_forward(
                *(normed, normed, normed, width, width // 64, *parts, None, None, False, 0.0, *out),
                training=False,
                need_weights=False,
                attn_mask=mask,
            )
            states = states + attended.transpose(0, 1)
            first, second = ([state[f"{block}.mlp.{part}.{kind}"] for kind in ("weight", "bias")] for part in MLP)
            hidden = F.linear(norm(states, f"{block}.ln_2"), *first)
            states = states + F.linear(hidden * torch.sigmoid(1.702 * hidden), *second)
        return states

    def encode(images: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor, float]:
        assert images.shape[-1] == resolution
        kernel = state["visual.conv1.weight"]
        patches = F.conv2d(images, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
        first = state["visual.class_embedding"].expand(len(images), 1, -1)
        rows = norm(torch.cat([first, patches], 1) + state["visual.positional_embedding"], "visual.ln_pre")
        pooled = norm(blocks(rows, "visual.transformer.", None)[:, 0], "visual.ln_post")
        ids = open_clip.SimpleTokenizer(context_length=context)(list(texts))
        words = state["token_embedding.weight"][ids] + state["positional_embedding"]
        mask = torch.full((context, context), -torch.inf).triu(1)
        ends = norm(blocks(words, "transformer.", mask), "ln_final")[torch.arange(len(ids)), ids.argmax(-1)]
        return pooled @ state["visual.proj"], ends @ state["text_projection"], state["logit_scale"].exp()

    return encode


READERS = {"openclip": by_open_clip, "transformers": by_transformers, "openai": by_hand}


def close(actual: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "openclip") for name in METHODS),
        *((n, kind) for n in ("lora", "norms") for kind in ("transformers", "openai")),
    ],
)
@torch.no_grad()
def test_other_libraries_compute_the_same_features(
    name: str, kind: str, made: dict[str, tuple[Path, Method]], export: Export, views: Tensor
) -> None:
    method, (folder, written) = made[name][1], export(name, kind)
    assert written.difference < 1e-4
    assert written.new_names is None
    others = method.with_class_names(OTHERS)
    image, text, scale = READERS[kind](folder)(views, [f"a photo of a {each}." for each in OTHERS])
    close(image, method.image_features_raw(views))
    close(F.normalize(text, dim=-1), others.class_embeddings())
    probabilities = (scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T).softmax(-1)
    expected = (others.predict_logits(views) / method.temperature).softmax(-1)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-4)
    head = load_file(folder / "zero_shot_head.safetensors")
    logits = head["logit_scale"] * F.normalize(image, dim=-1) @ head["class_embeddings"].T
    torch.testing.assert_close(logits, method.predict_logits(views) / method.temperature, rtol=0, atol=1e-4)


@torch.no_grad()
def test_open_clip_reads_openais_layout(made: dict[str, tuple[Path, Method]], export: Export, views: Tensor) -> None:
    """With the settings of `create_model(NAME, pretrained=FILE, weights_only=False)`."""
    model = open_clip.CLIP(**ARCHITECTURES["maple-tiny"]).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        open_clip.load_checkpoint(model, export("lora", "openai")[0] / "clip.pt", strict=True, weights_only=False)
    close(model.encode_image(views), made["lora"][1].image_features_raw(views))


@pytest.mark.parametrize("name", ["lora", "norms"])
def test_a_merged_checkpoint_is_a_backbone(
    name: str, made: dict[str, tuple[Path, Method]], export: Export, views: Tensor
) -> None:
    method = made[name][1]
    expected = method.with_class_names(OTHERS).predict_logits(views) / method.temperature
    paths = [export(name, "openclip")[0], export(name, "transformers")[0], export(name, "openai")[0] / "clip.pt"]
    backbones = [load_clip(str(path)) for path in paths]
    assert len({backbone.fingerprint for backbone in backbones}) == 1
    for backbone in backbones:
        zero_shot = build_method({"name": "zero_shot", "templates": ["a photo of a {}."]}, backbone, OTHERS)
        torch.testing.assert_close(zero_shot.predict_logits(views), expected, rtol=1e-5, atol=1e-4)


def test_what_a_checkpoint_lacks_is_said(export: Export) -> None:
    said = {}
    for name in ("lora", "norms"):
        folder, written = export(name, "openclip")
        stored = json.loads((folder / "zero_shot_head.json").read_text())
        assert (stored["merged"], stored["notes"]) == (True, list(written.notes))
        said[name] = "; ".join(written.notes)
    assert "'a photo of a {}.' gives the method's logits, for any class name" in said["lora"]
    assert (
        "exp(logit_scale) is 62.5, the method's divided by the temperature 1.6, where this CLIP has 14.28"
        in said["lora"]
    )
    assert "trained names need their classifier, class_embeddings of zero_shot_head.safetensors" in said["norms"]
    assert "logit_scale) is" not in said["norms"]


def test_a_run_in_half_precision_is_merged_in_float32(tmp_path: Path, views: Tensor) -> None:
    half = load_clip("maple-tiny", "random:1", precision="bf16")
    method = build_method(METHODS["lora-some"], half, NAMES)
    with torch.no_grad():
        for parameter in method.prompt_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    save_prompts(tmp_path / "half.safetensors", method, {})
    written = export_run(tmp_path / "half.safetensors", tmp_path / "out", "openclip")
    assert "trained in bf16, merged and written in float32" in written.notes
    exact = load_prompts(tmp_path / "half.safetensors", precision="fp32")
    weights = load_file(tmp_path / "out/open_clip_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    with torch.no_grad():
        image, _, _ = by_open_clip(tmp_path / "out")(views, ["x"])
        close(image, exact.image_features_raw(views))


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"name": "mma", "adapter_start": 2, "adapter_end": 3, "adapter_width": 8}, r"\(adapters\), so openai cannot"),
        ({"name": "mmrl", "layers": [2, 3], "tokens": 2, "token_width": 16}, r"\(tokens\), so openai .* format=onnx"),
        ({"name": "maple", "prompt_depth": 2}, r"\(prompts\), so openai cannot hold it; use format=onnx"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_what_is_not_weights_is_refused(
    description: dict[str, Any], message: str, tiny: Backbone, tmp_path: Path
) -> None:
    save_prompts(tmp_path / "file.safetensors", build_method(description, tiny, NAMES), {})
    with pytest.raises(ExportError, match=message):
        export_run(tmp_path / "file.safetensors", tmp_path / "out", "openai")
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "model_cfg",
            {"quick_gelu": False},
            "another activation than QuickGELU, and the format .* use format=openclip",
        ),
        ("preprocess_cfg", {"mean": [0.5, 0.5, 0.5]}, "another preprocessing than OpenAI's"),
        ("preprocess_cfg", {"resize_mode": "squash"}, "another preprocessing than OpenAI's"),
    ],
)
def test_a_clip_that_openais_layout_does_not_describe_is_refused(
    part: str, change: dict[str, Any], message: str, export: Export, tmp_path: Path
) -> None:
    folder = copytree(export("norms", "openclip")[0], tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config[part] |= change
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    method = build_method({"name": "coop"}, load_clip(str(folder)), NAMES)
    save_prompts(tmp_path / "file.safetensors", method)
    with pytest.raises(ExportError, match=f"openai: this backbone has {message}"):
        export_run(tmp_path / "file.safetensors", tmp_path / "out", "openai")
