"""CLIP's own tokenizer with the file that open_clip ships, without importing open_clip."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from maple.clip_tokenizer import ClipTokenizer
from maple.errors import BackboneError

MERGES = "bpe_simple_vocab_16e6.txt.gz"


class PublishedTokenizer:
    """Sentences to padded ids [n, T] int64, as open_clip's `SimpleTokenizer`, but a longer sentence is refused.

    Example:
        >>> PublishedTokenizer(77)(["a photo of a cat."]).shape
        torch.Size([1, 77])
    """

    def __init__(self, context_length: int) -> None:
        package = find_spec("open_clip")
        if package is None or package.origin is None:
            raise BackboneError("CLIP's tokenizer is a file of open_clip_torch, which is not installed: install it")
        self._tokenizer = ClipTokenizer(Path(package.origin).parent / MERGES, context_length)

    def __call__(self, sentences: Sequence[str], *, truncate: bool = False) -> Tensor:
        """Sentences to ids.

        Raises:
            ClassNamesError: one has more tokens than the context length, and none is truncated.
        """
        ids = torch.zeros(len(sentences), self._tokenizer.context_length, dtype=torch.int64)
        for row, sentence in zip(ids, sentences, strict=True):
            tokens = self._tokenizer.sentence(sentence, truncate=truncate)
            row[: len(tokens)] = torch.tensor(tokens)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; a word ends with a space."""
        return self._tokenizer.decode(ids)
