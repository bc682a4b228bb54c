"""`maple backbones`: which CLIPs are known to work, and which methods run on them."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument

from maple.cli import options

if TYPE_CHECKING:
    from maple.clip.describe import BackboneDescription


def backbones_command(
    name: Annotated[
        str | None,
        Argument(metavar="NAME", help="Describe one: an architecture, hf-hub:OWNER/NAME, a folder or a file."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """List the CLIPs that are known to work: their size, what each is for, and which methods run.

    No weights are loaded but those of a file.
    """
    import json

    from maple.clip.describe import describe_backbone, describe_config
    from maple.clip.known_backbones import KNOWN_BACKBONES

    if name is not None:
        described = describe_backbone(name)
        if as_json:
            typer.echo(json.dumps({"name": name, **_as_json(described)}, indent=1))
        else:
            _print_one(name, described)
        return
    descriptions: dict[str, BackboneDescription] = {}
    for known in KNOWN_BACKBONES:
        if known.name not in descriptions:
            config = known.config
            descriptions[known.name] = (
                describe_backbone(known.name) if config is None else describe_config(config, known.name)
            )
    if as_json:
        for known in KNOWN_BACKBONES:
            about = {"name": known.name, "pretrained": known.pretrained, "subject": known.subject, "use": known.use}
            typer.echo(json.dumps({**about, **_as_json(descriptions[known.name])}))
        return
    subject = ""
    for known in KNOWN_BACKBONES:
        if known.subject != subject:
            subject = known.subject
            options.echo(f"{subject}:")
        described = descriptions[known.name]
        options.echo(f"  {' '.join(filter(None, (known.name, known.pretrained)))}: {known.use}")
        options.echo(
            f"    {described.parameters / 1e6:,.0f} million parameters, {described.image_size[0]} pixels, "
            f"{described.context_length} tokens; {_runs(described)}"
        )
    options.echo(
        "\nGive them as --backbone and --pretrained; a pretrained .pt is a file that you download. Any other open_clip "
        "architecture and tag, repository, folder or file works where its towers permit: `maple backbones NAME`."
    )


def _runs(described: "BackboneDescription") -> str:
    reasons = described.families()
    running = [family for family, reason in reasons.items() if reason is None]
    return "all methods" if len(running) == len(reasons) else f"methods: {', '.join(running)}"


def _print_one(name: str, described: "BackboneDescription") -> None:
    from maple.clip.describe import FAMILIES

    options.echo(f"{name}: {described.parameters:,} parameters, features of {described.embed_dim} numbers")
    side, other = described.image_size
    options.echo(f"  images of {side} x {other} pixels, sentences of at most {described.context_length} tokens")
    for tower, about in (("text", described.text), ("image", described.image)):
        blocks = f", {about.depth} blocks of {about.width} channels" if about.depth else ""
        options.echo(f"  {tower} tower: {about.kind}{blocks}")
    options.echo("\nmethods:")
    for family, reason in described.families().items():
        options.echo(f"  {family} ({FAMILIES[family]}): {'yes' if reason is None else f'no, {reason}'}")


def _as_json(described: "BackboneDescription") -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(described), "methods": described.families()}
