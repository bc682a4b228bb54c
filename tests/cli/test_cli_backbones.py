"""`maple backbones`: the list of known CLIPs, and one in detail."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
from typer.testing import CliRunner

from maple import load_clip
from maple.cli import app
from maple.clip import known_backbones
from maple.clip.backbone_names import HUB, is_architecture
from maple.clip.describe import FAMILIES, describe_backbone
from maple.errors import BackboneError


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["backbones", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_each_known_backbone_can_be_given_as_it_is_listed() -> None:
    for known in known_backbones.KNOWN_BACKBONES:
        if known.pretrained is None:
            assert known.name == "maple-small" or (known.name.startswith(HUB) and known.config is not None)
        elif known.pretrained.endswith(".pt"):
            assert is_architecture(known.name)
            assert "quickgelu" in known.name, "a state dict does not say its activation"
        else:
            assert known.pretrained in open_clip.list_pretrained_tags_by_model(known.name)


def test_text_towers_of_transformers_have_published_sizes() -> None:
    architectures = {known.name for known in known_backbones.KNOWN_BACKBONES}
    configs = [open_clip.get_model_config(name) for name in architectures & set(open_clip.list_models())]
    configs += [known.config for known in known_backbones.KNOWN_BACKBONES if known.config]
    names = {config["text_cfg"].get("hf_model_name") for config in configs} - {None}
    assert len(names) >= 3
    assert names <= known_backbones.TEXT_CONFIGS.keys()


def test_list(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [each for each in known_backbones.KNOWN_BACKBONES if each.name in ("maple-small", "RN50", "ViT-B-32")]
    monkeypatch.setattr(known_backbones, "KNOWN_BACKBONES", tuple(chosen))
    output = run()
    assert "RN50 openai: OpenAI's ResNet" in output
    assert "102 million parameters, 224 pixels, 77 tokens; methods: text prompts, frozen features" in output
    assert "10 million parameters, 64 pixels, 77 tokens; all methods" in output
    rows = [json.loads(line) for line in run("--json").splitlines()]
    assert [row["name"] for row in rows] == [known.name for known in chosen]
    assert all(set(row["methods"]) == set(FAMILIES) for row in rows)
    assert rows[0]["parameters"] == load_clip("maple-small").parameter_count


def test_one_in_detail(tmp_path: Path) -> None:
    output = run("RN50")
    assert "102,007,137 parameters, features of 1024 numbers" in output
    assert "image tower: ModifiedResNet" in output
    assert "image prompts (VPT): no, its image tower is a ModifiedResNet" in output
    described: dict[str, Any] = json.loads(run("maple-tiny", "--json"))
    assert described["image"] == {
        "kind": "VisionTransformer",
        "depth": 4,
        "width": 192,
        "prompts": None,
        "edits": None,
        "tokens": None,
    }
    assert set(described["methods"].values()) == {None}
    folder = {"model_cfg": {"embed_dim": 8, "vision_cfg": {"layers": 10**9}, "text_cfg": {}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(folder))
    with pytest.raises(BackboneError, match="a tower of 1000000000 layers; at most 1000"):
        describe_backbone(str(tmp_path))


def test_unknown_names_are_reported() -> None:
    with pytest.raises(BackboneError, match=r"unknown CLIP 'ViT-B-17'.*nearest are ViT-B-16"):
        run("ViT-B-17")
