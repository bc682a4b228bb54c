"""The seam between a method and whoever asks it: pictures in, class names out, without torch.

A server encodes the pictures of many requests in one batch and answers each under its own class list: `view`,
`encode_class_names`, `encode` and `probabilities` share no state that changes. `stream` answers for one class list
after another, as a command does.
"""

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maple.data.images.eval_transform import EvalView
from maple.data.images.prefetch import map_in_order
from maple.errors import ConfigError, DataError
from maple.inference.images import ImageSource
from maple.inference.trained_names import TrainedNames
from maple.names import clean_class_names, distinct

Floats = NDArray[np.float32]

_LISTS_KEPT = 16


@dataclass(frozen=True)
class Ranked:
    """A class name and its probability (0 to 1)."""

    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one picture, best first.

    Attributes:
        source: the picture's name.
        best: by the trained method.
        zero_shot: by the frozen CLIP; None where it was not asked for.
        zero_shot_of_best: what the frozen CLIP gives the classes of `best`, in their order.
    """

    source: str
    best: tuple[Ranked, ...]
    zero_shot: tuple[Ranked, ...] | None = None
    zero_shot_of_best: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Unreadable:
    """A picture that could not be read; the reason begins with its name."""

    source: str
    reason: str


@dataclass(frozen=True)
class EncodedClasses:
    """A class list that was checked and encoded.

    Attributes:
        names: C class names, as given.
        note: a line on names that were not trained (see `TrainedNames.explain`), or None.
        tuned, frozen: what the answerer that made it keeps for it, for the method and the frozen CLIP.
    """

    names: tuple[str, ...]
    note: str | None
    tuned: Any
    frozen: Any


class Predictor(ABC):
    """A trained method, whatever computes it. All of it may be used by several threads, but `set_class_names`.

    Attributes:
        trained_names: the classes it was trained on.
        has_zero_shot: whether the frozen CLIP answers beside.
        about: what it is, for people and programs: method, backbone, data set, image size (`image_size`, pixels).
    """

    def __init__(
        self,
        trained_names: Sequence[str],
        *,
        view: EvalView,
        has_zero_shot: bool,
        about: dict[str, Any],
        name_features: Callable[[Sequence[str]], Floats] | None,
    ) -> None:
        """Make the part that needs no model.

        Args:
            view: how the image tower sees a picture.
            name_features: the frozen CLIP's unit features [n, D] of "a photo of a {}." for each name; None where it
                has none.
        """
        self.trained_names = tuple(trained_names)
        self.has_zero_shot = has_zero_shot
        self.about = about
        self._view = view
        self._known = TrainedNames(trained_names, name_features)
        self._lists: OrderedDict[tuple[str, ...], EncodedClasses] = OrderedDict()
        self._lock = threading.Lock()
        self._now: EncodedClasses | None = None

    def view(self, image: Image.Image) -> Floats:
        """The normalised values [3, R, R] of an RGB image, as the image tower reads it."""
        return self._view(image)

    def encode_class_names(self, names: Sequence[str] | None = None) -> EncodedClasses:
        """A class list, checked and encoded; the last few are kept. None is the trained one.

        Raises:
            ClassNamesError: an empty list or name, the same words twice, a name too long for the text tower, or one
                that the method cannot speak of.
        """
        if names is None:
            names = self.trained_names
        # Two of the trained names may be equal, as published data sets have such pairs.
        elif clean_class_names(names) != clean_class_names(self.trained_names):
            distinct(names)
        return self._spoken(tuple(names))

    @abstractmethod
    def encode(self, views: Floats) -> list[Any]:
        """What the towers see in each of the views [B, 3, R, R]: B things that `probabilities` takes, in any mixture.

        Raises:
            BackboneError: a result is not finite.
        """

    @abstractmethod
    def probabilities(self, seen: Sequence[Any], spoken: EncodedClasses) -> tuple[Floats, Floats | None]:
        """Probabilities [n, C] of n things that `encode` gave, and those of the frozen CLIP where it is there.

        Raises:
            BackboneError: a result is not finite.
        """

    @abstractmethod
    def _speak(self, names: tuple[str, ...], note: str | None) -> EncodedClasses:
        """Encode names that are distinct. Raises as `encode_class_names`."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that `stream` speaks of now; at first those it was trained on."""
        return self.spoken.names

    @property
    def spoken(self) -> EncodedClasses:
        """The class list that `stream` speaks of now."""
        return self._now or self.encode_class_names()

    def set_class_names(self, names: Sequence[str]) -> str | None:
        """Let `stream` speak of these classes from now on, at once.

        Returns:
            A line on names that were not trained, if there are any.

        Raises:
            ClassNamesError: as `encode_class_names`; nothing is changed then.
        """
        self._now = self.encode_class_names(names)
        return self._now.note

    def stream(
        self, pictures: Iterable[ImageSource], *, top: int = 5, batch_size: int = 32, workers: int = 2
    ) -> Iterator[Prediction | Unreadable]:
        """Answer for pictures in their order, `batch_size` at a time; what cannot be read is said in its place.

        `workers` threads read ahead, at most two batches; no picture is kept.

        Args:
            top: how many classes each answer has at most.

        Raises:
            ConfigError: a number is below 1 (at the call; workers: below 0).
            BackboneError: a logit is not finite (while iterating).
        """
        for what, value, least in (("top", top, 1), ("batch_size", batch_size, 1), ("workers", workers, 0)):
            if value < least:
                raise ConfigError(f"{what} is {value}; it must be at least {least}")
        return self._stream(pictures, self.spoken, top, batch_size, workers)

    def _stream(
        self, pictures: Iterable[ImageSource], spoken: EncodedClasses, top: int, batch_size: int, workers: int
    ) -> Iterator[Prediction | Unreadable]:
        with closing(map_in_order(self._viewed, pictures, workers, ahead=2 * batch_size)) as views:
            while batch := list(islice(views, batch_size)):
                yield from self._answers(batch, spoken, top)

    def _viewed(self, picture: ImageSource) -> tuple[str, Floats | Unreadable]:
        try:
            return picture.name, self.view(picture.read())
        except DataError as error:
            return picture.name, Unreadable(picture.name, str(error))

    def _answers(
        self, batch: Sequence[tuple[str, Floats | Unreadable]], spoken: EncodedClasses, top: int
    ) -> Iterator[Prediction | Unreadable]:
        views = [view for _, view in batch if not isinstance(view, Unreadable)]
        seen = self.encode(np.stack(views)) if views else []
        tuned, frozen = self.probabilities(seen, spoken) if views else (np.empty((0, 0), np.float32), None)
        row = 0
        for name, view in batch:
            if isinstance(view, Unreadable):
                yield view
                continue
            yield answer(name, spoken.names, tuned[row], None if frozen is None else frozen[row], top)
            row += 1

    def _spoken(self, names: tuple[str, ...]) -> EncodedClasses:
        with self._lock:
            if names in self._lists:
                self._lists.move_to_end(names)
                return self._lists[names]
        spoken = self._speak(names, self._known.explain(names))
        with self._lock:
            self._lists[names] = spoken
            while len(self._lists) > _LISTS_KEPT:
                self._lists.popitem(last=False)
        return spoken


def answer(source: str, names: Sequence[str], tuned: Floats, frozen: Floats | None, top: int) -> Prediction:
    """The `top` likeliest of C names by their probabilities [C], and what the frozen CLIP's say of them."""
    best, order = _ranked(names, tuned, top)
    if frozen is None:
        return Prediction(source, best)
    return Prediction(source, best, _ranked(names, frozen, top)[0], tuple(frozen[order].tolist()))


def _ranked(names: Sequence[str], probabilities: Floats, top: int) -> tuple[tuple[Ranked, ...], NDArray[np.intp]]:
    # A stable sort: equal probabilities come in the order of the names.
    order = np.argsort(-probabilities, kind="stable")[:top]
    return tuple(Ranked(names[index], float(probabilities[index])) for index in order), order
