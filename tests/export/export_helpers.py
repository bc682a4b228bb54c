"""Prompts files for tests of exports."""

from pathlib import Path

import torch

from maple import build_method, save_prompts
from maple.clip import Backbone

NAMES = ("red thing", "green_thing", "blue thing")


def write_prompts(folder: Path, tiny: Backbone, description: dict[str, object]) -> Path:
    """A prompts file of a method that has gone some way from where it starts."""
    method = build_method(description, tiny, NAMES)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in method.prompt_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    path = folder / f"{description['name']}.safetensors"
    save_prompts(path, method, {"dataset": "/home/somebody/eurosat"})
    return path
