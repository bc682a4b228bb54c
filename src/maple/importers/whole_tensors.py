"""Published checkpoints whose learned tensors are this package's, one for one, under other names.

Sources: ZjjConan/VLM-MultiModalAdapter@c3d0bc2 trainers/mmadapter.py; yunncheng/MMRL@27d8821 trainers/mmrl.py,
trainers/mmrlpp.py; jusiro/CLAP@dbdf409 trainers/adapters.py; CLIP-LoRA from a description of
MaxZanella/CLIP-LoRA@358f0d7 loralib/utils.py, DePT from one of Koorye/DePT@d4ff416.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from maple.errors import CheckpointError, shortened_list
from maple.importers.keys import FROZEN, TOKENS, learned_tensor

_LORA_MATRICES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "proj": "o"}
_LORA_FACTORS = {"w_lora_A": "down", "w_lora_B": "up"}
# Of the training sentences: tensors that are dropped, with a row for each class.
_PER_CLASS = re.compile(r"(\w+\.)?(token_(prefix|suffix)|prompt_embeddings|tokenized_prompts)")
_PUBLISHED_DEPTH = 12  # of the towers for which the published code names parts of a tower


Name = tuple[re.Pattern[str], Callable[[re.Match[str]], str]]
"""A pattern of published keys, and the name here, from the match."""


@dataclass(frozen=True)
class Renaming:
    """How the published code names the tensors of a method.

    Attributes:
        methods: that save such files; the first one is assumed.
        marks: keys that no other method saves.
        names: patterns of keys, and their names here, from the match.
        dropped: keys that are left out, in addition to those of the frozen CLIP.
        settings: the settings that the tensors, by their names here, imply.
        per_class: a tensor that has a row for each class; "" if none has.
    """

    methods: tuple[str, ...]
    marks: re.Pattern[str]
    names: Sequence[Name]
    dropped: re.Pattern[str]
    settings: Callable[[Mapping[str, Tensor], int], dict[str, Any]]
    per_class: str = ""


def _mma_settings(parameters: Mapping[str, Tensor], depth: int) -> dict[str, Any]:
    del depth
    keys = {name.split(".")[1] for name in parameters if name.startswith("shared_adapter.")}
    blocks = sorted(int(key) + 1 for key in keys if key != "input")
    expected = list(range(blocks[0], blocks[-1] + 1)) if blocks else []
    if blocks != expected or not blocks or ("input" in keys and blocks[0] != 1):
        raise CheckpointError(
            f"the adapters are those of {', '.join(sorted(keys)) or 'no'} blocks; the published code adapts all from a "
            "first to a last one, so the file is incomplete"
        )
    shared = parameters.get(f"shared_adapter.{blocks[0] - 1}.weight")
    if shared is None or shared.ndim != 2:
        problem = "is missing" if shared is None else f"has shape {list(shared.shape)}"
        raise CheckpointError(f"shared_adapter.{blocks[0]}.0.weight {problem}; a matrix [width, width] is needed")
    start = 0 if "input" in keys else blocks[0]
    return {"adapter_start": start, "adapter_end": blocks[-1], "adapter_width": shared.shape[0]}


def _mma_block(number: str) -> str:
    return "input" if number == "0" else str(int(number) - 1)


def _mmrl_settings(parameters: Mapping[str, Tensor], depth: int) -> dict[str, Any]:
    numbers = {int(name.split(".")[1]) for name in parameters if re.fullmatch(r"to_text\.\d+\.bias", name)}
    tokens = parameters.get("tokens")
    if tokens is None or tokens.ndim != 2 or not numbers or numbers != set(range(len(numbers))):
        raise CheckpointError(
            "the representation tokens or the maps of a layer are missing; an MMRL checkpoint has "
            "representation_learner.compound_rep_tokens and maps numbered from 0"
        )
    # The file does not say which layers; the published ones are the last.
    layers = range(depth - len(numbers) + 1, depth + 1)
    if layers[0] < 1:
        raise CheckpointError(f"there are maps of {len(numbers)} layers, but the towers have {depth} blocks")
    config = {"layers": list(layers), "tokens": tokens.shape[0], "token_width": tokens.shape[1]}
    factor, projection = parameters.get("to_text.0.up"), parameters.get("projection.down")
    if factor is not None and projection is not None:
        if not factor.ndim == projection.ndim == 2:
            raise CheckpointError(
                f"representation_learner.srra_r2tproj.srra.0.A has shape {list(factor.shape)}, and image_encoder.A "
                f"{list(projection.shape)}; matrices are needed"
            )
        config |= {"rank": factor.shape[1], "projection_rank": projection.shape[1]}
    return config


def _clap_settings(parameters: Mapping[str, Tensor], depth: int) -> dict[str, Any]:
    del depth
    shape = list(parameters["prototypes"].shape)
    if len(shape) != 2:
        raise CheckpointError(f"prototypes has shape {shape}; one vector of each class is needed, [C, D]")
    return {}  # the constraint is one of the training alone


_MMRL_SIDES = {"r2v": "to_vision", "r2t": "to_text"}
_MMRL_FACTORS = {"A": "up", "B": "down", "bias": "bias"}
_MMRL_TOKENS: Name = (re.compile(r"representation_learner\.compound_rep_tokens"), lambda _: "tokens")
_MMRL_DROPPED = re.compile(r"(representation_learner\.)?prompt_embeddings")
RENAMINGS = (
    Renaming(
        methods=("mma", "mmapp"),
        marks=re.compile(r"shared_adapter\.\d+\.0\.weight"),
        names=(
            (
                re.compile(r"(text|visual)_adapter\.(\d{1,3})\.(?:(down)\.0|(up))\.(weight|bias)"),
                lambda m: ".".join(
                    [f"{m[1].replace('visual', 'vision')}_adapter", _mma_block(m[2]), m[3] or m[4], m[5]]
                ),
            ),
            (
                re.compile(r"shared_adapter\.(\d{1,3})\.0\.(weight|bias)"),
                lambda m: f"shared_adapter.{_mma_block(m[1])}.{m[2]}",
            ),
        ),
        dropped=re.compile(r"(adapter_learner\.)?(token_embedding(\.\w+)?|tokenized_prompts)"),
        settings=_mma_settings,
    ),
    Renaming(
        methods=("mmrl",),
        marks=re.compile(r"representation_learner\.compound_rep_tokens_r2vproj\.\d+\.weight"),
        names=(
            _MMRL_TOKENS,
            (
                re.compile(r"representation_learner\.compound_rep_tokens_(r2[vt])proj\.(\d{1,3})\.(weight|bias)"),
                lambda m: f"{_MMRL_SIDES[m[1]]}.{m[2]}.{m[3]}",
            ),
            (re.compile(r"image_encoder\.proj_rep"), lambda _: "projection"),
        ),
        dropped=_MMRL_DROPPED,
        settings=_mmrl_settings,
    ),
    Renaming(
        methods=("mmrlpp",),
        marks=re.compile(r"representation_learner\.srra_r2vproj\.weight"),
        names=(
            _MMRL_TOKENS,
            (
                re.compile(r"representation_learner\.srra_(r2[vt])proj\.weight"),
                lambda m: f"{_MMRL_SIDES[m[1]]}.weight",
            ),
            (
                re.compile(r"representation_learner\.srra_(r2[vt])proj\.srra\.(\d{1,3})\.(A|B|bias)"),
                lambda m: f"{_MMRL_SIDES[m[1]]}.{m[2]}.{_MMRL_FACTORS[m[3]]}",
            ),
            (re.compile(r"image_encoder\.A"), lambda _: "projection.down"),
            (re.compile(r"image_encoder\.B"), lambda _: "projection.up"),
        ),
        dropped=_MMRL_DROPPED,
        settings=_mmrl_settings,
    ),
    Renaming(
        methods=("clap",),
        marks=re.compile(r"prototypes"),
        names=((re.compile(r"prototypes"), lambda _: "prototypes"),),
        dropped=re.compile(r"base_text_features"),
        settings=_clap_settings,
        per_class="prototypes",
    ),
)


def rename_tensors(
    state_dict: Mapping[str, object], method: str | None
) -> tuple[str, dict[str, Any], dict[str, Tensor], dict[str, Any]] | None:
    """The method, settings, parameters and facts of a state dict that one of `RENAMINGS` fits; None if none does.

    Raises:
        CheckpointError: a key is unknown or occurs twice, the layers are incomplete, or `method` is another one.
        UnsafeCheckpointError: a learned tensor would be the result of running code.
    """
    plain = {str(key).removeprefix("module.").removeprefix("adapter_learner."): key for key in state_dict}
    fitting = [renaming for renaming in RENAMINGS if any(renaming.marks.fullmatch(name) for name in plain)]
    if not fitting:
        return None
    renaming = fitting[0]
    if method is not None and method not in renaming.methods:
        raise CheckpointError(f"the keys are those of {' or '.join(renaming.methods)}, not of {method!r}")
    if len(plain) != len(state_dict):
        raise CheckpointError("the state dict has a key twice, with and without `module.`; remove one of them")
    parameters: dict[str, Tensor] = {}
    dropped, dtypes, depth, class_count = 0, set(), 0, None
    for name, key in plain.items():
        if renamed := _renamed(name, renaming.names):
            parameters[renamed] = learned_tensor(key, state_dict[key])
            dtypes.add(str(getattr(state_dict[key], "dtype", "")).removeprefix("torch."))
        elif FROZEN.fullmatch(name) or TOKENS.fullmatch(name) or renaming.dropped.fullmatch(name):
            dropped += 1
            block = re.match(r"image_encoder\.transformer\.resblocks\.(\d+)\.", name)
            depth = max(depth, int(block[1]) + 1 if block else 0)
            value = state_dict[key]
            if _PER_CLASS.fullmatch(name) and isinstance(value, Tensor) and value.ndim:
                class_count = len(value)
        else:
            raise CheckpointError(
                f"unknown key {key!r}: neither a learned parameter of {' or '.join(renaming.methods)}, nor part of the "
                "frozen CLIP; import a file of the published code, or remove the key"
            )
    config = renaming.settings(parameters, depth or _PUBLISHED_DEPTH)
    info: dict[str, Any] = {"dropped_keys": dropped, "dtypes": sorted(dtypes)}
    if renaming.per_class:
        class_count = len(parameters[renaming.per_class])
    if class_count is not None:
        info["class_count"] = class_count
    return method or renaming.methods[0], config, parameters, info


def _renamed(key: str, names: Sequence[Name]) -> str:
    """The name here of a published key; "" if no pattern fits it."""
    matches = ((pattern.fullmatch(key), rename) for pattern, rename in names)
    return next((rename(match) for match, rename in matches if match), "")


_HEAD: Sequence[Name] = (
    (re.compile(r"film_lp_(img|text)\.(scale|bias)"), lambda m: f"film_{m[1].replace('img', 'image')}.{m[2]}"),
    (re.compile(r"linear_probe_proj\.(weight|bias)"), lambda m: f"head.{m[1]}"),
)


def split_head(state_dict: Mapping[str, object]) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The state dict without DePT's head, and the tensors of the head by their names here; none in other files.

    Raises:
        CheckpointError: the head is incomplete, or its shapes do not fit together.
        UnsafeCheckpointError: a tensor would be the result of running code.
    """
    rest: dict[str, object] = {}
    head: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if name := _renamed(str(key).removeprefix("module."), _HEAD):
            head[name] = learned_tensor(key, value)
        else:
            rest[key] = value
    if head:
        films = [f"film_{side}.{part}" for side in ("image", "text") for part in ("scale", "bias")]
        shape = list(head["head.weight"].shape) if "head.weight" in head else []
        expected = {"head.weight": shape, "head.bias": shape[:1]}
        if any(name in head for name in films):
            expected |= dict.fromkeys(films, shape[1:])
        shapes = {name: list(tensor.shape) for name, tensor in head.items()}
        if len(shape) != 2 or shapes != expected:
            raise CheckpointError(
                f"the head has the shapes {shapes}; DePT has linear_probe_proj.weight [C, D] and .bias [C], and "
                "film_lp_img and film_lp_text, each with scale and bias [D]"
            )
    return rest, head


