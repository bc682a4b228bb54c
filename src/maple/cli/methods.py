"""`maple methods`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from maple.clip import Backbone


def methods_command(
    backbone: Annotated[str, typer.Option(help="The CLIP to count on; weights are not needed.")] = "ViT-B-16",
    pretrained: Annotated[
        str | None, typer.Option(help="Which weights. Counting needs none: random, for an architecture's name.")
    ] = None,
) -> None:
    """List the methods: what each is, its presets, and its learned parameters on a backbone."""
    from rich.console import Console

    from maple.clip import load_clip
    from maple.config import preset_names, read_preset, resolve
    from maple.methods import METHODS

    if pretrained is None and "/" not in backbone and not Path(backbone).exists():
        pretrained = "random"
    clip = load_clip(backbone, pretrained)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"learned parameters of each preset on {backbone}:\n")
    presets = [
        (preset, resolve([read_preset(preset), {"backbone": {"name": backbone}}]).method) for preset in preset_names()
    ]
    for name, kind in METHODS.items():
        console.print(f"[bold]{name}[/]  {kind.title} ({kind.paper})\n    {kind.summary}", markup=True)
        for preset, description in presets:
            if description["name"] == name:
                console.print(f"    {preset:<32} {_count(description, clip)}")


def _count(description: dict[str, Any], clip: "Backbone") -> str:
    from maple.errors import MapleError
    from maple.methods import build_method

    try:
        method = build_method(description, clip, ["class"])
    except MapleError as error:
        return str(error)
    return f"{method.parameter_count():>9,}"
