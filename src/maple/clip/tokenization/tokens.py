"""What a tokenizer makes of a sentence: which tokens are words, which are special, and which are padding."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from maple.clip.tokenization.published_tokenizer import PublishedTokenizer
from maple.errors import BackboneError, ClassNamesError, shortened
from maple.names import refuse_long

_CLIP_VOCABULARY = 49408
_WORD_BEGINS = ("▁", "Ġ")
"""Marks of a token that begins a word: of SentencePiece, and of byte-level BPE."""


class SentenceTokenizer:
    """The tokenizer of a CLIP, of any kind that open_clip has, and its special tokens.

    Args:
        tokenizer: sentences to padded ids [n, T]; one of open_clip's classes, or `PublishedTokenizer`.
        name: of the backbone, for messages.

    Example:
        >>> tokenizer = SentenceTokenizer(open_clip.get_tokenizer("ViT-B-16"), "ViT-B-16")
        >>> tokenizer.first_word, tokenizer.word_ids("a photo")
        (1, [320, 1125])
    """

    def __init__(self, tokenizer: Callable[..., Tensor], name: str) -> None:
        self._tokenizer: Any = tokenizer
        self._name = name
        self._inner: Any = None
        self._is_simple = False
        if not isinstance(tokenizer, PublishedTokenizer):
            from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, SimpleTokenizer

            self._is_simple = isinstance(tokenizer, SimpleTokenizer)
            self._inner = tokenizer.tokenizer if isinstance(tokenizer, HFTokenizer | SigLipTokenizer) else None
        # 1 if a class token follows the padding, as the last token of all.
        self._behind = 1 if getattr(tokenizer, "tokenizer_mode", None) == "clips" else 0

    def __call__(self, sentences: Sequence[str], *, truncate: bool = False) -> Tensor:
        """Sentences to padded ids [n, T], int64: see `Backbone.tokenize`."""
        refuse_long(sentences)
        if getattr(self._inner, "padding_side", "right") == "left":
            raise BackboneError(f"the tokenizer of {self._name} pads sentences in front; it must pad them behind")
        if self._inner is None and not self._is_simple:
            options = {"truncate": True} if truncate else {}
            complete: Tensor = self._tokenizer(list(sentences), **options).to(torch.int64)
            return complete
        ids: Tensor = self._tokenizer(list(sentences)).to(torch.int64)
        if truncate:  # open_clip's tokenizers do
            return ids
        length = ids.shape[1] - self._behind
        for sentence, row in zip(sentences, ids[:, :length], strict=True):
            if (row[-2:] == self._padding).all():
                continue
            # A full row may be a sentence that just fits: then a much longer one only has more padding.
            longest = length + 4 * len(sentence) + 8  # a character has at most four bytes, and a byte one token
            whole = self._tokenizer([sentence], context_length=longest)[0, : longest - self._behind]
            if not torch.equal(whole[:length].to(row), row) or not (whole[length:] == self._padding).all():
                # The end of a sentence may look like padding.
                needed = int((whole != self._padding).nonzero().max()) + 1 + self._end_is_padding + self._behind
                raise ClassNamesError(
                    f"{shortened(sentence)!r} needs {needed} tokens, but this CLIP reads at most {len(ids[0])}; "
                    "shorten the class name, the template, or the prompt"
                )
        return ids

    @property
    def is_clip(self) -> bool:
        """Whether this is CLIP's own tokenizer, as published."""
        tokenizer = self._tokenizer
        if not self._is_simple:
            return isinstance(tokenizer, PublishedTokenizer)
        from open_clip.tokenizer import _clean_lower

        plain = tokenizer.reduction_fn is None
        return plain and tokenizer.vocab_size == _CLIP_VOCABULARY and tokenizer.clean_fn is _clean_lower

    @cached_property
    def placeholder(self) -> str:
        """A word of one token: see `Backbone.placeholder`."""
        for word in ("X", "a", "the", "o", "*"):
            if len(self.word_ids(" ".join([word] * 3))) == 3:
                return word
        raise BackboneError(f"the tokenizer of {self._name} has no usual word of one token, so prompts have no place")

    @property
    def first_word(self) -> int:
        """The position of the first word of a sentence."""
        return self._special_tokens[0]

    def word_ids(self, text: str) -> list[int]:
        """Vocabulary ids of `text`, without special tokens."""
        before, after = self._special_tokens
        ids = self._unpadded(text)
        return ids[before : len(ids) - after]

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Each token as text: see `Backbone.token_texts`."""
        if self._is_simple or isinstance(self._tokenizer, PublishedTokenizer):
            texts = [self._tokenizer.decode([index]) for index in ids]
            return [
                text[:-1] if text.endswith(" ") else text if text.endswith("_of_text>") else f"{text}-"
                for text in texts
            ]
        if self._inner is None:
            raise BackboneError(
                f"the tokenizer of {self._name} ({type(self._tokenizer).__name__}) cannot decode tokens"
            )
        return [self._piece(index) for index in ids]

    def _piece(self, index: int) -> str:
        """The text of a token; one that only continues a word begins with a hyphen."""
        token = self._inner.convert_ids_to_tokens(index)
        if token is None:  # the table of embeddings is often longer than the vocabulary
            return f"<{index}>"
        if token.startswith("##"):  # WordPiece
            return f"-{token[2:]}"
        text = str(self._inner.decode([index])).strip(" ▁Ġ") or token
        continues = (
            self._marks_words and not token.startswith(_WORD_BEGINS) and index not in self._inner.all_special_ids
        )
        return f"-{text}" if continues else text

    @cached_property
    def _marks_words(self) -> bool:
        """Whether tokens that begin a word have a mark."""
        tokens = self._inner.convert_ids_to_tokens(self.word_ids("a a"))
        return any(str(token).startswith(_WORD_BEGINS) for token in tokens)

    @property
    def _padding(self) -> int:
        return 0 if self._inner is None else int(self._inner.pad_token_id)

    @cached_property
    def _end_is_padding(self) -> bool:
        """Whether the end of a sentence looks like padding: SigLIP's is the same token, CLIPA's becomes it."""
        if self._inner is None:
            return False
        return self._inner.eos_token_id == self._padding or bool(getattr(self._tokenizer, "strip_sep_token", False))

    @cached_property
    def _special_tokens(self) -> tuple[int, int]:
        """How many special tokens a sentence has before its words and after them."""
        special, sentence = self._unpadded(""), self._unpadded("a")
        equal = (special[position] == sentence[position] for position in range(len(special)))
        before = next((position for position, same in enumerate(equal) if not same), len(special))
        return before, len(special) - before

    def _unpadded(self, text: str) -> list[int]:
        """The ids of a sentence without the padding behind them."""
        ids: list[int] = self([text])[0].tolist()
        if self._inner is None:
            return ids[: ids.index(max(ids)) + 1]  # EOT is the last of CLIP's vocabulary; padding is one of its words
        ids = ids[: len(ids) - self._behind]
        while ids and ids[-1] == self._padding:  # where these are equal, the end of the sentence too
            ids.pop()
        return ids
