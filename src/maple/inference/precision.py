"""The precision in which images are predicted: bfloat16 where a processor has units for it and the answers stay.

Only `maple predict` decides by itself. Evaluations keep the precision of the run, so that a table of results does not
depend on the processor that it was computed on.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

from maple.clip.cpu_linear import processor_facts
from maple.inference.predictor import Prediction, Predictor
from maple.inference.sources.image_sources import ImageSource, cache_downloads
from maple.inference.torch_predictor import TorchPredictor

WORTHWHILE = 400
"""Fewer images are predicted sooner than a second copy of the backbone is loaded and checked."""
CHECKED = 64
"""How many of the images are predicted in both precisions."""
LARGEST_DIFFERENCE = 0.02
"""Of a probability between the precisions; beyond it, float32 is kept."""


def has_bfloat16_units() -> bool:
    """Whether this processor multiplies matrices of bfloat16 in units made for it (AMX), several times as fast."""
    return bool(processor_facts().get("amx_bf16"))


def in_fastest_precision(
    predictor: Predictor, load: Callable[[], Predictor], images: Iterable[ImageSource]
) -> tuple[Predictor, Iterator[ImageSource], str | None]:
    """Choose between a predictor in float32 and the same in bfloat16, by the first images.

    bfloat16 is chosen if the processor has units for it, there are at least `WORTHWHILE` images, and the first
    `CHECKED` that can be read have the same class in both precisions, with probabilities that differ by at most
    `LARGEST_DIFFERENCE`.

    Args:
        predictor: with the class names that count; one that is not of PyTorch is returned as it is.
        load: loads the same in bfloat16.

    Returns:
        The predictor to use, all images in their order, and a line for people if both precisions were tried.
    """
    remaining = iter(images)
    if not isinstance(predictor, TorchPredictor) or not has_bfloat16_units():
        return predictor, remaining, None
    backbone = predictor.method.backbone
    if backbone.precision != "fp32" or backbone.device.type != "cpu":
        return predictor, remaining, None
    # What is downloaded is kept: these are read three times.
    first = [*cache_downloads(islice(remaining, CHECKED)), *islice(remaining, WORTHWHILE - CHECKED)]
    images = chain(first, remaining)
    if len(first) < WORTHWHILE:
        return predictor, iter(images), None
    faster = load()
    faster.set_class_names(predictor.class_names)
    every = len(predictor.class_names)
    pairs = [
        (exact, rounded)
        for exact, rounded in zip(
            *(chosen.stream(first[:CHECKED], top=every) for chosen in (predictor, faster)), strict=True
        )
        if isinstance(exact, Prediction) and isinstance(rounded, Prediction)
    ]
    differing = sum(_best_classes(exact) != _best_classes(rounded) for exact, rounded in pairs)
    difference = max((_difference(exact, rounded) for exact, rounded in pairs), default=1.0)
    if differing or difference > LARGEST_DIFFERENCE:
        reason = f"{differing} of the first {len(pairs)} images have another class in bfloat16"
        if not differing:
            reason = f"a probability of the first {len(pairs)} images differs by {difference:.3f} in bfloat16"
        return predictor, iter(images), f"computed in float32: {reason}; --precision bf16 uses it nevertheless"
    note = (
        f"computed in bfloat16: the first {len(pairs)} images have the same classes, with probabilities within "
        f"{difference:.3f}; --precision fp32 computes as in training"
    )
    return faster, iter(images), note


def _best_classes(prediction: Prediction) -> tuple[str, ...]:
    first = prediction.zero_shot[:1] if prediction.zero_shot else ()
    return tuple(item.name for item in (prediction.best[0], *first))


def _difference(exact: Prediction, rounded: Prediction) -> float:
    """The largest difference of a probability, of the method or of the frozen CLIP."""
    largest = 0.0
    for expected, actual in ((exact.best, rounded.best), (exact.zero_shot or (), rounded.zero_shot or ())):
        probabilities = {item.name: item.probability for item in actual}
        largest = max([largest, *(abs(item.probability - probabilities[item.name]) for item in expected)])
    return largest
