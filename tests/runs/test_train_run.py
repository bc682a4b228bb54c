"""Runs as folders: what is in one, what is never repeated, and what a run refuses to go on from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maple.checkpoint import load_prompts, read_prompts
from maple.config import RunSettings
from maple.data import ImageStore
from maple.errors import CheckpointError, ConfigError, DataError
from maple.runs import content_name, evaluate_run, finished_prompts, read_history, read_settings, train_run
from maple.train import EpochReport, StepReport

FILES = ["config.json", "environment.json", "images.json", "items.json", "metrics.jsonl", "prompts.safetensors"]
FILES += ["trained_images.json"]


class Interrupting:
    """A progress that stops the run: during an epoch, or once an epoch is on the disk."""

    def __init__(self, *, at_step: int | None = None, after_epoch: int | None = None) -> None:
        self.at_step, self.after_epoch = at_step, after_epoch
        self.begun: tuple[int, int, int] | None = None
        self.epochs: list[int] = []

    def start(self, epochs: int, steps: int, finished_epochs: int) -> None:
        self.begun = (epochs, steps, finished_epochs)

    def step(self, report: StepReport) -> None:
        if report.step == self.at_step:
            raise KeyboardInterrupt

    def epoch(self, report: EpochReport) -> None:
        self.epochs.append(report.epoch)
        if report.epoch == self.after_epoch:
            raise KeyboardInterrupt


@pytest.fixture
def settings(make_images: Callable[..., Path], settings_for: Callable[..., RunSettings]) -> RunSettings:
    return settings_for(make_images(classes=("cat", "dog")))


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name != ".lock")


def test_a_run_is_a_folder(settings: RunSettings, tmp_path: Path) -> None:
    progress = Interrupting()
    ready: list[Any] = []
    result = train_run(
        settings, tmp_path / "run", progress=progress, on_ready=lambda method, items: ready.append((method, items))
    )
    assert names(result.folder) == FILES
    assert progress.begun == (2, 2, 0)
    assert [report.epoch for report in result.history] == progress.epochs == [0, 1]
    assert not result.was_finished
    (method, items), *_ = ready
    stored = read_prompts(result.folder / "prompts.safetensors")
    assert stored.class_names == method.class_names == ("cat", "dog")
    assert stored.info["train"]["epochs"] == 2
    assert stored.info["items"] == json.loads((result.folder / "items.json").read_text())["hash"]
    assert len(items) == len(json.loads((result.folder / "items.json").read_text())["items"]) == 8
    assert str(tmp_path) not in json.dumps(stored.info["data"].get("root"))
    assert read_settings(result.folder).train == settings.train
    assert read_history(result.folder) == list(result.history)
    assert load_prompts(finished_prompts(result.folder)).class_names == ("cat", "dog")


def test_a_finished_run_is_not_repeated(settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train_run(settings, tmp_path / "run")
    before = {name: (tmp_path / "run" / name).stat().st_mtime_ns for name in FILES}
    monkeypatch.setattr("maple.runs.training.open_backbone", lambda *_: pytest.fail("a backbone was loaded"))
    (tmp_path / "run" / "resume.safetensors").touch()
    again = train_run(settings, tmp_path / "run")
    assert again.was_finished
    assert again.history == first.history
    assert {name: (tmp_path / "run" / name).stat().st_mtime_ns for name in FILES} == before
    assert names(tmp_path / "run") == FILES


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_interrupted_run_comes_to_the_same_bytes(optimizer: str, settings: RunSettings, tmp_path: Path) -> None:
    settings = settings.changed(train=settings.train.changed(epochs=3, optimizer=optimizer))
    train_run(settings, tmp_path / "straight")
    stops = [Interrupting(at_step=1), Interrupting(after_epoch=0), Interrupting(at_step=3), Interrupting(after_epoch=2)]
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            train_run(settings, tmp_path / "broken", progress=stop)
        with pytest.raises(CheckpointError, match=r"holds no prompts.safetensors; (it was interrupted|train first)"):
            finished_prompts(tmp_path / "broken")
    assert [stop.begun and stop.begun[2] for stop in stops] == [0, 0, 1, 1]
    last = Interrupting()
    train_run(settings, tmp_path / "broken", progress=last)
    assert last.epochs == [], "all epochs were done; only the result was missing"
    for name in ("prompts.safetensors", "metrics.jsonl", "items.json", "config.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert names(tmp_path / "broken") == FILES


def test_workers_change_nothing(settings: RunSettings, tmp_path: Path) -> None:
    train_run(settings, tmp_path / "one")
    train_run(settings.changed(train=settings.train.changed(workers=2)), tmp_path / "two")
    assert (tmp_path / "one/prompts.safetensors").read_bytes() == (tmp_path / "two/prompts.safetensors").read_bytes()
    assert content_name(settings) == content_name(settings.changed(train=settings.train.changed(workers=2)))
    assert content_name(settings) != content_name(settings.changed(seed=2))


def test_drafts_are_a_setting_of_the_run(
    make_images: Callable[..., Path],
    settings_for: Callable[..., RunSettings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_images(classes=("cat", "dog"))
    for path in [*folder.rglob("*.png"), *folder.rglob("*.jpg")]:
        with Image.open(path) as image:
            image.convert("RGB").resize((1408, 1056)).save(path.with_suffix(".jpg"))
        if path.suffix != ".jpg":
            path.unlink()
    sizes: list[tuple[int, int]] = []
    read = ImageStore.get

    def counted(self: ImageStore, path: str) -> Image.Image:
        image = read(self, path)
        sizes.append(image.size)
        return image

    monkeypatch.setattr(ImageStore, "get", counted)
    whole = settings_for(folder, epochs=1)
    drafted = whole.changed(data=whole.data.changed(draft=True))
    train_run(drafted, tmp_path / "drafted")
    assert set(sizes) == {(352, 264)}  # 64 pixels are seen, and the smallest crop has 8 % of an image
    sizes.clear()
    evaluate_run(tmp_path / "drafted", part="train")
    assert set(sizes) == {(176, 132)}
    assert content_name(whole) != content_name(drafted)


def test_where_images_are_cut_and_resized_changes_nothing(settings: RunSettings, tmp_path: Path) -> None:
    train = settings.train.changed(images="device", workers=2)
    batched = settings.changed(train=train, evaluate=settings.evaluate.changed(images="device"))
    rows = []
    for folder, chosen in ((tmp_path / "host", settings), (tmp_path / "device", batched)):
        train_run(chosen, folder)
        rows.append(evaluate_run(folder)[1])
    for name in ("prompts.safetensors", "metrics.jsonl"):
        assert (tmp_path / "host" / name).read_bytes() == (tmp_path / "device" / name).read_bytes()
    assert rows[0] == rows[1]
    assert content_name(settings) == content_name(batched)


def test_another_number_of_threads_is_reported(
    settings: RunSettings, interrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = interrupted / "environment.json"
    environment = json.loads(path.read_text())
    path.write_text(json.dumps({**environment, "threads": 64}))
    train_run(settings, interrupted, device="cpu")
    assert "trained with 64 threads until now, and is resumed with 1" in caplog.text
    assert "OMP_NUM_THREADS=64" in caplog.text


def test_a_resumed_run_keeps_its_start(settings: RunSettings, interrupted: Path) -> None:
    """The time that a plan reports includes the pauses."""
    path = interrupted / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "started": "2025-05-01T10:00:00+00:00"}))
    train_run(settings, interrupted)
    assert json.loads(path.read_text())["started"] == "2025-05-01T10:00:00+00:00"


def test_a_report_lost_in_a_crash_is_written_again(settings: RunSettings, tmp_path: Path) -> None:
    train_run(settings, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        train_run(settings, tmp_path / "run", progress=Interrupting(after_epoch=1))
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])  # as if killed just before the second line
    train_run(settings, tmp_path / "run")
    assert metrics.read_bytes() == (tmp_path / "straight/metrics.jsonl").read_bytes()


def test_leftovers_of_killed_processes_go(settings: RunSettings, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".resume.safetensors.abc.tmp", ".config.json.x1.tmp", "mine.tmp", "notes.txt"):
        (folder / name).write_text("{")
    train_run(settings, folder)
    assert names(folder) == sorted([*FILES, "mine.tmp", "notes.txt"])


def test_other_settings_are_refused(settings: RunSettings, tmp_path: Path) -> None:
    train_run(settings, tmp_path / "run")
    other = settings.changed(train=settings.train.changed(lr=0.5))
    with pytest.raises(
        ConfigError, match=r"run belongs to a run with other settings \(train.lr: 0.01 there, 0.5 now\)"
    ):
        train_run(other, tmp_path / "run")
    assert train_run(settings.changed(evaluate={"batch_size": 3}), tmp_path / "run").was_finished


@pytest.fixture
def interrupted(settings: RunSettings, tmp_path: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        train_run(settings, tmp_path / "run", progress=Interrupting(after_epoch=0))
    return tmp_path / "run"


def test_other_images_are_refused(settings: RunSettings, interrupted: Path) -> None:
    class_folder = Path(settings.data.dataset) / "train" / "cat"
    (class_folder / "0.png").rename(class_folder / "renamed.png")
    with pytest.raises(CheckpointError, match=r"other training images \(hash\): \w{64} there, \w{64} now. Restore"):
        train_run(settings, interrupted)


def test_another_backbone_is_refused(settings: RunSettings, interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from maple.clip import load_clip

    monkeypatch.setattr("maple.runs.training.open_backbone", lambda *_, **__: load_clip("maple-tiny", "random:7"))
    with pytest.raises(CheckpointError, match=r"other backbone: .*fingerprint.* there, .*fingerprint.* now"):
        train_run(settings, interrupted)


def test_a_damaged_resume_file_is_told(settings: RunSettings, interrupted: Path) -> None:
    path = interrupted / "resume.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:-1], b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(
            CheckpointError, match=r"cannot be resumed: .*resume.safetensors is not .*; remove .*run to"
        ):
            train_run(settings, interrupted)
    for key, replacement in ((b'\\"trainer\\"', b'\\"trainex\\"'), (b'\\"history\\"', b'\\"histony\\"')):
        assert key in whole
        path.write_bytes(whole.replace(key, replacement))
        with pytest.raises(CheckpointError, match=r"cannot be resumed: .*resume.safetensors .*; remove .*start again"):
            train_run(settings, interrupted)
    path.write_bytes(whole)
    assert not train_run(settings, interrupted).was_finished


def test_folders_that_are_no_runs(settings: RunSettings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file is a file; choose another output"):
        train_run(settings, tmp_path / "file")
    with pytest.raises(ConfigError, match=r"cannot be made \(.*\); choose another output"):
        train_run(settings, tmp_path / "file" / "below")
    with pytest.raises(ConfigError, match=r"first is among the images of .*; choose another output"):
        train_run(settings, Path(settings.data.dataset) / "runs" / "first")
    assert not (Path(settings.data.dataset) / "runs").exists()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/prompts.safetensors").touch()
    with pytest.raises(ConfigError, match=r"odd holds a prompts.safetensors without a config.json"):
        train_run(settings, tmp_path / "odd")
    with pytest.raises(CheckpointError, match=r"nowhere is not a run folder: it has no config.json"):
        read_settings(tmp_path / "nowhere")
    for content in ("{", "[]", "3", "\udcff"):
        (tmp_path / "odd/config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(CheckpointError, match=r"config.json is (unreadable or )?damaged"):
            read_settings(tmp_path / "odd")
    for content in ("{", "[]", "{}", '{"losses": 3}', '{"losses": [], "rate": 1}'):
        (tmp_path / "odd/metrics.jsonl").write_text(content)
        with pytest.raises(CheckpointError, match=r"metrics.jsonl is (unreadable or )?damaged"):
            read_history(tmp_path / "odd")


def test_no_data_set(settings: RunSettings, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set is named; give dataset=NAME, one of imagenet, caltech101, "):
        train_run(settings.changed(data={"dataset": ""}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_divergence_keeps_the_last_whole_epoch(
    settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maple.errors import TrainingDivergedError
    from maple.methods import Method

    plain, calls = Method.loss, []

    def spoilt(self: Method, *batch: Any) -> Any:
        calls.append(1)
        loss, logs = plain(self, *batch)
        return (loss * float("nan") if len(calls) == 4 else loss), logs

    train_run(settings, tmp_path / "straight")
    monkeypatch.setattr(Method, "loss", spoilt)
    with pytest.raises(TrainingDivergedError, match=r"at step 3 \(epoch 2 of 2\)"):
        train_run(settings, tmp_path / "run")
    assert len(read_history(tmp_path / "run")) == 1
    train_run(settings, tmp_path / "run")
    assert (tmp_path / "run/prompts.safetensors").read_bytes() == (
        tmp_path / "straight/prompts.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_runs(precision: str, settings: RunSettings, tmp_path: Path) -> None:
    backbone = settings.backbone.changed(precision=precision)
    result = train_run(settings.changed(backbone=backbone), tmp_path / "run")
    assert read_prompts(result.folder / "prompts.safetensors").backbone["precision"] == precision
    scores, row = evaluate_run(result.folder)
    assert scores.images == 6
    assert row["backbone"]["precision"] == precision


def test_zero_shot_trains_nothing_and_evaluates(
    settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zero_shot = settings.changed(method={"name": "zero_shot"})
    with monkeypatch.context() as patched:
        patched.setattr(ImageStore, "get", lambda *_: pytest.fail("an image was read"))
        result = train_run(zero_shot, tmp_path / "run")
    assert result.history == ()
    assert names(tmp_path / "run") == [name for name in FILES if name != "metrics.jsonl"]
    assert evaluate_run(tmp_path / "run")[0].images == 6
    assert train_run(zero_shot, tmp_path / "run").was_finished


def test_nothing_is_trained_on_a_data_set_for_evaluation_only(settings: RunSettings, tmp_path: Path) -> None:
    pictures = Path(settings.data.dataset)
    (tmp_path / "eurosat").mkdir()
    pictures.rename(tmp_path / "eurosat/2750")
    rows = [[f"test/{name}/0.png", label, name] for label, name in enumerate(("cat", "dog"))]
    split = {"train": [], "val": [], "test": rows}
    (tmp_path / "eurosat/split_zhou_EuroSAT.json").write_text(json.dumps(split))
    published = settings.changed(data=settings.data.changed(dataset="eurosat", root=str(tmp_path)))
    with pytest.raises(DataError, match=r"'eurosat' has no training images \(val 0, test 2\)"):
        train_run(published, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    split["train"] = rows[1:]
    (tmp_path / "eurosat/split_zhou_EuroSAT.json").write_text(json.dumps(split))
    base = published.changed(data=published.data.changed(classes="base"))
    with pytest.raises(DataError, match=r"'eurosat' has no training images \(val 0, test 1\)"):
        train_run(base, tmp_path / "run")