def lora_tensors(
    weights: Mapping[str, Any], metadata: Mapping[str, Any]
) -> tuple[str, dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """The method, settings, parameters and facts of a CLIP-LoRA file.

    Its layers are numbered through the updated blocks of the text tower, then those of the image tower; which blocks
    these are follows from the name of a part of the tower ("position"), of twelve blocks, or from their number.

    Raises:
        CheckpointError: the metadata or a factor is missing, or the layers are not those of the metadata.
        UnsafeCheckpointError: a factor would be the result of running code.
    """
    try:
        rank, alpha, encoder = int(metadata["r"]), float(metadata["alpha"]), str(metadata["encoder"])
        matrices, position = [str(matrix) for matrix in metadata["params"]], str(metadata["position"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"the metadata of a CLIP-LoRA file has r, alpha, encoder, params and position; reading them failed: {error}"
        ) from error
    if encoder not in ("both", "text", "vision") or set(weights) != {f"layer_{i}" for i in range(len(weights))}:
        raise CheckpointError(
            f"the metadata has encoder {encoder!r} and the weights {shortened_list(map(str, weights), 20)}; encoder is "
            "both, text or vision, and weights are layer_0, layer_1 and so on"
        )
    if unknown := set(matrices) - set(_LORA_MATRICES.values()):
        raise CheckpointError(f"the metadata has params {matrices}; {min(unknown)!r} is not one of q, k, v and o")
    layers, dtypes = [], set()
    for number in range(len(weights)):
        factors = {}
        for published, matrix in _LORA_MATRICES.items():
            for factor, name in _LORA_FACTORS.items():
                if matrix not in matrices:
                    continue
                key = f"layer_{number}.{published}.{factor}"
                try:
                    value = weights[f"layer_{number}"][published][factor]
                except (LookupError, TypeError) as error:
                    raise CheckpointError(f"{key} is missing, although params are {matrices}") from error
                factors[f"{matrix}.{name}"] = learned_tensor(key, value)
                if factors[f"{matrix}.{name}"].ndim != 2:
                    raise CheckpointError(f"{key} has shape {list(value.shape)}; a matrix is needed")
                dtypes.add(str(getattr(value, "dtype", "")).removeprefix("torch."))
        layers.append(factors)
    if not layers or not layers[0]:
        raise CheckpointError(f"the file updates no matrix: params are {matrices}, and there are {len(layers)} layers")
    # Of the two towers, each has half of the layers where their widths do not distinguish them.
    first = f"{matrices[0]}.down"
    text = len(layers) if encoder == "text" else 0
    if encoder == "both":
        widths = [factors[first].shape[-1] for factors in layers]
        text = sum(width == widths[0] for width in widths) if len(set(widths)) == 2 else len(layers) // 2
    towers = {"text": layers[:text], "vision": layers[text:]}
    blocks = {name: _blocks_at(position, len(tower)) for name, tower in towers.items()}
    parameters = {
        f"lora.{name}.{block}.{factor}": tensor
        for name in ("vision", "text")
        for block, factors in zip(blocks[name], towers[name], strict=True)
        for factor, tensor in factors.items()
    }
    config = {"encoder": encoder, "matrices": matrices, "rank": rank, "alpha": alpha}
    chosen = {f"{name}_layers": blocks[name] for name, tower in towers.items() if tower}
    return "clip_lora", {**config, **chosen}, parameters, {"dropped_keys": 0, "dtypes": sorted(dtypes)}


def _blocks_at(position: str, count: int) -> list[int]:
    """The `count` blocks of a tower, from 0, that the published code means by a position."""
    starts = {
        **dict.fromkeys(("all", "bottom", "half-bottom"), 0),
        "mid": 4,
        "half-up": count,
        **dict.fromkeys(("up", "top", "top1", "top2", "top3"), _PUBLISHED_DEPTH - count),
    }
    if position not in starts:
        raise CheckpointError(f"the metadata has position {position!r}; choose one of {', '.join(starts)}")
    return list(range(starts[position], starts[position] + count))
