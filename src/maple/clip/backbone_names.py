"""How backbones are named, and which of them may be loaded because a file names them.

A prompts file from elsewhere may name any path, repository or size. What it names is loaded only if it is packaged,
published by open_clip under one of its own tags, or was given by this user before: that is recorded in
`$XDG_STATE_HOME/maple/backbones.json`, which may be deleted at any time.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from maple import files
from maple.errors import BackboneError, MapleError, UntrustedBackboneError, shortened
from maple.names import FEATURES
from maple.places import state_folder

# Small architectures for tests and first trials without weights: 64 x 64 pixels, CLIP's vocabulary.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "maple-tiny": {
        "embed_dim": 128,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 64, "layers": 4, "width": 192, "patch_size": 16, "head_width": 64},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 4},
    }
}

# Models that are shipped with the package: name -> folder in open_clip's format under assets/.
PACKAGED = {"maple-small": "small_clip"}

QUICKGELU, GELU = "quickgelu", "gelu"
ASSUMED = "assumed"
"""The activation of weights that were loaded before it was asked for: QuickGELU of a file, else the architecture's."""

HUB = "hf-hub:"
_FOLDER = "local-dir:"
"""What open_clip writes before a folder; it may be left out here."""
_WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")
_MOST_REMEMBERED = 10_000
_given: set[tuple[str, str]] = set()
"""What was given to this process, which also counts where nothing can be written."""


def architecture_name(name: str) -> str:
    """The name of an architecture as open_clip writes it, also of one that is written as OpenAI does.

    Example:
        >>> architecture_name("ViT-B/16"), architecture_name("ViT-L/14@336px")
        ('ViT-B-16', 'ViT-L-14-336')
    """
    return name.replace("/", "-").replace("@336px", "-336")


def is_architecture(name: str) -> bool:
    """Whether `name` is an architecture of open_clip or of this package, or a packaged model."""
    name = architecture_name(name)
    return name in PACKAGED or name in ARCHITECTURES or architecture_config(name) is not None


def architecture_config(name: str) -> dict[str, Any] | None:
    """The configuration of an open_clip architecture; None if `name` is none.

    Where open_clip has an architecture, it can also be named with its activation: ViT-L-16-quickgelu, ViT-L-16-gelu.

    Example:
        >>> architecture_config("ViT-L-16-quickgelu")["quick_gelu"]
        True
    """
    import open_clip  # slow, and the packaged CLIP does without it

    name = architecture_name(name)
    if name in open_clip.list_models():
        config: dict[str, Any] | None = open_clip.get_model_config(name)
        return config
    for activation in (QUICKGELU, GELU):
        plain = name.removesuffix(f"-{activation}")
        if plain != name and plain in open_clip.list_models() and has_clip_blocks(config := architecture_config(plain)):
            return {**(config or {}), "quick_gelu": activation == QUICKGELU}
    return None


