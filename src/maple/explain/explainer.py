"""Pictures in; maps of where the frozen CLIP and the trained method find a class, out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from maple.errors import ClassNamesError, ConfigError, DataError
from maple.explain.relevance import relevance
from maple.inference import ImageSource, Ranked, TorchPredictor, Unreadable
from maple.inference.predictor import Floats, answer
from maple.methods import Method

SHOWN = 3
"""How many answers stand beside a map."""


@dataclass(frozen=True)
class Side:
    """What one method says of a picture, and where it finds the class that is asked for.

    Attributes:
        best: its likeliest classes, best first.
        probability: what it gives that class, 0 to 1.
        values: G rows of G patches, top left first: the share of the relevance that falls on each, summing to 1; all
            zero where nothing speaks for the class.
    """

    best: tuple[Ranked, ...]
    probability: float
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Explanation:
    """One picture.

    Attributes:
        source: the picture's name.
        target: the class that both maps are about.
        seen: what the image tower sees of it, RGB, R x R pixels.
        zero_shot, tuned: the frozen CLIP, and the trained method.
    """

    source: str
    target: str
    seen: Image.Image
    zero_shot: Side
    tuned: Side


class Explainer:
    """Explains the answers of a predictor that was loaded with `zero_shot=True`."""

    def __init__(self, predictor: TorchPredictor, target: str | None = None) -> None:
        """Explain why pictures might show `target`; without it, for each picture the trained method's first answer.

        Raises:
            ConfigError: the predictor has no frozen CLIP beside.
            ClassNamesError: `target` is none of its classes.
        """
        self._spoken = predictor.spoken
        if self._spoken.frozen is None:
            raise ConfigError("an explanation shows the frozen CLIP too; load the predictor with zero_shot=True")
        self._predictor = predictor
        self._target = None if target is None else _place(predictor.class_names, target)

    def explain(self, pictures: Iterable[ImageSource]) -> Iterator[Explanation | Unreadable]:
        """Explain pictures one by one, in their order; what cannot be read is said in its place.

        Raises:
            UnsupportedTowerError: the image tower has no attention blocks that can be read (while iterating).
        """
        for picture in pictures:
            try:
                image = picture.read()
            except DataError as error:
                yield Unreadable(picture.name, str(error))
                continue
            view = self._predictor.transform(image)
            seen = self._predictor.encode(view[None].numpy())
            tuned, frozen = self._predictor.probabilities(seen, self._spoken)
            target = int(tuned[0].argmax()) if self._target is None else self._target
            yield Explanation(
                source=picture.name,
                target=self._spoken.names[target],
                seen=self._picture(view),
                zero_shot=self._side(self._spoken.frozen, view, (tuned if frozen is None else frozen)[0], target),
                tuned=self._side(self._spoken.tuned, view, tuned[0], target),
            )

    def _side(self, method: Method, view: Tensor, given: Floats, target: int) -> Side:
        found = relevance(method, view[None], torch.tensor([target]))[0]
        total = found.sum()
        shares = found / total if total > 0 else found
        best = answer("", self._spoken.names, given, None, SHOWN).best
        return Side(best, float(given[target]), tuple(tuple(row) for row in shares.tolist()))

    def _picture(self, view: Tensor) -> Image.Image:
        """The pixels [R, R, 3] of a normalised view [3, R, R]."""
        preprocessing = self._predictor.method.backbone.preprocessing
        mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
        pixels = ((view.cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _place(names: tuple[str, ...], target: str) -> int:
    """Where `target` stands among the class names, underscores and spaces being the same."""
    words = [name.replace("_", " ").strip() for name in names]
    wanted = target.replace("_", " ").strip()
    if wanted not in words:
        shown = ", ".join(words[:10]) + (f", and {len(words) - 10} more" if len(words) > 10 else "")
        raise ClassNamesError(
            f"{target!r} is none of the classes that are spoken of ({shown}); name it in the list too"
        )
    return words.index(wanted)
