"""The words of the vocabulary nearest to the learned text tokens.

Source: CoOp (IJCV 2022), section 4.2 and Table 4; KaiyangZhou/CoOp@ff61507 interpret_prompt.py, which lists the
Euclidean distance.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maple import files
from maple.errors import ConfigError
from maple.methods import METHODS, Method

WORDS = "words.json"
WARNING = (
    "Read with care: learned tokens are points between the words, and training does not draw them to any. The nearest "
    "words are rarely readable, and a near word does not show the effect of the token."
)


@dataclass(frozen=True)
class NearWord:
    """A token of the vocabulary near a learned one; `value` is the Euclidean distance or the cosine between them."""

    word: str
    value: float


@dataclass(frozen=True)
class TokenWords:
    """The words nearest to one learned token.

    Attributes:
        by_distance, by_cosine: the nearest first, with their Euclidean distances or cosines.
        norm: the token's length; compared with `word_norm` of the whole, it shows whether the token is among the words.
    """

    by_distance: tuple[NearWord, ...]
    by_cosine: tuple[NearWord, ...]
    norm: float


@dataclass(frozen=True)
class LearnedWords:
    """The words nearest to the learned tokens of the input layer.

    Attributes:
        sets: the tokens of each set: a single one under "", or one for each class, under its name.
        word_norm: the median length of the vocabulary's embeddings.
        deeper: the number of layers with further tokens; those enter between blocks, where words have no embedding.
        shifted: every image shifts the tokens (CoCoOp); the words are those before the shift.

    Example:
        >>> words = nearest_words(load_prompts("prompts.safetensors"), top=3)
        >>> [token.by_distance[0].word for token in words.sets[""]]
        ['a', 'photo']
    """

    sets: dict[str, tuple[TokenWords, ...]]
    word_norm: float
    deeper: int
    shifted: bool

    def notes(self) -> list[str]:
        """Further remarks for readers of the words, after `WARNING`."""
        notes = [f"The median length of the vocabulary's embeddings is {self.word_norm:.3f}."]
        if self.deeper:
            plural = "s" if self.deeper > 1 else ""
            notes.append(
                f"{self.deeper} deeper layer{plural} with tokens left out: these enter between blocks, in a space that "
                "has no words."
            )
        if self.shifted:
            notes.append("Every image shifts these tokens; the words are those before the shift.")
        return notes

    def to_json(self) -> dict[str, Any]:
        """The content of words.json."""

        def token_to_json(token: TokenWords) -> dict[str, Any]:
            return {
                "norm": token.norm,
                "by_distance": [{"word": near.word, "distance": near.value} for near in token.by_distance],
                "by_cosine": [{"word": near.word, "cosine": near.value} for near in token.by_cosine],
            }

        return {
            "warning": WARNING,
            "notes": self.notes(),
            "word_norm": self.word_norm,
            "sets": [
                {"class": name or None, "tokens": [token_to_json(token) for token in tokens]}
                for name, tokens in self.sets.items()
            ],
        }


@torch.no_grad()
def nearest_words(method: Method, top: int = 5) -> LearnedWords:
    """Find the `top` nearest tokens of the vocabulary to each learned text token of the input layer.

    Raises:
        ConfigError: the method learns no such token, or `top` is not within the vocabulary.
        BackboneError: the tokenizer cannot spell its tokens.

    Example:
        >>> nearest_words(load_prompts("prompts.safetensors")).word_norm
        0.383
    """
    prompts = [prompt.detach().float() for prompt in method.text_prompts()]
    if not prompts:
        able = [name for name, kind in METHODS.items() if kind.text_prompts is not Method.text_prompts]
        raise ConfigError(
            f"{method.title} learns no token in the sentence, so there are no words near it; methods that do: "
            f"{', '.join(able)}"
        )
    text = method.backbone.text
    table = text.token_embeddings(range(text.vocabulary_size))
    # A token that its CLIP never met in training may have no embedding at all (maple-small); it is near to nothing.
    ids = table.norm(dim=-1).nonzero()[:, 0]
    table = table[ids]
    if not 1 <= top <= len(ids):
        raise ConfigError(f"top is {top}; it must be within 1 and {len(ids):,}, the words that this CLIP knows")

    def near(token: Tensor) -> TokenWords:
        def best(values: Tensor, *, largest: bool) -> tuple[NearWord, ...]:
            chosen, places = values.topk(top, largest=largest)
            return tuple(map(NearWord, method.backbone.token_texts(ids[places].tolist()), chosen.tolist()))

        distances = (table - token).norm(dim=-1)
        cosines = torch.nn.functional.cosine_similarity(table, token[None], dim=-1)
        return TokenWords(best(distances, largest=False), best(cosines, largest=True), float(token.norm()))

    sets = {"": prompts[0]}
    if prompts[0].ndim == 3:  # tokens of each class; equal names, which some data sets have, are numbered
        names = method.class_names
        numbered = (name if names.index(name) == at else f"{name} ({at + 1})" for at, name in enumerate(names))
        sets = dict(zip(numbered, prompts[0], strict=True))
    return LearnedWords(
        sets={name: tuple(near(token) for token in tokens) for name, tokens in sets.items()},
        word_norm=float(table.norm(dim=-1).median()),
        deeper=len(prompts) - 1,
        shifted=method.classes_depend_on_image,
    )


def write_words(folder: Path, words: LearnedWords) -> Path:
    """Write words.json into a folder; return its path.

    Raises:
        ConfigError: the folder cannot be written.

    Example:
        >>> write_words(Path("runs/pets/explanation"), nearest_words(method)).name
        'words.json'
    """
    with files.output_errors(folder):
        files.write_json(folder / WORDS, words.to_json())
    return folder / WORDS
