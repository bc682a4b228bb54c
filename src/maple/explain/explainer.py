"""Heat maps of images: where the frozen CLIP and the trained method find a class."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from PIL import Image

from maple.errors import ClassNamesError, ConfigError, DataError, shortened_list
from maple.explain.relevance import relevance
from maple.inference import ImageSource, Prediction, TorchPredictor, UnreadableImage
from maple.inference.predictor import ClassProbability, Floats
from maple.methods import Method
from maple.names import NameRows

SHOWN = 3
"""The number of predicted classes shown below a map."""


@dataclass(frozen=True)
class ExplainedSide:
    """The prediction of one method for an image, and its heat map.

    Attributes:
        probability: its probability of the explained class, 0 to 1.
        values: G rows of G patches, top left first: the share of the relevance of each, summing to 1; all zero where
            nothing is evidence for the class.

    Example:
        >>> max(explanation.trained.values[0])
        0.031
    """

    best: tuple[ClassProbability, ...]
    probability: float
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Explanation:
    """The heat maps of one image.

    Attributes:
        target: the class that both maps are about.
        image: the input of the image tower, RGB, R x R pixels.

    Example:
        >>> explanation.target, explanation.zero_shot.probability, explanation.trained.probability
        ('cat', 0.41, 0.93)
    """

    source: str
    target: str
    image: Image.Image
    zero_shot: ExplainedSide
    trained: ExplainedSide


class Explainer:
    """Explain the predictions of a predictor that was loaded with `zero_shot=True`.

    Args:
        target: the class to explain; by default, for each image, the one that the trained method predicts.

    Raises:
        ConfigError: the predictor has no frozen CLIP.
        ClassNamesError: `target` is not one of its classes.

    Example:
        >>> explainer = Explainer(TorchPredictor.load("runs/pets", zero_shot=True), target="cat")
        >>> for explanation in explainer.explain(find_images(["photos"])):
        ...     print(explanation.source, explanation.trained.probability)
    """

    def __init__(self, predictor: TorchPredictor, target: str | None = None) -> None:
        self._classes = predictor.classes
        if self._classes.zero_shot is None:
            raise ConfigError("an explanation shows the frozen CLIP too; load the predictor with zero_shot=True")
        self._predictor = predictor
        self._target: int | None = None
        if target is not None:
            (self._target,) = NameRows(predictor.class_names).find([target])
            if self._target is None:
                words = [name.replace("_", " ").strip() for name in predictor.class_names]
                raise ClassNamesError(
                    f"{target!r} is not one of the classes ({shortened_list(words, 10)}); add it to the list too"
                )

    def explain(self, images: Iterable[ImageSource]) -> Iterator[Explanation | UnreadableImage]:
        """Explain images one by one, in their order; one that cannot be read is reported in its place.

        Raises:
            UnsupportedTowerError: the image tower has no readable attention blocks (while iterating).
        """
        preprocessing = self._predictor.method.backbone.preprocessing
        mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
        for source in images:
            try:
                pixels = self._predictor.preprocess(source.read())
            except DataError as error:
                yield UnreadableImage(source.name, str(error))
                continue
            encoded = self._predictor.encode_images(pixels[None])
            trained, frozen = self._predictor.probabilities(encoded, self._classes)
            target = int(trained[0].argmax()) if self._target is None else self._target
            shown = ((torch.from_numpy(pixels) * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
            probabilities = (trained if frozen is None else frozen)[0]
            yield Explanation(
                source=source.name,
                target=self._classes.names[target],
                image=Image.fromarray(shown.permute(1, 2, 0).contiguous().numpy()),
                zero_shot=self._side(self._classes.zero_shot, pixels, probabilities, target),
                trained=self._side(self._classes.trained, pixels, trained[0], target),
            )

    def _side(self, method: Method, pixels: Floats, probabilities: Floats, target: int) -> ExplainedSide:
        values = relevance(method, torch.from_numpy(pixels)[None], torch.tensor([target]))[0]
        total = values.sum()
        shares = values / total if total > 0 else values
        best = Prediction.from_probabilities("", self._classes.names, probabilities, None, SHOWN).best
        return ExplainedSide(best, float(probabilities[target]), tuple(tuple(row) for row in shares.tolist()))
