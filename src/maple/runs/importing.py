"""Write a run folder for prompts that were learned by other code."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from maple import files
from maple.checkpoint import put_parameters, save_prompts
from maple.config import RunSettings
from maple.errors import ConfigError
from maple.methods import Method, build_method
from maple.runs.spec import complete, open_backbone


def write_imported(
    settings: RunSettings,
    parameters: Mapping[str, Tensor],
    class_names: Sequence[str],
    folder: Path,
    *,
    info: Mapping[str, Any],
) -> Method:
    """Put `parameters` on the run's backbone and write a finished run for `maple evaluate`.

    Nothing is written unless every parameter fits the method and the backbone.

    Raises:
        ConfigError: the folder exists already, or the settings do not fit the backbone.
        CheckpointError: a parameter is missing, unknown, or of another shape (another backbone's width, say).

    Example:
        >>> write_imported(settings, learned.tensors, ["cat", "dog"], Path("runs/imported"), info={})
    """
    if (folder / "config.json").exists():
        raise ConfigError(f"{folder} is already a run; choose another --output")
    settings = complete(settings)
    backbone = open_backbone(settings, "cpu")
    method = build_method(settings.method, backbone, class_names)
    put_parameters(method, parameters, source=f"the imported checkpoint on {backbone.name}")
    save_prompts(folder / "prompts.safetensors", method, info)
    files.write_json(folder / "config.json", settings.model_dump(mode="json"))
    return method
