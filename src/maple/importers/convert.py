"""From the reference's state dicts to the method names, settings and parameter names of this package."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from maple.errors import CheckpointError, ConfigError, one_of
from maple.importers.keys import Found, sort_keys

METHODS = ("maple", "independent_vl", "deep_language", "vpt", "coop", "cocoop", "kgcoop", "prograd", "promptsrc")
TEMPLATE = "a photo of a {}."
_MAX_WORD_PROMPT = 4


@dataclass(frozen=True)
class ImportedPrompts:
    """What a published checkpoint teaches.

    Attributes:
        method: one of `METHODS`.
        config: the settings of that method, by field name.
        parameters: contract name -> float32, contiguous, owning its memory. `text_prompt.k` [P, Ht] (CoOp's
            may be [C, P, Ht]), `vision_prompt.k` [P, Hv], `coupling.k.weight` [Hv, Ht], `coupling.k.bias` [Hv],
            `meta_net.0.weight` [hidden, D], `meta_net.1.weight` [Ht, hidden] and their biases; k from 0.
        info: `text_width` Ht, `vision_width` Hv (each None where the file does not say), `dropped_keys` (a
            count), `dtypes` as stored, `class_count` (None where unknown), for CoCoOp `embedding_width` D;
            from a file also `epoch` and `val_result` where they are plain numbers, and `ignored_objects`.
    """

    method: str
    config: dict[str, Any]
    parameters: dict[str, torch.Tensor]
    info: dict[str, Any]


def convert(
    state_dict: Mapping[str, object], *, init_text: str = "a photo of a", method: str | None = None
) -> ImportedPrompts:
    """Read the method, its settings and its learned tensors from a state dict of the reference code.

    How the method is told: coupling functions make it `maple`; a meta-network `cocoop`; vision prompts
    `independent_vl` with a text prompt and `vpt` without; deep text prompts `deep_language`, since the
    reference's language prompting is IVLP at vision depth 0, where it creates no vision key. A text prompt
    alone is `coop`, unless the frozen CLIP is in the file: CoOp saves its prompt learner only, so that is
    `deep_language` of depth 1. The two compute the same, and `method` can ask for either.

    KgCoOp saves a bias and a layer that it never uses: they make it `kgcoop`, and are dropped. ProGrad's files are
    CoOp's, and PromptSRC's are those of IVLP (with a second, frozen image tower): they compute the same, so they are
    read as `coop` and `independent_vl` unless `method` asks for `prograd` or `promptsrc`.

    Args:
        state_dict: the learned tensors, any floating dtype; `module.` in front of keys is accepted, frozen
            CLIP weights and the `token_prefix` / `token_suffix` of the training classes are dropped.
        init_text: the sentence the prompt was initialised from (the reference's CTX_INIT), which the file does
            not record. It is kept where the reference would have used it: for up to 4 tokens in `maple`,
            `independent_vl` and `deep_language`, whose remaining words stay fixed; for exactly as many tokens
            as words in `coop` (shared context) and `cocoop`. Otherwise the prompt was random, and it is "".
        method: the expected method; None takes what the keys say.

    Returns:
        The prompts. CoOp's `class_token_position` is not recorded in the file; "end", its default, is given.

    Raises:
        ConfigError: `method` or `init_text` is unknown.
        CheckpointError: the keys belong to another method or to none, a layer is missing, widths or lengths
            disagree, or a tensor is not made of finite floating-point numbers.

    Source: muzairkhattak/multimodal-prompt-learning@69bce21: trainers/maple.py:84-117; departs from
        :301-333, which loads with `strict=False` and leaves missing layers random. trainers/coop.py:76-100,
        trainers/cocoop.py:79-104.
    """
    if method is not None and method not in METHODS:
        raise ConfigError(one_of("method", method, METHODS))
    if not isinstance(init_text, str):
        raise ConfigError(f"init_text is {init_text!r}; give the words the prompt started from, or an empty string")
    found = sort_keys(state_dict)
    name = _method(found, method)
    words = " ".join(init_text.replace("_", " ").split())
    builders = {"maple": _maple, "cocoop": _cocoop, "coop": _coop, "vpt": _vpt, "kgcoop": _kgcoop, "prograd": _prograd}
    builder = builders.get(name)
    config, parameters = builder(found, words) if builder else _independent(found, words, name)
    text, vision = parameters.get("text_prompt.0"), parameters.get("vision_prompt.0")
    vision_width = vision.shape[-1] if vision is not None else None
    info: dict[str, Any] = {
        "text_width": text.shape[-1] if text is not None else None,
        "vision_width": parameters["coupling.0.bias"].shape[0] if name == "maple" else vision_width,
        "dropped_keys": len(found.dropped),
        "dtypes": sorted(found.dtypes),
        "class_count": found.class_count,
    }
    if name == "cocoop":
        info["embedding_width"] = parameters["meta_net.0.weight"].shape[1]
    return ImportedPrompts(name, config, parameters, info)


def _method(found: Found, expected: str | None) -> str:
    """The method that the keys make, checked against the `expected` one."""
    text, deep = found.layers.get("text_prompt", {}), set(found.layers.get("text_prompt", {})) - {0}
    vision = bool(found.layers.get("vision_prompt"))
    coupled = "coupling" in found.linears or "compound" in found.layers
    meta_net = "meta_net" in found.linears
    if not found.keys:
        raise CheckpointError(
            "no learned prompt among the keys; the state dict of MaPLe, IVLP, VPT, CoOp or CoCoOp has"
            " `prompt_learner.ctx`, `image_encoder.VPT` or `ctx`"
        )
    candidates: tuple[str, ...]
    if found.kgcoop:
        candidates = ("kgcoop",)
    elif coupled:
        candidates = ("maple",)
    elif meta_net:
        candidates = ("cocoop",)
    elif vision:
        candidates = ("independent_vl", "promptsrc") if text else ("vpt",)
    elif deep:
        candidates = ("deep_language",)
    else:
        candidates = ("deep_language", "coop") if found.whole_model else ("coop", "prograd", "deep_language")
        if text[0].ndim == 3:
            candidates = ("coop",)
    _refuse_mixture(found, candidates[0])
    if expected is not None and expected not in candidates:
        raise CheckpointError(
            f"the keys are those of {' or '.join(candidates)}, not of {expected!r}; leave the method out or name that"
        )
    return expected or candidates[0]


def _refuse_mixture(found: Found, method: str) -> None:
    own = {"maple": {"coupling", "compound"}, "cocoop": {"meta_net"}, "kgcoop": {"meta_net"}}.get(method)
    if own is None:
        return
    for (kind, layer, _), key in found.keys.items():
        if kind not in own and (kind, layer) != ("text_prompt", 0):
            raise CheckpointError(f"{key!r} does not belong to {method}, which the other keys make; remove it")


def _maple(found: Found, words: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    prompts = {**found.layers.get("text_prompt", {}), **found.layers.get("compound", {})}
    parameters = _stack(prompts, "text_prompt", "prompt_learner.ctx and prompt_learner.compound_prompts_text")
    coupling = found.linears.get("coupling", {})
    if set(coupling) != set(prompts):
        missing = sorted(set(coupling) ^ set(prompts))
        raise CheckpointError(
            f"{len(prompts)} layers have text prompts and {len(coupling)} a coupling function; layers {missing} have"
            " only one of the two. Each needs both"
        )
    text_width = prompts[0].shape[1]
    vision_width = _linear(coupling[0], "coupling function of layer 0", None, text_width)
    for layer in sorted(coupling):
        _linear(coupling[layer], f"coupling function of layer {layer}", vision_width, text_width)
        parameters |= {f"coupling.{layer}.{part}": coupling[layer][part] for part in ("weight", "bias")}
    length = prompts[0].shape[0]
    config = {
        "prompt_length": length,
        "prompt_depth": len(prompts),
        "init_text": words if length <= _MAX_WORD_PROMPT else "",
        "coupling_sharing": "per_layer",
    }
    return config, parameters


def _independent(found: Found, words: str, method: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """IVLP, and language prompting, which is IVLP without a vision prompt."""
    text, vision = found.layers.get("text_prompt", {}), found.layers.get("vision_prompt", {})
    parameters = _stack(text, "text_prompt", "prompt_learner.ctx and text_encoder...VPT_shallow")
    length = text[0].shape[0]
    init_text = words if length <= _MAX_WORD_PROMPT else ""
    if method == "deep_language":
        return {"prompt_length": length, "prompt_depth": len(text), "init_text": init_text}, parameters
    parameters |= _stack(vision, "vision_prompt", "image_encoder.VPT and image_encoder...VPT_shallow")
    config = {
        "text_prompt_length": length,
        "vision_prompt_length": vision[0].shape[0],
        "text_prompt_depth": len(text),
        "vision_prompt_depth": len(vision),
        "init_text": init_text,
    }
    return config, parameters


def _vpt(found: Found, _words: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    vision = found.layers["vision_prompt"]
    parameters = _stack(vision, "vision_prompt", "image_encoder.VPT and image_encoder...VPT_shallow")
    config = {
        "vision_prompt_length": vision[0].shape[0],
        "vision_prompt_depth": len(vision),
        "template": TEMPLATE,
    }
    return config, parameters


def _coop(found: Found, words: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    context = found.layers["text_prompt"][0]
    if context.ndim not in (2, 3):
        raise CheckpointError(f"ctx has shape {list(context.shape)}; allowed are [P, Ht] and [C, P, Ht]")
    length, specific = context.shape[-2], context.ndim == 3
    if specific and found.class_count not in (None, context.shape[0]):
        raise CheckpointError(
            f"ctx has {context.shape[0]} classes, but the stored token vectors {found.class_count}; they must agree"
        )
    config = {
        "prompt_length": length,
        "class_specific": specific,
        "class_token_position": "end",
        "init_text": "" if specific else _words_of_length(words, length),
    }
    return config, {"text_prompt.0": context}


def _kgcoop(found: Found, words: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    parameters = _stack(found.layers.get("text_prompt", {}), "text_prompt", "prompt_learner.ctx")
    length = parameters["text_prompt.0"].shape[0]
    return {"prompt_length": length, "init_text": _words_of_length(words, length)}, parameters


def _prograd(found: Found, words: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """ProGrad's words are those of its teacher's sentence; with too many of them for the prompt, it was not these."""
    parameters = _stack(found.layers.get("text_prompt", {}), "text_prompt", "ctx")
    length = parameters["text_prompt.0"].shape[0]
    if not 0 < len(words.split()) <= length:
        raise CheckpointError(
            f"a ProGrad prompt of {length} tokens cannot have started from init_text {words!r}; give the words that "
            f"its sentences began with, at most {length}"
        )
    return {"prompt_length": length, "teacher_template": f"{words} {{}}."}, parameters


def _cocoop(found: Found, words: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    parameters = _stack(found.layers.get("text_prompt", {}), "text_prompt", "prompt_learner.ctx")
    length, text_width = parameters["text_prompt.0"].shape
    linears = found.linears["meta_net"]
    if set(linears) != {0, 1}:
        raise CheckpointError(f"the meta-network lacks linear{2 if 0 in linears else 1}; it has linear1 and linear2")
    hidden = _linear(linears[0], "meta_net.linear1", None, None)
    _linear(linears[1], "meta_net.linear2", text_width, hidden)
    width = linears[0]["weight"].shape[1]
    reduction = width // hidden
    if reduction < 1 or width // reduction != hidden:
        raise CheckpointError(
            f"meta_net.linear1 has {hidden} outputs for {width} inputs; the hidden width must be {width} divided by"
            " a whole number and rounded down"
        )
    parameters |= {f"meta_net.{n}.{part}": linears[n][part] for n in (0, 1) for part in ("weight", "bias")}
    config = {
        "prompt_length": length,
        "init_text": _words_of_length(words, length),
        "meta_net_reduction": reduction,
    }
    return config, parameters


def _words_of_length(words: str, length: int) -> str:
    return words if len(words.split()) == length else ""


def _stack(prompts: Mapping[int, torch.Tensor], name: str, source: str) -> dict[str, torch.Tensor]:
    """`name.k` for k in order, after checking that no layer is missing and all have one shape [P, H]."""
    missing = sorted(set(range(max(prompts, default=0) + 1)) - set(prompts))[:20]
    if missing:
        raise CheckpointError(
            f"{name} lacks layer {', '.join(map(str, missing))} of {max(prompts, default=0) + 1} (keys {source});"
            " the file is incomplete"
        )
    shape = list(prompts[0].shape)
    if len(shape) != 2:
        raise CheckpointError(f"{name}.0 has shape {shape}; a prompt is [prompt length, width] (keys {source})")
    for layer, prompt in prompts.items():
        if list(prompt.shape) != shape:
            raise CheckpointError(
                f"{name}.{layer} has shape {list(prompt.shape)}, but {name}.0 has {shape}; all layers have one shape"
            )
    return {f"{name}.{layer}": prompts[layer] for layer in sorted(prompts)}


def _linear(linear: Mapping[str, torch.Tensor], what: str, outputs: int | None, inputs: int | None) -> int:
    """Check a weight [outputs, inputs] and a bias [outputs]; return the number of outputs."""
    absent = sorted({"weight", "bias"} - set(linear))
    if absent:
        raise CheckpointError(f"the {what} has no {absent[0]}; the file is incomplete")
    weight, bias = list(linear["weight"].shape), list(linear["bias"].shape)
    wanted = [outputs if outputs is not None else bias[0] if bias else 0, inputs]
    if len(weight) != 2 or weight[0] != wanted[0] or inputs not in (None, weight[1]) or bias != [weight[0]]:
        expected = f"[{wanted[0]}, {'any' if inputs is None else inputs}]"
        raise CheckpointError(
            f"the {what} has weight {weight} and bias {bias}; {expected} and [{wanted[0]}] are needed"
        )
    return weight[0]
