"""`load_clip` loads a CLIP of any kind; open_clip is imported for all but the packaged ones."""

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from maple.clip.backbone import DTYPES, Backbone, preprocessing_of
from maple.clip.backbone_names import ARCHITECTURES, PACKAGED, remember, with_absolute_paths
from maple.clip.checkpoints.formats import OPEN_CLIP_WEIGHTS, read_tensors
from maple.clip.features import FeatureBackbone
from maple.clip.plain_model import PlainCLIP
from maple.clip.tokenization.published_tokenizer import PublishedTokenizer
from maple.errors import BackboneError, first_line, one_of
from maple.files import read_json
from maple.names import FEATURES


def load_clip(
    name: str, pretrained: str | None = None, *, precision: str = "fp32", device: str | torch.device = "cpu"
) -> Backbone:
    """Load a frozen CLIP from a name, a hub repository, a folder or a file.

    Args:
        name: a packaged CLIP (`maple-small`), an open_clip architecture (`ViT-B-16`; either takes precedence over a
            folder of the same name, which is written `./ViT-B-16`), a hub repository (`hf-hub:org/model` or
            `org/model`) or a folder, in open_clip's or transformers' format, or a file in OpenAI's layout (`.pt`,
            TorchScript or state dict; `.safetensors`).
        pretrained: for an architecture only: an open_clip tag (`openai`, `laion2b_s34b_b88k`, ...), a weight file
            (if OpenAI did not write it, the architecture must say the activation, as `ViT-B-32-quickgelu` or
            `ViT-B-32-gelu`), or `random` / `random:SEED` for seeded random weights. By default `openai`, where OpenAI
            published one. For a file: `quickgelu` or `gelu`, its activation, unless OpenAI wrote it.
        precision: `fp32`, `bf16` or `fp16`, of the large weights and the states; the rest stays float32.
        device: where it runs.

    A folder, file or repository never makes another program import, run or download anything: see
    `maple.clip.checkpoints.formats.read_open_clip_config`. What is given here may from now on also be named by prompts
    files.

    Raises:
        BackboneError: the name, tag, precision or device is unknown, the file is unreadable or is not a CLIP, or the
            hub cannot be reached.

    Example:
        >>> load_clip("ViT-B-16").fingerprint  # the same 32 digits for every file of these weights
        >>> load_clip("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K", precision="bf16", device="cuda")
        >>> load_clip("maple-tiny", "random:1")
    """
    return load_given(name, pretrained, precision=precision, device=device)


def load_given(name: str, pretrained: str | None, **options: Any) -> Backbone:
    """`load_backbone`, for what the user gave: files may name it from now on."""
    backbone = load_backbone(name, pretrained, **options)
    remember(backbone.name, backbone.pretrained)
    return backbone


def load_backbone(
    name: str,
    pretrained: str | None,
    *,
    precision: str,
    device: str | torch.device,
    activation: str | None = None,
) -> Backbone:
    """`load_clip`, for what was not given by the user: it is not remembered as trusted.

    `activation` (QUICKGELU, GELU or ASSUMED) is that of weights that do not say theirs, which are refused otherwise.
    """
    if not isinstance(name, str) or not isinstance(pretrained, str | None) or len(f"{name}{pretrained}") > 8192:
        raise BackboneError(f"the CLIP {name!r:.80} / {pretrained!r:.80} must be named by strings; see `load_clip`")
    if precision not in list(DTYPES):
        raise BackboneError(one_of("precision", precision, DTYPES))
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise BackboneError(f"unknown device {device!r}; write cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackboneError(f"device {str(device)!r}: torch sees no CUDA device on this machine; use device='cpu'")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BackboneError(f"device {str(device)!r} cannot be used: {first_line(error)}; use device='cpu'") from error
    if name.startswith(FEATURES):
        return FeatureBackbone(name, device=device)
    name, pretrained = with_absolute_paths(name, pretrained)
    if name in PACKAGED:
        if pretrained is not None:
            raise BackboneError(
                f"{name} is shipped with its weights; pretrained={pretrained!r} can only be given with an architecture "
                f"name (with random weights: {', '.join(ARCHITECTURES)})"
            )
        model: Any
        preprocess: Mapping[str, Any]
        tokenizer: Callable[[Sequence[str]], Tensor]
        with resources.as_file(resources.files("maple").joinpath("assets", PACKAGED[name])) as folder:
            if precision == "fp32":
                config: dict[str, Any] = read_json(folder / "open_clip_config.json")
                model = PlainCLIP(config["model_cfg"], read_tensors(folder / OPEN_CLIP_WEIGHTS[0]))
                preprocess = {**config["preprocess_cfg"], "size": model.visual.image_size}
                tokenizer = PublishedTokenizer(model.context_length)
            else:
                model, preprocess, tokenizer = _open_clip_parts(str(folder), None, activation)
    else:
        model, preprocess, tokenizer = _open_clip_parts(name, pretrained, activation)
    return Backbone(
        model,
        name=name,
        pretrained=pretrained,
        preprocessing=preprocessing_of(preprocess),
        tokenizer=tokenizer,
        precision=precision,
        device=device,
    )


def _open_clip_parts(
    name: str, pretrained: str | None, activation: str | None
) -> tuple[Any, Mapping[str, Any], Callable[[Sequence[str]], Tensor]]:
    # Only now: open_clip takes longer to import than PyTorch.
    from maple.clip.checkpoints.open_clip_models import load_parts

    return load_parts(name, pretrained, activation)


def backbone_from_state_dict(state: Mapping[str, Tensor], *, name: str = "state dict", **options: Any) -> Backbone:
    """Build a backbone from a state dict in OpenAI's layout; `options` are those of `Backbone`."""
    from maple.clip.checkpoints import formats
    from maple.clip.checkpoints.open_clip_models import build_model, openai_preprocess
    from maple.clip.tokenization.tokenizers import clip_tokenizer

    config = formats.openai_config(state, name)
    # Copies, since the model keeps its tensors and the caller may change its own.
    model = build_model(config, {key: value.clone() for key, value in formats.openai_state(state).items()}, name)
    tokenizer = clip_tokenizer(config["text_cfg"]["context_length"])
    preprocessing = preprocessing_of(openai_preprocess(config))
    return Backbone(model, name=name, pretrained=None, preprocessing=preprocessing, tokenizer=tokenizer, **options)
