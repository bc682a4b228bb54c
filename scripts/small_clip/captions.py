"""Captions of emoji concepts, and their tokens in a vocabulary reduced to what they use."""

import random

import open_clip
import torch
from torch import Tensor

from maple.data.emoji.scenes import Concept

PLAIN_TEMPLATE = "a photo of a {}."
TEMPLATES = (
    PLAIN_TEMPLATE, PLAIN_TEMPLATE, PLAIN_TEMPLATE, "a picture of a {}.", "a drawing of a {}.", "{}", "a {}.",
    "an icon of a {}.", "an emoji of a {}.", "a photo of a {}, a type of KIND.", "a {} in a scene.",
)  # fmt: skip
KINDS = {
    "animals": "animal", "food": "food", "objects": "object", "places": "place", "people": "person",
    "symbols": "symbol", "activities": "activity", "flags": "flag",
}  # fmt: skip
CAPTIONS = 24  # per concept
CONTEXT = 18


def captions_of(concept: Concept, rng: random.Random) -> list[str]:
    """`CAPTIONS` sentences on one concept: mostly its name in a template, some with keywords, few of a keyword only."""
    captions = []
    for number in range(CAPTIONS):
        text = rng.choice(TEMPLATES).replace("KIND", KINDS[concept.group]).format(concept.name)
        if concept.keywords and number % 4 == 3:
            words = rng.sample(concept.keywords, min(len(concept.keywords), rng.randint(1, 3)))
            text = f"{text.removesuffix('.')}, {', '.join(words)}"
        if concept.keywords and number % 12 == 7:
            text = PLAIN_TEMPLATE.format(rng.choice(concept.keywords))
        captions.append(text)
    return captions


def caption_tables(concepts: tuple[Concept, ...]) -> tuple[Tensor, Tensor]:
    """Tokens (concepts, CAPTIONS, CONTEXT) in the reduced vocabulary, and the rows of CLIP's that it consists of.

    The rows are ascending, so the end token stays the largest, which is what the text tower looks for.
    """
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    rng = random.Random(1)
    tokens = torch.stack([tokenizer(captions_of(concept, rng)) for concept in concepts])
    rows, reduced = torch.unique(tokens, return_inverse=True)
    return reduced, rows
