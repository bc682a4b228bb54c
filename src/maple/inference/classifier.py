"""`PromptClassifier`: adapted CLIP as a scikit-learn estimator."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.exceptions import NotFittedError
from torch import Tensor

from maple.checkpoint import load_prompts, read_prompts, save_prompts
from maple.clip import Backbone
from maple.clip.backbone_names import require_trusted
from maple.data import EvalTransform
from maple.data.sources.rows import Columns
from maple.descriptions import DEFAULT_METHOD
from maple.distributed import choose_device
from maple.errors import CheckpointError, ClassNamesError, MapleError
from maple.inference.hub import fetch_prompts, push_folder
from maple.inference.in_memory import candidates_of, check_callbacks, train_in_memory
from maple.inference.predictor import check_reject
from maple.inference.sharing import PROMPTS, without_paths, write_card
from maple.inference.sources.array_images import (
    class_names_of_labels,
    labels_of_names,
    number_labels,
    read_inputs,
    to_inputs,
    weighted_accuracy,
)
from maple.inference.sources.python_data import ADVICE, labelled
from maple.inference.torch_predictor import finite, prompts_file
from maple.methods import Method
from maple.names import clean_class_names, distinct, is_hub_id, repository_of
from maple.runs import TrainProgress
from maple.runs.frozen_features import require_features
from maple.runs.selection_plan import Goal
from maple.runs.spec import cached_backbone

_BATCH = 32
Labels = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


class NotTrainedError(MapleError, NotFittedError):  # type: ignore[misc]
    """A classifier is used before it was trained or loaded; also scikit-learn's NotFittedError."""


