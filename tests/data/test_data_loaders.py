"""Batches: the same for any number of processes, workers and interruptions."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from data_helpers import save_image
from hypothesis import given
from hypothesis import strategies as st

from maple.data import EvalTransform, ImageStore, Item, TrainTransform, eval_batches, train_batches
from maple.data.batches import derive_seed, steps_per_epoch, view_batches
from maple.data.images.prefetch import reading_threads
from maple.errors import ConfigError, ImageError

MEAN = STD = (0.5, 0.5, 0.5)
TRAIN = TrainTransform(8, MEAN, STD)
EVAL = EvalTransform(8, MEAN, STD)
Batches = Callable[..., list[tuple[torch.Tensor, torch.Tensor, int]]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index in range(11):
        save_image(folder / f"{index}.png", index * 20)
    return folder


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return [Item(f"{index}.png", index, f"class_{index}") for index in range(11)]


@pytest.fixture
def batches(root: Path, items: list[Item]) -> Batches:
    def run(**options: int) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
        settings = {"batch_size": 4, "seed": 1, "epoch": 0, **options}
        loader = train_batches(items, ImageStore(root), TRAIN, **settings)
        return [(batch.images, batch.labels, length) for batch, length in loader]

    return run


def labels_of(found: list[tuple[torch.Tensor, torch.Tensor, int]]) -> list[list[int]]:
    return [labels.tolist() for _, labels, _ in found]


def same(first: list[tuple[torch.Tensor, torch.Tensor, int]], second: object) -> bool:
    assert isinstance(second, list)
    return labels_of(first) == labels_of(second) and all(
        torch.equal(a, b) for (a, _, _), (b, _, _) in zip(first, second, strict=True)
    )


def test_an_epoch_is_a_random_order_in_full_batches(batches: Batches) -> None:
    found = batches()
    assert [length for _, _, length in found] == [4, 4]
    assert all(images.shape == (4, 3, 8, 8) and images.dtype == torch.float32 for images, _, _ in found)
    assert all(labels.dtype == torch.int64 for _, labels, _ in found)
    everything = batches(drop_last=False)
    assert [length for _, _, length in everything] == [4, 4, 3]
    assert sorted(label for batch in labels_of(everything) for label in batch) == list(range(11))
    assert same(everything[:2], found)


def test_images_stay_with_their_labels(batches: Batches, root: Path, items: list[Item]) -> None:
    plain = {item.label: EVAL(ImageStore(root).get(item.path))[0, 0, 0].item() for item in items}
    for images, labels, _ in batches(drop_last=False):
        assert images[:, 0, 4, 4].tolist() == pytest.approx([plain[label] for label in labels.tolist()])


def test_the_order_follows_seed_and_epoch(batches: Batches) -> None:
    orders = [labels_of(batches(seed=seed, epoch=epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len({str(order) for order in orders}) == 4
    assert labels_of(batches(seed=0, epoch=1)) == orders[1]


def test_worker_threads_change_nothing(batches: Batches) -> None:
    assert same(batches(drop_last=False), batches(drop_last=False, num_workers=3))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_processes_share_each_batch(batches: Batches, world_size: int) -> None:
    whole = batches(drop_last=False)
    parts = [batches(drop_last=False, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, (images, labels, length) in enumerate(whole):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), images)
        assert torch.equal(torch.cat([part[step][1] for part in parts]), labels)
        assert {part[step][2] for part in parts} == {length}
    sizes = [len(part[0][1]) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    if world_size == 5:
        empty = next(part[0] for part in parts if not len(part[0][1]))
        assert empty[0].shape == (0, 3, 8, 8)
        assert empty[0].dtype == torch.float32


def test_views_in_order_are_those_of_training(batches: Batches, root: Path, items: list[Item]) -> None:
    for epoch in (1, 3):
        shown = batches(views=2, epoch=epoch, drop_last=False)
        ordered = list(view_batches(items, ImageStore(root), TRAIN, view=1, seed=1, batch_size=4, num_workers=2))
        images = torch.cat([batch.images for batch in ordered])
        for drawn, labels, _ in shown:
            assert torch.equal(drawn, images[labels])


def test_resuming_continues_exactly(batches: Batches) -> None:
    whole = batches(drop_last=False)
    for start in range(4):
        assert same(whole[start:], batches(drop_last=False, start=start))


def test_fewer_items_than_a_batch_are_kept(batches: Batches) -> None:
    assert [length for _, _, length in batches(batch_size=32)] == [11]


def test_no_global_generator_is_touched(batches: Batches) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = batches()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert same(first, batches())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"start": 3}, "start is batch 3; this epoch has 2 batches"),
        ({"start": -1}, "start is batch -1"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of world_size 2"),
        ({"rank": -1}, "rank is -1"),
    ],
)
def test_numbers_out_of_range_are_refused_at_the_call(
    options: dict[str, int], message: str, root: Path, items: list[Item]
) -> None:
    with pytest.raises(ConfigError, match=message):
        train_batches(items, ImageStore(root), TRAIN, **{"batch_size": 4, "seed": 1, "epoch": 0, **options})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unusable_image_is_named(tmp_path: Path, num_workers: int) -> None:
    items = [Item(path, 0, "a") for path in ("good.png", "bad.png", "good.png")]
    save_image(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no image")
    message = f"^{tmp_path / 'bad.png'}: is not an image"
    with pytest.raises(ImageError, match=message):
        list(eval_batches(items, tmp_path, EVAL, num_workers=num_workers))
    store = ImageStore(tmp_path)
    with pytest.raises(ImageError, match=message):
        list(train_batches(items, store, TRAIN, batch_size=3, seed=0, epoch=0, num_workers=num_workers))


def test_leaving_early_ends_the_threads(root: Path, items: list[Item]) -> None:
    loader = eval_batches(items, root, EVAL, batch_size=2, num_workers=2)
    next(loader)
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("maple-images")]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_keeps_the_order(root: Path, items: list[Item], num_workers: int) -> None:
    found = list(eval_batches(items, root, EVAL, batch_size=4, num_workers=num_workers))
    assert [len(batch) for batch in found] == [4, 4, 3]
    assert torch.cat([batch.labels for batch in found]).tolist() == list(range(11))
    expected = torch.stack([EVAL(ImageStore(root).get(item.path)) for item in items])
    assert torch.equal(torch.cat([batch.images for batch in found]), expected)
    assert list(eval_batches([], root, EVAL)) == []


def test_a_store_spares_decoding_in_the_second_epoch(root: Path, items: list[Item]) -> None:
    store = ImageStore(root)
    for epoch in range(3):
        list(train_batches(items, store, TRAIN, batch_size=4, seed=1, epoch=epoch, drop_last=False, num_workers=2))
    list(eval_batches(items, store, EVAL))
    assert store.decodes == 11


@given(n_items=st.integers(0, 200), batch_size=st.integers(1, 50), drop_last=st.booleans())
def test_steps_follow_the_reference(n_items: int, batch_size: int, drop_last: bool) -> None:
    chunks = [range(n_items)[first : first + batch_size] for first in range(0, n_items, batch_size)]
    if drop_last and n_items >= batch_size:
        chunks = [chunk for chunk in chunks if len(chunk) == batch_size]
    assert steps_per_epoch(n_items, batch_size, drop_last) == len(chunks)


def test_derived_seeds_are_fixed_and_distinct() -> None:
    assert derive_seed("order", 1, 0) == 7964679478889176414
    seeds = {derive_seed(seed, epoch, position) for seed in range(5) for epoch in range(5) for position in range(50)}
    assert len(seeds) == 1250
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(1) != derive_seed("1")
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(("cores", "threads"), [(1, 0), (2, 2), (64, 4)])
def test_threads_where_there_are_cores(cores: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert reading_threads(None) == threads
    assert reading_threads(3) == 3
    assert reading_threads(0) == 0
