"""A loaded CLIP: two towers with seams, its tokenizer and preprocessing, frozen."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.model import convert_weights_to_lp
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, SimpleTokenizer, _clean_lower
from open_clip.transformer import Attention, LayerNorm, LayerNormFp32, LayerScale
from torch import Tensor, nn

from maple.clip.towers import ImageTower, TextTower
from maple.errors import BackboneError, ClassNamesError, shortened

_CLIP_VOCABULARY = 49408
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Preprocessing:
    """What the image tower expects: square size R in pixels, channel means and deviations of [0, 1] values."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"


class Backbone:
    """A frozen CLIP. No parameter of it ever receives a gradient, and it is always in evaluation mode.

    Args:
        model: an open_clip model in float32; it is frozen, moved and converted in place.
        name: what the user called it; with `pretrained`, how to load it again.
        preprocessing: the image side's input.
        tokenizer: callable from sentences to ids [n, T].
        precision: fp32, bf16 or fp16: of the large weights and of the states between blocks. Norms,
            prompts, features, logits and losses stay float32.
    """

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
        _convert(model, self.dtype)
        model.to(self.device)
        self.text = TextTower(model, self.dtype)
        self.image = ImageTower(model, self.dtype)
        if self.dtype != torch.float32:
            self._autocast_whole_towers()
        self.embed_dim = self._embed_dim()

    @property
    def model(self) -> Any:
        """The open_clip model itself, for export and tests; do not train it."""
        return self._model

    def tokenize(self, sentences: Sequence[str]) -> Tensor:
        """Sentences to padded ids [n, T], int64, T the context length.

        Raises:
            ClassNamesError: a sentence has more tokens than the context holds; it is named, never cut.
        """
        ids = self._tokenizer(list(sentences)).to(torch.int64)
        for sentence, row in zip(sentences, ids, strict=True):
            if row[-1] != 0:
                self._refuse_cut(sentence, row)
        return ids

    @property
    def reads_clip_words(self) -> bool:
        """Whether its tokenizer is CLIP's own, as published."""
        tokenizer: Any = self._tokenizer
        plain = isinstance(tokenizer, SimpleTokenizer) and tokenizer.reduction_fn is None
        return plain and tokenizer.vocab_size == _CLIP_VOCABULARY and tokenizer.clean_fn is _clean_lower

    def word_ids(self, text: str) -> list[int]:
        """The vocabulary ids of `text`, without SOS and EOT."""
        ids = self.tokenize([text])[0]
        end = int(self.text.end_positions(ids[None])[0])
        return [int(i) for i in ids[1:end]]

    def token_words(self, ids: Sequence[int]) -> list[str]:
        """How each vocabulary id reads; a token that only begins a word ends in a hyphen.

        Raises:
            BackboneError: the tokenizer has no list of its tokens.
        """
        if isinstance(self._tokenizer, SimpleTokenizer):
            read = [self._tokenizer.decode([index]) for index in ids]
            return [
                word[:-1] if word.endswith(" ") else word if word.endswith("_of_text>") else f"{word}-" for word in read
            ]
        if isinstance(self._tokenizer, HFTokenizer):
            return [str(self._tokenizer.tokenizer.decode([index])) for index in ids]
        raise BackboneError(f"the tokenizer of {self.name} ({type(self._tokenizer).__name__}) cannot say its tokens")

    def _refuse_cut(self, sentence: str, row: Tensor) -> None:
        """Raise unless a longer context would only add padding to `row`."""
        if not isinstance(self._tokenizer, SimpleTokenizer | HFTokenizer | SigLipTokenizer):
            return
        longer = self._tokenizer([sentence], context_length=len(row) + 1)[0]
        if not torch.equal(longer[:-1].to(row), row):
            simple = isinstance(self._tokenizer, SimpleTokenizer)
            needed = str(len(self._tokenizer.encode(sentence)) + 2) if simple else f"more than {len(row)}"
            raise ClassNamesError(
                f"{shortened(sentence)!r} needs {needed} tokens, but this CLIP reads at most {len(row)}; "
                "shorten the class name, the template, or the prompt"
            )

    def _embed_dim(self) -> int:
        projection = getattr(self._model, "text_projection", None)
        if isinstance(projection, nn.Parameter):
            return int(projection.shape[1])
        with torch.no_grad():
            ids = torch.as_tensor(self._tokenizer(["a"]), device=self.device)
            return int(self.text.plain(ids).shape[-1])

    def _autocast_whole_towers(self) -> None:
        """Towers without seams keep float32 weights and run under autocast, as their own libraries expect."""
        for tower in (self.text, self.image):
            if tower.obstacle is not None:
                tower.encode = _autocasted(tower.encode, self.device.type, self.dtype)


def fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """Identify frozen weights: the same for every file format and load precision of the same checkpoint.

    Each tensor is hashed as float32 with its name and shape (names of open_clip's layout), so a half
    precision archive and its float32 copy agree. Returns 32 hexadecimal digits.
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
    """Read open_clip's preprocess settings.

    Raises:
        BackboneError: the image side is not square.
    """
    size = config["size"]
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(set(sides)) != 1:
        raise BackboneError(f"this CLIP reads images of {sides} pixels; only square ones are supported")
    mean, std = (tuple(float(v) for v in config[key]) for key in ("mean", "std"))
    return Preprocessing(int(sides[0]), mean, std, str(config.get("interpolation") or "bicubic"))  # type: ignore[arg-type]


def _convert(model: Any, dtype: torch.dtype) -> None:
    """Large weights to `dtype`, norms in float32: what open_clip does, but after the weights were identified.

    It also converts what open_clip forgets or cannot: layer and head scales, a linear text projection.
    """
    if dtype == torch.float32:
        return
    if TextTower(model, dtype).obstacle is None:
        tower = getattr(model, "text", model)
        _convert_part(tower.transformer, dtype)
        tower.ln_final = _float32_norm(tower.ln_final)
        if isinstance(tower.text_projection, nn.Linear):
            tower.text_projection.to(dtype)
        elif tower.text_projection is not None:
            tower.text_projection.data = tower.text_projection.data.to(dtype)
    if ImageTower(model, dtype).obstacle is None:
        _convert_part(model.visual, dtype)


def _convert_part(part: nn.Module, dtype: torch.dtype) -> None:
    for module in part.modules():
        for child_name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, child_name, _float32_norm(child))
        _convert_scales(module, dtype)
    convert_weights_to_lp(part, dtype)


def _convert_scales(module: nn.Module, dtype: torch.dtype) -> None:
    names = {LayerScale: ("gamma",), Attention: ("head_scale", "logit_scale")}.get(type(module), ())
    for name in names:
        scale = getattr(module, name)
        if scale is not None:
            scale.data = scale.data.to(dtype)


def _float32_norm(norm: nn.LayerNorm) -> nn.LayerNorm:
    if type(norm) is not LayerNorm:
        return norm
    copy = LayerNormFp32(norm.normalized_shape, eps=norm.eps)
    copy.weight, copy.bias = norm.weight, norm.bias
    return copy.eval()  # type: ignore[no-any-return]


def _autocasted(encode: Callable[[Tensor], Tensor], device_type: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def run(inputs: Tensor) -> Tensor:
        with torch.autocast(device_type, dtype):
            return encode(inputs)

    return run
