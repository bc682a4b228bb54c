"""Files of CLIP weights, read safely, and open_clip configurations of OpenAI's layout.

Source: openai/CLIP@a1d0717 clip/model.py:399-436 (sizes are read from the shapes of the weights).
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maple.archives import Placeholder, read_checkpoint, read_torchscript
from maple.archives.torch_file import is_torchscript
from maple.clip.backbone_names import has_clip_blocks, is_text_model_name
from maple.errors import BackboneError, CheckpointError, first_line, pointer_in, shortened_list
from maple.files import read_json, regular

StateDict = dict[str, Tensor]

OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
_ENCLOSING = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.", "clip_model.", "clip.")
"""What parallel, compiled and Lightning modules, and models that own a CLIP, put before the names of its tensors."""
HEAD_WIDTH = 64  # of every CLIP that OpenAI published; its files do not store it
CLIP_VOCABULARY = 49408
MOST_PIXELS, MOST_TOKENS = 4096, 4096  # sides of images and lengths of sentences; published ones reach 1,024 and 256
_PIXELS = ("image_size", "patch_size")
_SPARE_NUMBERS = 2**25
_TOKENIZER_ARGUMENTS = ("clean", "strip_sep_token", "language", "reduction_mask", "use_fast", "padding_side", "legacy")
_MAPPED_BYTES = 32 * 1024**2  # how much of a file is copied before it is mapped anew


def read_tensors(path: Path) -> StateDict:
    """Read a file of weights: safetensors, a TorchScript archive, or a state dict saved by `torch.save`.

    Nothing in the file is run or imported. What training code wraps the weights in is removed: an enclosing
    {"state_dict": ...} (or model_state_dict, model), and the prefixes of `_PREFIXES` where all tensors have them.

    Raises:
        BackboneError: the file is none of these, or is damaged.
    """
    try:
        if path.suffix == ".safetensors":
            content: Mapping[Any, Any] = _read_safetensors(path)
        else:
            content = read_torchscript(path) if is_torchscript(path) else read_checkpoint(path)
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise BackboneError(f"{path} cannot be read as CLIP weights: {reason}") from error
    while enclosed := [key for key in _ENCLOSING if isinstance(content.get(key), Mapping)]:
        content = content[enclosed[0]]
    if not content:
        raise BackboneError(f"{path} does not hold a state dict of tensors: it is empty")
    state: StateDict = {}
    for key, value in content.items():
        name = str(key)
        tensor = torch.as_tensor(value) if name in OPENAI_EXTRAS and isinstance(value, int) else value
        if isinstance(tensor, Placeholder):
            raise BackboneError(
                f"{path} cannot be read as CLIP weights: {name!r} would come from running {tensor.origin}; nothing was "
                "run. Save the file again with nothing but tensors"
            )
        if not isinstance(tensor, Tensor):
            raise BackboneError(
                f"{path} does not hold a state dict: {name!r} is a {type(tensor).__name__}; save the weights alone, as "
                "torch.save(model.state_dict(), FILE), or as {'state_dict': model.state_dict()}"
            )
        state[name] = tensor
    return _without_prefixes(state, path)


def _without_prefixes(state: StateDict, path: Path) -> StateDict:
    """The tensors without the prefixes of training code that all of them have.

    Raises:
        BackboneError: only some of the tensors have the prefix of the others.
    """
    sizes = {key: value for key, value in state.items() if key.rpartition(".")[2] in OPENAI_EXTRAS}
    weights = {key: value for key, value in state.items() if key not in sizes}
    while weights and (prefix := next((p for p in _PREFIXES if any(key.startswith(p) for key in weights)), "")):
        others = [key for key in weights if not key.startswith(prefix)]
        if others:
            # "model" and "clip" may begin the name of a part of a CLIP's own.
            if not any(key.startswith((f"{prefix}visual.", f"{prefix}transformer.")) for key in weights):
                break
            raise BackboneError(
                f"{path} holds a CLIP whose tensors begin with {prefix!r}, and {len(others)} tensors that do not "
                f"({shortened_list(others, 3)}); save the CLIP alone: its state_dict()"
            )
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return {**weights, **{key.rpartition(".")[2]: value for key, value in sizes.items()}}


def layout_hint(state: Mapping[str, Tensor]) -> str:
    """What to do with weights in transformers' layout, to be added to an error; "" for others."""
    if not any(key.startswith(("text_model.", "vision_model.")) for key in state):
        return ""
    return ". These are weights in transformers' layout: give their folder, with its config.json, as the backbone"


