"""`load_clip`: one door for every kind of CLIP."""

import difflib
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub.errors import HfHubHTTPError
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.pretrained import download_pretrained
from torch import Tensor

from maple.clip import formats
from maple.clip.backbone import DTYPES, Backbone, preprocessing_of
from maple.clip.hub import asking_the_hub, download, is_network_error
from maple.clip.transformers_format import read_transformers_folder
from maple.clip.weights import fill, uninitialised
from maple.errors import BackboneError, first_line, one_of

PRECISIONS = tuple(DTYPES)

# Small architectures of our own, for tests and for a first try without weights. 64 x 64 pixels, CLIP's vocabulary.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "maple-tiny": {
        "embed_dim": 128,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 64, "layers": 4, "width": 192, "patch_size": 16, "head_width": 64},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 4},
    }
}

# Pretrained ones that lie in the package: name -> folder of open_clip's format under assets/.
PACKAGED = {"maple-small": "small_clip"}

_WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")


def load_clip(
    name: str,
    pretrained: str | None = None,
    *,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
) -> Backbone:
    """Load a CLIP, frozen, from wherever it is.

    Args:
        name: a packaged CLIP (`maple-small`), an open_clip architecture (`ViT-B-16`; either wins over a folder of the
            same name, which is `./ViT-B-16`), a hub repository (`hf-hub:org/model` or `org/model`; open_clip or
            transformers format), a folder of either format, or a file in
            OpenAI's layout (`.pt`, TorchScript or state dict; `.safetensors`).
        pretrained: for an architecture only: an open_clip tag (`openai`, `laion2b_s34b_b88k`, ...), a file of weights
            (QuickGELU if OpenAI wrote it or the architecture's name says so), or `random` / `random:SEED` for seeded
            random weights. Without it, `openai` where OpenAI published one.
        precision: `fp32`, `bf16` or `fp16`, of the large weights and the states; the rest stays float32.
        device: where it runs.

    Raises:
        BackboneError: unknown name, tag, precision or device, unreadable or foreign file, or a hub that cannot be
            reached.
    """
    if precision not in DTYPES:
        raise BackboneError(one_of("precision", precision, DTYPES))
    device = _checked_device(device)
    local = Path(name).expanduser()
    if not _is_architecture(name) and (local.exists() or name.startswith("hf-hub:") or _is_hub_id(name)):
        if pretrained is not None:
            raise BackboneError(
                f"{name!r} brings its own weights; pretrained={pretrained!r} goes with an architecture name only"
            )
        if local.is_file():
            model, preprocess, tokenizer = _from_file(local)
        else:
            folder = local if local.is_dir() else download(name.removeprefix("hf-hub:"))
            model, preprocess, tokenizer = _from_folder(folder)
    elif name in PACKAGED:
        model, preprocess, tokenizer = _from_package(name, pretrained)
    else:
        model, preprocess, tokenizer = _from_architecture(name, pretrained)
    return Backbone(
        model,
        name=name,
        pretrained=pretrained,
        preprocessing=preprocessing_of(preprocess),
        tokenizer=tokenizer,
        precision=precision,
        device=device,
    )


def backbone_from_state_dict(state: Mapping[str, Tensor], *, name: str = "state dict", **options: Any) -> Backbone:
    """Make a backbone of an OpenAI-layout state dict in memory; `options` as `Backbone`'s."""
    config = formats.openai_config(state, name)
    # Copies: the caller may go on to change what it gave.
    model = _build(config, {key: value.clone() for key, value in formats.openai_state(state).items()}, name)
    tokenizer = _clip_tokenizer(config["text_cfg"]["context_length"])
    preprocessing = preprocessing_of(_openai_preprocess(config))
    return Backbone(model, name=name, pretrained=None, preprocessing=preprocessing, tokenizer=tokenizer, **options)


@cache
def _clip_tokenizer(context_length: int) -> Callable[[Sequence[str]], Tensor]:
    """CLIP's own tokenizer; its merges take a while to read, and it keeps no state."""
    tokenizer: Callable[[Sequence[str]], Tensor] = open_clip.SimpleTokenizer(context_length=context_length)
    return tokenizer


_Parts = tuple[Any, Mapping[str, Any], Callable[[Sequence[str]], Tensor]]


