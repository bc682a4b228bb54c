"""Batches of image tensors, identical for any number of processes, worker threads and interruptions."""

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from maple.data.images.eval_transform import EvalTransform
from maple.data.images.prefetch import map_in_order
from maple.data.images.store import ImageStore
from maple.data.images.train_transform import TrainTransform
from maple.data.records import Item
from maple.errors import ConfigError

_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Batch:
    """Normalised images [B, 3, R, R] float32, or features [B, D] in their place, and their labels [B] int64.

    `frozen` holds the raw features [B, D] of the images by the frozen tower, where they are known.

    Example:
        >>> batch = Batch(torch.zeros(4, 3, 224, 224), torch.tensor([0, 1, 2, 0]))
        >>> len(batch), len(batch.part(1, 2))
        (4, 2)
    """

    images: Tensor
    labels: Tensor
    frozen: Tensor | None = None

    def __len__(self) -> int:
        """Return B."""
        return len(self.labels)

    def part(self, start: int, size: int) -> "Batch":
        """Return the `size` images from `start` on, or fewer at the end."""
        chosen = slice(start, start + size)
        frozen = None if self.frozen is None else self.frozen[chosen]
        return Batch(self.images[chosen], self.labels[chosen], frozen)


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part, the same on every machine and in every process."""
    digest = hashlib.sha256(json.dumps(parts).encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def steps_per_epoch(n_items: int, batch_size: int, drop_last: bool = True) -> int:
    """Return the number of batches per epoch of `n_items`; a short last batch is dropped only if there is a full one.

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
) -> Iterator[tuple[Batch, int]]:
    """Iterate over one epoch in random order: this process's share of each global batch, and the global length.

    The order depends on `seed` and `epoch`; the view of an image on these and its position in the order or, with a
    fixed number of `views` per image, on `seed`, the image, and `epoch` modulo `views`. So neither the number of
    processes nor of worker threads changes anything, and `start` (global batches to skip when resuming) continues
    exactly. Process `rank` of `world_size` gets its contiguous share of each global batch of `batch_size`, possibly
    empty ([0, 3, R, R]). `num_workers` threads read ahead; with 0 the caller's thread reads. No global generator is
    used.

    Raises:
        ConfigError: a number is out of its range (at the call).
        ImageError: an image cannot be used (while iterating).

    Example:
        >>> store = dataset.store()
        >>> for batch, _ in train_batches(dataset.train, store, transform, batch_size=4, seed=1, epoch=0):
        ...     loss, logs = method.loss(batch.images, batch.labels)
    """
    _check_workers(num_workers)
    order, shares = _epoch_order(len(items), batch_size, seed, epoch, drop_last, rank, world_size, start)

    def view(position: int) -> tuple[Tensor, int]:
        index = order[position]
        drawn_by = (epoch, position) if views is None else ("view", epoch % views, index)
        generator = _generator("augment", seed, *drawn_by)
        return transform(store.get(items[index].path), generator), items[index].label

    def batches() -> Iterator[tuple[Batch, int]]:
        positions = (position for share, _ in shares for position in share)
        sizes = [len(share) for share, _ in shares]
        with closing(_read_batches(view, positions, sizes, transform.size, num_workers, batch_size)) as read:
            for batch, (_, length) in zip(read, shares, strict=True):
                yield batch, length

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
    overlap: bool = True,
) -> Iterator[Batch]:
    """Iterate over view number `view` of all items in order, the same views as `train_batches(..., views=...)`.

    `num_workers` and `overlap` are those of `eval_batches`. Raises as `eval_batches`.
    """
    sizes = _batch_sizes(len(items), batch_size, num_workers)

    def read(index: int) -> tuple[Tensor, int]:
        generator = _generator("augment", seed, "view", view, index)
        return transform(store.get(items[index].path), generator), items[index].label

    return _read_batches(read, range(len(items)), sizes, transform.size, num_workers, batch_size, overlap)