def has_clip_blocks(config: Mapping[str, Any] | None) -> bool:
    """Whether the blocks of both towers are open_clip's own, so that their activation is QuickGELU or GELU."""
    vision, text = ((config or {}).get(key) or {} for key in ("vision_cfg", "text_cfg"))
    foreign = vision.get("timm_model_name") or text.get("hf_model_name") or "multimodal_cfg" in (config or {})
    return config is not None and not foreign


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a repository of the hub, OWNER/NAME, rather than a path."""
    is_written_so = re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is not None
    return is_written_so and not name.startswith(".") and not name.endswith(_WEIGHT_SUFFIXES)


def is_text_model_name(name: Any) -> bool:
    """Whether `name` can be a model of the hub, NAME or OWNER/NAME, rather than a path.

    Example:
        >>> is_text_model_name("microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"), is_text_model_name("../bert")
        (True, False)
    """
    if not isinstance(name, str) or len(name) > 96 or ".." in name or "--" in name:
        return False
    return re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name, re.ASCII) is not None


def random_seed(pretrained: str) -> int | None:
    """The seed of `random` (0) or `random:SEED`; None for anything else."""
    kind, _, seed = pretrained.partition(":")
    if kind != "random":
        return None
    if not (seed or "0").isdecimal() or len(seed) > 18:
        raise BackboneError(
            f"pretrained={shortened(pretrained)!r}: the seed must be a whole number, as in random:1 (at most 18 digits)"
        )
    return int(seed or "0")


def with_absolute_paths(name: str, pretrained: str | None) -> tuple[str, str | None]:
    """The same backbone, however a path is written and from which folder; links are kept."""

    def absolute(path: str) -> str:
        full = os.path.abspath(os.path.expanduser(path.removeprefix(_FOLDER)))
        return full if os.path.exists(full) else path

    if not is_architecture(name):
        return (name if name.startswith(HUB) else absolute(name)), pretrained
    if pretrained is None or pretrained.partition(":")[0] == "random" or _tag(name, pretrained):
        return name, pretrained
    return name, absolute(pretrained)


def remember(name: str, pretrained: str | None) -> None:
    """Record that the user gave this backbone; nothing is recorded of those that any file may name."""
    key = _key(name, pretrained)
    if _is_known_to_all(name, pretrained) or key in _given:
        return
    _given.add(key)
    # Without a home that can be written to, the user is asked again.
    with suppress(OSError, NotImplementedError):
        if (record := _record()) is not None and key not in _remembered(record):
            record.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(record.with_suffix(".lock"), timeout=10):
                keys = [*_remembered(record), key][-_MOST_REMEMBERED:]
                files.write_json(record, [{"name": name, "pretrained": weights or None} for name, weights in keys])


def require_trusted(name: str, pretrained: str | None, source: str) -> None:
    """Refuse what `source` names unless it is packaged, published, or was given by the user before.

    Raises:
        UntrustedBackboneError: it is not, or its path does not exist; the message has the ways to continue.
    """
    if _is_known_to_all(name, pretrained):
        return
    key, record = _key(name, pretrained), _record()
    path = (pretrained if is_architecture(name) else name) or ""
    is_path = not path.startswith(HUB) and path.partition(":")[0] != "random"
    is_missing = is_path and os.path.isabs(os.path.expanduser(path)) and not os.path.exists(os.path.expanduser(path))
    if not is_missing and (key in _given or (record is not None and key in _remembered(record))):
        return
    named = " / ".join(repr(shortened(part)) for part in (name, pretrained) if part is not None)
    ways = "name your own copy with backbone=PATH: it is checked to be the same"
    if is_missing:
        raise UntrustedBackboneError(f"{source} names the CLIP {named}, which does not exist here; {ways}")
    relative = f", which was read from {shortened(path)!r}, relative to the folder of the training, or from the hub,"
    raise UntrustedBackboneError(
        f"{source} names the CLIP {named}{relative if is_path and not os.path.isabs(path) else ','} and files may name "
        f"only what is packaged, published by open_clip, or was given here before; {ways}; or accept the one that it "
        "names with trust_backbone=True"
    )


def _tag(architecture: str, pretrained: str) -> dict[str, Any]:
    """What open_clip publishes under a tag; empty if there is no such tag."""
    import open_clip

    return dict(open_clip.get_pretrained_cfg(architecture_name(architecture), pretrained))


def _is_known_to_all(name: str, pretrained: str | None) -> bool:
    if name.startswith(FEATURES):  # a table of numbers, read from files that hold nothing else
        return True
    architecture = architecture_name(name)
    if architecture in ARCHITECTURES or name in PACKAGED:  # small, and part of the package
        return True
    return is_architecture(name) and (pretrained is None or bool(_tag(name, pretrained)))


def _key(name: str, pretrained: str | None) -> tuple[str, str]:
    if is_architecture(name):
        weights = pretrained or ""
        is_random = weights.partition(":")[0] == "random"
        return architecture_name(name), "random" if is_random else os.path.realpath(os.path.expanduser(weights))
    path = os.path.expanduser(name)
    if os.path.isabs(path) or (os.path.exists(path) and not name.startswith(HUB)):
        return os.path.realpath(path), ""
    return (HUB + name.removeprefix(HUB) if is_hub_id(name.removeprefix(HUB)) else name), ""


def _record() -> Path | None:
    """The file of what the user gave; None without a home."""
    state = state_folder()
    return None if state is None else state / "backbones.json"


def _remembered(record: Path) -> list[tuple[str, str]]:
    try:
        entries = files.read_json(record, list)
    except MapleError:  # missing, unreadable or damaged: nothing is remembered
        return []
    keys = ((entry.get("name"), entry.get("pretrained") or "") for entry in entries if isinstance(entry, dict))
    return [(name, weights) for name, weights in keys if isinstance(name, str) and isinstance(weights, str)]
