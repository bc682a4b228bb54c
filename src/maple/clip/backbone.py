"""A loaded, frozen CLIP: two towers that prompts can enter, its tokenizer and its preprocessing."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, SimpleTokenizer, _clean_lower
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from maple.clip.backbone_names import GELU, QUICKGELU
from maple.clip.towers import image_tower, text_tower
from maple.errors import BackboneError, ClassNamesError, one_of, shortened
from maple.names import refuse_long

_CLIP_VOCABULARY = 49408
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Preprocessing:
    """What the image tower expects, as the checkpoint says.

    Attributes:
        size: the side R of its square images, in pixels.
        mean, std: of each channel of values in [0, 1].
        interpolation: a key of `maple.data.images.eval_transform.RESAMPLING`.
        resize: how an image is brought to `resize_size` (None: `size`): its shorter side, its longer side, both sides
            ("squash", whatever its proportions), or not at all ("none").
        fill: the level, 0 to 255, of what is added where the image is then smaller than R x R, in the centre of which
            it stands. Where it is larger, the centre is cut out.
        crop_offset: whether the first row and column of the crop are rounded half to even, as in torchvision and
            open_clip, or down, as in transformers.

    Example:
        >>> clip.preprocessing.size
        224
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize: Literal["shortest", "longest", "squash", "none"] = "shortest"
    resize_size: int | None = None
    fill: int = 0
    crop_offset: Literal["rounded", "floor"] = "rounded"


