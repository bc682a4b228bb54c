"""`load_clip`: one door for every kind of CLIP."""

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from maple.clip import formats
from maple.clip.backbone import DTYPES, Backbone, preprocessing_of
from maple.errors import BackboneError, one_of

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

_HUB_WEIGHTS = {
    "open_clip_config.json": (
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.bin",
        "model.safetensors",
        "pytorch_model.bin",
    ),
    "config.json": (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
}


def load_clip(
    name: str,
    pretrained: str | None = None,
    *,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
) -> Backbone:
    """Load a CLIP, frozen, from wherever it is.

    Args:
        name: an open_clip architecture (`ViT-B-16`), a hub repository (`hf-hub:org/model` or `org/model`; open_clip
            or transformers format), a folder of either format, or a file in OpenAI's layout (`.pt`, TorchScript or
            state dict; `.safetensors`).
        pretrained: for an architecture only: an open_clip tag (`openai`, `laion2b_s34b_b88k`, ...), a file of weights,
            or `random` / `random:SEED` for seeded random weights. Without it, `openai` where OpenAI published one.
        precision: `fp32`, `bf16` or `fp16`, of the large weights and the states; the rest stays float32.
        device: where it runs.

    Raises:
        BackboneError: unknown name or tag, unreadable or foreign file, or a hub that cannot be reached.
    """
    if precision not in DTYPES:
        raise BackboneError(one_of("precision", precision, DTYPES))
    local = Path(name).expanduser()
    if local.exists() or name.startswith("hf-hub:") or _is_hub_id(name):
        if pretrained is not None:
            raise BackboneError(
                f"{name!r} brings its own weights; pretrained={pretrained!r} goes with an architecture name only"
            )
        if local.is_file():
            model, preprocess, tokenizer = _from_file(local)
        else:
            folder = local if local.is_dir() else _download(name.removeprefix("hf-hub:"))
            model, preprocess, tokenizer = _from_folder(folder)
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
    config = formats.openai_config(state)
    model = _build(config, formats.openai_state(state), name)
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    preprocessing = preprocessing_of(_openai_preprocess(config))
    return Backbone(model, name=name, pretrained=None, preprocessing=preprocessing, tokenizer=tokenizer, **options)


_Parts = tuple[Any, Mapping[str, Any], Callable[[Sequence[str]], Tensor]]


def _from_file(path: Path) -> _Parts:
    state = formats.read_tensors(path)
    config = formats.openai_config(state)
    model = _build(config, formats.openai_state(state), str(path))
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    return model, _openai_preprocess(config), tokenizer


def _from_folder(folder: Path) -> _Parts:
    if (folder / "open_clip_config.json").is_file():
        return _open_clip(f"local-dir:{folder}", None)
    if (folder / "config.json").is_file():
        config, state, preprocess = formats.read_transformers_folder(folder)
        tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
        return _build(config, state, str(folder)), preprocess, tokenizer
    raise BackboneError(
        f"{folder} is no CLIP: it needs open_clip_config.json (open_clip) or config.json (transformers) "
        "beside the weights"
    )


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
            return _open_clip(architecture, None)
    if pretrained not in tags and not Path(pretrained).is_file():
        raise BackboneError(
            f"{one_of(f'pretrained of {name}', pretrained, [*tags, 'random', 'random:SEED'])}, or the path of a file"
        )
    return _open_clip(architecture, pretrained)


def _from_own_architecture(name: str, pretrained: str | None) -> _Parts:
    seed = _random_seed("random" if pretrained is None else pretrained)
    if seed is None:
        raise BackboneError(one_of(f"pretrained of {name}", pretrained, ["random", "random:SEED"]))
    config = ARCHITECTURES[name]
    with _seeded(seed):
        model = open_clip.CLIP(**_copy(config))
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    return model, _openai_preprocess(config), tokenizer


def _open_clip(name: str, pretrained: str | None) -> _Parts:
    """Build through open_clip, with the activation that the weights were trained with."""
    options: dict[str, Any] = {"require_pretrained": pretrained is not None or ":" in name}
    if pretrained is not None:
        tag = open_clip.get_pretrained_cfg(name, pretrained)
        config = open_clip.get_model_config(name) or {}
        quick_gelu = tag.get("quick_gelu", False) if tag else formats.is_torchscript(Path(pretrained))
        if quick_gelu != config.get("quick_gelu", False) and (tag or quick_gelu):
            options["quick_gelu"] = quick_gelu
    try:
        with torch.random.fork_rng(devices=[]) if options["require_pretrained"] else _same_rng(), _quiet():
            model = open_clip.create_model(name, pretrained=pretrained, pretrained_text=False, **options)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        what = name if pretrained is None else f"{name} / {pretrained}"
        raise BackboneError(
            f"{what} cannot be loaded: {str(error).strip()[:600]}. If this machine has no network, fetch the weights "
            "elsewhere and name the file: --backbone ViT-B-16 --pretrained FILE"
        ) from error
    preprocess: Mapping[str, Any] = open_clip.get_model_preprocess_cfg(model)
    return model, preprocess, tokenizer


def _build(config: dict[str, Any], state: Mapping[str, Tensor], source: str) -> Any:
    """A native CLIP of `config` with exactly the weights of `state`.

    Raises:
        BackboneError: a weight is missing, unknown, or of another shape.
    """
    with torch.random.fork_rng(devices=[]):
        model = open_clip.CLIP(**_copy(config))
    if "logit_scale" in state:
        state = {**state, "logit_scale": state["logit_scale"].reshape(model.logit_scale.shape)}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise BackboneError(f"{source} does not fit the CLIP its sizes describe: {str(error).strip()[:800]}") from error
    return model


def _openai_preprocess(config: Mapping[str, Any]) -> dict[str, Any]:
    size = config["vision_cfg"]["image_size"]
    return {"size": size, "mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "interpolation": "bicubic"}


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    known = name.replace("/", "-") in open_clip.list_models()
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~")) and not known


def _download(repository: str) -> Path:
    """Fetch the configuration and weights of a hub repository into the hub's cache; return their folder."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, file))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None

    try:
        for config, candidates in _HUB_WEIGHTS.items():
            if (found := fetch(config)) is None:
                continue
            weights = next((path for path in map(fetch, candidates) if path is not None), None)
            if weights is None:
                raise BackboneError(f"{repository} has a {config} but none of {', '.join(candidates)}")
            if weights.suffix == ".json":
                for shard in sorted(set(json.loads(weights.read_text())["weight_map"].values())):
                    fetch(shard)
            fetch("preprocessor_config.json")
            return found.parent
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise BackboneError(
            f"{repository} cannot be fetched from the hub: {str(error).strip().splitlines()[0]} If this machine has no "
            "network, fetch the repository elsewhere and name its folder"
        ) from error
    raise BackboneError(f"{repository} is no CLIP: it has neither open_clip_config.json nor config.json")


def _random_seed(pretrained: str) -> int | None:
    """The seed of `random` (0) or `random:SEED`; None for anything else."""
    kind, _, seed = pretrained.partition(":")
    if kind != "random":
        return None
    if not (seed or "0").isdecimal():
        raise BackboneError(f"pretrained={pretrained!r}: the seed must be a whole number, as in random:1")
    return int(seed or "0")


def _close(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, [*open_clip.list_models(), *ARCHITECTURES], n=3, cutoff=0.5)
    return f"the nearest are {', '.join(near)}" if near else "`open_clip.list_models()` lists them"


def _copy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}


@contextmanager
def _seeded(seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        yield


@contextmanager
def _same_rng() -> Any:
    yield


@contextmanager
def _quiet() -> Any:
    """Keep open_clip's own remarks (a random model, a chosen activation) off the user's screen."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        root.setLevel(level)