def eval_batches(
    items: Sequence[Item],
    source: ImageStore | Path,
    transform: EvalTransform,
    *,
    batch_size: int = 100,
    num_workers: int = 0,
    overlap: bool = True,
) -> Iterator[Batch]:
    """Iterate over all items in order; the last batch may be short.

    `source` is a store, or the root of the data set, whose images are then not kept in memory. `num_workers` threads
    read ahead, at most two batches, or one and then wait without `overlap` (see `maple.data.images.prefetch.overlaps`);
    with 0 the caller's thread reads.

    Raises:
        ConfigError: a number is out of its range (at the call).
        ImageError: an image cannot be used (while iterating).

    Example:
        >>> for batch in eval_batches(dataset.test, dataset.store(), transform):
        ...     logits = method(batch.images)
    """
    sizes = _batch_sizes(len(items), batch_size, num_workers)
    store = source if isinstance(source, ImageStore) else ImageStore(source, max_bytes=0)

    def read(item: Item) -> tuple[Tensor, int]:
        return transform(store.get(item.path)), item.label

    return _read_batches(read, items, sizes, transform.size, num_workers, batch_size, overlap)


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
    mix_views: bool = False,
) -> Iterator[tuple[Batch, int]]:
    """Iterate as `train_batches` does, over the features [V, N, D] of V views of N items in place of images.

    The order is the same; epoch `epoch` shows view `epoch` modulo V. With `mix_views` the batches, as many as of one
    view, are drawn from all V N rows. ConfigError if a number is out of its range.
    """
    rows, steps = features[epoch % len(features)], steps_per_epoch(len(labels), batch_size, drop_last)
    if mix_views:
        rows, labels = features.flatten(0, 1), labels.repeat(len(features))
    order, shares = _epoch_order(len(labels), batch_size, seed, epoch, drop_last, rank, world_size, steps=steps)

    def batches() -> Iterator[tuple[Batch, int]]:
        for share, length in shares:
            chosen = torch.tensor([order[position] for position in share], dtype=torch.int64)
            yield Batch(rows[chosen], labels[chosen]), length

    return batches()


def _epoch_order(
    count: int,
    batch_size: int,
    seed: int,
    epoch: int,
    drop_last: bool,
    rank: int,
    world_size: int,
    start: int = 0,
    steps: int | None = None,
) -> tuple[list[int], list[tuple[range, int]]]:
    """The order of `count` items in an epoch; of each global batch, this process's positions in it and its length.

    With `steps` given, the epoch has as many batches, of the first items in the order.
    """
    steps = steps_per_epoch(count, batch_size, drop_last) if steps is None else steps
    if not 0 <= start <= steps:
        raise ConfigError(f"start is batch {start}; this epoch has {steps} batches, so it must be 0 to {steps}")
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank is {rank} of world_size {world_size}; it must be 0 to {world_size - 1}")
    order = torch.randperm(count, generator=_generator("order", seed, epoch)).tolist()
    shares = []
    for first in range(start * batch_size, steps * batch_size, batch_size):
        length = min(batch_size, count - first)
        share = range(first + length * rank // world_size, first + length * (rank + 1) // world_size)
        shares.append((share, length))
    return order, shares


def _batch_sizes(count: int, batch_size: int, num_workers: int) -> list[int]:
    _check_workers(num_workers)
    steps = steps_per_epoch(count, batch_size, drop_last=False)
    return [min(batch_size, count - step * batch_size) for step in range(steps)]


def _read_batches(
    read: Callable[[_Key], tuple[Tensor, int]],
    keys: Iterable[_Key],
    sizes: Sequence[int],
    image_size: int,
    num_workers: int,
    batch_size: int,
    overlap: bool = True,
) -> Generator[Batch, None, None]:
    """Stack what `read` returns (an image [3, R, R] and its label) for the next `size` keys, for each of `sizes`."""
    with closing(map_in_order(read, keys, num_workers, batch_size, overlap=overlap)) as pairs:
        for size in sizes:
            chosen = list(islice(pairs, size))
            images = [image for image, _ in chosen]
            labels = torch.tensor([label for _, label in chosen], dtype=torch.int64)
            # A process may have no share of a short batch, but still takes part in its step.
            yield Batch(torch.stack(images) if images else torch.empty(0, 3, image_size, image_size), labels)


def _generator(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*parts))


def _check_workers(num_workers: int) -> None:
    if num_workers < 0:
        raise ConfigError(f"num_workers is {num_workers}; it must be 0 (no extra threads) or more")