def _read_safetensors(path: Path) -> StateDict:
    """Every tensor, copied out of the mapped file once."""
    try:
        with safe_open(regular(path), "pt") as file:
            names = list(file.keys())
        state: StateDict = {}
        # The file is mapped anew for every few tensors: until then, pages that were copied count as this process's
        # memory, so that the peak would be twice the weights.
        while len(state) < len(names):
            copied = 0
            with safe_open(path, "pt") as file:
                while len(state) < len(names) and copied < _MAPPED_BYTES:
                    name = names[len(state)]
                    state[name] = file.get_tensor(name).clone(memory_format=torch.contiguous_format)
                    copied += state[name].nbytes
    except (SafetensorError, OSError, RuntimeError, ValueError, LookupError, AttributeError, TypeError) as error:
        if problem := pointer_in(path):
            raise CheckpointError(f"it is {problem}") from error
        raise CheckpointError(first_line(error)) from error
    return state


def is_openai(state: Mapping[str, Tensor]) -> bool:
    """Whether OpenAI wrote `state`: only its archives store three sizes next to the weights."""
    return any(key in state for key in OPENAI_EXTRAS)


def openai_config(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The open_clip configuration of a state dict in OpenAI's layout, from the shapes of its weights.

    Raises:
        BackboneError: a tensor that every CLIP has is missing, or has another shape.
    """
    try:
        return {
            "embed_dim": state["text_projection"].shape[1],
            "quick_gelu": True,
            "vision_cfg": _openai_vision(state, source),
            "text_cfg": _openai_text(state, source),
        }
    except KeyError as error:
        hint = layout_hint(state)
        raise BackboneError(
            f"{source} is not a CLIP in OpenAI's layout: the tensor {error} is missing; it begins with "
            f"{shortened_list(sorted(state), 3)}{hint}"
        ) from error
    except (IndexError, ValueError) as error:
        raise BackboneError(
            f"{source} is not a CLIP in OpenAI's layout: a tensor has too few dimensions ({error})"
        ) from error


def openai_state(state: Mapping[str, Tensor]) -> StateDict:
    """The weights without the three sizes that OpenAI stores next to them."""
    return {key: value for key, value in state.items() if key not in OPENAI_EXTRAS}


def _openai_text(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    width = state["ln_final.weight"].shape[0]
    words = state["token_embedding.weight"].shape[0]
    check_vocabulary(words, source)
    return {
        "context_length": state["positional_embedding"].shape[0],
        "vocab_size": words,
        "width": width,
        "heads": _openai_heads(width, f"{source}: the text tower"),
        "layers": _count(state, r"transformer\.resblocks\.(\d+)\."),
        "mlp_ratio": mlp_ratio(state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0], width),
    }


def _openai_vision(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    if "visual.conv1.weight" in state and "visual.layer1.0.conv1.weight" not in state:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
        tower = {
            "layers": _count(state, r"visual\.transformer\.resblocks\.(\d+)\."),
            "width": width,
            "patch_size": patch,
        }
        head_width = HEAD_WIDTH if is_openai(state) else published_head_width(tower, source)
        if head_width == HEAD_WIDTH:
            _openai_heads(width, f"{source}: the image tower")
        return {
            **tower,
            "image_size": grid * patch,
            "head_width": head_width,
            "mlp_ratio": mlp_ratio(state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0], width),
        }
    grid = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
    return {
        "image_size": grid * 32,
        "layers": [_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)],
        "width": state["visual.layer1.0.conv1.weight"].shape[0],
        "patch_size": None,
    }


def published_head_width(tower: Mapping[str, int], source: str) -> int:
    """The width of the heads in open_clip's image towers of these sizes; OpenAI's if there are none.

    Raises:
        BackboneError: some of these towers have heads of another width than others.
    """
    import open_clip  # slow, and the packaged CLIP does without it
    from open_clip.model import CLIPVisionCfg

    names: dict[int, str] = {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision = {**vars(CLIPVisionCfg()), **config["vision_cfg"]}
        if has_clip_blocks(config) and all(vision[key] == size for key, size in tower.items()):
            names.setdefault(vision["head_width"], name)
    if len(names) > 1:
        raise BackboneError(
            f"{source} may be {' or '.join(names.values())}, whose attention heads have different widths, which "
            "OpenAI's layout does not store; name the architecture, with pretrained=FILE"
        )
    return next(iter(names), HEAD_WIDTH)


def _openai_heads(width: int, tower: str) -> int:
    if width % HEAD_WIDTH or not width:
        raise BackboneError(
            f"{tower} is {width} wide, which is not a multiple of {HEAD_WIDTH}; OpenAI's layout does not store the "
            "number of attention heads. Save the model as an open_clip or transformers folder, which does"
        )
    return width // HEAD_WIDTH


def check_vocabulary(words: int, source: str) -> None:
    """Raise BackboneError unless the vocabulary has the size of CLIP's own."""
    if words != CLIP_VOCABULARY:
        raise BackboneError(
            f"{source} has a vocabulary of {words} tokens, but CLIP's tokenizer has {CLIP_VOCABULARY}; use a model "
            "with CLIP's own tokenizer"
        )


def mlp_ratio(hidden: int, width: int) -> float:
    """The mlp_ratio that gives exactly `hidden` channels."""
    # open_clip multiplies by the width and rounds down, so that the plain quotient may lose a channel.
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({match.group(1) for match in map(re.compile(pattern).match, state) if match})


def shards(index: Path) -> list[str]:
    """The names of the weight files in a transformers index."""
    content: dict[str, Any] = read_json(index, error=BackboneError, foreign=True)
    names = content.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise BackboneError(f"{index} does not name any weight files: it needs a weight_map from tensors to files")
    names = sorted(set(names.values()))
    if outside := [name for name in names if not name or name.startswith(".") or set("/\\:\0") & set(name)]:
        raise BackboneError(f"{index} names {shortened_list(map(repr, outside))}; weight files are next to it")
    return names


def read_open_clip_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `model_cfg` and `preprocess_cfg` of an open_clip_config.json that builds plain modules and nothing else.

    open_clip itself passes on whatever the file says: arguments with which transformers runs the Python of the folder
    (`trust_remote_code`), and names that timm and transformers take for folders and repositories.

    Raises:
        BackboneError: not the description of both towers, or one that names something other than what open_clip's own
            configurations name.
    """
    content: dict[str, Any] = read_json(path, error=BackboneError, foreign=True)
    model, preprocess = content.get("model_cfg"), content.get("preprocess_cfg") or {}
    required = ("embed_dim", "vision_cfg", "text_cfg")
    if not isinstance(model, dict) or (missing := [key for key in required if key not in model]):
        lacking = ", ".join(required if not isinstance(model, dict) else missing)
        raise BackboneError(f"{path} does not describe an open_clip model: model_cfg lacks {lacking}")
    vision, text = model["vision_cfg"], model["text_cfg"]
    if not all(isinstance(part, dict) for part in (vision, text, preprocess)):
        raise BackboneError(
            f"{path} does not describe an open_clip model: vision_cfg, text_cfg, preprocess_cfg: objects"
        )
    if timm_name := vision.get("timm_model_name"):
        import timm

        if not isinstance(timm_name, str) or set(":/\\") & set(timm_name) or not timm.is_model(timm_name):
            raise BackboneError(f"{path}: timm_model_name is {timm_name!r:.100}; it must be a model of timm's own")
    if text.get("hf_model_name") and not is_text_model_name(text["hf_model_name"]):
        raise BackboneError(
            f"{path}: hf_model_name is {text['hf_model_name']!r:.100}; it must be a model of the hub, NAME or "
            "OWNER/NAME, of which the configuration is read"
        )
    options = text.get("tokenizer_kwargs") or {}
    if not isinstance(options, dict) or not isinstance(text.get("hf_tokenizer_name"), str | None):
        raise BackboneError(f"{path}: hf_tokenizer_name must be a string, and tokenizer_kwargs a JSON object")
    for name, value in options.items():
        if name not in _TOKENIZER_ARGUMENTS or not isinstance(value, str | bool | None):
            raise BackboneError(
                f"{path}: tokenizer_kwargs has {name!r:.50} = {value!r:.50}; allowed are strings and booleans for "
                f"{', '.join(_TOKENIZER_ARGUMENTS)}. Python code in a folder is never run"
            )
    return model, preprocess


def check_size(
    config: Mapping[str, Any], state: Mapping[str, Tensor], source: str, text_size: tuple[int, float] = (0, 0.0)
) -> None:
    """Refuse a description that is out of proportion to its weights, before any of it is built.

    A few bytes can ask for terabytes, or for modules without end. What a model needs is estimated from above, roughly.

    Args:
        text_size: the layers and numbers of a text tower that is transformers' own.

    Raises:
        BackboneError: it is larger than the weights by far, or an image or a sentence is too large.
    """
    stored = sum(tensor.numel() for tensor in state.values())
    needed = math.inf if text_size[0] > len(state) else text_size[1]
    from open_clip.coca_model import MultimodalCfg
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    kinds: dict[str, Any] = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg, "multimodal_cfg": MultimodalCfg}
    for part in kinds.keys() & config.keys():
        tower = vars(kinds[part](**config[part]))
        layers = tower["layers"] if isinstance(tower["layers"], list | tuple) else [tower["layers"]]
        side, patch = (max(size) if isinstance(size, list | tuple) else size or 0 for size in map(tower.get, _PIXELS))
        words, length = tower.get("vocab_size", 0), tower.get("context_length", 0)
        if not 0 <= side <= MOST_PIXELS or not 0 <= length <= MOST_TOKENS:
            raise BackboneError(
                f"{source} describes a CLIP of images of {side} pixels and sentences of {length} tokens; at most "
                f"{MOST_PIXELS} and {MOST_TOKENS} are supported"
            )
        if sum(layers) > len(state):
            needed = math.inf
        width = tower["width"]
        if tower.get("timm_model_name") or tower.get("hf_model_name"):
            width = 4096  # of its projection; the rest is as large as the library has it
        else:
            rows = words + length + (side // (patch or 32)) ** 2 + 3 * patch**2 + tower.get("attn_pooler_queries", 0)
            needed += width * (rows + sum(layers) * width * (4 + 2 * tower["mlp_ratio"]))
        needed += width * config["embed_dim"]
    if not needed <= 4 * stored + _SPARE_NUMBERS:
        raise BackboneError(
            f"{source} does not fit its description, a CLIP of about {needed:.2g} numbers: it has {stored:,}"
        )


def open_clip_weights(folder: Path) -> Path:
    """The weight file in the folder of an open_clip_config.json.

    Raises:
        BackboneError: there is none, or there are several under names that open_clip does not use.
    """
    named = [folder / name for name in OPEN_CLIP_WEIGHTS if (folder / name).is_file()]
    others = sorted(path for suffix in ("safetensors", "bin", "pth", "pt") for path in folder.glob(f"*.{suffix}"))
    if not named and len(others) != 1:
        candidates = f"several candidates ({', '.join(path.name for path in others)})" if others else "none"
        raise BackboneError(
            f"{folder} should hold one weight file, such as {OPEN_CLIP_WEIGHTS[0]}; it has {candidates}"
        )
    return (named or others)[0]
