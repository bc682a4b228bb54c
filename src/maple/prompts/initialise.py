"""Initial values of prompt tokens: random, or the embeddings of words."""

import torch
from torch import Generator, Tensor

from maple.clip import Backbone
from maple.errors import ConfigError

PROMPT_STD = 0.02
_LONGEST_WORD_PROMPT = 4


def random_tokens(*shape: int, generator: Generator) -> Tensor:
    """Draw float32 tokens of `shape` from N(0, 0.02). Source: MaPLe@69bce21 trainers/maple.py:97-99.

    Example:
        >>> random_tokens(4, 512, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([4, 512])
    """
    return torch.randn(shape, generator=generator) * PROMPT_STD


def word_tokens(backbone: Backbone, text: str, length: int) -> Tensor:
    """The embeddings [P, Ht] of the first `length` tokens of `text`.

    Raises:
        ConfigError: `text` has fewer tokens.

    Example:
        >>> word_tokens(load_clip("ViT-B-16"), "a photo of a", 4).shape
        torch.Size([4, 512])
    """
    ids = backbone.word_ids(text.replace("_", " "))
    if len(ids) < length:
        raise ConfigError(f"init_text {text!r} has {len(ids)} tokens, fewer than prompt_length={length}")
    return backbone.text.token_embeddings(ids[:length]).cpu()


def words_if_short(init_text: str, length: int) -> str:
    """`init_text`, or an empty text if the prompt is longer than four tokens.

    The published code starts longer prompts at random whatever the words are, and its sentences are then
    "X X ... X {class}.". Source: MaPLe@69bce21 trainers/maple.py:84-101, trainers/independentVL.py.
    """
    return init_text if length <= _LONGEST_WORD_PROMPT else ""


def first_tokens(backbone: Backbone, init_text: str, length: int, generator: Generator) -> Tensor:
    """Text tokens [P, Ht] of the first layer: those of `init_text`, or random ones if it is empty."""
    if init_text.strip():
        return word_tokens(backbone, init_text, length)
    return random_tokens(length, backbone.text.width, generator=generator)
