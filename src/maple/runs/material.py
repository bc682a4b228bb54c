"""What a run learns from: its images, or the features of the frozen image tower where these can stand in for them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from maple.config import RunSettings
from maple.data import (
    Batch,
    EvalTransform,
    ImageStore,
    Item,
    TrainTransform,
    feature_batches,
    steps_per_epoch,
    train_batches,
    view_batches,
)
from maple.methods import Method
from maple.prompts import wide
from maple.train import Batches, Trainer


class Material:
    """The training items of a run, as `Trainer.run_epoch` takes them.

    With `train.views` there are only so many views of each image; if the method leaves the image tower alone, their
    features are then extracted once, at the first epoch, and every epoch reads them.

    Args:
        items: the sampled training items; `store` opens their images.
    """

    def __init__(self, settings: RunSettings, items: Sequence[Item], store: ImageStore) -> None:
        self._settings = settings
        self._items = items
        self._store = store
        self._labels = torch.tensor([item.label for item in items], dtype=torch.int64)
        self._features: Tensor | None = None

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        train = self._settings.train
        return steps_per_epoch(len(self._items), train.batch_size, train.drop_last)

    def batches(self, trainer: Trainer) -> Batches:
        """The batches of the trainer's next epoch: this process's share of each, augmented.

        Raises:
            ImageError: an image cannot be used (while iterating, or at once where features are extracted).
        """
        train, method, processes = self._settings.train, trainer.method, trainer.processes
        if train.views is not None and method.reads_features:
            return feature_batches(
                self._view_features(method),
                self._labels,
                batch_size=train.batch_size,
                seed=self._settings.seed,
                epoch=trainer.epoch,
                drop_last=train.drop_last,
                rank=processes.rank,
                world_size=processes.count,
            )
        return train_batches(
            self._items,
            self._store,
            self._transform(method),
            batch_size=train.batch_size,
            seed=self._settings.seed,
            epoch=trainer.epoch,
            drop_last=train.drop_last,
            rank=processes.rank,
            world_size=processes.count,
            num_workers=train.workers,
            views=None if train.views is None else max(train.views, 1),
        )

    def _transform(self, method: Method) -> TrainTransform | EvalTransform:
        train, seen = self._settings.train, method.backbone.preprocessing
        if train.views == 0:
            return EvalTransform(seen.size, seen.mean, seen.std, seen.interpolation)
        return TrainTransform(
            seen.size, seen.mean, seen.std, scale=train.crop_scale, flip=train.flip, interpolation=seen.interpolation
        )

    def _view_features(self, method: Method) -> Tensor:
        """Raw features [V, N, D] of every view of every item, extracted once."""
        if self._features is None:
            views = [self._view(method, number) for number in range(max(self._settings.train.views or 0, 1))]
            self._features = torch.stack([_features(method, view) for view in views])
        return self._features

    def _view(self, method: Method, number: int) -> Iterator[Batch]:
        return view_batches(
            self._items,
            self._store,
            self._transform(method),
            view=number,
            seed=self._settings.seed,
            batch_size=self._settings.evaluate.batch_size,
            num_workers=self._settings.train.workers,
        )


@torch.no_grad()
def _features(method: Method, batches: Iterator[Batch]) -> Tensor:
    """Raw features [N, D] of the frozen image tower, float32, on the CPU."""
    tower, device = method.backbone.image, method.backbone.device
    return torch.cat([wide(tower.plain(batch.images.to(device))).cpu() for batch in batches])
