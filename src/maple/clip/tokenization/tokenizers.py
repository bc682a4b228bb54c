"""Tokenizers: CLIP's own, those that open_clip names, and those in the folders of transformers."""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from maple.clip.foreign import FOREIGN_ERRORS, quiet
from maple.errors import BackboneError, first_line
from maple.files import read_json, regular
from maple.hub_client import offline

Tokenize = Callable[[Sequence[str]], Tensor]
_LARGEST_VOCABULARY_FILE = 256 * 1024**2  # bytes; Gemma's and XLM-V's tokenizer.json have 34 and 52 million


@cache
def clip_tokenizer(context_length: int) -> Tokenize:
    """CLIP's own tokenizer, shared: it is slow to read and has no state."""
    return cast(Tokenize, open_clip.SimpleTokenizer(context_length=context_length))


def described_tokenizer(text: Mapping[str, Any], folder: Path | None) -> Tokenize:
    """The tokenizer that a text_cfg of open_clip describes.

    Args:
        text: open_clip's text_cfg.
        folder: where the files of a tokenizer of transformers are; None: in the repository that `text` names.

    Raises:
        BackboneError: its files are missing or damaged, or would run Python code.
    """
    name, options = text.get("hf_tokenizer_name"), dict(text.get("tokenizer_kwargs") or {})
    length = text.get("context_length", 77)
    if not name and not options:
        return clip_tokenizer(length)
    try:
        with quiet(), offline(folder is not None):
            if not name:
                return cast(Tokenize, open_clip.SimpleTokenizer(context_length=length, **options))
            # An absolute folder, which cannot be mistaken for a repository; code in it is refused without a question.
            options |= {"tokenizer_mode": text.get("tokenizer_mode"), "trust_remote_code": False}
            source = str(name if folder is None else folder.absolute())
            return cast(Tokenize, HFTokenizer(source, context_length=length, **options))
    except FOREIGN_ERRORS as error:
        raise _unreadable(folder or name, error) from error


class TransformersTokenizer(HFTokenizer):  # type: ignore[misc]
    """The tokenizer of a folder of transformers, which prepares sentences as the folder's processor does.

    Sentences are padded to `context_length`. Those of SigLIP are in lower case and without punctuation, as
    `SiglipTokenizer` makes them, and those of SigLIP 2 in lower case, as `Siglip2Tokenizer` does; others are cleaned
    only as the files of the tokenizer say.

    Args:
        folder: of tokenizer_config.json and tokenizer.json, spiece.model, or what else the tokenizer reads.
        model_type: of config.json.
        context_length: T, the tokens of a padded sentence.
        vocabulary: how many token embeddings the model has.

    Raises:
        BackboneError: the files are missing or damaged, or would run Python code.

    Source: transformers 5.24 models/siglip/tokenization_siglip.py, models/siglip2/tokenization_siglip2.py,
    models/auto/tokenization_auto.py.

    Example:
        >>> TransformersTokenizer(folder, "siglip", 64, 32000)(["A photo of a cat."]).shape
        torch.Size([1, 64])
    """

    def __init__(self, folder: Path, model_type: str, context_length: int, vocabulary: int) -> None:
        path = folder / "tokenizer_config.json"
        settings: dict[str, Any] = read_json(path, error=BackboneError, foreign=True) if path.is_file() else {}
        kind = str(settings.get("tokenizer_class") or ("SiglipTokenizer" if model_type == "siglip" else ""))
        clean: Callable[[str], str] = str
        try:
            if kind.removesuffix("Fast") == "SiglipTokenizer":
                self.tokenizer = _siglip_tokenizer(folder)
                clean = _siglip_sentence if settings.get("do_lower_case", True) is not False else _without_punctuation
            else:
                if (model_type == "siglip" and "Gemma" in kind) or "Siglip2" in kind:
                    clean = str.lower  # SigLIP 2 was trained so, and Gemma's tokenizer does not know it
                with quiet(), offline():
                    source = str(folder.absolute())
                    super().__init__(source, context_length=context_length, trust_remote_code=False)
        except FOREIGN_ERRORS as error:
            raise _unreadable(folder, error) from error
        self.context_length = context_length
        self.tokenizer_mode, self.strip_sep_token = "", False
        self.clean_fn = clean
        self._source, self._vocabulary = folder, vocabulary

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Sentences to ids [n, T], int64."""
        ids = torch.as_tensor(super().__call__(texts, context_length=context_length))
        if ids.numel() and int(ids.max()) >= self._vocabulary:
            raise BackboneError(
                f"the tokenizer in {self._source} has the token {int(ids.max())}, but the model only "
                f"{self._vocabulary} token embeddings; use the tokenizer that was published with the model"
            )
        return ids


def _siglip_tokenizer(folder: Path) -> Any:
    """What `SiglipTokenizer` does to sentences that are cleaned already, from spiece.model or tokenizer.json.

    transformers needs the sentencepiece package for it; here the file is read as it reads T5's without that package.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import import_protobuf

    if (folder / "tokenizer.json").is_file():
        path = regular(folder / "tokenizer.json", most=_LARGEST_VOCABULARY_FILE)
        tokenizer = _checked(lambda: Tokenizer.from_file(str(path)), path)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    else:
        path = regular(folder / "spiece.model", most=_LARGEST_VOCABULARY_FILE)
        model = _checked(lambda: import_protobuf().ModelProto.FromString(path.read_bytes()), path)
        pieces = [(piece.piece, piece.score) for piece in model.pieces]
        tokenizer = _checked(lambda: Tokenizer(models.Unigram(pieces, unk_id=model.trainer_spec.unk_id)), path)
        if charsmap := model.normalizer_spec.precompiled_charsmap:
            tokenizer.normalizer = _checked(lambda: normalizers.Precompiled(charsmap), path)
        metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    end = tokenizer.token_to_id("</s>")
    if end is None:
        raise ValueError(f"{path.name} does not have the token </s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "padding_side": "right"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _checked(read: Callable[[], Any], path: Path) -> Any:
    """The result of `read`; errors of the tokenizers package and of protobuf are plain Exceptions."""
    try:
        return read()
    except Exception as error:
        raise ValueError(f"{path.name} is damaged: {first_line(error)}") from error


def _siglip_sentence(text: str) -> str:
    return _without_punctuation(text.lower())


def _without_punctuation(text: str) -> str:
    return re.sub(r"\s+", " ", text.translate(str.maketrans("", "", string.punctuation))).strip()


def _unreadable(source: Any, error: Exception) -> BackboneError:
    way = "its files must be next to the weights; Python code in a folder or repository is never run"
    if isinstance(error, ImportError):
        way = "it needs two more packages: pip install 'maple-clip[transformers]'"
    return BackboneError(f"the tokenizer of {source} cannot be loaded: {first_line(error)} ({way})")
