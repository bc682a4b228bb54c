"""The interface of everything that classifies images, and what it returns. Nothing here needs torch.

A server encodes the images of many requests in one batch and classifies each under its own class names: `preprocess`,
`encode_class_names`, `encode_images` and `probabilities` share no mutable state. `stream` classifies images under one
list of class names at a time, as a command does.
"""

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from maple.data.images.eval_transform import EvalView
from maple.data.images.prefetch import map_in_order, overlaps
from maple.errors import ConfigError, DataError, shortened
from maple.inference.sources.image_sources import ImageSource
from maple.inference.trained_names import TrainedNames
from maple.names import clean_class_names, distinct

if TYPE_CHECKING:
    from torch import Tensor

    from maple.feature_files import FeatureRows

Floats = NDArray[np.float32]

_CACHED_LISTS = 16


@dataclass(frozen=True)
class ClassProbability:
    """A class name and its probability (0 to 1)."""

    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, best first.

    Attributes:
        best: by the trained method.
        zero_shot: by the frozen CLIP; None where it was not requested.
        zero_shot_of_best: the frozen CLIP's probabilities of the classes in `best`, in their order.
        rejected: whether the greatest probability is below the threshold, so that the answer is "none of these"; None
            where no threshold was given.

    Example:
        >>> prediction = next(predictor.stream(find_images(["cat.jpg"]), top=3))
        >>> prediction.best[0].name, prediction.best[0].probability
        ('cat', 0.93)
    """

    source: str
    best: tuple[ClassProbability, ...]
    zero_shot: tuple[ClassProbability, ...] | None = None
    zero_shot_of_best: tuple[float, ...] | None = None
    rejected: bool | None = None

    @classmethod
    def from_probabilities(
        cls,
        source: str,
        names: Sequence[str],
        trained: Floats,
        zero_shot: Floats | None,
        top: int,
        reject: float | None = None,
    ) -> Self:
        """Rank C names by probabilities [C] of the trained method and of the frozen CLIP; keep the first `top`.

        `reject` is the threshold of the greatest probability, 0 to 1, below which the image is rejected.
        """
        # A stable sort: equal probabilities keep the order of the names.
        order = np.argsort(-trained, kind="stable")[:top]
        best = tuple(ClassProbability(names[index], float(trained[index])) for index in order)
        rejected = None if reject is None else best[0].probability < reject
        if zero_shot is None:
            return cls(source, best, rejected=rejected)
        frozen = cls.from_probabilities(source, names, zero_shot, None, top).best
        return cls(source, best, frozen, tuple(zero_shot[order].tolist()), rejected)


@dataclass(frozen=True)
class UnreadableImage:
    """An image that could not be read; `reason` begins with its name.

    Example:
        >>> for result in predictor.stream(find_images(["damaged.png"])):
        ...     if isinstance(result, UnreadableImage):
        ...         print(result.reason)
    """

    source: str
    reason: str


@dataclass(frozen=True)
class EncodedClasses:
    """A validated list of class names with its text features.

    Attributes:
        note: a line about names that were not trained (see `TrainedNames.note`), or None.
        trained, zero_shot: what the predictor that made it needs of it, for the method and for the frozen CLIP.
    """

    names: tuple[str, ...]
    note: str | None
    trained: Any
    zero_shot: Any


def classes_to_json(classes: Sequence[ClassProbability]) -> list[dict[str, Any]]:
    """Return class names and probabilities as commands, the server and reports write them in JSON."""
    return [{"class": item.name, "probability": item.probability} for item in classes]


def check_reject(reject: float | None) -> float | None:
    """Return a threshold of the greatest probability, below which an image is rejected, or None.

    Raises:
        ConfigError: it is not a number between 0 and 1, both excluded.
    """
    is_number = isinstance(reject, Real) and not isinstance(reject, bool)
    if reject is not None and not (is_number and 0 < reject < 1):
        raise ConfigError(
            f"reject is {shortened(repr(reject))}; it must be a probability above 0 and below 1, as in 0.6"
        )
    return reject


class Predictor(ABC):
    """A trained method that classifies images under any class names, independent of what computes it.

    Several threads may use it at once, except for `set_class_names`.

    Args:
        preprocess: from an RGB image to the normalised values [3, R, R] that the image tower reads.
        about: a description for people and programs: method, backbone, data set, image size (`image_size`, pixels).
        name_features: the frozen CLIP's unit features [n, D] of "a photo of a {}." for each name, if there are any.

    Example:
        >>> predictor = load_predictor("runs/pets", zero_shot=True)
        >>> predictor.set_class_names(["cat", "dog"])
        >>> for prediction in predictor.stream(find_images(["photos"])):
        ...     print(prediction.source, prediction.best[0].name)
    """

    batch_size = 32
    """The number of images that `stream` encodes at once, if none is given."""
    device_type = "cpu"
    """Where images are encoded: "cpu", "cuda" or another type of device of PyTorch."""

    def __init__(
        self,
        trained_names: Sequence[str],
        *,
        preprocess: EvalView,
        has_zero_shot: bool,
        about: dict[str, Any],
        name_features: Callable[[Sequence[str]], Floats] | None,
    ) -> None:
        self.trained_names = tuple(trained_names)
        self.preprocess = preprocess
        self.has_zero_shot = has_zero_shot
        self.about = about
        self._distances = TrainedNames(trained_names, name_features)
        self._cache: OrderedDict[tuple[str, ...], EncodedClasses] = OrderedDict()
        self._lock = threading.Lock()
        self._current: EncodedClasses | None = None

    @abstractmethod
    def encode_images(self, images: Floats) -> list[Any]:
        """Encode preprocessed images [B, 3, R, R]: B items that `probabilities` takes, in any mixture.

        Raises:
            BackboneError: a result is not finite.
        """

    def encode_features(self, features: "Tensor") -> list[Any]:
        """Encode raw features [B, D] of the frozen image tower: B items that `probabilities` takes.

        Raises:
            BackboneError: a result is not finite.
        """
        raise NotImplementedError

    def require_rows(self, rows: "FeatureRows") -> None:  # noqa: ARG002 - refused whatever they are
        """Refuse rows of features, unless the method can classify them.

        Raises:
            ConfigError: it needs images.
            DataError: these are features of another CLIP.
        """
        raise ConfigError(
            f"{self.about['title']} is an export, which reads images; predict with the run it was made of"
        )

    @abstractmethod
    def probabilities(self, encoded: Sequence[Any], classes: EncodedClasses) -> tuple[Floats, Floats | None]:
        """Return probabilities [n, C] of n items of `encode_images`, and those of the frozen CLIP if it is included.

        Raises:
            BackboneError: a result is not finite.
        """

    @abstractmethod
    def _encode_class_names(self, names: tuple[str, ...], note: str | None) -> EncodedClasses:
        """Encode names that are distinct. Raises as `encode_class_names`."""

    def encode_class_names(self, names: Sequence[str] | None = None) -> EncodedClasses:
        """Validate and encode a list of class names (None: the trained ones); the most recent lists are cached.

        Raises:
            ClassNamesError: an empty list or name, the same words twice, a name too long for the text tower, or one
                that the method cannot predict.
        """
        if names is None:
            names = self.trained_names
        # Two of the trained names may be equal: some published data sets have such pairs.
        elif clean_class_names(names) != clean_class_names(self.trained_names):
            distinct(names)
        key = tuple(names)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        # Encoding is slow, so it runs outside the lock; two threads may encode the same list, which is harmless.
        classes = self._encode_class_names(key, self._distances.note(key))
        with self._lock:
            self._cache[key] = classes
            while len(self._cache) > _CACHED_LISTS:
                self._cache.popitem(last=False)
        return classes

    def prepare(self) -> None:
        """Open and compute now what is otherwise left until it is needed, so that the first request finds no damage.

        Raises:
            CheckpointError: a file is damaged.
        """
        self.encode_class_names()

    @property
    def classes(self) -> EncodedClasses:
        """The encoded class names that `stream` uses."""
        return self._current or self.encode_class_names()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names that `stream` uses; initially those it was trained on."""
        return self.classes.names

    def set_class_names(self, names: Sequence[str]) -> str | None:
        """Set the class names that `stream` uses from its next call on; return a line about those not trained, if any.

        Raises:
            ClassNamesError: as `encode_class_names`; the current names are kept.
        """
        self._current = self.encode_class_names(names)
        return self._current.note

    def stream(
        self,
        images: Iterable[ImageSource],
        *,
        top: int = 5,
        batch_size: int | None = None,
        workers: int = 2,
        reject: float | None = None,
    ) -> Iterator[Prediction | UnreadableImage]:
        """Classify images in their order, `batch_size` at a time; one that cannot be read is reported in its place.

        Without a `batch_size`, it is that of the predictor. A prediction has at most `top` classes. `workers` threads
        read at most two batches ahead, or one and then wait, where they need all cores of a CPU that encodes, too. No
        image is kept.
        Images whose greatest probability is below `reject` are marked as rejected.

        Raises:
            ConfigError: a number is below 1 (at the call; workers: below 0; reject: outside of 0 to 1).
            BackboneError: a logit is not finite (while iterating).
        """
        batch_size = self.batch_size if batch_size is None else batch_size
        _check_numbers(reject, top=(top, 1), batch_size=(batch_size, 1), workers=(workers, 0))
        classes = self.classes

        def read(image: ImageSource) -> tuple[str, Floats | UnreadableImage]:
            try:
                return image.name, self.preprocess(image.read())
            except DataError as error:
                return image.name, UnreadableImage(image.name, str(error))

        def predict() -> Iterator[Prediction | UnreadableImage]:
            overlap = overlaps(self.device_type, workers)
            with closing(map_in_order(read, images, workers, batch_size, overlap=overlap)) as results:
                while batch := list(islice(results, batch_size)):
                    readable = [(name, pixels) for name, pixels in batch if not isinstance(pixels, UnreadableImage)]
                    names, encoded = [name for name, _ in readable], []
                    if readable:
                        encoded = self.encode_images(np.stack([pixels for _, pixels in readable]))
                    predictions = self._rank(names, encoded, classes, top, reject)
                    for _, result in batch:
                        yield result if isinstance(result, UnreadableImage) else next(predictions)

        return predict()

    def stream_features(
        self, rows: "FeatureRows", *, top: int = 5, batch_size: int = 32, reject: float | None = None
    ) -> Iterator[Prediction]:
        """Classify precomputed features of images as `stream` does images, named as the rows are.

        Raises:
            ConfigError: the method needs images, or a number is out of its range (at the call).
            DataError: these are features of another CLIP (at the call).
            BackboneError: a logit is not finite (while iterating).

        Example:
            >>> for prediction in predictor.stream_features(read_rows("new.safetensors")):
            ...     print(prediction.source, prediction.best[0].name)
        """
        _check_numbers(reject, top=(top, 1), batch_size=(batch_size, 1))
        self.require_rows(rows)
        classes = self.classes

        def predict() -> Iterator[Prediction]:
            for start in range(0, len(rows.names), batch_size):
                part = slice(start, start + batch_size)
                encoded = self.encode_features(rows.features[part])
                yield from self._rank(rows.names[part], encoded, classes, top, reject)

        return predict()

    def _rank(
        self, names: Sequence[str], encoded: Sequence[Any], classes: EncodedClasses, top: int, reject: float | None
    ) -> Iterator[Prediction]:
        if not names:
            return
        trained, zero_shot = self.probabilities(encoded, classes)
        for row, name in enumerate(names):
            frozen = None if zero_shot is None else zero_shot[row]
            yield Prediction.from_probabilities(name, classes.names, trained[row], frozen, top, reject)


