"""A loaded, frozen CLIP: two towers that prompts can enter, its tokenizer and its preprocessing."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maple.clip.backbone_names import GELU, QUICKGELU
from maple.clip.plain_model import is_quick_gelu
from maple.clip.tokenization.tokens import SentenceTokenizer
from maple.clip.towers import image_tower, text_tower
from maple.errors import BackboneError, one_of

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
        self._tokenizer = SentenceTokenizer(tokenizer, name)
        self._model = model.eval().requires_grad_(False)
        self.fingerprint = fingerprint(model.state_dict())
        self.logit_scale = float(model.logit_scale.detach().float().exp())
        self.parameter_count = sum(parameter.numel() for parameter in model.parameters())
        self.text, self.image = text_tower(model, self.dtype), image_tower(model, self.dtype)
        self.text.convert()
        self.image.convert()
        model.to(self.device)
        first_ids = tokenizer(["a"])
        # Encoders of transformers may have more positions than sentences are padded to, or no number of them (mT5).
        self.text.context_length = min(self.text.context_length or first_ids.shape[1], first_ids.shape[1])
        projection = getattr(model, "text_projection", None)
        if isinstance(projection, nn.Parameter):
            self.embed_dim = int(projection.shape[1])
        else:
            with torch.no_grad():
                self.embed_dim = int(self.text.plain(first_ids.to(self.device)).shape[-1])

    @property
    def activation(self) -> str:
        """ "quickgelu" if blocks have this activation, else "gelu", whatever others there are."""
        return QUICKGELU if any(map(is_quick_gelu, self._model.modules())) else GELU

    @property
    def model(self) -> Any:
        """The underlying open_clip model, for export and tests; do not train it."""
        return self._model

    def require_text(self, method: str) -> None:
        """Raise ConfigError, which names `method`, if text features of classes cannot be had."""

    def tokenize(self, sentences: Sequence[str], *, truncate: bool = False) -> Tensor:
        """Sentences to padded ids [n, T], int64, T the context length.

        Args:
            truncate: keep the beginning of a sentence that is longer than the context, and its end token.

        Raises:
            ClassNamesError: a sentence has more tokens than the context length, and none is truncated.
            BackboneError: the tokenizer pads sentences in front.
        """
        return self._tokenizer(sentences, truncate=truncate)

    @property
    def uses_clip_tokenizer(self) -> bool:
        """Whether the tokenizer is CLIP's own, as published."""
        return self._tokenizer.is_clip

    @property
    def first_word(self) -> int:
        """The position of the first word of a sentence: after SOS, or 0 where the tokenizer writes none."""
        return self._tokenizer.first_word

    @property
    def placeholder(self) -> str:
        """A word of one token, which keeps the place of a prompt token in a sentence.

        Raises:
            BackboneError: no such word is known to the tokenizer.
        """
        return self._tokenizer.placeholder

    def word_ids(self, text: str) -> list[int]:
        """Vocabulary ids of `text`, without special tokens such as SOS and EOT."""
        return self._tokenizer.word_ids(text)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Decode each vocabulary id by itself: a hyphen shows on which side a part of a word continues.

        Raises:
            BackboneError: the tokenizer cannot decode single tokens.
        """
        return self._tokenizer.token_texts(ids)


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
