"""What a run learns from: its images, or the features of the frozen image tower where these can stand in for them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maple.config import RunSettings
from maple.data import Batch, EvalTransform, ImageStore, Item, TrainTransform, train_batches
from maple.data.batches import feature_batches, steps_per_epoch
from maple.data.images.prefetch import reading_threads
from maple.errors import ConfigError
from maple.evaluation import predict
from maple.methods import Features, Method
from maple.runs.frozen_features import frozen_batches, prediction_batches
from maple.runs.spec import eval_transform, training_transform
from maple.train import EpochReport, Trainer, is_validation_epoch


class TrainingData:
    """The training and validation items of a run, as batches for `Trainer.run_epoch` and as features for a method.

    With `train.views` each image has this number of views only. If the method leaves the image tower unchanged, or
    needs the features of the frozen one, these are then extracted once, in the first epoch, and reused in every epoch,
    and by later runs on the same images (`maple.runs.frozen_features`).

    Args:
        items, val: the sampled training and validation items; `store` opens their images.
        spare: the items that the best state is chosen on, where the settings ask for it (`spare_items`).

    Attributes:
        steps: steps in an epoch.
        train: the settings of the training, with its number of epochs where the run's settings give a number of steps.

    Example:
        >>> data = TrainingData(settings, dataset.train, dataset.store())
        >>> trainer = Trainer(method, data.train)
        >>> trainer.run_epoch(data.batches(trainer))
    """

    def __init__(
        self,
        settings: RunSettings,
        items: Sequence[Item],
        store: ImageStore,
        val: Sequence[Item] = (),
        spare: Sequence[Item] = (),
    ) -> None:
        self._settings, self._items, self._store, self._val, self._spare = settings, items, store, val, spare
        train = settings.train
        self.steps = steps_per_epoch(len(items), train.batch_size, train.drop_last)
        self.train = train.with_epochs_for(self.steps)
        self._labels = torch.tensor([item.label for item in items], dtype=torch.int64)
        self._views: Tensor | None = None
        self._cached_features: Features | None = None
        self._validation: list[Batch] | None = None  # features of the spare items

    def fit_features(self, method: Method) -> None:
        """Let the method fit what it computes from features; before a trainer is made of it.

        Raises:
            ConfigError: the method needs validation images, and there are none; or `train.mix_views` does not fit it.
            ImageError: an image cannot be used.
        """
        if self.train.mix_views and (self.train.views is None or not method.accepts_features):
            raise ConfigError(
                f"train.mix_views=true draws batches from views whose features are extracted once: with {method.title} "
                f"and train.views={self.train.views} there are none; leave it out, or set train.views for a method on "
                "frozen features"
            )
        if method.uses_features:
            method.require_validation(len(self._val))  # before the features are extracted, which can take hours
            method.fit_features(self._features(method))

    def select_hyperparameters(self, method: Method) -> None:
        """Let the method select its hyperparameters after training. Raises as `fit_features`."""
        if method.uses_features:
            method.select_hyperparameters(self._features(method))

    def validate(self, trainer: Trainer) -> EpochReport:
        """Score the trainer's state on the spare items, if the best state is kept and its epoch is one to be scored.

        Returns the report of the epoch. `Trainer.load_best` then sets the best state, at the end.

        Raises:
            ConfigError: the best state is to be kept, and there are no images to choose it on.
            ImageError: an image cannot be used.
            BackboneError: a logit is not finite.
        """
        if self.train.keep == "last" or not is_validation_epoch(trainer.epoch, trainer.epochs):
            return trainer.history[-1]
        self.require_spare(trainer)
        method, kept = trainer.method, self._validation
        batches = prediction_batches(method, self._spare, self._store, self._settings) if kept is None else kept
        if method.accepts_features and kept is None:  # a few numbers for each image, which do not change
            batches = self._validation = list(batches)
        logits, labels = predict(method, batches)
        right = int((logits.argmax(axis=1) == labels).sum())
        loss = F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels))
        return trainer.record_validation(right, len(labels), float(loss))

    def require_spare(self, trainer: Trainer) -> None:
        """Raise ConfigError if the best state of a training is to be kept, and there are no images to choose it on."""
        learns = trainer.parameters and trainer.epochs
        if self.train.keep == "best" and learns and not self._spare:
            raise ConfigError(
                "train.keep=best chooses the best state of the training on images that are neither trained nor tested "
                "on, and there are none; add validation images (a folder `val`, or the split `val` of a table), train "
                "on fewer images (data.shots), or set train.keep=last"
            )

    def batches(self, trainer: Trainer) -> Iterator[tuple[Batch, int]]:
        """The batches of the trainer's next epoch: this process's share of each, augmented.

        Raises ImageError while iterating.
        """
        train, method, processes = self.train, trainer.method, trainer.processes
        order: dict[str, Any] = {
            "batch_size": train.batch_size,
            "seed": self._settings.seed,
            "epoch": trainer.epoch,
            "drop_last": train.drop_last,
            "rank": processes.rank,
            "world_size": processes.count,
        }
        views = None if train.views is None else max(train.views, 1)
        if views is not None and method.accepts_features:
            mixed = train.mix_views
            yield from feature_batches(self._view_features(method), self._labels, **order, mix_views=mixed)
            return
        transform, threads = training_transform(self._settings, method.backbone), self._threads(method)
        batches = train_batches(self._items, self._store, transform, **order, num_workers=threads, views=views)
        # Where every epoch shows another view, extracting them first would save nothing.
        if method.needs_frozen_features and views is not None and views < trainer.epochs:
            features = feature_batches(self._view_features(method), self._labels, **order)
            for (batch, whole), (frozen, _) in zip(batches, features, strict=True):
                yield replace(batch, frozen=frozen.images), whole
        else:
            yield from batches

    def _features(self, method: Method) -> Features:
        if self._cached_features is None:
            device = method.backbone.device
            val = torch.zeros(0, method.backbone.embed_dim)
            if self._val:
                val = self._extracted(method, self._val, eval_transform(method.backbone))
            val_labels = torch.tensor([item.label for item in self._val], dtype=torch.int64)
            tensors = (self._view_features(method), self._labels, val, val_labels)
            self._cached_features = Features(*(tensor.to(device) for tensor in tensors))
        return self._cached_features

    def _view_features(self, method: Method) -> Tensor:
        """Raw features [V, N, D] of every view of every item, extracted once.

        Where a new view is drawn in every epoch there is one here: the view of evaluation.
        """
        if self._views is None:
            views = self._settings.train.views or 0
            transform = (
                training_transform(self._settings, method.backbone) if views else eval_transform(method.backbone)
            )
            features = [self._extracted(method, self._items, transform, view) for view in range(max(views, 1))]
            self._views = torch.stack(features)
        return self._views

    def _extracted(
        self, method: Method, items: Sequence[Item], transform: TrainTransform | EvalTransform, view: int = 0
    ) -> Tensor:
        """Raw features [N, D] of one view of all items, float32, on the CPU."""
        size, threads = self._settings.evaluate.batch_size, self._threads(method)
        options = {"view": view, "seed": self._settings.seed, "batch_size": size, "num_workers": threads}
        batches = frozen_batches(method.backbone, items, self._store, transform, **options)
        return torch.cat([batch.images.cpu() for batch in batches])

    def _threads(self, method: Method) -> int:
        workers = self._settings.train.workers
        return 0 if workers is None and method.backbone.device.type == "cpu" else reading_threads(workers)
