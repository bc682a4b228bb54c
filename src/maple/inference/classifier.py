"""`PromptClassifier`: adapted CLIP as a scikit-learn estimator."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maple.checkpoint import load_prompts, read_prompts, save_prompts
from maple.clip import Backbone
from maple.config import BackboneSettings, RunSettings, options_layer, read_preset, resolve
from maple.data import ImageStore, Item, hold_out, sample_few_shot
from maple.data.images.prefetch import map_in_order
from maple.distributed import Processes, this_process
from maple.inference.array_images import InputError, numbered, to_images, words_for
from maple.inference.estimator import Classifier, Estimator, NotTrainedError, sections_of
from maple.inference.hub import PREFIX, PROMPTS, OnHub, fetch_prompts, is_hub_id
from maple.inference.images import ImageSource
from maple.inference.torch_predictor import TorchPredictor, finite, prompts_file
from maple.methods import Method, method_settings
from maple.names import distinct
from maple.runs import TrainingData, cached_backbone, complete, fresh_method
from maple.train import Trainer

_BATCH = 32
_WORKERS = 2

Labels = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


class PromptClassifier(Classifier, Estimator, OnHub):
    """CLIP, adapted by learned prompts: images in, labels out, with scikit-learn's methods.

    Works without scikit-learn too; with it, it is one of its classifiers (`clone`, `cross_val_score`, `GridSearchCV`
    ...). Images are paths, PIL images, arrays [n, H, W, 3] (bytes, or floats from 0 to 1) or tensors [n, 3, H, W], in
    lists or whole; see `maple.inference.array_images.to_images`.

    Attributes (after `fit` or `from_pretrained`):
        classes_: labels, sorted (after `set_class_names`: the names, in their order), [C].
        class_names_: the words that stand for them.
        method_: the `torch.nn.Module` with the prompts; its `backbone` is the frozen CLIP.
        history_: the reports of the epochs.
    """

    def __init__(
        self,
        method: str = "maple",
        *,
        backbone: str | None = None,
        pretrained: str | None = None,
        precision: str | None = None,
        preset: str | None = None,
        shots: int | None = None,
        epochs: int | None = None,
        lr: float | None = None,
        batch_size: int | None = None,
        seed: int = 1,
        settings: Mapping[str, Any] | None = None,
        class_names: Mapping[Any, str] | Sequence[str] | None = None,
        validation_fraction: float = 0.25,
        device: str | None = None,
    ) -> None:
        """Choose what to learn and how; nothing is checked or loaded before `fit`.

        What is None is as the preset says, or the default of `maple train`.

        Args:
            method, preset: as `maple train` takes them; the preset is METHOD_base-to-novel by default.
            backbone, pretrained, precision: which CLIP, as `load_clip` takes them.
            shots: images per class to train on, drawn with `seed`; all of them without it.
            epochs, lr, batch_size: of the training.
            seed: decides the sample, the prompts' start and the order; 0 is valid.
            settings: any other settings by section, as in {"train": {"optimizer": "adamw"}, "method":
                {"prompt_depth": 3}}.
            class_names: words for the labels: {label: words}, or a list in the order of the sorted labels. Needed where
                labels are no strings; CLIP reads them.
            validation_fraction: how much of each class `fit` holds out of its images, chosen with `seed`, for methods
                that choose a setting on validation images (Tip-Adapter's alpha and beta, the linear probe's
                regularisation), unless that setting is given; at most four images of a class where `shots` is set. It
                is not trained on. Other methods train on everything.
            device: cpu, cuda, cuda:1, mps; by default a GPU if there is one.
        """
        self.method = method
        self.backbone = backbone
        self.pretrained = pretrained
        self.precision = precision
        self.preset = preset
        self.shots = shots
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.seed = seed
        self.settings = settings
        self.class_names = class_names
        self.validation_fraction = validation_fraction
        self.device = device

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803 - scikit-learn's names
        """Learn prompts from images `X` and their labels `y` [n]; forget what was learned before.

        The same as `maple train` does with the same images in the same order, settings and seed. A method that searches
        on validation images finds them among `X`: see `validation_fraction`.

        Raises:
            MapleError: bad settings, images, labels or names, or a backbone that cannot be loaded.
        """
        settings = complete(self._resolved())
        pictures = to_images(X)
        classes, indices = numbered(y, len(pictures))
        names = words_for(classes, self.class_names)
        items = [Item(str(number), int(label), names[label]) for number, label in enumerate(indices)]
        items, val = self._held_out(items, settings)
        items, val = sample_few_shot(items, val, settings.data.shots, settings.seed)
        device = this_process(self.device).device
        clip = settings.backbone
        backbone = cached_backbone(clip.name, clip.pretrained, clip.precision, device)
        method = fresh_method(settings, backbone, names)
        material = TrainingData(
            settings, items, ImageStore(Path(), read=lambda number: pictures[int(number)].read()), val
        )
        material.begin(method)
        trainer = Trainer(method, settings.train, Processes(0, 1, device))
        while not trainer.finished:
            trainer.run_epoch(material.batches(trainer))
        material.finish(method)
        loss = trainer.history[-1].loss if trainer.history else None
        train = {"epochs": trainer.epoch, "images": len(items), "loss": loss}
        info = {"seed": settings.seed, "train": train}
        self._take(
            method.eval(), classes, info | ({"chosen": chosen} if (chosen := method.selected_hyperparameters()) else {})
        )
        self.history_ = tuple(trainer.history)
        return self

    def predict(self, X: Any) -> Labels:  # noqa: N803
        """The likeliest label of each image, [n]."""
        best = self._logits(X).argmax(dim=1).numpy()
        found: Labels = self.classes_[best]
        return found

    def predict_proba(self, X: Any) -> Floats:  # noqa: N803
        """Probabilities [n, C] of the classes, in the order of `classes_`; float32, each row sums to 1."""
        return self._logits(X).softmax(dim=1).numpy()

    def predict_log_proba(self, X: Any) -> Floats:  # noqa: N803
        """Their logarithms [n, C], finite also where a probability is 0 in float32."""
        return self._logits(X).log_softmax(dim=1).numpy()

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:  # noqa: N803
        """The fraction of images whose predicted label is that of `y` [n], weighted if wanted.

        Raises:
            InputError: not one label for each image, not one weight, or nothing to average.
        """
        found, labels = self.predict(X), np.asarray(y)
        if labels.shape != found.shape:
            raise InputError(f"{len(found)} images have labels of shape {list(labels.shape)}; give one label for each")
        weights = np.ones(len(found)) if sample_weight is None else np.asarray(sample_weight)
        if weights.shape != found.shape:
            raise InputError(f"{len(found)} images have weights of shape {list(weights.shape)}; give one for each")
        if not weights.sum():
            raise InputError(f"{len(found)} images of weight 0 have no score; give some images")
        return float(np.average(found == labels, weights=weights))

    def encode_image(self, X: Any) -> Floats:  # noqa: N803
        """Unit image features [n, D], float32, as the prompted image tower gives them."""
        return self._over(X, "encode_images", self._fitted().backbone.embed_dim).numpy()

    def set_class_names(self, names: Sequence[str]) -> Self:
        """Speak of these classes from now on, without training; they are the labels too.

        Raises:
            ClassNamesError: an empty list or name, the same words twice, or a name too long for the text tower.
        """
        self._fitted().set_class_names(distinct(names))
        self.classes_ = np.asarray(names)
        self.class_names_ = tuple(names)
        return self

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        backbone: str | Backbone | None = None,
        pretrained: str | None = None,
        device: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """Load a finished run's folder, a prompts file, a folder of `save_pretrained`, or a hub repository OWNER/NAME.

        Args:
            backbone, pretrained: the CLIP, where it does not lie where the file says; it must be the same.
            revision, token, cache_dir, force_download, local_files_only: for a hub repository, as huggingface_hub's
                mixin takes them.

        Raises:
            CheckpointError: nothing of this kind is there, or the backbone is another one.
            BackboneError: the backbone cannot be loaded.
        """
        source = str(pretrained_model_name_or_path)
        path = Path(source).expanduser()
        if not path.exists() and is_hub_id(source.removeprefix(PREFIX)):
            path = fetch_prompts(
                source.removeprefix(PREFIX),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        else:
            path = prompts_file(path)
        stored = read_prompts(path)
        now = stored.info.get("classifier", {"labels": list(stored.class_names), "names": list(stored.class_names)})
        wanted = stored.backbone
        where = this_process(device).device
        if backbone is None:
            backbone = cached_backbone(wanted["name"], wanted["pretrained"], wanted["precision"], where)
        elif isinstance(backbone, str):
            backbone = cached_backbone(backbone, pretrained, wanted["precision"], where)
        method = load_prompts(path, backbone)
        made = cls(
            stored.method["name"],
            backbone=backbone.name,
            pretrained=backbone.pretrained,
            precision=backbone.precision,
            settings={"method": {key: value for key, value in stored.method.items() if key != "name"}},
            class_names=None if now["labels"] == now["names"] else dict(zip(now["labels"], now["names"], strict=True)),
            device=device,
        )
        made._take(method, np.asarray(now["labels"]), stored.info)
        if tuple(now["names"]) != method.class_names:
            method.set_class_names(now["names"])
            made.class_names_ = tuple(now["names"])
        made.history_ = ()
        return made

    def _save_pretrained(self, save_directory: Path) -> None:
        method = self._fitted()
        now = {"labels": self.classes_.tolist(), "names": list(self.class_names_)}
        # The file names the classes that were trained; those spoken of now are noted beside.
        method.set_class_names(self._trained_names)
        try:
            save_prompts(save_directory / PROMPTS, method, {**self._info, "classifier": now})
        finally:
            method.set_class_names(self.class_names_)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "method_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()  # type: ignore[misc]
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        return tags

    def _resolved(self) -> RunSettings:
        layer = options_layer(
            backbone={"name": self.backbone, "pretrained": self.pretrained, "precision": self.precision},
            train={"epochs": self.epochs, "lr": self.lr, "batch_size": self.batch_size},
            data={"shots": self.shots},
        )
        layer["seed"] = self.seed  # a seed of None is refused, not left out
        if self.preset is None:
            method_settings({"name": self.method})  # an unknown method is told as that, not as an unknown preset
        preset = read_preset(self.preset or f"{self.method}_base-to-novel")
        # Pictures of one's own want a CLIP that has seen the world, unless another is named.
        default = {"backbone": {"name": BackboneSettings().name}}
        own = {"method": {"name": self.method}, "data": {"shots": None}}
        return resolve([default, preset, own, sections_of(self.settings), layer])

    def _held_out(self, items: list[Item], settings: RunSettings) -> tuple[list[Item], list[Item]]:
        """The items to train on, and those that a method searches on, if it does."""
        if not method_settings(settings.method)[1].needs_validation:
            return items, []
        items, val = hold_out(items, self.validation_fraction, settings.seed)
        if not val:
            raise InputError(
                f"{settings.method['name']} chooses a setting on validation images, but no class has more than one "
                'image; give more, or give the setting: settings={"method": {...}}'
            )
        return items, val

    def _take(self, method: Method, classes: Labels, info: Mapping[str, Any]) -> None:
        self.method_ = method
        self.classes_ = classes
        self.class_names_ = method.class_names
        self._trained_names = method.class_names
        self._info = {key: value for key, value in info.items() if key not in ("versions", "classifier")}

    def _fitted(self) -> Method:
        if not hasattr(self, "method_"):
            raise NotTrainedError(
                "this PromptClassifier has learned nothing yet; call fit(images, labels), or load one with "
                "PromptClassifier.from_pretrained(...)"
            )
        return self.method_

    def _logits(self, images: Any) -> Tensor:
        return self._over(images, "predict_logits", len(self._fitted().class_names))

    @torch.no_grad()
    def _over(self, images: Any, function: str, width: int) -> Tensor:
        """The method's function of all images, batch by batch: [n, width], float32, on the CPU."""
        predictor = TorchPredictor(self._fitted())
        compute, device = getattr(predictor.method, function), predictor.method.backbone.device

        def view(picture: ImageSource) -> Tensor:
            return predictor.transform(picture.read())

        found = [torch.empty(0, width)]
        with closing(map_in_order(view, to_images(images), _WORKERS, ahead=2 * _BATCH)) as read:
            while batch := list(islice(read, _BATCH)):
                images = torch.stack(batch).to(device)
                found.append(finite(compute(images).float().cpu(), predictor.method.backbone))
        return torch.cat(found)