def _check_numbers(reject: float | None, **numbers: tuple[int, int]) -> None:
    """Refuse a number below the least one allowed, and a threshold that is not a probability."""
    for option, (value, least) in numbers.items():
        if value < least:
            raise ConfigError(f"{option} is {value}; it must be at least {least}")
    check_reject(reject)


def load_predictor(source: str | Path, *, zero_shot: bool = False, device: str | None = None, **clip: Any) -> Predictor:
    """Load a finished run's folder, a prompts file, `hub:OWNER/NAME`, or the folder of an export to ONNX.

    PyTorch is imported for the first three only. `zero_shot` classifies with the frozen CLIP too; the default `device`
    is a CUDA GPU if there is one, and the CPU for an export. `clip`: `precision`, `backbone`, `pretrained` and
    `trust_backbone`, as in `maple.load_prompts`; not for an export.

    Raises:
        UntrustedBackboneError: the run is from elsewhere and names an unknown CLIP.
        MapleError: the path is none of these, is damaged, or the device does not exist.

    Example:
        >>> predictor = load_predictor("exported", device="cpu")
        >>> for prediction in predictor.stream(find_images(["photos"])):
        ...     print(prediction.source, prediction.best[0].name)
    """
    # The predictors import this module, and each needs packages that the other does without.
    from maple.inference.manifest import is_export

    if is_export(source):
        from maple.inference.onnx_predictor import OnnxPredictor

        if any(clip.values()):
            given = ", ".join(name for name, value in clip.items() if value)
            raise ConfigError(f"{source} is an export, which contains its CLIP; leave out {given}")
        return OnnxPredictor.load(source, zero_shot=zero_shot, device=device)
    from maple.inference.torch_predictor import TorchPredictor

    return TorchPredictor.load(source, zero_shot=zero_shot, device=device, **clip)
