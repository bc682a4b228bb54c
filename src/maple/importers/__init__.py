"""Published checkpoints of MaPLe, IVLP, VPT, language prompting, CoOp, CoCoOp, KgCoOp, ProGrad and PromptSRC, read
without running them.

`maple.archives` reads the files, `keys` knows the names in the state dicts, and `convert` turns them into the
parameters and settings of this package.
"""

import os
from dataclasses import replace
from typing import Any

import torch

from maple.archives.torch_file import read_with_ignored
from maple.archives.unpickle import Placeholder
from maple.errors import CheckpointError, UnsafeCheckpointError
from maple.importers.convert import METHODS, ImportedPrompts, convert

__all__ = ["METHODS", "ImportedPrompts", "convert", "import_checkpoint"]


def import_checkpoint(
    path: str | os.PathLike[str], *, init_text: str = "a photo of a", method: str | None = None
) -> ImportedPrompts:
    """Read a published `model.pth.tar-N` and convert it; nothing in the file is run.

    Args:
        path: the checkpoint, or a bare state dict saved with `torch.save`.
        init_text: the sentence the prompt was initialised from, see `convert`.
        method: the expected method; None takes what the keys say.

    Returns:
        The prompts; `info` also has `epoch` and `val_result` where they are plain numbers, and
        `ignored_objects`, the sorted names of the classes and functions that were left out.

    Raises:
        ConfigError: `method` or `init_text` is unknown.
        CheckpointError: the file cannot be read, or is not what the reference code writes.
        UnsafeCheckpointError: the state dict or a tensor of it would come from running code.

    Source: KaiyangZhou/Dassl.pytorch@c61a1b5: dassl/engine/trainer.py (`save_model`: the keys), and
        dassl/optim/lr_scheduler.py:22 (`_BaseWarmupScheduler`; its `successor` is a live scheduler that holds
        a live optimizer).
    """
    checkpoint, ignored = read_with_ignored(path)
    try:
        imported = convert(_state_dict(checkpoint), init_text=init_text, method=method)
    except CheckpointError as error:
        raise type(error)(f"{os.fspath(path)}: {error}") from error
    plain = {key: checkpoint[key] for key in ("epoch", "val_result") if type(checkpoint.get(key)) in (int, float)}
    return replace(imported, info={**imported.info, **plain, "ignored_objects": list(ignored)})


def _state_dict(checkpoint: dict[str, Any]) -> dict[str, Any]:
    if "state_dict" not in checkpoint and any(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        return checkpoint
    state_dict = checkpoint.get("state_dict")
    if isinstance(state_dict, Placeholder):
        raise UnsafeCheckpointError(f"its state_dict would come from running {state_dict.origin}; nothing was run")
    if not isinstance(state_dict, dict):
        keys = ", ".join(f"{key!r:.40}" for key in list(checkpoint)[:8])
        raise CheckpointError(f"has no state_dict, only the keys: {keys or 'none'}; give a `model.pth.tar-N`")
    return state_dict
