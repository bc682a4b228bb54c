"""Captions of names, and their tokens in a vocabulary reduced to what they use."""

import random

import open_clip
import torch
from torch import Tensor

PLAIN_TEMPLATE = "a photo of a {}."
TEMPLATES = (
    PLAIN_TEMPLATE, PLAIN_TEMPLATE, PLAIN_TEMPLATE, "a picture of a {}.", "a drawing of a {}.", "{}", "a {}.",
    "an icon of a {}.", "a symbol of a {}.", "a sign that shows a {}.", "a {} in a scene.", "a rendering of a {}.",
)  # fmt: skip
CAPTIONS = 12  # per name
CONTEXT = 18


def captions_of(name: str, keywords: list[str], rng: random.Random) -> list[str]:
    """`CAPTIONS` sentences on one name, the first one plain: in a template, some with keywords, few of a keyword."""
    captions = []
    for number in range(CAPTIONS):
        text = rng.choice(TEMPLATES).format(name)
        if keywords and number % 4 == 3:
            words = rng.sample(keywords, min(len(keywords), rng.randint(1, 3)))
            text = f"{text.removesuffix('.')}, {', '.join(words)}"
        if keywords and number % 12 == 7:
            text = PLAIN_TEMPLATE.format(rng.choice(keywords))
        captions.append(text)
    return [PLAIN_TEMPLATE.format(name), *captions[1:]]


def caption_tables(names: list[str], keywords: list[list[str]]) -> tuple[Tensor, Tensor]:
    """Tokens (names, CAPTIONS, CONTEXT) in the reduced vocabulary, and the rows of CLIP's that it consists of.

    The rows are ascending, so the end token stays the largest, which is what the text tower looks for.
    """
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    rng = random.Random(1)
    tokens = torch.stack([tokenizer(captions_of(*pair, rng)) for pair in zip(names, keywords, strict=True)])
    rows, reduced = torch.unique(tokens, return_inverse=True)
    return reduced, rows
