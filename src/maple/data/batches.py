"""Batches of image tensors, the same whatever the number of processes, workers and interruptions."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maple.data.images.prefetch import map_in_order
from maple.data.images.reading import ImageStore
from maple.data.images.train_transform import EvalTransform, TrainTransform
from maple.data.records import Item
from maple.data.views import Views, make_views
from maple.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """B images [B, 3, R, R] float32, normalised, or features [B, D] in their place; and their labels [B] int64.

    `frozen` are the raw features [B, D] of the images by the frozen tower, where they are known.
    """

    images: Tensor
    labels: Tensor
    frozen: Tensor | None = None

    def __len__(self) -> int:
        """Return B."""
        return len(self.labels)

    def part(self, start: int, size: int) -> "Batch":
        """The `size` images from `start` on, or as many as there are."""
        chosen = slice(start, start + size)
        frozen = None if self.frozen is None else self.frozen[chosen]
        return Batch(self.images[chosen], self.labels[chosen], frozen)


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part, the same on every machine and in every process."""
    digest = hashlib.sha256(json.dumps(parts).encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def steps_per_epoch(n_items: int, batch_size: int, drop_last: bool = True) -> int:
    """Return the number of batches of one pass over `n_items`.

    A short last batch is dropped only if there is a full one.

    Raises:
        ConfigError: `batch_size` is below 1.

    Source: KaiyangZhou/Dassl.pytorch@c61a1b5 dassl/data/data_manager.py `build_data_loader`.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    if drop_last and n_items >= batch_size:
        return n_items // batch_size
    return -(-n_items // batch_size)


def train_batches(
    items: Sequence[Item],
    store: ImageStore,
    transform: TrainTransform | EvalTransform,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    drop_last: bool = True,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    views: int | None = None,
    device: torch.device | None = None,
) -> Iterator[tuple[Batch, int]]:
    """Iterate over one epoch in random order: this process's part of each global batch, and the global length.

    The order depends on `seed` and `epoch`; the view of an image on these and its position in the order, or, where
    there are only so many `views` of each image, on `seed`, the image, and `epoch` modulo `views`. So neither
    the number of processes nor of worker threads changes anything, and `start` (global batches to leave out, when
    resuming) continues exactly. Process `rank` of `world_size` gets its contiguous share of each global batch of
    `batch_size`, possibly empty ([0, 3, R, R]). `num_workers` threads read ahead; with 0 the caller's thread reads.
    With a `device`, views are cut, resized and normalised there in batches, which then lie there; the values are the
    same. Touches no global generator.

    Raises:
        ConfigError: a number is out of its range (at the call).
        ImageError: an image cannot be used (while iterating).
    """
    _check_workers(num_workers)
    order, shares = _epoch(len(items), batch_size, seed, epoch, drop_last, rank, world_size, start)

    maker = make_views(transform, device)

    def view(position: int) -> tuple[Any, int]:
        if views is not None:
            return _numbered_view(items, store, maker, seed, epoch % views, order[position])
        item = items[order[position]]
        generator = _generator("augment", seed, epoch, position)
        return maker.one(store.get(item.path), generator), item.label

    def batches() -> Iterator[tuple[Batch, int]]:
        wanted = (position for share, _ in shares for position in share)
        with closing(map_in_order(view, wanted, num_workers, ahead=2 * batch_size)) as views:
            for share, length in shares:
                yield _collate(list(islice(views, len(share))), maker), length

    return batches()


def view_batches(
    items: Sequence[Item],
    store: ImageStore,
    transform: TrainTransform | EvalTransform,
    *,
    view: int,
    seed: int,
    batch_size: int = 100,
    num_workers: int = 0,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """Iterate over view number `view` of all items in their order, as `train_batches` with `views` shows them.

    `num_workers` and `device` as there.

    Raises:
        ConfigError: a number is out of its range (at the call).
        ImageError: an image cannot be used (while iterating).
    """
    steps = steps_per_epoch(len(items), batch_size, drop_last=False)
    _check_workers(num_workers)
    maker = make_views(transform, device)

    def batches() -> Iterator[Batch]:
        def one(index: int) -> tuple[Any, int]:
            return _numbered_view(items, store, maker, seed, view, index)

        with closing(map_in_order(one, range(len(items)), num_workers, ahead=2 * batch_size)) as views:
            for _ in range(steps):
                yield _collate(list(islice(views, batch_size)), maker)

    return batches()


def feature_batches(
    features: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    drop_last: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Batch, int]]:
    """What `train_batches` iterates over, from the features [V, N, D] of V views of N items in place of images.

    The order is the same, and epoch `epoch` shows view `epoch` modulo V.

    Raises:
        ConfigError: a number is out of its range (at the call).
    """
    order, shares = _epoch(len(labels), batch_size, seed, epoch, drop_last, rank, world_size)
    seen = features[epoch % len(features)]

    def batches() -> Iterator[tuple[Batch, int]]:
        for share, length in shares:
            chosen = torch.tensor([order[position] for position in share], dtype=torch.int64)
            yield Batch(seen[chosen], labels[chosen]), length

    return batches()


def eval_batches(
    items: Sequence[Item],
    source: ImageStore | Path,
    transform: TrainTransform | EvalTransform,
    *,
    batch_size: int = 100,
    num_workers: int = 0,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """Iterate over all items in their order, the last batch short.

    `source` is the root of the data set, whose images are then not kept in memory, or a store. `num_workers` threads
    read ahead, at most two batches; with 0 the caller's thread reads. `device` as for `train_batches`.

    Raises:
        ConfigError: a number is out of its range (at the call).
        ImageError: an image cannot be used (while iterating).
    """
    steps = steps_per_epoch(len(items), batch_size, drop_last=False)
    _check_workers(num_workers)
    maker = make_views(transform, device)
    store = source if isinstance(source, ImageStore) else ImageStore(source, max_bytes=0)

    def view(item: Item) -> tuple[Any, int]:
        return maker.one(store.get(item.path)), item.label

    def batches() -> Iterator[Batch]:
        with closing(map_in_order(view, items, num_workers, ahead=2 * batch_size)) as views:
            for _ in range(steps):
                yield _collate(list(islice(views, batch_size)), maker)

    return batches()


def _epoch(
    count: int,
    batch_size: int,
    seed: int,
    epoch: int,
    drop_last: bool,
    rank: int,
    world_size: int,
    start: int = 0,
) -> tuple[list[int], list[tuple[range, int]]]:
    """The order of `count` items in an epoch, and this process's share of each global batch, with its length."""
    steps = steps_per_epoch(count, batch_size, drop_last)
    if not 0 <= start <= steps:
        raise ConfigError(f"start is batch {start}; this epoch has {steps} batches, so it must be 0 to {steps}")
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank is {rank} of world_size {world_size}; it must be 0 to {world_size - 1}")
    order = torch.randperm(count, generator=_generator("order", seed, epoch)).tolist()
    shares = [
        _share(step * batch_size, min((step + 1) * batch_size, count), rank, world_size) for step in range(start, steps)
    ]
    return order, shares


def _numbered_view(
    items: Sequence[Item], store: ImageStore, maker: Views, seed: int, view: int, index: int
) -> tuple[Any, int]:
    generator = _generator("augment", seed, "view", view, index)
    return maker.one(store.get(items[index].path), generator), items[index].label


def _share(first: int, last: int, rank: int, world_size: int) -> tuple[range, int]:
    """Return the positions of process `rank` among those of a global batch, `first` to `last`, and their number."""
    length = last - first
    return range(first + length * rank // world_size, first + length * (rank + 1) // world_size), length


def _collate(views: Sequence[tuple[Any, int]], maker: Views) -> Batch:
    labels = torch.tensor([label for _, label in views], dtype=torch.int64)
    return Batch(maker.batch([view for view, _ in views]), labels)


def _generator(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*parts))


def _check_workers(num_workers: int) -> None:
    if num_workers < 0:
        raise ConfigError(f"num_workers is {num_workers}; it must be 0 (no extra threads) or more")
