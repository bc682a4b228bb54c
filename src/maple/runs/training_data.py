"""What a run learns from: its images, or the features of the frozen image tower where these can stand in for them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from maple.config import RunSettings
from maple.data import Batch, EvalTransform, ImageStore, Item, TrainTransform, eval_batches, train_batches
from maple.data.batches import feature_batches, steps_per_epoch, view_batches
from maple.data.images.prefetch import reading_threads
from maple.methods import Features, Method
from maple.prompts import encode_image, to_float32
from maple.runs.spec import eval_transform
from maple.train import Trainer
from maple.train.trainer import Batches


class TrainingData:
    """The training and validation items of a run, as a method and `Trainer.run_epoch` take them.

    With `train.views` there are only so many views of each image; if the method leaves the image tower alone, or asks
    what the frozen one says of them, their features are then extracted once, at the first epoch, and every epoch reads
    them.

    Args:
        items, val: the sampled training and validation items; `store` opens their images.
    """

    def __init__(
        self, settings: RunSettings, items: Sequence[Item], store: ImageStore, val: Sequence[Item] = ()
    ) -> None:
        self._settings = settings
        self._items = items
        self._store = store
        self._val = val
        self._labels = torch.tensor([item.label for item in items], dtype=torch.int64)
        self._views: Tensor | None = None
        self._fitting: Features | None = None

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        train = self._settings.train
        return steps_per_epoch(len(self._items), train.batch_size, train.drop_last)

    def begin(self, method: Method) -> None:
        """Fit what the method fits at once; before a trainer is made of it.

        Raises:
            ConfigError: the method needs validation images, and there are none.
            ImageError: an image cannot be used.
        """
        if method.uses_features:
            method.fit_features(self._features(method))

    def finish(self, method: Method) -> None:
        """Choose what the method chooses after training. Errors as `begin`'s."""
        if method.uses_features:
            method.select_hyperparameters(self._features(method))

    def batches(self, trainer: Trainer) -> Batches:
        """The batches of the trainer's next epoch: this process's share of each, augmented.

        Raises:
            ImageError: an image cannot be used (while iterating, or at once where features are extracted).
        """
        train, method = self._settings.train, trainer.method
        if train.views is not None and method.accepts_features:
            return self._feature_batches(trainer)
        batches = train_batches(
            self._items,
            self._store,
            self._transform(method),
            **self._order(trainer),
            num_workers=self._threads(method),
            views=None if train.views is None else max(train.views, 1),
        )
        # Where every epoch shows another view, extracting them first would save nothing.
        if method.needs_frozen_features and train.views is not None and max(train.views, 1) < train.epochs:
            known = self._feature_batches(trainer)
            return (
                (replace(batch, frozen=frozen.images), whole)
                for (batch, whole), (frozen, _) in zip(batches, known, strict=True)
            )
        return batches

    def _feature_batches(self, trainer: Trainer) -> Iterator[tuple[Batch, int]]:
        """The batches of the trainer's next epoch, with features in place of images."""
        return feature_batches(self._view_features(trainer.method), self._labels, **self._order(trainer))

    def _order(self, trainer: Trainer) -> dict[str, Any]:
        """What says which items make the batches of the trainer's next epoch, and which of them are this process's."""
        train, processes = self._settings.train, trainer.processes
        return {
            "batch_size": train.batch_size,
            "seed": self._settings.seed,
            "epoch": trainer.epoch,
            "drop_last": train.drop_last,
            "rank": processes.rank,
            "world_size": processes.count,
        }

    def _transform(self, method: Method) -> TrainTransform | EvalTransform:
        train, seen = self._settings.train, method.backbone.preprocessing
        if train.views == 0:
            return eval_transform(method.backbone)
        return TrainTransform(
            seen.size, seen.mean, seen.std, scale=train.crop_scale, flip=train.flip, interpolation=seen.interpolation
        )

    def _features(self, method: Method) -> Features:
        if self._fitting is None:
            train, val = self._view_features(method), torch.zeros(0, method.backbone.embed_dim)
            if self._val:
                batches = eval_batches(
                    self._val,
                    self._store,
                    eval_transform(method.backbone),
                    batch_size=self._settings.evaluate.batch_size,
                    num_workers=self._threads(method),
                )
                val = _features(method, batches)
            labels = torch.tensor([item.label for item in self._val], dtype=torch.int64)
            device = method.backbone.device
            self._fitting = Features(*(one.to(device) for one in (train, self._labels, val, labels)))
        return self._fitting

    def _view_features(self, method: Method) -> Tensor:
        """Raw features [V, N, D] of every view of every item, extracted once.

        Where a new view is drawn in every epoch there is one here: what evaluation sees.
        """
        if self._views is None:
            views = [self._view(method, number) for number in range(max(self._settings.train.views or 0, 1))]
            self._views = torch.stack([_features(method, view) for view in views])
        return self._views

    def _view(self, method: Method, number: int) -> Iterator[Batch]:
        return view_batches(
            self._items,
            self._store,
            self._transform(method) if self._settings.train.views else eval_transform(method.backbone),
            view=number,
            seed=self._settings.seed,
            batch_size=self._settings.evaluate.batch_size,
            num_workers=self._threads(method),
        )

    def _threads(self, method: Method) -> int:
        workers = self._settings.train.workers
        return 0 if workers is None and method.backbone.device.type == "cpu" else reading_threads(workers)


@torch.no_grad()
def _features(method: Method, batches: Iterator[Batch]) -> Tensor:
    """Raw features [N, D] of the frozen image tower, float32, on the CPU."""
    tower, device = method.backbone.image, method.backbone.device
    return torch.cat([to_float32(encode_image(tower, batch.images.to(device), ())).cpu() for batch in batches])
