"""Views made in batches: the bytes that PIL makes of each image, whatever their sizes and boxes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maple.data import EvalTransform, ImageStore, Item, TrainTransform, eval_batches, train_batches, view_batches
from maple.data import resampling as module
from maple.data.resampling import Piece, columns_first, line_taps, resample
from maple.data.views import DeviceViews, HostViews, make_views, reading_threads, views_device

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CPU = torch.device("cpu")
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))
interpolations = st.sampled_from(["bicubic", "bilinear"])


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """The hardest image to resize: every rounding and every clipping shows."""
    values = np.random.default_rng([width, height, seed]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def both(transform: TrainTransform | EvalTransform, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    def views(maker: HostViews | DeviceViews) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(number) for number in range(len(images))]
        return maker.batch([maker.one(*pair) for pair in zip(images, generators, strict=True)])

    return views(HostViews(transform)), views(DeviceViews(transform, CPU))


@settings(max_examples=60, deadline=None)
@given(sizes, st.tuples(st.integers(1, 60), st.integers(1, 60)), interpolations)
def test_resizing_is_that_of_pil(size: tuple[int, int], resized: tuple[int, int], interpolation: str) -> None:
    image = noise(*size)
    expected = np.asarray(image.resize(resized, RESAMPLING[interpolation]))
    side = max(resized)
    canvas = np.zeros((side, side, 3), dtype=np.uint8)
    canvas[: resized[1], : resized[0]] = expected
    rows, columns = (line_taps(size[axis], resized[axis], 0, resized[axis], interpolation) for axis in (1, 0))
    grown = [
        module.Taps(
            np.resize(taps.first, side),
            np.concatenate([taps.weights, np.zeros((side - len(taps.first), taps.weights.shape[1]), np.int32)]),
        )
        for taps in (rows, columns)
    ]
    piece = Piece(np.array(image), *grown)
    piece = piece.turned() if columns_first(size[1], size[0], (resized[1], resized[0])) else piece
    np.testing.assert_array_equal(resample([piece], CPU)[0].numpy(), canvas)


@settings(max_examples=40, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=4), st.sampled_from([1, 7, 32]), interpolations)
def test_views_of_a_batch_equal_the_views_one_by_one(
    shapes: list[tuple[int, int]], size: int, interpolation: str
) -> None:
    images = [noise(*shape, seed=number) for number, shape in enumerate(shapes)]
    for transform in (
        TrainTransform(size, MEAN, STD, interpolation=interpolation),
        EvalTransform(size, MEAN, STD, interpolation),
    ):
        expected, found = both(transform, images)
        assert found.shape == (len(images), 3, size, size)
        assert found.is_contiguous()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(500, 333), (333, 500), (1000, 40), (7, 900), (224, 224), (225, 224), (2, 1000)])
def test_common_and_odd_sizes(shape: tuple[int, int]) -> None:
    for transform in (TrainTransform(224, MEAN, STD), EvalTransform(224, MEAN, STD)):
        expected, found = both(transform, [noise(*shape), noise(shape[1], shape[0])])
        assert torch.equal(found, expected)


def test_large_images_are_not_held_whole_and_come_out_the_same() -> None:
    image = noise(1600, 1200)
    for transform in (EvalTransform(32, MEAN, STD), TrainTransform(32, MEAN, STD, scale=(0.9, 1.0))):
        piece = DeviceViews(transform, CPU).one(image, torch.Generator().manual_seed(0))
        assert piece.pixels.shape == (32, 32, 3)
        expected, found = both(transform, [noise(50, 30), image, noise(30, 50)])
        assert torch.equal(found, expected)


def test_groups_bound_the_memory_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [noise(40 + number, 60 - number) for number in range(7)]
    maker = DeviceViews(EvalTransform(16, MEAN, STD), CPU)
    pieces = [maker.one(image) for image in images]
    expected = maker.batch(pieces)
    monkeypatch.setattr(module, "_ROWS_BYTES", 100 * 16 * 12)
    groups = module._groups(pieces)
    assert len(groups) > 2
    assert [piece for group in groups for piece in group] == pieces
    assert all(sum(piece.pixels.shape[0] for piece in group) <= 100 for group in groups)
    assert torch.equal(maker.batch(pieces), expected)


def test_an_older_pil_begins_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_may_begin_with_columns", lambda: False)
    assert not columns_first(300, 30, (64, 64))
    monkeypatch.setattr(module, "_may_begin_with_columns", lambda: True)
    assert columns_first(300, 30, (64, 64))
    assert not columns_first(30, 300, (64, 64))


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, list[Item]]:
    items = []
    for number in range(7):
        noise(20 + 3 * number, 44 - 2 * number).save(tmp_path / f"{number}.png")
        items.append(Item(f"{number}.png", number, f"class_{number}"))
    return tmp_path, items


@pytest.mark.parametrize(
    "options", [{}, {"views": 2}, {"num_workers": 2}, {"rank": 1, "world_size": 2}, {"rank": 2, "world_size": 5}]
)
def test_batches_on_a_device_are_those_of_the_host(folder: tuple[Path, list[Item]], options: dict[str, int]) -> None:
    root, items = folder
    found = []
    for device in (None, CPU):
        batches = train_batches(
            items,
            ImageStore(root),
            TrainTransform(16, MEAN, STD),
            batch_size=3,
            seed=1,
            epoch=3,
            drop_last=False,
            device=device,
            **options,
        )
        found.append([(batch.images, batch.labels, whole) for batch, whole in batches])
    assert len(found[0]) == 3
    for (images, labels, whole), (other, other_labels, other_whole) in zip(*found, strict=True):
        assert torch.equal(images, other)
        assert torch.equal(labels, other_labels)
        assert whole == other_whole


def test_views_in_order_and_evaluation_on_a_device_too(folder: tuple[Path, list[Item]]) -> None:
    root, items = folder
    train, evaluation = TrainTransform(16, MEAN, STD), EvalTransform(16, MEAN, STD)
    for device in (None, CPU):
        seen = [
            b.images for b in view_batches(items, ImageStore(root), train, view=1, seed=2, batch_size=4, device=device)
        ]
        shown = [b.images for b in eval_batches(items, root, evaluation, batch_size=4, num_workers=2, device=device)]
        if device is None:
            expected = [*seen, *shown]
        else:
            assert all(torch.equal(*pair) for pair in zip(expected, [*seen, *shown], strict=True))


def test_where_views_are_made() -> None:
    cuda = torch.device("cuda")
    assert [views_device(place, CPU) for place in ("auto", "host", "device")] == [None, None, CPU]
    assert [views_device(place, cuda) for place in ("auto", "host", "device")] == [cuda, None, cuda]
    assert isinstance(make_views(EvalTransform(8, MEAN, STD)), HostViews)


@pytest.mark.parametrize(("cores", "threads"), [(1, 0), (2, 2), (64, 4)])
def test_threads_where_there_are_cores(cores: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert reading_threads(None) == threads
    assert reading_threads(3) == 3
    assert reading_threads(0) == 0
