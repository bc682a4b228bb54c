"""How far new class names are from the trained ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from maple.clip import Backbone
from maple.data.emoji import TEMPLATE
from maple.prompts import TemplateClasses

MOST_NAMES = 500
"""Lists longer than this, old and new together, are not measured: it would take longer than the prediction."""

_LOWEST = 0.05
_SHOWN = 3


def explain_new_names(backbone: Backbone, trained: Sequence[str], names: Sequence[str]) -> str | None:
    """Say in one line that some of `names` were not trained, and whether they are far from those that were.

    A name is far when its cosine to the nearest trained name, of the frozen text features of "a photo of a {}.", is
    below the smallest twentieth of what the trained names have among themselves; this scale is the backbone's own,
    whatever it is. A list is called far when most of its new names are.

    Measured on the small CLIP, trained on half of `emoji-food`: of the other half 34 per cent of the names are far, of
    `emoji-animals` 27; of people and activities 53, objects and places 64, symbols 86, flags 99. It tells how far one
    has gone from the training, not how well the prompts do there: compare with zero-shot for that.

    Returns:
        None where every name was trained.
    """
    known = {_words(name) for name in trained}
    new = [name for name in dict.fromkeys(names) if _words(name) not in known]
    if not new:
        return None
    told = f"{len(new)} of {len(names)} class names were not trained ({_some(new)})"
    if len(known) < 2 or len(known) + len(new) > MOST_NAMES:
        return told
    nearest, usual = name_cosines(backbone, sorted(known), new)
    bound = float(usual.quantile(_LOWEST))
    far = [name for name, cosine in zip(new, nearest.tolist(), strict=True) if cosine < bound]
    if 2 * len(far) <= len(new):
        return told
    return (
        f"{told}, and this list is far from the trained one: {_some(far)} less like any trained name than those are "
        f"like each other (cosine {float(nearest.min()):.2f}, usual {bound:.2f} and more); compare with --zero-shot"
    )


@torch.no_grad()
def name_cosines(backbone: Backbone, trained: Sequence[str], names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Cosines to the nearest trained name: of each of `names` [n], and of each trained name to the others [C]."""
    classes = TemplateClasses(backbone, [TEMPLATE])
    classes.set_class_names([*trained, *names])
    features = classes.features.cpu()
    old, new = features[: len(trained)], features[len(trained) :]
    among = old @ old.T
    among.fill_diagonal_(-torch.inf)
    return (new @ old.T).amax(dim=1), among.amax(dim=1)


def _words(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown}, ..." if len(names) > _SHOWN else shown
