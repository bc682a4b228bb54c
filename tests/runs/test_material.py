"""What a run learns from: the same views whether they are read as images or as features of the frozen tower."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maple.clip import Backbone
from maple.config import RunSettings
from maple.data import Item, load_dataset
from maple.errors import ConfigError
from maple.methods import Method, build_method
from maple.runs import TrainingData, content_name, train_run
from maple.train import Trainer

NAMES = ["bird", "cat", "dog", "eel"]


def made(images: Path, **train: Any) -> tuple[RunSettings, list[Item], TrainingData]:
    settings = RunSettings(data={"dataset": str(images)}, train={"batch_size": 5, "epochs": 4, "lr": 0.02, **train})
    dataset = load_dataset(str(images), None)
    return settings, list(dataset.train), TrainingData(settings, dataset.train, dataset.store())


def coop(backbone: Backbone) -> Method:
    generator = torch.Generator().manual_seed(1)
    return build_method({"name": "coop", "prompt_length": 3}, backbone, NAMES, generator=generator)


def epochs(trainer: Trainer, material: TrainingData, count: int) -> list[list[tuple[Tensor, Tensor, int]]]:
    found = []
    for _ in range(count):
        found.append([(batch.images, batch.labels, whole) for batch, whole in material.batches(trainer)])
        trainer.epoch += 1
    return found


@pytest.mark.parametrize("views", [0, 2])
def test_features_are_those_of_the_same_views_in_the_same_order(
    views: int, make_images: Callable[..., Path], backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, _, material = made(make_images(), views=views, drop_last=False)
    method = coop(backbone)
    features = epochs(Trainer(method, settings.train), material, 3)
    monkeypatch.setattr(type(method), "accepts_features", False)
    pixels = epochs(Trainer(method, settings.train), material, 3)
    for seen, shown in zip(features, pixels, strict=True):
        assert [len(labels) for _, labels, _ in seen] == [5, 5, 5, 1]
        for (feature, label, whole), (image, other_label, other_whole) in zip(seen, shown, strict=True):
            assert feature.shape == (len(label), backbone.embed_dim)
            assert image.shape == (len(label), 3, 32, 32)
            assert torch.equal(label, other_label)
            assert whole == other_whole
            with torch.no_grad():
                torch.testing.assert_close(method.image_features_raw(image), feature, rtol=1e-4, atol=1e-5)


def test_views_come_again(make_images: Callable[..., Path], backbone: Backbone) -> None:
    settings, items, material = made(make_images(), views=2, batch_size=16)
    found = epochs(Trainer(coop(backbone), settings.train), material, 4)
    rows = [{tuple(row) for batch, _, _ in epoch for row in batch.tolist()} for epoch in found]
    assert all(len(row) == len(items) for row in rows)
    assert rows[0] == rows[2]
    assert rows[1] == rows[3]
    assert not rows[0] & rows[1], "another view of every image"


def test_batches_of_all_views(make_images: Callable[..., Path], backbone: Backbone) -> None:
    settings, items, material = made(make_images(), views=3, batch_size=40, mix_views=True)
    trainer = Trainer(coop(backbone), settings.train)
    every = [{tuple(row) for row in view.tolist()} for view in material._view_features(trainer.method)]
    first, second = epochs(trainer, material, 2)
    assert len(items) == 16
    for epoch in (first, second):
        ((rows, labels, whole),) = epoch
        assert (len(rows), whole) == (40, 40), "more than one view of the sixteen images has"
        drawn = {tuple(row) for row in rows.tolist()}
        assert len(drawn) == 40
        assert all(drawn & view for view in every)
        views = material._view_features(trainer.method).tolist()
        of_rows = {tuple(row): items[index].label for view in views for index, row in enumerate(view)}
        assert [of_rows[tuple(row)] for row in rows.tolist()] == labels.tolist()
    assert not torch.equal(first[0][0], second[0][0])
    _, _, material = made(make_images("others"), views=3, batch_size=5, mix_views=True, drop_last=False)
    assert [len(rows) for rows, _, _ in epochs(trainer, material, 1)[0]] == [5, 5, 5, 5], "as many as of one view"


def test_mixed_views_need_features(make_images: Callable[..., Path], backbone: Backbone) -> None:
    images = make_images()
    for views in (0, 1):  # as for features, which have one view
        _, _, plain = made(images, views=views)
        _, _, material = made(images, views=views, mix_views=True)
        material.fit_features(coop(backbone))
        expected, mixed = (epochs(Trainer(coop(backbone), each.train), each, 1)[0] for each in (plain, material))
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(expected, mixed, strict=True))
    _, _, material = made(images, mix_views=True)
    with pytest.raises(ConfigError, match=r"train\.mix_views=true .* train\.views=None there are none"):
        material.fit_features(coop(backbone))


def test_the_image_tower_runs_once_for_each_view(
    make_images: Callable[..., Path], backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, items, material = made(make_images(), views=2)
    seen: list[int] = []
    embed = backbone.image.embed
    monkeypatch.setattr(backbone.image, "embed", lambda images: (seen.append(len(images)), embed(images))[1])
    trainer = Trainer(coop(backbone), settings.train)
    while not trainer.finished:
        trainer.run_epoch(material.batches(trainer))
    assert sum(seen) == 2 * len(items)


@pytest.mark.parametrize("views", [0, 2, 4])
@pytest.mark.parametrize("prompts", [{}, {"prompts": {"name": "maple", "prompt_depth": 2}}], ids=["own", "maple"])
def test_a_teacher_sees_each_view_once(
    views: int,
    prompts: dict[str, Any],
    make_images: Callable[..., Path],
    backbone: Backbone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the frozen tower says of images that come again is asked once, and changes nothing but rounding."""
    depths = {} if prompts else {"text_prompt_depth": 2, "vision_prompt_depth": 2}
    seen: list[int] = []
    embed = backbone.image.embed
    monkeypatch.setattr(backbone.image, "embed", lambda images: (seen.append(len(images)), embed(images))[1])

    pictures = make_images()

    def trained(known: bool) -> tuple[list[float], dict[str, Tensor], int]:
        seen.clear()
        settings, _, material = made(pictures, views=views, lr=0.002, micro_batch=2)
        generator = torch.Generator().manual_seed(1)
        method = build_method({"name": "promptsrc", **depths, **prompts}, backbone, NAMES, generator=generator)
        monkeypatch.setattr(type(method), "needs_frozen_features", known)
        trainer = Trainer(method, settings.train)
        while not trainer.finished:
            trainer.run_epoch(material.batches(trainer))
        losses = [loss for report in trainer.history for loss in report.losses]
        return losses, {name: value.detach() for name, value in method.prompt_parameters().items()}, sum(seen)

    images, shown = 16, 4 * 15  # of four epochs, whose last batch is dropped
    losses, prompts_now, asked = trained(known=True)
    expected, prompts_then, asked_always = trained(known=False)
    assert asked == shown + (shown if views == 4 else max(views, 1) * images)
    assert asked_always == 2 * shown
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    for name, value in prompts_now.items():
        torch.testing.assert_close(value, prompts_then[name], rtol=1e-3, atol=1e-5)


def test_a_method_that_changes_the_image_tower_reads_images(
    make_images: Callable[..., Path], backbone: Backbone
) -> None:
    settings, _, material = made(make_images(), views=0)
    method = build_method({"name": "vpt", "vision_prompt_depth": 2}, backbone, NAMES)
    one, other = epochs(Trainer(method, settings.train), material, 2)
    assert one[0][0].shape == (5, 3, 32, 32)
    rows = [sorted(row.sum().item() for batch, _, _ in epoch for row in batch) for epoch in (one, other)]
    assert len(set(rows[0]) & set(rows[1])) > 10, "without augmentation an image is always the same"


def test_runs_without_views_keep_their_names(make_images: Callable[..., Path], tmp_path: Path) -> None:
    settings, *_ = made(make_images())
    assert content_name(settings) != content_name(made(tmp_path / "pictures", views=0)[0])
    small = {"backbone": {"name": "maple-tiny", "pretrained": "random"}, "method": {"name": "coop"}}
    run = RunSettings(**{**settings.changed(train={"epochs": 2, "views": 1}).model_dump(), **small})
    result = train_run(run, tmp_path / "run", device="cpu")
    assert len(result.history) == 2