def _from_file(path: Path) -> _Parts:
    state = formats.read_tensors(path)
    config = formats.openai_config(state, str(path))
    model = _build(config, formats.openai_state(state), str(path))
    tokenizer = _clip_tokenizer(config["text_cfg"]["context_length"])
    return model, _openai_preprocess(config), tokenizer


def _from_folder(folder: Path) -> _Parts:
    if (folder / "open_clip_config.json").is_file():
        formats.check_open_clip_config(folder / "open_clip_config.json")
        weights = formats.open_clip_weights(folder)
        return _open_clip(f"local-dir:{folder}", formats.read_tensors(weights), str(weights), resize=True)
    if (folder / "config.json").is_file():
        config, state, preprocess = read_transformers_folder(folder)
        tokenizer = _clip_tokenizer(config["text_cfg"]["context_length"])
        return _build(config, state, str(folder)), preprocess, tokenizer
    raise BackboneError(
        f"{folder} is no CLIP: it needs open_clip_config.json (open_clip) or config.json (transformers) "
        "beside the weights"
    )


def _from_package(name: str, pretrained: str | None) -> _Parts:
    if pretrained is not None:
        raise BackboneError(
            f"{name} lies in the package with its only weights; pretrained={pretrained!r} goes with an architecture "
            f"name only (one with random weights: {', '.join(ARCHITECTURES)})"
        )
    with resources.as_file(resources.files("maple").joinpath("assets", PACKAGED[name])) as folder:
        return _from_folder(folder)


