"""Pictures in, class names with probabilities out, one by one and in order."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from maple.checkpoint import load_prompts, read_prompts
from maple.clip import Backbone
from maple.data import in_order, make_views, template_of, views_device
from maple.data.emoji import TEMPLATE
from maple.distributed import this_process
from maple.errors import BackboneError, ClassNamesError, ConfigError, DataError
from maple.inference.distance import explain_new_names
from maple.inference.hub import PREFIX, fetch_prompts
from maple.inference.pictures import Picture
from maple.methods import Method, build_method
from maple.prompts.splice import clean_class_names
from maple.runs import eval_transform, finished_prompts


@dataclass(frozen=True)
class Ranked:
    """A class name and its probability (0 to 1)."""

    name: str
    probability: float


@dataclass(frozen=True)
class Answer:
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


class Predictor:
    """A trained method that answers for pictures under any class names, beside the frozen CLIP if wanted.

    Attributes:
        method: the trained method; its class names change with `set_class_names`.
        trained_names: the classes it was trained on.
        transform: from an RGB image to the tensor [3, R, R] that its backbone reads.
        views: makes the same of many images, on a GPU if the backbone is there.
    """

    def __init__(self, method: Method, *, zero_shot: bool = False, template: str = TEMPLATE) -> None:
        """Answer with `method`, and with the frozen CLIP in `template` beside it if `zero_shot`.

        Raises:
            ConfigError: the template has not exactly one {}.
        """
        self.method = method.eval()
        self.trained_names = method.class_names
        self.transform = eval_transform(method.backbone)
        self.views = make_views(self.transform, views_device("auto", method.backbone.device))
        self._frozen: Method | None = None
        if zero_shot:
            description = {"name": "zero_shot", "templates": [template]}
            self._frozen = build_method(description, method.backbone, method.class_names)

    @classmethod
    def load(cls, run: str | Path, *, zero_shot: bool = False, device: str | None = None) -> Self:
        """Load a finished run's folder, or a prompts file.

        The frozen CLIP speaks the template of the run's data set, or "a photo of a {}.".

        Raises:
            MapleError: no finished run, an unreadable file, no such device, or a backbone that cannot be loaded.
        """
        path = prompts_file(run)
        template = template_of_info(read_prompts(path).info)
        method = load_prompts(path, device=this_process(device).device)
        return cls(method, zero_shot=zero_shot, template=template)

    @property
    def frozen(self) -> Method | None:
        """The frozen CLIP beside it, if there is one; its class names follow."""
        return self._frozen

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes it speaks of now."""
        return self.method.class_names

    def set_class_names(self, names: Sequence[str]) -> str | None:
        """Speak of these classes from now on, at once.

        Returns:
            A line on names that were not trained (see `explain_new_names`), if there are any.

        Raises:
            ClassNamesError: an empty list or name, the same words twice, or a name too long for the text tower.
        """
        before = self.class_names
        self.method.set_class_names(distinct(names))
        if self._frozen is not None:
            try:
                self._frozen.set_class_names(names)
            except ClassNamesError:
                self.method.set_class_names(before)
                raise
        return explain_new_names(self.method.backbone, self.trained_names, names)

    def probabilities(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Probabilities [B, C] of normalised images [B, 3, R, R], and those of the frozen CLIP; float32, on the CPU.

        Raises:
            BackboneError: a logit is not finite.
        """
        images = images.to(self.method.backbone.device)
        return _probabilities(self.method, images), _probabilities(self._frozen, images) if self._frozen else None

    def stream(
        self, pictures: Iterable[Picture], *, top: int = 5, batch_size: int = 32, workers: int = 2
    ) -> Iterator[Answer | Unreadable]:
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
        return self._stream(pictures, top, batch_size, workers)

    def _stream(
        self, pictures: Iterable[Picture], top: int, batch_size: int, workers: int
    ) -> Iterator[Answer | Unreadable]:
        with closing(in_order(self._view, pictures, workers, ahead=2 * batch_size)) as views:
            while batch := list(islice(views, batch_size)):
                yield from self._answers(batch, top)

    def _view(self, picture: Picture) -> tuple[str, Any]:
        try:
            return picture.name, self.views.one(picture.read())
        except DataError as error:
            return picture.name, Unreadable(picture.name, str(error))

    def _answers(self, batch: Sequence[tuple[str, Any]], top: int) -> Iterator[Answer | Unreadable]:
        views = [view for _, view in batch if not isinstance(view, Unreadable)]
        tuned, frozen = self.probabilities(self.views.batch(views)) if views else (torch.empty(0), None)
        row = 0
        for name, view in batch:
            if isinstance(view, Unreadable):
                yield view
                continue
            best, order = self._ranked(tuned[row], top)
            if frozen is None:
                yield Answer(name, best)
            else:
                beside = tuple(frozen[row][order].tolist())
                yield Answer(name, best, self._ranked(frozen[row], top)[0], beside)
            row += 1

    def _ranked(self, probabilities: Tensor, top: int) -> tuple[tuple[Ranked, ...], Tensor]:
        # A stable sort: equal probabilities come in the order of the names.
        order = probabilities.argsort(descending=True, stable=True)[:top]
        values = probabilities[order].tolist()
        names = [self.class_names[index] for index in order.tolist()]
        return tuple(Ranked(name, value) for name, value in zip(names, values, strict=True)), order


def distinct(names: Sequence[str]) -> Sequence[str]:
    """The names, none of which may say the same words as another.

    Raises:
        ClassNamesError: the list or a name is empty, or the same words come twice.
    """
    times = Counter(name.strip() for name in clean_class_names(names))
    if twice := [name for name, count in times.items() if count > 1]:
        raise ClassNamesError(f"{', '.join(map(repr, twice))} is named more than once; name every class once")
    return names


def prompts_file(run: str | Path) -> Path:
    """The prompts file of a run: the file itself, that of a finished run's folder, or of `hf-hub:OWNER/NAME`.

    Raises:
        CheckpointError: there is none.
    """
    if str(run).startswith(PREFIX):
        return fetch_prompts(str(run).removeprefix(PREFIX))
    path = Path(run).expanduser()
    return path if path.is_file() else finished_prompts(path)


def template_of_info(info: dict[str, Any]) -> str:
    """The zero-shot template of the data set that a prompts file says it was trained on, or CLIP's usual one."""
    data = info.get("data")
    name = data.get("dataset") if isinstance(data, dict) else info.get("dataset")
    return (template_of(name) if isinstance(name, str) else None) or TEMPLATE


def finite(values: Tensor, backbone: Backbone) -> Tensor:
    """The values, all of which must be numbers.

    Raises:
        BackboneError: one is infinite or NaN.
    """
    if not bool(values.isfinite().all()):
        raise BackboneError(
            f"a result is not finite, in {backbone.precision} on {backbone.device}; load the backbone in fp32"
        )
    return values


def _probabilities(method: Method, images: Tensor) -> Tensor:
    return finite(method.predict_logits(images).float(), method.backbone).softmax(dim=-1).cpu()
