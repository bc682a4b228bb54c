"""A page for each method, made from the method itself, its presets and the published numbers, so that none goes stale.

mkdocs calls it as a hook (mkdocs.yml); `page(name)` gives one page's Markdown.
"""

import csv
import inspect
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from maple.config import preset_names, read_preset
from maple.methods import METHODS

ROOT = Path(__file__).parent.parent
SOURCE = "src/maple"
PROTOCOLS = {"base-to-novel": "Base-to-novel", "transfer": "Trained on all classes of ImageNet"}


@cache
def _published() -> tuple[dict[str, str], ...]:
    text = (resources.files("maple.report") / "published.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))


def page(name: str) -> str:
    """The page of one method: paper, file, settings, presets, published numbers."""
    kind = METHODS[name]
    file = Path(inspect.getfile(kind)).relative_to(ROOT).as_posix()
    module = file.removeprefix("src/").removesuffix(".py").replace("/", ".")
    lines = [
        f"# {kind.title}",
        "",
        f"`{name}`: {kind.summary}.",
        "",
        f"- Paper: {kind.paper}",
        f"- File: `{file}`",
        f"- Class: `{module}.{kind.__name__}`; what it can override is in [the API](../api.md)",
        f"- Can name classes that it was not trained on: {_speaks(kind)}",
        f"- Text features that depend on the image: {'yes' if kind.classes_depend_on_image else 'no'}",
        "",
        *_settings(kind),
        *_presets(name),
        *_numbers(name),
    ]
    return "\n".join(lines) + "\n"


def _speaks(kind: Any) -> str:
    """Whether a method can speak of new classes under its default settings."""
    return "yes" if kind.Settings().supports_new_classes else "no"


def _settings(kind: Any) -> list[str]:
    fields = kind.Settings.model_fields
    if not fields:
        return ["## Settings", "", "None.", ""]
    rows = []
    for name, field in fields.items():
        allowed = inspect.formatannotation(field.annotation).replace("typing.", "").replace("|", "or")
        rows.append(f"| `{name}` | `{field.get_default(call_default_factory=True)!r}` | {allowed} |")
    said = inspect.getdoc(kind.Settings) if kind.Settings.__doc__ else None
    lines = ["## Settings", "", "| setting | default | kind |", "|---|---|---|", *rows, ""]
    return [*lines, said, ""] if said else lines


def _presets(name: str) -> list[str]:
    found = [preset for preset in preset_names() if read_preset(preset).get("method", {}).get("name") == name]
    lines = ["## Recipes", ""]
    for preset in found:
        text = (ROOT / SOURCE / "presets" / f"{preset}.toml").read_text(encoding="utf-8")
        lines += [f'??? note "{preset}"', "", "    ```toml", *(f"    {line}".rstrip() for line in text.splitlines())]
        lines += ["    ```", ""]
    return lines if found else [*lines, "None: `maple sweep` takes a file of your own.", ""]


def _numbers(name: str) -> list[str]:
    rows = [row for row in _published() if row["method"] == name]
    lines = ["## Published numbers", ""]
    if not rows:
        return [*lines, "None ship with the package.", ""]
    lines += ["Per cent, on ViT-B/16 with 16 images per class. They are the papers', not ours.", ""]
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        chosen = [row for row in rows if row["protocol"] == protocol]
        columns = [c for c in ("base", "novel", "harmonic_mean", "accuracy") if any(row[c] for row in chosen)]
        lines += [f"### {PROTOCOLS[protocol]}", ""]
        head = ["data set", "variant", *(column.replace("_", " ") for column in columns)]
        lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for row in chosen:
            values = [row["dataset"], row["title"], *(row[column] for column in columns)]
            lines.append(f"| {' | '.join(values)} |")
        read_in = dict.fromkeys(row["read_in"] for row in chosen)
        lines += ["", f"Read in: {'; '.join(read_in)}.", ""]
    return lines


def on_config(config: Any) -> Any:
    """Put a page for each method below "Methods"."""
    for entry in config["nav"]:
        if isinstance(entry, dict) and isinstance(entry.get("Methods"), list):
            entry["Methods"] += [{kind.title: f"methods/{name}.md"} for name, kind in METHODS.items()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, which are in no folder."""
    from mkdocs.structure.files import File

    for name in METHODS:
        files.append(File.generated(config, f"methods/{name}.md", content=page(name)))
    return files
