"""Frozen features on disk: the same bytes as without them, and no image tower where nothing has changed."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import ForkedProcess
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from maple.checkpoint import read_prompts
from maple.cli import app
from maple.clip import Backbone
from maple.clip.load import backbone_from_state_dict
from maple.config import RunSettings
from maple.data import EvalTransform, ImageStore, Item, TrainTransform, load_dataset
from maple.errors import ConfigError, ImageError
from maple.inference.classifier import PromptClassifier
from maple.runs import eval_transform, evaluate_run, train_run, train_together
from maple.runs import feature_cache as cache_module
from maple.runs.feature_cache import FeatureCache
from maple.runs.frozen_features import frozen_batches

Make = Callable[..., RunSettings]
METHOD = {"name": "linear_probe", "inverse_regularisation": 1.0}


class Extraction:
    """The images of a folder and how they are extracted; `rows()` counts the images that pass through the tower."""

    def __init__(self, backbone: Backbone, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.backbone, self.folder = backbone, folder
        self.items = list(load_dataset(str(folder), None).train)
        self.encoded = 0
        embed = backbone.image.embed

        def counted(images: Tensor) -> Tensor:
            self.encoded += len(images)
            return embed(images)

        monkeypatch.setattr(backbone.image, "embed", counted)

    def rows(self, transform: EvalTransform | TrainTransform | None = None, **options: Any) -> Tensor:
        batches = frozen_batches(
            *(options.pop("backbone", self.backbone), options.pop("items", self.items)),
            *(ImageStore(self.folder / "train"), transform or eval_transform(self.backbone)),
            **{"batch_size": 5, **options},
        )
        return torch.cat([batch.images for batch in batches])

    def is_new(self, **options: Any) -> bool:
        """Whether an extraction has to be computed."""
        before = self.encoded
        self.rows(**options)
        return self.encoded > before


@pytest.fixture
def extraction(backbone: Backbone, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Extraction:
    folder = make_images()
    made = Extraction(backbone, folder, monkeypatch)
    made.items = [Item(item.path.removeprefix("train/"), item.label, item.class_name) for item in made.items]
    return made


def augmented(**options: Any) -> TrainTransform:
    return TrainTransform(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), **options)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_the_second_extraction_gives_the_same_bytes_without_tower_and_decoder(
    extraction: Extraction, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = extraction.rows()
    assert extraction.encoded == len(extraction.items) == 16
    assert len(entries(own_cache)) == 1
    monkeypatch.setattr("maple.data.images.store.read_image", None)
    second = extraction.rows()
    assert extraction.encoded == 16
    assert first.numpy().tobytes() == second.numpy().tobytes()
    monkeypatch.undo()
    monkeypatch.setenv("MAPLE_CACHE", "off")
    assert extraction.rows().numpy().tobytes() == first.numpy().tobytes()


def test_batches_have_labels_and_sizes_of_images(extraction: Extraction) -> None:
    def batches() -> list[tuple[list[int], tuple[int, ...]]]:
        store, transform = ImageStore(extraction.folder / "train"), eval_transform(extraction.backbone)
        made = frozen_batches(extraction.backbone, extraction.items, store, transform, batch_size=5)
        return [(batch.labels.tolist(), tuple(batch.images.shape)) for batch in made]

    computed = batches()
    assert [shape for _, shape in computed] == [(5, 32), (5, 32), (5, 32), (1, 32)]
    assert batches() == computed


def test_whatever_decides_the_features_is_part_of_the_key(
    extraction: Extraction, other_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extraction.is_new()
    assert not extraction.is_new()
    assert extraction.is_new(items=extraction.items[::-1]), "the order"
    assert extraction.is_new(items=extraction.items[:-1])
    assert extraction.is_new(batch_size=4)
    assert extraction.is_new(transform=EvalTransform(32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))), "preprocessing"
    assert extraction.is_new(transform=augmented(), view=0, seed=1)
    assert not extraction.is_new(transform=augmented(), view=0, seed=1)
    assert extraction.is_new(transform=augmented(), view=1, seed=1)
    assert extraction.is_new(transform=augmented(), view=0, seed=2)
    assert extraction.is_new(transform=augmented(scale=(0.5, 1.0)), view=0, seed=1)
    assert extraction.is_new(transform=augmented(flip=0.0), view=0, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 3)
        assert extraction.is_new()
    other = Extraction(other_backbone, extraction.folder, monkeypatch)
    other.items = extraction.items
    assert other.is_new(), "other weights"
    assert not extraction.is_new(seed=3, view=1), "which apply to augmented views only"


def test_precision_and_architecture_are_part_of_the_key(
    extraction: Extraction, small_state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extraction.is_new()
    for options in ({"precision": "bf16"}, {"quick_gelu": False}):
        precision = str(options.get("precision", "fp32"))
        copy = backbone_from_state_dict(small_state, name="small", precision=precision)
        if "quick_gelu" in options:
            for block in copy.model.visual.transformer.resblocks:
                block.mlp.gelu = torch.nn.GELU()
        assert copy.fingerprint == extraction.backbone.fingerprint
        other = Extraction(copy, extraction.folder, monkeypatch)
        other.items = extraction.items
        assert other.is_new(), options


def test_images_are_recognised_by_their_content(extraction: Extraction, tmp_path: Path) -> None:
    assert extraction.is_new()
    moved = tmp_path / "moved"
    (extraction.folder / "train").rename(moved)
    (extraction.folder).rename(tmp_path / "empty")
    extraction.folder = tmp_path
    extraction.items = [Item(f"../{item.path}", item.label, item.class_name) for item in extraction.items]
    (tmp_path / "train").mkdir()
    extraction.items = [Item(item.path.replace("../", "../moved/"), 0, "x") for item in extraction.items]
    assert not extraction.is_new(), "the same images elsewhere, with other labels"
    changed = tmp_path / "train" / extraction.items[3].path
    Image.new("RGB", (40, 40), "red").save(changed)
    assert extraction.is_new()


def test_errors_are_those_of_reading(extraction: Extraction, own_cache: Path) -> None:
    extraction.rows()
    path = extraction.folder / "train" / extraction.items[2].path
    path.write_bytes(b"not an image")
    with pytest.raises(ImageError, match=str(path)):
        extraction.rows()
    path.unlink()
    with pytest.raises(ImageError, match="there is no such file"):
        extraction.rows()
    assert len(entries(own_cache)) == 1


def test_images_that_change_meanwhile_are_not_kept(extraction: Extraction, own_cache: Path) -> None:
    store, transform = ImageStore(extraction.folder / "train"), eval_transform(extraction.backbone)
    batches = frozen_batches(extraction.backbone, extraction.items, store, transform, batch_size=5)
    next(batches)
    Image.new("RGB", (9, 9), "red").save(extraction.folder / "train" / extraction.items[0].path)
    list(batches)
    assert not entries(own_cache)
    # The store has the first image still in memory.
    list(frozen_batches(extraction.backbone, extraction.items, store, transform, batch_size=5))
    assert not entries(own_cache)
    assert extraction.is_new()
    assert len(entries(own_cache)) == 1


@pytest.mark.parametrize("damage", ["empty", "short", "bit", "text", "other"])
def test_a_damaged_entry_is_computed_again(
    damage: str, extraction: Extraction, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = extraction.rows()
    (path,) = entries(own_cache)
    good = path.read_bytes()
    changed = bytearray(good)
    changed[-9] ^= 4
    other = FeatureCache(own_cache, 10**9)
    other.write("0" * 64, torch.zeros(16, 32), {})
    others = (own_cache / f"{'0' * 64}.safetensors").read_bytes()
    path.write_bytes({"empty": b"", "short": good[:-40], "bit": changed, "text": b"features", "other": others}[damage])
    assert torch.equal(extraction.rows(), first)
    assert extraction.encoded == 32
    assert len(caplog.messages) == 1
    assert "is damaged, and is computed again" in caplog.text
    assert path.read_bytes() == good
    assert not extraction.is_new()


def test_without_a_place_to_write_features_are_computed(
    extraction: Extraction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache_module._warn_once.cache_clear()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAPLE_CACHE", str(tmp_path / "file"))
    assert extraction.is_new()
    assert extraction.is_new()
    assert len(caplog.messages) == 1
    assert "features cannot be kept there" in caplog.text


def test_a_full_disk_is_reported_once(
    extraction: Extraction, own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache_module._warn_once.cache_clear()

    def full(path: Path, _data: bytes) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert extraction.is_new()
    assert extraction.is_new()
    assert len(caplog.messages) == 1
    assert list(own_cache.iterdir()) == []


def test_a_cache_below_a_folder_that_cannot_be_searched_is_not_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, **_: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refused)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert not FeatureCache(tmp_path / "home/features", 1000).is_writable


def test_an_entry_that_cannot_be_read_is_not_called_damaged(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refused)
    assert FeatureCache(own_cache, 1000).read("0" * 64) is None
    assert "cannot be read (Permission denied), and is computed again" in caplog.text
    assert "damaged" not in caplog.text


def test_the_least_recently_used_go_first(own_cache: Path) -> None:
    features = torch.zeros(100, 32)
    cache = FeatureCache(own_cache, 3 * (features.nbytes + 1000))
    keys = [f"{number:064x}" for number in range(4)]
    for age, key in enumerate(keys[:3]):
        cache.write(key, features, {})
        os.utime(cache._path(key), (time.time() - 1000 + age,) * 2)
    assert cache.read(keys[0]) is not None
    cache.write(keys[3], features, {})
    assert {entry.path.stem for entry in cache.entries()} == {keys[0], keys[2], keys[3]}
    FeatureCache(own_cache, 10).write("f" * 64, features, {})
    assert not cache._path("f" * 64).exists(), "larger than the limit"
    FeatureCache(own_cache, features.nbytes).write("e" * 64, features, {})
    assert [entry.path.stem for entry in cache.entries()] == ["e" * 64], "the new entry is kept"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", 5 * 10**9),
        ("0", 0),
        ("1000", 1000),
        ("5GB", 5 * 10**9),
        ("1.5 kb", 1500),
        ("2GiB", 2**31),
        ("3 M", 3 * 10**6),
    ],
)
def test_sizes(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAPLE_CACHE_SIZE", text)
    cache = FeatureCache.open()
    assert cache is not None
    assert cache.limit == size


@pytest.mark.parametrize("text", ["much", "-1", "5 GB or so", "nan", "5XB", "1e9"])
def test_a_limit_that_is_not_a_size_is_an_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAPLE_CACHE_SIZE", text)
    with pytest.raises(ConfigError, match=r"MAPLE_CACHE_SIZE is .* give a size, such as 5GB"):
        FeatureCache.open()


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def place() -> Path | None:
        cache = FeatureCache.open()
        return None if cache is None else cache.folder

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MAPLE_CACHE", "~/mine")
    assert place() == tmp_path / "mine" / "features"
    monkeypatch.setenv("MAPLE_CACHE", "OFF")
    assert place() is None
    monkeypatch.delenv("MAPLE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert place() == Path("/caches/maple/features")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert place() == tmp_path / ".cache/maple/features"


def _files(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    paths = [path for name in names for path in folder.glob(name)]
    assert len(paths) >= len(names)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


RESULTS = ("prompts.safetensors", "rows.jsonl", "predictions/*.npz", "items.json")


@pytest.mark.parametrize(
    "method",
    [
        {"name": "zero_shot"},
        METHOD,
        {"name": "tip_adapter", "alpha": 1.0, "beta": 2.0, "learn_keys": True},
        {"name": "clip_adapter"},
        {"name": "taskres"},
        {"name": "coop", "prompt_length": 2},
        {"name": "cocoop"},
        {"name": "maple", "prompt_depth": 2},
        {
            "name": "promptsrc",
            "text_prompt_depth": 2,
            "vision_prompt_depth": 2,
            "teacher_templates": ["a photo of a {}.", "a sketch of the {}!"],
        },
    ],
    ids=lambda method: method["name"],
)
def test_runs_are_the_same_bytes_with_and_without(
    method: dict[str, Any],
    make_images: Callable[..., Path],
    settings_for: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_cache: Path,
) -> None:
    settings = settings_for(make_images(), method, epochs=2, views=1)
    made = {}
    for name in ("off", "cold", "warm"):
        monkeypatch.setenv("MAPLE_CACHE", "off" if name == "off" else str(own_cache.parent))
        train_run(settings, tmp_path / name)
        done: list[int] = []
        evaluate_run(tmp_path / name, on_images=lambda images, _, done=done: done.append(images))
        assert done[-1] == 12
        made[name] = _files(tmp_path / name, RESULTS)
    assert made["off"] == made["cold"] == made["warm"]
    assert entries(own_cache) or method["name"] == "maple"


def test_runs_that_train_together_and_other_methods_share_features(
    make_images: Callable[..., Path], settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images()
    settings = settings_for(images, {"name": "clip_adapter"}, views=1)
    settings = settings.changed(backbone=settings.backbone, train=settings.train.changed(views=0))
    train_together([(settings.changed(train=settings.train.changed(lr=lr)), tmp_path / f"{lr}") for lr in (0.1, 0.2)])
    evaluate_run(tmp_path / "0.1")
    monkeypatch.setattr("maple.runs.frozen_features.encode_image", None)
    monkeypatch.setattr("maple.data.images.store.read_image", None)
    evaluate_run(tmp_path / "0.2")
    other = settings_for(images, METHOD, views=0)
    train_run(other, tmp_path / "probe")
    evaluate_run(tmp_path / "probe")


def test_drawn_data_sets_are_not_drawn_again(
    settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    settings = settings_for(Path("emoji-activities"), METHOD, views=0)
    settings = settings.changed(data=settings.data.changed(dataset="emoji-activities", shots=1))
    train_run(settings, tmp_path / "first")
    names = read_prompts(tmp_path / "first/prompts.safetensors").class_names[:5]
    evaluate_run(tmp_path / "first", only=names)
    monkeypatch.setattr("maple.data.emoji.render_scene", None)
    train_run(settings, tmp_path / "second")
    evaluate_run(tmp_path / "second", only=names)
    first, second = (_files(tmp_path / name, RESULTS[:2]) for name in ("first", "second"))
    assert first == second
    assert len(entries(own_cache)) >= 2


def test_a_classifier_shares_its_features(monkeypatch: pytest.MonkeyPatch, own_cache: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = generator.integers(0, 256, (8, 40, 40, 3), dtype=np.uint8)
    labels = ["cat", "dog"] * 4

    def probabilities(images: Any) -> Any:
        options = {"backbone": "maple-tiny", "pretrained": "random", "settings": {"train": {"views": 0}}}
        return PromptClassifier("clip_adapter", epochs=1, **options).fit(images, labels).predict_proba(arrays)

    first = probabilities(arrays)
    assert len(entries(own_cache)) == 1
    with monkeypatch.context() as patch:
        patch.setattr("maple.runs.frozen_features.encode_image", None)
        assert np.array_equal(probabilities([Image.fromarray(array) for array in arrays]), first)
    assert len(entries(own_cache)) == 1, "the pixels decide, in whatever form they are given"
    probabilities(arrays[::-1].copy())
    assert len(entries(own_cache)) == 2
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(array).save(path)
    probabilities(paths)
    with monkeypatch.context() as patch:
        patch.setattr("maple.runs.frozen_features.encode_image", None)
        assert np.array_equal(probabilities(list(map(str, paths))), first)


def write_and_read(folder: Path, rounds: int) -> None:
    """What a process does to a cache while others use it."""
    cache = FeatureCache(folder, 4_000_000)
    for number in range(rounds):
        features = torch.arange(200_000, dtype=torch.float32).reshape(1000, 200)
        cache.write(f"{number % 6:064x}", features, {"images": 1000})
        for other in range(6):
            read = cache.read(f"{other:064x}")
            assert read is None or torch.equal(read, features)
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()


@pytest.mark.slow
def test_two_processes_write_and_remove_at_once(own_cache: Path) -> None:
    for process in [ForkedProcess(write_and_read, own_cache, 8) for _ in range(2)]:
        assert process.wait() == 0, process.stderr
        assert "damaged" not in process.stderr
    cache = FeatureCache(own_cache, 4_000_000)
    assert 0 < sum(entry.size for entry in cache.entries()) <= 4_810_000, "the limit, but for the last writer's entry"


@pytest.mark.slow
def test_a_process_killed_while_it_writes_leaves_nothing_damaged(
    own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process, deadline = ForkedProcess(write_and_read, own_cache, 100_000), time.monotonic() + 60
    while "\n" not in process.stdout and process.returncode is None and time.monotonic() < deadline:
        time.sleep(0.01)
    while not list(own_cache.glob(".maple-*.tmp")) and time.monotonic() < deadline:
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr
    cache = FeatureCache(own_cache, 4_000_000)
    for entry in cache.entries():
        assert cache.read(entry.path.stem) is not None
    assert not caplog.messages
    cache.clear()
    assert list(own_cache.iterdir()) == [], "the temporary file, too"


def test_the_commands(extraction: Extraction, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["cache", *arguments], catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    assert run("list").startswith(f"0 in {own_cache}: 0 bytes of at most 5.0 GB")
    extraction.rows()
    extraction.rows(transform=augmented(), seed=4, view=1)
    content = json.loads(run("list", "--json"))
    assert content["cache"]["folder"] == str(own_cache)
    assert content["cache"]["size"] == sum(entry["size"] for entry in content["entries"])
    assert {entry["view"] for entry in content["entries"]} == {"evaluation", "training, seed 4, view 2"}
    for entry in content["entries"]:
        assert entry["images"] == 16
        assert entry["backbone"] == "small"
        assert entry["precision"] == "fp32"
        assert entry["root"] == str(extraction.folder / "train")
    entries(own_cache)[0].write_bytes(b"x")
    assert "damaged" in run("list")
    old = entries(own_cache)[1]
    os.utime(old, (time.time() - 3 * 86400,) * 2)
    assert "removed 0 (0 bytes)" in run("clear", "--older-than", "4")
    assert "removed 1 (" in run("clear", "--older-than", "2")
    assert not old.exists()
    assert "removed 1 (1 bytes)" in run("clear")
    assert not entries(own_cache)
    with pytest.raises(ConfigError, match="give a number of days"):
        run("clear", "--older-than", "-1")
    monkeypatch.setenv("MAPLE_CACHE", "off")
    assert "MAPLE_CACHE is off" in run("list")
    assert "MAPLE_CACHE is off" in run("clear")
    assert json.loads(run("list", "--json")) == {"cache": None, "entries": [], "sources": []}
