"""The words of the vocabulary that learned text tokens lie nearest to.

Learned tokens are points between words, and training does not draw them to any; a near word is rarely a meaning.

Source: CoOp (IJCV 2022), section 4.2 and Table 4; KaiyangZhou/CoOp@ff61507 interpret_prompt.py, which lists the
Euclidean distance.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from maple.clip import Backbone
from maple.errors import ConfigError
from maple.methods import Method

WARNING = (
    "Read with care: learned tokens are points between the words, and nothing draws them to one. The nearest words are "
    "rarely readable, and a word that is near need not say what the token does."
)


@dataclass(frozen=True)
class NearWord:
    """A token of the vocabulary.

    Attributes:
        value: the Euclidean distance (from 0 up) or the cosine (-1 to 1) to the learned token.
    """

    word: str
    value: float


@dataclass(frozen=True)
class TokenWords:
    """What one learned token lies near.

    Attributes:
        by_distance: the nearest first, with their Euclidean distances.
        by_cosine: the likest first, with their cosines.
        norm: the token's length; beside `word_norm` of the whole, it tells whether it lies among words at all.
    """

    by_distance: tuple[NearWord, ...]
    by_cosine: tuple[NearWord, ...]
    norm: float


@dataclass(frozen=True)
class LayerWords:
    """The tokens that stand in the sentence, those of the input layer.

    Attributes:
        sets: one tuple of tokens for each set of them: a single one under "", or one for each class, under its name.
        word_norm: the median length of the vocabulary's embeddings.
        deeper: how many layers have further tokens; those enter between blocks, where no word has a place.
        shifted: every image shifts the tokens (CoCoOp); what is told is where they lie before.
    """

    sets: dict[str, tuple[TokenWords, ...]]
    word_norm: float
    deeper: int
    shifted: bool


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a CLIP that have an embedding: ids [V] and embeddings [V, Ht]."""

    backbone: Backbone
    ids: Tensor
    embeddings: Tensor


@torch.no_grad()
def nearest_words(method: Method, top: int = 5) -> LayerWords:
    """Find the `top` nearest tokens of the vocabulary to each learned text token of the input layer.

    Raises:
        ConfigError: the method learns no such token, or `top` is not within the vocabulary.
        BackboneError: the tokenizer cannot say its tokens.
    """
    prompts = [prompt.detach().float() for prompt in method.text_prompts()]
    if not prompts:
        raise ConfigError(
            f"{method.title} learns no token in the sentence, so there are no words near it; methods that do: coop, "
            "cocoop, deep_language, independent_vl, maple, kgcoop, prograd, promptsrc"
        )
    text = method.backbone.text
    embeddings = text.token_embeddings(range(text.vocabulary_size))
    # A token that its CLIP never met in training may have no embedding at all (maple-small); it is near to nothing.
    ids = embeddings.norm(dim=-1).nonzero()[:, 0]
    if not 1 <= top <= len(ids):
        raise ConfigError(f"top is {top}; it must be within 1 and {len(ids):,}, the words that this CLIP knows")
    vocabulary = Vocabulary(method.backbone, ids, embeddings[ids])
    first = prompts[0]
    named = {"": first} if first.ndim == 2 else dict(zip(_told_apart(method.class_names), first, strict=True))
    return LayerWords(
        sets={name: tuple(_near(token, vocabulary, top) for token in tokens) for name, tokens in named.items()},
        word_norm=float(vocabulary.embeddings.norm(dim=-1).median()),
        deeper=len(prompts) - 1,
        shifted=method.classes_depend_on_image,
    )


def _near(token: Tensor, vocabulary: Vocabulary, top: int) -> TokenWords:
    distances = (vocabulary.embeddings - token).norm(dim=-1)
    cosines = torch.nn.functional.cosine_similarity(vocabulary.embeddings, token[None], dim=-1)

    def listed(values: Tensor, largest: bool) -> tuple[NearWord, ...]:
        best, places = values.topk(top, largest=largest)
        words = vocabulary.backbone.token_texts(vocabulary.ids[places].tolist())
        return tuple(map(NearWord, words, best.tolist()))

    return TokenWords(listed(distances, False), listed(cosines, True), float(token.norm()))


def _told_apart(names: tuple[str, ...]) -> list[str]:
    return [name if names.index(name) == place else f"{name} ({place + 1})" for place, name in enumerate(names)]