class PromptClassifier(ClassifierMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """CLIP, adapted by learned prompts: images in, labels out, with scikit-learn's methods.

    It works with `clone`, `cross_val_score`, `GridSearchCV` and the like. Images are paths, addresses, bytes, PIL
    images, arrays [n, H, W, 3] (bytes, or floats from 0 to 1) or tensors [n, 3, H, W], in lists or whole, or data sets
    (`maple.inference.sources.array_images.to_images`); or an array [n, D] of their features by the same frozen CLIP,
    for methods that leave its image tower as it is. Nothing is checked or loaded before `fit`. A parameter that is None
    is as the preset says, or the default of `maple train`.

    Args:
        method, preset, epochs, lr, batch_size: as in `maple train`; the preset is METHOD_base-to-novel by default. The
            method "auto" tries several by cross-validation on the images that `fit` is given, with their few-shot
            presets, and trains the best one on all of them, as `maple fit` does; each call of `fit` takes its minutes.
        minutes, goal, methods: of "auto" alone. The time that it may take, as estimated before; to be best on the
            "trained" names, or also on "new" ones that were not trained; the methods to try, from simple to costly
            ("zero_shot", "tip-adapter-f", ...), by default `maple.runs.selection.CANDIDATES`.
        backbone, pretrained, precision: which CLIP, as in `load_clip`.
        shots: images per class to train on, drawn with `seed`; all of them without it.
        calibrate: whether a temperature is fitted for the probabilities, as `maple fit` does; True by default. It does
            not change predicted labels. With fewer than 20 images that `shots` leaves over or that are held out for
            validation, that takes one to four more trainings, on parts of the images.
        seed: of the sample, the initial prompts and the order; 0 is valid.
        settings: any other settings by section, as in {"train": {"optimizer": "adamw"}, "method": {"prompt_depth": 3}}.
        class_names: {label: words that CLIP reads}, or a list in the order of the sorted labels; required where labels
            are not strings.
        validation_fraction: the part of each class that `fit` holds out, chosen with `seed` and not trained on, for
            methods that choose a setting on validation images (Tip-Adapter, GDA, the linear probe, LP++), unless it is
            given; also for `settings={"train": {"keep": "best"}}`, unless `shots` leaves images over.
        device: cpu, cuda, cuda:1, mps; by default a CUDA GPU if there is one.

    Attributes:
        classes_, class_names_: labels [C], sorted (after `set_class_names`: as given), and CLIP's words for them.
        method_: the `torch.nn.Module` with the prompts; its `backbone` is the frozen CLIP.
        history_: the reports of the epochs.
        selection_: with "auto" and after `fit`, the methods tried with their scores, a
            `maple.runs.selection.Selection`, which prints as a table; otherwise None.

    Example:
        >>> classifier = PromptClassifier(shots=16).fit(paths, labels)
        >>> classifier.predict(["cat.jpg"])
        array(['cat'], dtype='<U3')
        >>> classifier.save_pretrained("pets")
        PosixPath('pets')
    """

    def __init__(
        self,
        method: str = DEFAULT_METHOD,
        *,
        backbone: str | None = None,
        pretrained: str | None = None,
        precision: str | None = None,
        preset: str | None = None,
        shots: int | None = None,
        calibrate: bool | None = None,
        epochs: int | None = None,
        lr: float | None = None,
        batch_size: int | None = None,
        seed: int = 1,
        settings: Mapping[str, Any] | None = None,
        class_names: Mapping[Any, str] | Sequence[str] | None = None,
        validation_fraction: float = 0.25,
        device: str | None = None,
        minutes: float = 10,
        goal: Goal = "trained",
        methods: Sequence[str] | None = None,
    ) -> None:
        self.method = method
        self.backbone = backbone
        self.pretrained = pretrained
        self.precision = precision
        self.preset = preset
        self.shots = shots
        self.calibrate = calibrate
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.seed = seed
        self.settings = settings
        self.class_names = class_names
        self.validation_fraction = validation_fraction
        self.device = device
        self.minutes = minutes
        self.goal = goal
        self.methods = methods

    def fit(  # scikit-learn's names
        self,
        X: Any,  # noqa: N803
        y: Any = None,
        verbose: bool = False,
        callbacks: TrainProgress | Iterable[TrainProgress] = (),
    ) -> Self:
        """Learn prompts from images `X` and their labels `y` [n], and forget what was learned before.

        Without `y`, `X` has the labels: a data set of Hugging Face or torchvision, a frame with a column of labels, or
        a text that names a data set as for `maple train` ("flowers", "flowers.zip", "hf:OWNER/NAME"). Class names are
        then the labels; of a divided data set the training split is taken.

        What is learned equals what `maple train` learns with the same images in the same order, settings and seed. A
        method that searches on validation images takes them from `X`: see `validation_fraction`.

        Args:
            verbose: show a progress bar, in a notebook too.
            callbacks: a `maple.runs.TrainProgress`, or several, whose methods are called as training proceeds; with
                "auto", as the chosen method is trained. An exception that one raises ends `fit`, and the classifier is
                what it was before.

        Raises:
            MapleError: bad settings, images, labels or names, or a backbone that cannot be loaded.

        Example:
            >>> classifier = PromptClassifier("auto", minutes=5).fit(paths, labels, verbose=True)
            >>> print(classifier.selection_)
        """
        followers = check_callbacks(callbacks)
        candidates, selection = candidates_of(self)
        given, labels = labelled(X, self._columns(), split="train") if y is None else (X, y)
        inputs = to_inputs(given)
        images = list(inputs) if isinstance(inputs, Iterator) else inputs
        classes, indices = number_labels(labels, len(images))
        names = class_names_of_labels(classes, self.class_names)
        clean_class_names(names)
        clip, device = next(iter(candidates.values())).backbone, choose_device(self.device)
        backbone = cached_backbone(clip.name, clip.pretrained, clip.precision, device)
        trained = train_in_memory(
            *(candidates, images, indices.tolist(), names, backbone),
            selection=selection,
            validation_fraction=self.validation_fraction,
            verbose=verbose,
            callbacks=followers,
        )
        selected = {} if trained.selection is None else {"selection": trained.selection.as_json()}
        self._set_method(trained.method, classes, {**trained.info, **selected})
        self.history_ = trained.history
        self.selection_ = trained.selection
        return self

    def predict(self, X: Any, *, reject: float | None = None, rejected_label: Any = None) -> Labels:  # noqa: N803
        """Return the likeliest label of each image, [n]; of one image, [1].

        `X` may be one image (a path, an http(s) address, bytes, a PIL image, an array [H, W, 3]), images in a list or a
        generator, a folder or another source of `maple predict`, or a data set, whose labels are not read.

        An image whose greatest probability is below `reject` gets `rejected_label` instead; the array then has the type
        of the labels if this one has it, and holds Python objects otherwise, as with None.

        Raises:
            ConfigError: `reject` is not between 0 and 1.

        Example:
            >>> classifier.predict(["cat.jpg", "car.jpg"], reject=0.6, rejected_label="none of these")
            array(['cat', 'none of these'], dtype='<U13')
        """
        check_reject(reject)
        logits = self._logits(X)
        labels: Labels = self.classes_[logits.argmax(dim=1).numpy()]
        if reject is None:
            return labels
        rejected = self._probabilities(logits).amax(dim=1).numpy() < reject
        filler = np.empty((), object) if rejected_label is None else np.asarray(rejected_label)
        if filler.dtype.kind != labels.dtype.kind:
            labels, filler = labels.astype(object), np.asarray(rejected_label, object)
        replaced: Labels = np.where(rejected, filler, labels)
        return replaced

    def predict_proba(self, X: Any) -> Floats:  # noqa: N803
        """Return probabilities [n, C] of the classes, in the order of `classes_`; float32, each row sums to 1."""
        return self._probabilities(self._logits(X)).numpy()

    def predict_log_proba(self, X: Any) -> Floats:  # noqa: N803
        """Return their logarithms [n, C], finite also where a probability is 0 in float32."""
        return (self._logits(X) / self._fitted().temperature).log_softmax(dim=1).numpy()

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:  # noqa: N803
        """Return the accuracy on images with labels `y` [n], weighted if weights are given.

        Without `y`, `X` has the labels, as for `fit`; of a divided data set the test split is taken.

        Raises:
            InputError: not one label or not one weight for each image, or nothing to average.
        """
        images, labels = labelled(X, self._columns(), split="test") if y is None else (X, y)
        self._fitted()
        labels = labels_of_names(labels, self.classes_, self.class_names_)
        return weighted_accuracy(self.predict(images), labels, sample_weight)

    def encode_image(self, X: Any) -> Floats:  # noqa: N803
        """Return unit image features [n, D] of the prompted image tower, float32, and behind them a method's others."""
        return self._compute("encode_images", X, self._fitted().backbone.embed_dim).numpy()

    def transform(self, X: Any) -> Floats:  # noqa: N803
        """Return unit image features [n, D], float32, for the next step of a pipeline.

        Example:
            >>> pipeline = make_pipeline(PromptClassifier(shots=16), LogisticRegression()).fit(paths, labels)
        """
        return self.encode_image(X)[:, : self._fitted().backbone.embed_dim]

    def get_feature_names_out(self, input_features: Any = None) -> Labels:  # noqa: ARG002
        """Return the names of the D columns that `transform` gives: "promptclassifier0", "promptclassifier1", ..."""
        return np.asarray([f"promptclassifier{i}" for i in range(self._fitted().backbone.embed_dim)], dtype=object)

    def set_class_names(self, names: Sequence[str]) -> Self:
        """Set the class names to predict, without training; they become the labels too, in the order given.

        scikit-learn's metrics of probabilities take columns for sorted labels: give sorted names for these.

        Raises:
            ClassNamesError: an empty list or name, the same words twice, or a name too long for the text tower.
        """
        self._fitted().set_class_names(distinct(names))
        self.classes_ = np.asarray(names)
        self.class_names_ = tuple(names)
        return self

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        backbone: str | Backbone | None = None,
        pretrained: str | None = None,
        trust_backbone: bool = False,
        trust_code: bool = False,
        device: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """Load a finished run's folder, a prompts file, a folder of `save_pretrained`, or a hub repository OWNER/NAME.

        Args:
            backbone, pretrained: the CLIP, where it is not stored where the file says; it must be the same.
            trust_backbone: load whatever CLIP the file names, which may be from elsewhere.
            trust_code: run the file next to it that defines its method, which may be from elsewhere, too.
            revision, token, cache_dir, force_download, local_files_only: for a hub repository, as in
                `huggingface_hub.hf_hub_download`.

        Raises:
            CheckpointError: nothing of this kind exists there, or the backbone is another one.
            BackboneError: the backbone cannot be loaded.
        """
        source = str(pretrained_model_name_or_path)
        path = Path(source).expanduser()
        repository = None if path.exists() else repository_of(source) or (source if is_hub_id(source) else None)
        if repository is not None:
            options = {"revision": revision, "token": token, "cache_dir": cache_dir}
            options |= {"force_download": force_download, "local_files_only": local_files_only}
            path = fetch_prompts(repository, **options)
        else:
            path = prompts_file(path)
        stored = read_prompts(path)
        if not isinstance(backbone, Backbone):
            name, weights = (stored.backbone["name"], stored.backbone["pretrained"])
            if backbone is None and pretrained is None:
                if not trust_backbone:
                    require_trusted(name, weights, str(path))
                pretrained = weights
            backbone = cached_backbone(
                backbone or name, pretrained, stored.backbone["precision"], choose_device(device), stored.activation
            )
        method = load_prompts(path, backbone, trust_code=trust_code)
        # A file of `maple train` has no section of a classifier.
        trained = {"labels": list(stored.class_names), "names": list(stored.class_names)}
        current = stored.info.get("classifier", trained)
        try:
            labels, names = ([name for name in current[key]] for key in ("labels", "names"))  # noqa: C416 - or TypeError
            clean_class_names(names)
            pairs = dict(zip(labels, names, strict=True))
        except (ClassNamesError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: its labels and names do not fit together ({error})") from error
        if "classifier" not in stored.info:  # in the order of the training, not of a classifier
            labels = names = sorted(names)
        classifier = cls(
            stored.method["name"],
            backbone=backbone.name,
            pretrained=backbone.pretrained,
            precision=backbone.precision,
            settings={"method": {key: value for key, value in stored.method.items() if key != "name"}},
            class_names=None if labels == names else pairs,
            device=device,
        )
        classifier._set_method(method, np.asarray(labels), stored.info)
        if tuple(names) != method.class_names:
            method.set_class_names(names)
            classifier.class_names_ = tuple(names)
        classifier.history_, classifier.selection_ = (), None
        return classifier

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> Path | str:
        """Write the prompts (`prompts.safetensors`) and a model card (`README.md`) into a folder; return it.

        Args:
            repo_id: the name on the hub, for the card.
            push_to_hub: also upload it there, as `push_to_hub` does, and return the address of the commit instead.
            model_card_kwargs: may hold `repo_id`, for the card alone.

        Raises:
            CheckpointError: there is a file of this name, or the upload fails.
        """
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file; give a folder for the prompts, which need not exist")
        method = self._fitted()
        current = {"labels": self.classes_.tolist(), "names": list(self.class_names_)}
        # The file names the classes of the training; the current ones are noted in its information.
        method.set_class_names(self._trained_names)
        try:
            save_prompts(folder / PROMPTS, method, {**without_paths(self._info), "classifier": current})
        finally:
            method.set_class_names(self.class_names_)
        write_card(folder, (model_card_kwargs or {}).get("repo_id", repo_id))
        if push_to_hub:
            return self.push_to_hub(repo_id or folder.resolve().name, **push_to_hub_kwargs)
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload prompts",
        branch: str | None = None,
        token: str | None = None,
        private: bool | None = None,
        **options: Any,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub, as one commit; return its address.

        A `branch` of a new name is created; "main" by default. Options: `create_pr`, `allow_patterns`,
        `ignore_patterns`, `delete_patterns`, as in `HfApi.upload_folder`.

        Raises:
            CheckpointError: the hub refuses, or cannot be reached.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            options |= {"branch": branch, "token": token, "private": private}
            return push_folder(Path(folder), repo_id, message=commit_message, **options)[0]

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "method_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.three_d_array = False, True
        return tags

    def _columns(self) -> Columns:
        data = (self.settings or {}).get("data", {})
        return Columns(data.get("image_column"), data.get("label_column"), ADVICE)

    def _set_method(self, method: Method, classes: Labels, info: Mapping[str, Any]) -> None:
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

    def _probabilities(self, logits: Tensor) -> Tensor:
        return (logits / self._fitted().temperature).softmax(dim=1)

    def _logits(self, images: Any) -> Tensor:
        return self._compute("predict_logits", images, len(self._fitted().class_names))

    @torch.no_grad()
    def _compute(self, function: str, images: Any, width: int) -> Tensor:
        """Apply a function of the method to all images, batch by batch: [n, width], float32, on the CPU."""
        method = self._fitted().eval()
        inputs, results = to_inputs(images), list[Tensor]()
        if isinstance(inputs, Tensor):
            require_features(method, inputs.shape[1])
        transform = EvalTransform.from_preprocessing(method.backbone.preprocessing)
        device = method.backbone.device
        with closing(read_inputs(inputs, transform, batch_size=_BATCH, device=device.type)) as rows:
            while batch := list(islice(rows, _BATCH)):
                stacked = torch.stack(batch).to(device)
                results.append(finite(getattr(method, function)(stacked).float().cpu(), method.backbone))
        return torch.cat(results) if results else torch.empty(0, width)  # features may have another width than D
