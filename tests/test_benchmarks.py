"""The benchmarks compare equal computations and report what they measured; times are not checked."""

import json
import sys
from pathlib import Path

import pytest
import torch
from forked import ForkedProcess
from safetensors.torch import save_file

from benchmarks import baseline, common, floors, gpu, predict_files, real_features, together, walk_backbones
from benchmarks.sizes import held, reset_peak
from maple.clip import load_clip
from maple.clip.backbone_names import ARCHITECTURES

SETTINGS = ["--backbone", "maple-tiny", "--rounds", "1", "--images", "100"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "product_rates", lambda dtype, clock: common.product_rates(dtype, 64, 1, clock))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["floors", *SETTINGS, *arguments])
    floors.main()


def test_every_benchmark_agrees_with_the_plain_computation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(floors, "class_names", lambda count: common.class_names(count // 10))
    run(
        monkeypatch,
        "--output",
        str(tmp_path),
        "--only",
        "train-50,train-50-bf16,evaluate-100,evaluate-100-bf16,cocoop-100,lora-50,mma-50,mmrl-50",
    )
    results = json.loads((tmp_path / "floors.json").read_text())["results"]
    for name in ("train-50", "evaluate-100", "cocoop-100", "lora-50", "mma-50", "mmrl-50"):
        assert results[name]["largest_difference"] < 1e-4
        assert set(results[name]["ratio"]) == {"plain fp32"}
    assert set(results["train-50-bf16"]["ratio"]) == {"plain fp32", "plain bf16"}
    assert results["train-50"]["operations"] > 0


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = baseline.Plain.text_features
    monkeypatch.setattr(baseline.Plain, "text_features", lambda self, prompts: -right(self, prompts))
    with pytest.raises(SystemExit, match="the two ways differ by"):
        run(monkeypatch, "--only", "train-50")


def test_an_unknown_benchmark_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"unknown works: train-7; choose from train-50"):
        run(monkeypatch, "--only", "train-7")


def test_names_are_distinct_words() -> None:
    names = common.class_names(1000)
    assert len(set(names)) == len(names) == 1000
    assert len({len(name.split()) for name in names}) > 3


def write_peak() -> None:
    """Write the peak of memory while a block of 256 MiB is made."""
    torch.ones(128 * 2**20)  # 512 MiB, freed at once
    before = reset_peak()
    _block = torch.ones(64 * 2**20)
    sys.stdout.write(str(held("VmHWM") - before))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_peak_memory_is_that_of_the_computation() -> None:
    # A process of its own, as in the benchmark: one that ran other tests has freed memory, which a new block may reuse.
    process = ForkedProcess(write_peak)
    assert process.wait() == 0, process.stderr
    assert 250 * 2**20 < int(process.stdout) < 300 * 2**20


def test_joint_runs_agree_with_runs_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(together, "CASES", {"tiny": ("maple-tiny", "random:0", 5, 2)})
    arguments = ["together", "--only", "tiny", "--rounds", "1", "--steps", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    together.main()
    result = json.loads((tmp_path / "together.json").read_text())["results"]["tiny"]
    assert result["largest_difference"] < 1e-3
    assert set(result["ratio"]) == {"in turn"}
    spoilt = together.Work.in_turn
    monkeypatch.setattr(together.Work, "in_turn", lambda self: (spoilt(self), spoilt(self))[0])
    with pytest.raises(SystemExit, match="the two ways differ by"):
        together.main()


def test_the_plain_tower_is_that_of_open_clip() -> None:
    clip, names = load_clip("maple-tiny", "random:0"), ["cat", "dog"]
    method, plain = baseline.build("coop", clip, names)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ids = clip.tokenize([" ".join(["X"] * 16) + f" {name}." for name in names])
    with torch.no_grad():
        expected = clip.model.encode_image(images, normalize=True), clip.model.encode_text(ids, normalize=True)
        features = plain.image_features(images, []), plain.text_features([])
    assert method.settings.prompt_length == 16
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_check_for_gpus_runs_at_small_sizes_and_reports_what_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "PLAIN", ("maple",))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setitem(gpu.SMALL, "methods", ("maple",))
    command = ["gpu", "--device", "cpu", "--small", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    gpu.main()
    (path,) = tmp_path.iterdir()
    results = json.loads(path.read_text())["results"]
    failed = {name for name, result in results.items() if isinstance(result, dict) and "error" in result}
    assert not failed
    assert results["agreement maple, maple-tiny"]["fp32"]["gradients"] < 1e-4
    assert results["agreement maple, maple-tiny"]["bf16"]["logits"] > 0
    assert results["training maple fp32, batch 2, 3 classes"]["share_of_product_rate"] > 0
    assert results["together 2 seeds"]["steps"] == 4
    assert results["JPEG files to predictions"]["same_predictions"] == 1
    assert set(results["blocks of the image tower"]["cost_seconds"]) == {"compiled"}
    assert "CUDA graphs need a CUDA device" in results["blocks of the text tower"]["errors"]["CUDA graphs"]
    # A wrong result, a work that fails, and works that there is no time for are reported, and the rest is run.
    right = baseline.Plain.logits
    monkeypatch.setattr(baseline.Plain, "logits", lambda self, images: -right(self, images))
    monkeypatch.setattr(gpu.works, "several_runs", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", [*command, "--only", "together,files"])
    with pytest.raises(SystemExit, match="does not agree: JPEG files to predictions"):
        gpu.main()
    results = json.loads(path.read_text())["results"]
    assert "ZeroDivisionError" in results["together 2 seeds"]["error"]
    monkeypatch.setattr(sys, "argv", [*command, "--minutes", "0"])
    gpu.main()
    results = json.loads(path.read_text())["results"]
    assert results["JPEG files to predictions"] == {"skipped": "0 seconds of 0 minutes were left"}


def test_methods_are_compared_on_given_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three classes, each around its text feature: what is trained on is never tested."""
    text, labels = torch.eye(3, 512), torch.arange(3).repeat(33)
    noise = torch.randn(99, 512, generator=torch.Generator().manual_seed(1)) / 60
    tensors = {"test": (text[labels] + noise).half(), "test_labels": labels.to(torch.int16), "text": text.half()}
    save_file(tensors, tmp_path / "fgvc_aircraft.vitb16.test_text.safetensors")
    part = real_features.read_parts(tmp_path, "fgvc_aircraft", 1)
    assert [len(images[1]) for images in (part.train, part.val, part.test)] == [48, 12, 39]
    rows = torch.cat([part.train[0], part.val[0], part.test[0]])
    assert len({tuple(row.tolist()) for row in rows}) == 99
    command = ["real_features", "--features", str(tmp_path), "--data", "fgvc_aircraft", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--seeds", "1,2", "--methods", "zero_shot,tip-adapter-f"])
    real_features.main()
    zero_shot, cache = json.loads((tmp_path / "real-features.json").read_text())["results"]
    assert (zero_shot["method"], len(cache["runs"]), cache["images"]) == ("zero_shot", 2, 39)
    assert cache["accuracy"] >= zero_shot["accuracy"] > 90
    monkeypatch.setattr(real_features, "TUNING", [["train.lr=0.01", "train.epochs=2"]])
    monkeypatch.setattr(sys, "argv", [*command, "--seeds", "1", "--tune"])
    real_features.main()
    (row,) = json.loads((tmp_path / "real-features-tune.json").read_text())["results"]
    assert row["settings"] == "train.lr=0.01 train.epochs=2"
    monkeypatch.setattr(sys, "argv", [*command, "--methods", "tip"])
    with pytest.raises(SystemExit, match="unknown: tip; choose from zero_shot"):
        real_features.main()


def test_the_walk_reports_what_runs_and_what_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(walk_backbones, "architecture_config", ARCHITECTURES.__getitem__)
    row = walk_backbones.walk("maple-tiny", ["one", "two"], {})
    assert (row["parameters"], row["pixels"], row["tokens"]) == (9099521, 64, 77)
    assert set(row["families"].values()) == {None}
    assert row["failures"] == []
    monkeypatch.setitem(walk_backbones.EXAMPLES, "image prompts", {"name": "vpt", "vision_prompt_depth": 9})
    failed = walk_backbones.walk("maple-tiny", [], {})
    assert len(failed["failures"]) == 1
    assert "image prompts: ConfigError: vision prompt depth=9" in failed["failures"][0]
    page = tmp_path / "page.md"
    page.write_text("before\n" + "\nold\n".join(walk_backbones.MARKERS) + "\nafter\n")
    for _ in range(2):
        walk_backbones.write_table(page, [row, failed, {**row, "failures": [], "refused": "too large"}])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("| maple-tiny | one, two | 9 | 64 | 77 | yes | yes | yes | yes | yes |") == 1
    assert "too large" in text
    assert "vision prompt depth=9" in text


def test_files_are_predicted_as_in_a_plain_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(predict_files, "WORKERS", 0)
    arguments = ["--backbones", "maple-tiny", "--images", "5", "--batches", "2,4", "--rounds", "1", "--processes", "0"]
    monkeypatch.setattr(sys, "argv", ["predict_files", *arguments, "--output", str(tmp_path)])
    predict_files.main()
    results = json.loads((tmp_path / "predict-files.json").read_text())["results"]["maple-tiny"]
    assert 0 <= results["largest_difference"] < 1e-4
    assert results["batch of the plain loop"] in (2, 4)
    assert set(results["loop"]["ratio"]) == {"plain"}
    plain = predict_files.plain_loop
    monkeypatch.setattr(predict_files, "plain_loop", lambda *arguments: 1 - plain(*arguments))
    with pytest.raises(SystemExit, match="maple-tiny: the two ways differ by"):
        predict_files.main()
