"""Convert published state dicts to the names, settings and parameters of this package's methods."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from maple.archives.torch_file import read_with_ignored
from maple.archives.unpickle import Placeholder
from maple.errors import CheckpointError, ConfigError, UnsafeCheckpointError, one_of
from maple.importers.frozen_parts import FrozenParts, frozen_parts
from maple.importers.keys import Kind, LearnedTensors, sort_keys
from maple.importers.whole_tensors import lora_tensors, rename_tensors, split_head

IMPORTABLE = (
    *("maple", "independent_vl", "deep_language", "vpt", "coop", "cocoop", "kgcoop", "prograd", "promptsrc", "tcp"),
    *("dept", "mma", "mmapp", "mmrl", "mmrlpp", "clip_lora", "clap"),
)
SAME_KEYS = {"mma": "mmapp"}
"""Methods whose files have the keys of another one but predict otherwise, by the method that is assumed."""
TEMPLATE = "a photo of a {}."
# The published code initialises longer prompts at random, whatever its CTX_INIT.
_LONGEST_FROM_WORDS = 4
_PROMPT_KEYS = {
    "text_prompt": "prompt_learner.ctx, prompt_learner.compound_prompts_text or text_encoder...VPT_shallow",
    "vision_prompt": "image_encoder.VPT or image_encoder...VPT_shallow",
}


@dataclass(frozen=True)
class ImportedPrompts:
    """The content of a published checkpoint.

    Attributes:
        method: one of `IMPORTABLE`.
        config: the settings of that method, by field name.
        parameters: float32, contiguous, owning their memory: `text_prompt.k` [P, Ht] (CoOp's may be [C, P, Ht]),
            `vision_prompt.k` [P, Hv], `coupling.k.weight` [Hv, Ht], `coupling.k.bias` [Hv], `meta_net.0.weight`
            [hidden, D], `meta_net.1.weight` [Ht, hidden] (TCP: [P x Ht, hidden]) and their biases; k from 0. Those of
            the methods inside the blocks are named as by their class.
        info: `text_width` Ht, `vision_width` Hv, `class_count` (each None where unknown), `dropped_keys` (a count),
            `dtypes` as stored, for CoCoOp `embedding_width` D; from a file also `epoch` and `val_result` where they are
            plain numbers, and `ignored_objects`, the sorted names of the classes and functions that were left out.
        frozen: of a file, by which its backbone and its class names can be checked.

    Example:
        >>> method = build_method({"name": imported.method, **imported.config}, backbone, class_names)
    """

    method: str
    config: dict[str, Any]
    parameters: dict[str, Tensor]
    info: dict[str, Any]
    frozen: FrozenParts = field(default_factory=FrozenParts)


def import_checkpoint(
    path: str | os.PathLike[str], *, init_text: str = "a photo of a", method: str | None = None
) -> ImportedPrompts:
    """Read a published `model.pth.tar-N` and convert it; nothing in the file is executed.

    The file may also be a bare state dict saved with `torch.save`. `init_text` and `method` are those of `convert`.

    Raises:
        ConfigError: `method` or `init_text` is unknown.
        CheckpointError: the file cannot be read, or the published code does not write such files.
        UnsafeCheckpointError: the state dict or one of its tensors would be the result of running code.

    Example:
        >>> imported = import_checkpoint("model.pth.tar-5")
        >>> imported.method, imported.config["prompt_length"]
        ('maple', 2)

    Source: KaiyangZhou/Dassl.pytorch@c61a1b5: dassl/engine/trainer.py (`save_model`: the keys), and
        dassl/optim/lr_scheduler.py:22 (`_BaseWarmupScheduler`; its `successor` is a live scheduler that holds
        a live optimizer).
    """
    checkpoint, ignored = read_with_ignored(path)
    bare = "state_dict" not in checkpoint and any(isinstance(value, Tensor) for value in checkpoint.values())
    state_dict = checkpoint if bare else checkpoint.get("state_dict")
    try:
        if isinstance(state_dict, Placeholder):
            raise UnsafeCheckpointError(f"its state_dict would come from running {state_dict.origin}; nothing was run")
        if state_dict is None and isinstance(checkpoint.get("weights"), dict):
            state_dict = checkpoint  # of CLIP-LoRA
        if not isinstance(state_dict, dict):
            keys = ", ".join(f"{key!r:.40}" for key in list(checkpoint)[:8]) or "none"
            raise CheckpointError(
                f"has no state_dict, only the keys: {keys}; give a `model.pth.tar-N`, or CLIP-LoRA's file"
            )
        imported = convert(state_dict, init_text=init_text, method=method)
    except CheckpointError as error:
        raise type(error)(f"{os.fspath(path)}: {error}") from error
    numbers = {key: checkpoint[key] for key in ("epoch", "val_result") if type(checkpoint.get(key)) in (int, float)}
    info = {**imported.info, **numbers, "ignored_objects": list(ignored)}
    return replace(imported, info=info, frozen=frozen_parts(state_dict))


def convert(
    state_dict: Mapping[str, object], *, init_text: str = "a photo of a", method: str | None = None
) -> ImportedPrompts:
    """Convert a published state dict: recognise the method, its settings and its learned tensors.

    How the method is recognised: coupling functions make it `maple`; a meta-network `cocoop`; vision prompts
    `independent_vl` with a text prompt and `vpt` without; deep text prompts `deep_language`, since the
    reference's language prompting is IVLP at vision depth 0, where it creates no vision key. A text prompt
    alone is `coop`, unless the frozen CLIP is in the file: CoOp saves its prompt learner only, so that is
    `deep_language` of depth 1. The two compute the same, and `method` can select either.

    KgCoOp saves a bias and a layer that it never uses: they make it `kgcoop`, and are dropped. ProGrad's files are
    CoOp's, and PromptSRC's are those of IVLP (with a second, frozen image tower): they compute the same, so they are
    read as `coop` and `independent_vl` unless `method` is `prograd` or `promptsrc`. Likewise MMA++'s files are MMA's.
    DePT's head makes it `dept`, on the method that the other keys belong to.
    TCP's meta-network, unlike CoCoOp's, gives a token for each one that is learned.

    Args:
        state_dict: the learned tensors, any floating dtype; `module.` in front of keys is accepted, frozen
            CLIP weights and the `token_prefix` / `token_suffix` of the training classes are dropped.
        init_text: the sentence the prompt was initialised from (the reference's CTX_INIT), which the file does
            not record. It is kept where the reference would have used it: for up to 4 tokens in `maple`,
            `independent_vl` and `deep_language`, whose remaining words stay fixed; for exactly as many tokens
            as words in `coop` (shared context) and `cocoop`. Otherwise the prompt was random, and it is "".
        method: the expected method; None recognises it by the keys.

    CoOp's `class_token_position` is not recorded in the file; "end", its default, is given.

    Raises:
        ConfigError: `method` or `init_text` is unknown.
        CheckpointError: the keys belong to another method or to none, a layer is missing, widths or lengths
            disagree, or a tensor does not consist of finite floating-point numbers.

    Source: muzairkhattak/multimodal-prompt-learning@69bce21: trainers/maple.py:84-117; departs from
        :301-333, which loads with `strict=False` and leaves missing layers random. trainers/coop.py:76-100,
        trainers/cocoop.py:79-104.
    """
    if method is not None and method not in IMPORTABLE:
        raise ConfigError(one_of("method", method, IMPORTABLE))
    if not isinstance(init_text, str):
        raise ConfigError(f"init_text is {init_text!r}; give the words the prompt started from, or an empty string")
    weights, metadata = state_dict.get("weights"), state_dict.get("metadata")
    if isinstance(weights, Mapping):
        if method not in (None, "clip_lora"):
            raise CheckpointError(f"the file is one of CLIP-LoRA, not of {method!r}; leave the method out")
        return ImportedPrompts(*lora_tensors(weights, metadata if isinstance(metadata, Mapping) else {}))
    if renamed := rename_tensors(state_dict, method):
        return ImportedPrompts(*renamed)
    rest, head = split_head(state_dict)
    if head:
        return _with_head(rest, head, init_text, method)
    if method == "dept":
        raise CheckpointError("the keys are not those of DePT: its head, linear_probe_proj, is missing")
    learned = sort_keys(state_dict)
    name = _method_name(learned, method)
    parameters = _parameters(learned, name)
    config = _settings(name, parameters, " ".join(init_text.replace("_", " ").split()))
    text, vision = parameters.get("text_prompt.0"), parameters.get("vision_prompt.0", parameters.get("coupling.0.bias"))
    info: dict[str, Any] = {
        "text_width": None if text is None else text.shape[-1],
        "vision_width": None if vision is None else vision.shape[-1],
        "dropped_keys": len(learned.dropped),
        "dtypes": sorted(learned.dtypes),
        "class_count": learned.class_count,
    }
    if name in ("cocoop", "tcp"):
        info["embedding_width"] = parameters["meta_net.0.weight"].shape[1]
    return ImportedPrompts(name, config, parameters, info)


def _with_head(
    rest: Mapping[str, object], head: dict[str, Tensor], init_text: str, method: str | None
) -> ImportedPrompts:
    """DePT's checkpoint: its head, and the rest, which is its base method's."""
    if method not in (None, "dept"):
        raise CheckpointError(f"the keys are those of dept, not of {method!r}; leave the method out or name that")
    base = convert(rest, init_text=init_text)
    if base.method == "deep_language" and base.config["prompt_depth"] == 1:
        base = convert(rest, init_text=init_text, method="coop")  # DePT saves the frozen CLIP with CoOp's prompt, too
    config = {"base_method": base.method, **base.config, "film": "film_image.scale" in head}
    info = {**base.info, "class_count": len(head["head.weight"]), "embedding_width": head["head.weight"].shape[1]}
    return ImportedPrompts("dept", config, base.parameters | head, info)


def _method_name(learned: LearnedTensors, expected: str | None) -> str:
    """The method that the keys belong to, checked against the `expected` one."""
    if not learned.keys:
        raise CheckpointError(
            "no learned prompt among the keys; the state dict of MaPLe, IVLP, VPT, CoOp or CoCoOp has"
            " `prompt_learner.ctx`, `image_encoder.VPT` or `ctx`"
        )
    kinds = {kind for kind, _, _ in learned.keys}
    text = learned.prompts("text_prompt")
    candidates: tuple[str, ...]
    allowed: set[Kind] | None = None  # in addition to the text prompt of the first layer; None: any
    if learned.kgcoop:
        candidates, allowed = ("kgcoop",), {"meta_net"}
    elif kinds & {"coupling", "deep_text_prompt"}:
        candidates, allowed = ("maple",), {"coupling", "deep_text_prompt"}
    elif "meta_net" in kinds:
        second = learned.tensors.get(("meta_net", 1, "bias"))
        several = 0 in text and text[0].ndim == 2 and len(text[0]) > 1
        per_token = several and second is not None and list(second.shape) == [text[0].numel()]
        candidates, allowed = ("tcp" if per_token else "cocoop",), {"meta_net"}
    elif "vision_prompt" in kinds:
        candidates = ("independent_vl", "promptsrc") if text else ("vpt",)
    elif text.keys() - {0}:
        candidates = ("deep_language",)
    elif text[0].ndim == 3:
        candidates = ("coop",)
    else:
        candidates = ("deep_language", "coop") if learned.whole_model else ("coop", "prograd", "deep_language")
    for (kind, layer, _), key in learned.keys.items():
        if allowed is not None and kind not in allowed and (kind, layer) != ("text_prompt", 0):
            raise CheckpointError(f"{key!r} does not belong to {candidates[0]}, as the other keys do; remove it")
    if expected is not None and expected not in candidates:
        raise CheckpointError(
            f"the keys are those of {' or '.join(candidates)}, not of {expected!r}; leave the method out or name that"
        )
    return expected or candidates[0]


def _parameters(learned: LearnedTensors, name: str) -> dict[str, Tensor]:
    """The parameters of method `name` by contract name, after checking that they are complete and fit together."""
    text = learned.prompts("text_prompt", "deep_text_prompt")
    if name == "coop":
        context, classes = text[0], learned.class_count
        if context.ndim not in (2, 3):
            raise CheckpointError(f"ctx has shape {list(context.shape)}; allowed are [P, Ht] and [C, P, Ht]")
        if context.ndim == 3 and classes not in (None, len(context)):
            problem = f"ctx has {len(context)} classes, but the stored token vectors {classes}"
            raise CheckpointError(f"{problem}; they must agree")
        return {"text_prompt.0": context}
    parameters = {} if name == "vpt" else _stack(text, "text_prompt")
    if name in ("vpt", "independent_vl", "promptsrc"):
        parameters |= _stack(learned.prompts("vision_prompt"), "vision_prompt")
    if name == "maple":
        coupling, vision_width = learned.linears("coupling"), None
        if set(coupling) != set(text):
            raise CheckpointError(
                f"{len(text)} layers have text prompts and {len(coupling)} a coupling function; layers "
                f"{sorted(set(coupling) ^ set(text))} have only one of the two. Each needs both"
            )
        for layer, linear in sorted(coupling.items()):
            vision_width = _check_linear(linear, f"coupling function of layer {layer}", vision_width, text[0].shape[1])
            parameters |= {f"coupling.{layer}.{part}": tensor for part, tensor in linear.items()}
    elif name in ("cocoop", "tcp"):
        meta_net = learned.linears("meta_net")
        if missing := {0, 1} - set(meta_net):
            raise CheckpointError(f"the meta-network lacks linear{min(missing) + 1}; it has linear1 and linear2")
        hidden = _check_linear(meta_net[0], "meta_net.linear1", None, None)
        tokens = len(text[0]) if name == "tcp" else 1
        _check_linear(meta_net[1], "meta_net.linear2", tokens * text[0].shape[1], hidden)
        for layer, linear in meta_net.items():
            parameters |= {f"meta_net.{layer}.{part}": tensor for part, tensor in linear.items()}
    return parameters


def _settings(name: str, parameters: Mapping[str, Tensor], words: str) -> dict[str, Any]:
    """The settings of method `name` that `parameters` imply, for prompts that were initialised from `words`."""
    depths = {kind: sum(key.startswith(kind) for key in parameters) for kind in ("text_prompt", "vision_prompt")}
    lengths = {kind: parameters[f"{kind}.0"].shape[-2] for kind, depth in depths.items() if depth}
    length, depth = lengths.get("text_prompt", 0), depths["text_prompt"]
    first_words = words if length <= _LONGEST_FROM_WORDS else ""
    all_words = words if len(words.split()) == length else ""
    vision = {"vision_prompt_length": lengths.get("vision_prompt"), "vision_prompt_depth": depths["vision_prompt"]}
    match name:
        case "maple":
            shape = {"prompt_length": length, "prompt_depth": depth}
            return {**shape, "init_text": first_words, "coupling_sharing": "per_layer"}
        case "independent_vl" | "promptsrc":
            return {"text_prompt_length": length, "text_prompt_depth": depth, **vision, "init_text": first_words}
        case "deep_language":
            return {"prompt_length": length, "prompt_depth": depth, "init_text": first_words}
        case "vpt":
            return {**vision, "template": TEMPLATE}
        case "coop":
            specific = parameters["text_prompt.0"].ndim == 3
            shape = {"prompt_length": length, "class_specific": specific}
            return {**shape, "class_token_position": "end", "init_text": "" if specific else all_words}
        case "kgcoop":
            return {"prompt_length": length, "init_text": all_words}
        case "prograd":
            # Its prompt starts at the words of its teacher's sentence, so it cannot be shorter than these.
            if not 0 < len(words.split()) <= length:
                raise CheckpointError(
                    f"a ProGrad prompt of {length} tokens cannot have started from init_text {words!r}; give the words "
                    f"that its sentences began with, at most {length}"
                )
            return {"prompt_length": length, "teacher_template": f"{words} {{}}."}
        case "cocoop" | "tcp":
            hidden, width = parameters["meta_net.0.weight"].shape
            reduction = width // hidden
            if reduction < 1 or width // reduction != hidden:
                problem = f"meta_net.linear1 has {hidden} outputs for {width} inputs"
                need = f"the hidden width must be {width} divided by a whole number and rounded down"
                raise CheckpointError(f"{problem}; {need}")
            start = all_words if name == "cocoop" else ""
            return {"prompt_length": length, "init_text": start, "meta_net_reduction": reduction}
    raise AssertionError(name)  # it is one of IMPORTABLE


def _stack(prompts: Mapping[int, Tensor], name: str) -> dict[str, Tensor]:
    """`name.k` for k in order, after checking that no layer is missing and all have one shape [P, H]."""
    layers = max(prompts, default=0) + 1
    keys = _PROMPT_KEYS[name]
    if missing := sorted(set(range(layers)) - set(prompts))[:20]:
        raise CheckpointError(
            f"{name} lacks layer {', '.join(map(str, missing))} of {layers} (keys {keys}); the file is incomplete"
        )
    shape = list(prompts[0].shape)
    if len(shape) != 2:
        raise CheckpointError(f"{name}.0 has shape {shape}; a prompt is [prompt length, width] (keys {keys})")
    for layer, prompt in prompts.items():
        if list(prompt.shape) != shape:
            raise CheckpointError(
                f"{name}.{layer} has shape {list(prompt.shape)}, but {name}.0 has {shape}; all layers have one shape"
            )
    return {f"{name}.{layer}": prompts[layer] for layer in range(layers)}


def _check_linear(linear: Mapping[str, Tensor], name: str, outputs: int | None, inputs: int | None) -> int:
    """Check a weight [outputs, inputs] and a bias [outputs], None for any; return the number of outputs."""
    if absent := sorted({"weight", "bias"} - set(linear)):
        raise CheckpointError(f"the {name} has no {absent[0]}; the file is incomplete")
    weight, bias = list(linear["weight"].shape), list(linear["bias"].shape)
    expected = outputs if outputs is not None else bias[0] if bias else 0
    if len(weight) != 2 or weight[0] != expected or inputs not in (None, weight[1]) or bias != [weight[0]]:
        raise CheckpointError(
            f"the {name} has weight {weight} and bias {bias}; [{expected}, {'any' if inputs is None else inputs}] and "
            f"[{expected}] are needed"
        )
    return weight[0]