class Backbone:
    """A frozen CLIP: its parameters never receive a gradient, and it is always in evaluation mode.

    Args:
        model: an open_clip model in float32; it is frozen, moved and converted in place.
        name: the name it was loaded by; together with `pretrained`, how to load it again.
        precision: fp32, bf16 or fp16: of the large weights and of the states between blocks. Norms, prompts, features,
            logits and losses stay float32.

    Example:
        >>> clip = load_clip("ViT-B-16", device="cuda")
        >>> clip.tokenize(["a photo of a cat."]).shape, clip.image.depth, clip.embed_dim
        (torch.Size([1, 77]), 12, 512)
    """

    templates: tuple[str, ...] | None = None
    """The sentences about a class, with {} for its name, where the backbone knows no others; None for all."""
    has_text = True
    """Whether text features of classes can be had."""
    computed_by: str | None = None
    """Where features stand for a CLIP: which CLIP computed them, as their files say, or ""; None for a CLIP itself."""

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        pretrained: str | None,
        preprocessing: Preprocessing,
        tokenizer: Callable[[Sequence[str]], Tensor],
        precision: str = "fp32",
        device: str | torch.device = "cpu",
    ) -> None:
        self.name = name
        self.pretrained = pretrained
        self.preprocessing = preprocessing
        self.precision = precision
        self.device = torch.device(device)
        self.dtype = DTYPES[precision]
        self._tokenizer = tokenizer
        self._model = model.eval().requires_grad_(False)
        self.fingerprint = fingerprint(model.state_dict())
        self.logit_scale = float(model.logit_scale.detach().float().exp())
        self.parameter_count = sum(parameter.numel() for parameter in model.parameters())
        self.text, self.image = text_tower(model, self.dtype), image_tower(model, self.dtype)
        self.text.convert()
        self.image.convert()
        model.to(self.device)
        projection = getattr(model, "text_projection", None)
        if isinstance(projection, nn.Parameter):
            self.embed_dim = int(projection.shape[1])
        else:
            with torch.no_grad():
                self.embed_dim = int(self.text.plain(tokenizer(["a"]).to(self.device)).shape[-1])

    @property
    def activation(self) -> str:
        """ "quickgelu" if blocks have this activation, else "gelu", whatever others there are."""
        return QUICKGELU if any(isinstance(module, QuickGELU) for module in self._model.modules()) else GELU

    @property
    def model(self) -> Any:
        """The underlying open_clip model, for export and tests; do not train it."""
        return self._model

    def require_text(self, method: str) -> None:
        """Raise ConfigError, which names `method`, if text features of classes cannot be had."""

    def tokenize(self, sentences: Sequence[str]) -> Tensor:
        """Sentences to padded ids [n, T], int64, T the context length.

        Raises:
            ClassNamesError: a sentence has more tokens than the context length; none is ever truncated.
            BackboneError: the tokenizer pads sentences in front.
        """
        refuse_long(sentences)
        tokenizer: Any = self._tokenizer
        if getattr(getattr(tokenizer, "tokenizer", None), "padding_side", "right") == "left":
            raise BackboneError(f"the tokenizer of {self.name} pads sentences in front; it must pad them behind")
        ids: Tensor = tokenizer(list(sentences)).to(torch.int64)
        can_be_longer = isinstance(tokenizer, SimpleTokenizer | HFTokenizer | SigLipTokenizer)
        for sentence, row in zip(sentences, ids, strict=True):
            if row[-1] == 0 or not can_be_longer:
                continue
            # A full row may be a sentence that just fits. It was truncated if a longer context adds more than padding.
            longer = tokenizer([sentence], context_length=len(row) + 1)[0]
            if not torch.equal(longer[:-1].to(row), row):
                simple = isinstance(tokenizer, SimpleTokenizer)
                needed = str(len(tokenizer.encode(sentence)) + 2) if simple else f"more than {len(row)}"
                raise ClassNamesError(
                    f"{shortened(sentence)!r} needs {needed} tokens, but this CLIP reads at most {len(row)}; shorten "
                    "the class name, the template, or the prompt"
                )
        return ids

    @property
    def uses_clip_tokenizer(self) -> bool:
        """Whether the tokenizer is CLIP's own, as published."""
        tokenizer: Any = self._tokenizer
        plain = isinstance(tokenizer, SimpleTokenizer) and tokenizer.reduction_fn is None
        return plain and tokenizer.vocab_size == _CLIP_VOCABULARY and tokenizer.clean_fn is _clean_lower

    @property
    def first_word(self) -> int:
        """The position of the first word of a sentence: after SOS, or 0 where the tokenizer writes none."""
        return self._special_tokens[0]

    @cached_property
    def placeholder(self) -> str:
        """A word of one token, which keeps the place of a prompt token in a sentence.

        Raises:
            BackboneError: no such word is known to the tokenizer.
        """
        for word in ("X", "a", "the", "o", "*"):
            if len(self.word_ids(" ".join([word] * 3))) == 3:
                return word
        raise BackboneError(f"the tokenizer of {self.name} has no usual word of one token, so prompts have no place")

    def word_ids(self, text: str) -> list[int]:
        """Vocabulary ids of `text`, without special tokens such as SOS and EOT."""
        before, after = self._special_tokens
        ids = self._unpadded(text)
        return ids[before : len(ids) - after]

    @cached_property
    def _special_tokens(self) -> tuple[int, int]:
        """How many special tokens a sentence has before its words and after them."""
        special, sentence = self._unpadded(""), self._unpadded("a")
        equal = (special[position] == sentence[position] for position in range(len(special)))
        before = next((position for position, same in enumerate(equal) if not same), len(special))
        return before, len(special) - before

    def _unpadded(self, text: str) -> list[int]:
        """The ids of a sentence without the padding behind them."""
        ids: list[int] = self.tokenize([text])[0].tolist()
        tokenizer: Any = self._tokenizer
        if not isinstance(tokenizer, HFTokenizer | SigLipTokenizer):
            return ids[: ids.index(max(ids)) + 1]  # EOT is the last of CLIP's vocabulary; padding is one of its words
        padding = tokenizer.tokenizer.pad_token_id
        while ids and ids[-1] == padding:  # with SigLIP's, the end of the sentence too
            ids.pop()
        return ids

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Decode each vocabulary id by itself; a token that only begins a word ends in a hyphen.

        Raises:
            BackboneError: the tokenizer cannot decode single tokens.
        """
        if isinstance(self._tokenizer, SimpleTokenizer):
            texts = [self._tokenizer.decode([index]) for index in ids]
            return [
                text[:-1] if text.endswith(" ") else text if text.endswith("_of_text>") else f"{text}-"
                for text in texts
            ]
        if isinstance(self._tokenizer, HFTokenizer | SigLipTokenizer):
            return [str(self._tokenizer.tokenizer.decode([index])) for index in ids]
        raise BackboneError(f"the tokenizer of {self.name} ({type(self._tokenizer).__name__}) cannot decode tokens")


def fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """Identify frozen weights by 32 hexadecimal digits: equal for every file format and load precision.

    Each tensor is hashed as float32 with its name (in open_clip's layout) and shape, so that a half precision archive
    and its float32 copy agree.
    """

    def digest(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        shape = tuple(tensor.shape) or (1,)
        hasher = hashlib.blake2b(f"{name}:{shape}:".encode(), digest_size=16)
        hasher.update(tensor.detach().to("cpu", torch.float32).contiguous().reshape(-1).numpy().data)
        return hasher.digest()

    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(digest, sorted(state_dict.items())))
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def preprocessing_of(config: Mapping[str, Any]) -> Preprocessing:
    """Preprocessing from open_clip's preprocess settings, and our own `resize_size` and `crop_offset`.

    A folder's values are checked: they may be of any kind.

    Raises:
        BackboneError: the images are not square, or a setting is none that can be followed.

    Source: open_clip 3.3.0 src/open_clip/transform.py `image_transform`.
    """
    size = config["size"]
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(set(sides)) != 1:
        raise BackboneError(f"this CLIP reads images of {sides} pixels; only square images are supported")
    try:
        # open_clip repeats a single number for the three channels.
        triples = (
            value if isinstance(value, list | tuple) else (value,) * 3 for value in (config["mean"], config["std"])
        )
        mean, std = (tuple(float(v) for v in values) for values in triples)
    except (TypeError, ValueError) as error:
        raise BackboneError(f"the means or deviations of this CLIP's images are not numbers ({error})") from error
    if not len(mean) == len(std) == 3 or not all(map(math.isfinite, (*mean, *std))) or not min(std) > 0:
        raise BackboneError(
            f"this CLIP's images have means {mean!r:.80} and deviations {std!r:.80}; three of each are read"
        )
    allowed: dict[str, Sequence[str]] = {
        "interpolation": ("bicubic", "bilinear", "random", "nearest", "lanczos", "box", "hamming"),
        "resize_mode": ("shortest", "longest", "squash", "none"),
        "mode": ("RGB",),
    }
    chosen: dict[str, Any] = {key: config.get(key) or values[0] for key, values in allowed.items()}
    for key, values in allowed.items():
        if chosen[key] not in values:
            raise BackboneError(f"this CLIP's images have {one_of(key, chosen[key], values)}")
    resize_size, fill = config.get("resize_size"), config.get("fill_color") or 0
    if not isinstance(fill, int) or not 0 <= fill <= 255:
        raise BackboneError(f"this CLIP's images are filled with {fill!r:.80}; a level from 0 to 255 is read")
    # open_clip evaluates with bicubic interpolation where training draws it at random.
    interpolation = {"random": "bicubic"}.get(chosen["interpolation"], chosen["interpolation"])
    side = int(sides[0])
    return Preprocessing(
        side,
        mean,
        std,
        interpolation,
        resize=chosen["resize_mode"],
        resize_size=None if resize_size == side else resize_size,
        fill=fill,
        crop_offset=config.get("crop_offset") or "rounded",
    )