def _from_architecture(name: str, pretrained: str | None) -> _Parts:
    architecture = name.replace("/", "-")
    if architecture in ARCHITECTURES:
        return _from_own_architecture(architecture, pretrained)
    if architecture not in open_clip.list_models():
        raise BackboneError(
            f"no CLIP is called {name!r}: it is no file or folder here, and no open_clip architecture such as "
            f"ViT-B-16, ViT-L-14 or RN50 ({_close(architecture)}); hub repositories are written hf-hub:org/model"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained is None:
        if "openai" not in tags:
            raise BackboneError(
                f"{name} needs pretrained=...: one of {', '.join(tags) or '(no tags)'}, a file, or 'random'"
            )
        pretrained = "openai"
    if (seed := _random_seed(pretrained)) is not None:
        with _seeded(seed):
            return _open_clip(architecture)
    tag = open_clip.get_pretrained_cfg(architecture, pretrained)
    if not tag and not Path(pretrained).expanduser().is_file():
        raise BackboneError(
            f"{one_of(f'pretrained of {name}', pretrained, [*tags, 'random', 'random:SEED'])}, or the path of a file"
        )
    path = _fetch(name, pretrained, tag) if tag else Path(pretrained).expanduser()
    state = formats.read_tensors(path)
    quick_gelu = bool(tag.get("quick_gelu", False)) if tag else (formats.is_openai(state) or None)
    model, preprocess, tokenizer = _open_clip(architecture, state, str(path), resize=bool(tag), quick_gelu=quick_gelu)
    published = {key: tag[key] for key in ("mean", "std", "interpolation") if key in tag}
    return model, {**preprocess, **published}, tokenizer


def _from_own_architecture(name: str, pretrained: str | None) -> _Parts:
    seed = _random_seed("random" if pretrained is None else pretrained)
    if seed is None:
        raise BackboneError(one_of(f"pretrained of {name}", pretrained, ["random", "random:SEED"]))
    config = ARCHITECTURES[name]
    with _seeded(seed):
        model = open_clip.CLIP(**_copy(config))
    tokenizer = _clip_tokenizer(config["text_cfg"]["context_length"])
    return model, _openai_preprocess(config), tokenizer


def _fetch(name: str, tag: str, published: Mapping[str, Any]) -> Path:
    try:
        with asking_the_hub():
            return Path(download_pretrained(published))
    except Exception as error:
        if not isinstance(error, OSError | RuntimeError | ValueError | HfHubHTTPError) and not is_network_error(error):
            raise
        raise BackboneError(
            f"the weights of {name} / {tag} cannot be fetched: {first_line(error)} "
            f"If this machine has no network, fetch them elsewhere and name the file: --backbone {name} "
            "--pretrained FILE"
        ) from error


def _open_clip(
    name: str,
    state: Mapping[str, Tensor] | None = None,
    source: str = "",
    *,
    resize: bool = False,
    quick_gelu: bool | None = None,
) -> _Parts:
    """Build through open_clip, with the weights of `state` (None: as its authors initialise it).

    `quick_gelu` is the activation that the weights were trained with, None for what the configuration says; with
    `resize`, positional embeddings of another length are interpolated, as open_clip does for what it published.
    """
    options = {} if quick_gelu is None else {"quick_gelu": quick_gelu}
    try:
        with _quiet():
            with _untouched_rng(), uninitialised(state is not None):
                model = open_clip.create_model(name, load_weights=False, pretrained_text=False, **options)
            tokenizer = _tokenizer(name)
            preprocess: Mapping[str, Any] = open_clip.get_model_preprocess_cfg(model)
            if state is not None:
                fill(model, state, source, resize=resize)
    except _FOREIGN_ERRORS as error:
        raise BackboneError(f"{name.removeprefix('local-dir:')} cannot be built: {first_line(error)}") from error
    return model, preprocess, tokenizer


def _tokenizer(name: str) -> Callable[[Sequence[str]], Tensor]:
    text = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
    plain = not any(key in text for key in ("hf_tokenizer_name", "tokenizer_kwargs")) and "siglip" not in name.lower()
    if plain:
        return _clip_tokenizer(text.get("context_length", 77))
    tokenizer: Callable[[Sequence[str]], Tensor] = open_clip.get_tokenizer(name)
    return tokenizer


def _build(config: dict[str, Any], state: Mapping[str, Tensor], source: str) -> Any:
    """A native CLIP of `config` with exactly the weights of `state`.

    Raises:
        BackboneError: a weight is missing, unknown, or of another shape; or the sizes make no CLIP.
    """
    try:
        with _untouched_rng(), uninitialised():
            model = open_clip.CLIP(**_copy(config))
    except _FOREIGN_ERRORS as error:
        raise BackboneError(f"{source} describes no CLIP: {first_line(error)}") from error
    fill(model, state, source)
    return model


def _openai_preprocess(config: Mapping[str, Any]) -> dict[str, Any]:
    size = config["vision_cfg"]["image_size"]
    return {"size": size, "mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "interpolation": "bicubic"}


def _is_architecture(name: str) -> bool:
    return name.replace("/", "-") in (*PACKAGED, *ARCHITECTURES, *open_clip.list_models())


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~")) and not name.endswith(_WEIGHT_SUFFIXES)


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        checked = torch.device(device)
    except RuntimeError as error:
        raise BackboneError(f"no device is called {device!r}; write cpu, cuda, cuda:N or mps") from error
    if checked.type == "cuda" and not torch.cuda.is_available():
        raise BackboneError(f"device {str(device)!r}: torch sees no CUDA device on this machine; use device='cpu'")
    return checked


def _random_seed(pretrained: str) -> int | None:
    """The seed of `random` (0) or `random:SEED`; None for anything else."""
    kind, _, seed = pretrained.partition(":")
    if kind != "random":
        return None
    if not (seed or "0").isdecimal():
        raise BackboneError(f"pretrained={pretrained!r}: the seed must be a whole number, as in random:1")
    return int(seed or "0")


def _close(name: str) -> str:
    near = difflib.get_close_matches(name, [*open_clip.list_models(), *ARCHITECTURES, *PACKAGED], n=3, cutoff=0.5)
    return f"the nearest are {', '.join(near)}" if near else "`open_clip.list_models()` lists them"


def _copy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}


# What open_clip, timm, transformers and torch raise on a configuration that they cannot build.
_FOREIGN_ERRORS = (
    *(RuntimeError, ValueError, OSError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError),
    *(ImportError, pickle.UnpicklingError),
)


@contextmanager
def _untouched_rng() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's generator for a while; torch.manual_seed would seed the accelerators' for good."""
    with _untouched_rng():
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip's own remarks (a random model, a chosen activation) off the user's screen.

    It logs through the root logger, which gets a handler at the first record if it has none; ours goes away again.
    """
    root, silent = logging.getLogger(), logging.NullHandler()
    level = root.level
    root.addHandler(silent)
    root.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        root.setLevel(level)
        root.removeHandler(silent)
