"""Build the documentation site in build/site, with a page for each method.

    pip install '.[docs]'
    python scripts/build_docs.py

The page of a method is made from the method's class, its presets and the published numbers, so it cannot be out of
date. Zensical has no hooks: the pages, and a configuration that lists them, are written to build/ next to a copy of
docs/, and the site is built from there.
"""

import csv
import inspect
import json
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from maple.config import RunSettings, preset_names, read_preset
from maple.methods import METHODS, Method

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build"
PROTOCOLS = {"base-to-novel": "Base-to-novel", "transfer": "Trained on all classes of ImageNet"}
OVERVIEW = '{ "Overview" = "methods.md" },'
SETTINGS = '{ "All settings" = "settings.md" },'


def method_page(name: str) -> str:
    """The Markdown page of one method: paper, file, settings, recipes, published numbers."""
    method = METHODS[name]
    file = Path(inspect.getfile(method)).relative_to(ROOT).as_posix()
    module = file.removeprefix("src/").removesuffix(".py").replace("/", ".")
    lines = [
        f"# {method.title}",
        "",
        f"`{name}`: {method.summary}.",
        "",
        f"- Paper: {method.paper}",
        f"- File: `{file}`",
        f"- Class: `{module}.{method.__name__}`, a [`Method`](../api.md)",
        f"- Can name classes that it was not trained on: {'yes' if method.Settings().supports_new_classes else 'no'}",
        f"- Text features depend on the image: {'yes' if method.classes_depend_on_image else 'no'}",
        "",
        *_settings(method),
        *_presets(name),
        *_published_numbers(name),
    ]
    return "\n".join(lines) + "\n"


def settings_page() -> str:
    """The Markdown page of all settings: of runs, and of each method."""
    lines = [
        "# All settings",
        "",
        "`--set section.key=value` changes one; `maple train FILE` and `--preset FILE` take them from TOML or JSON.",
        "`--print-config` prints what a command would use, as such a file; a run folder is one as well. A preset may",
        "have [rules](new-method.md) for data sets, shots and backbones.",
        "",
    ]
    run = RunSettings.model_fields
    for name, title in {"backbone": "Backbone", "data": "Data", "train": "Training", "evaluate": "Evaluation"}.items():
        kind: type[BaseModel] = run[name].annotation  # type: ignore[assignment]
        lines += [f"## {title}", "", *_table(kind, f"{name}."), ""]
    lines += [
        "## Seed",
        "",
        "`seed`, by default 1, decides the images that are drawn, the first prompts and the order.",
        "",
    ]
    lines += ["## Methods", "", "`method.name` is a name of `maple methods`; the others belong to the method.", ""]
    for name, method in METHODS.items():
        lines += [f"### [{method.title}](methods/{name}.md) (`{name}`)", "", *_settings(method)[2:]]
    return "\n".join(lines) + "\n"


def _settings(method: type[Method]) -> list[str]:
    if not method.Settings.model_fields:
        return ["## Settings", "", "None.", ""]
    # `inspect.getdoc` would fall back on the docstring of the base class
    description = inspect.getdoc(method.Settings) if method.Settings.__doc__ else None
    return ["## Settings", "", *_table(method.Settings), "", *([description, ""] if description else [])]


def _table(settings: type[BaseModel], prefix: str = "") -> list[str]:
    """A table of a section's settings: name, default, what is allowed, and the meaning where it is said."""
    schema = settings.model_json_schema(mode="validation")
    has_meaning = any(field.description for field in settings.model_fields.values())
    lines = [f"| setting | default | allowed |{' meaning |' if has_meaning else ''}", f"|{'---|' * (3 + has_meaning)}"]
    for name, field in settings.model_fields.items():
        default = json.dumps(field.get_default(call_default_factory=True), default=str)
        cells = [f"`{prefix}{name}`", f"`{default}`", _allowed(schema["properties"][name], schema.get("$defs", {}))]
        cells += [" ".join((field.description or "").split())] * has_meaning
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return lines


def _allowed(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What a JSON schema permits, in words."""
    if reference := schema.get("$ref"):
        return _allowed(definitions[reference.rpartition("/")[2]], definitions)
    if options := schema.get("anyOf"):
        return " or ".join(_allowed(option, definitions) for option in options)
    if values := schema.get("enum") or ([schema["const"]] if "const" in schema else None):
        return ", ".join(f"`{value}`" for value in values)
    limits = {
        "minimum": "at least {}",
        "exclusiveMinimum": "above {}",
        "maximum": "at most {}",
        "exclusiveMaximum": "below {}",
    }
    kinds = {"integer": "whole number", "array": "list", "object": "table", "null": "nothing"}
    words = [kinds.get(schema.get("type", ""), schema.get("type", "any value"))]
    words += [text.format(schema[limit]) for limit, text in limits.items() if limit in schema]
    if items := schema.get("items") or (schema.get("prefixItems") or [None])[0]:
        words.append(f"each: {_allowed(items, definitions)}")
    return ", ".join(words)


def _presets(name: str) -> list[str]:
    presets = [preset for preset in preset_names() if read_preset(preset).get("method", {}).get("name") == name]
    lines = ["## Recipes", ""]
    for preset in presets:
        text = (ROOT / "src/maple/presets" / f"{preset}.toml").read_text(encoding="utf-8")
        lines += [f'??? note "{preset}"', "", "    ```toml", *(f"    {line}".rstrip() for line in text.splitlines())]
        lines += ["    ```", ""]
    return lines if presets else [*lines, "None ship with the package; `maple sweep` accepts a file of your own.", ""]


def _published_numbers(name: str) -> list[str]:
    with (resources.files("maple.report") / "published.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == name]
    lines = ["## Published numbers", ""]
    if not rows:
        return [*lines, "None ship with the package.", ""]
    lines += ["From the papers; per cent, on ViT-B/16 with 16 images per class.", ""]
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        selected = [row for row in rows if row["protocol"] == protocol]
        columns = [c for c in ("base", "novel", "harmonic_mean", "accuracy") if any(row[c] for row in selected)]
        header = ["data set", "variant", *(column.replace("_", " ") for column in columns)]
        lines += [f"### {PROTOCOLS[protocol]}", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        for row in selected:
            lines.append(f"| {' | '.join([row['dataset'], row['title'], *(row[column] for column in columns)])} |")
        sources = dict.fromkeys(row["read_in"] for row in selected)
        lines += ["", f"Source: {'; '.join(sources)}.", ""]
    return lines


def write_sources() -> Path:
    """Write the pages and the site's configuration to build/, and return the path of the configuration."""
    pages = BUILD / "docs"
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(ROOT / "docs", pages)
    shutil.copytree(ROOT / "examples", pages / "examples")
    for path in pages.glob("*.md"):
        path.write_text(path.read_text(encoding="utf-8").replace("](../examples/", "](examples/"), encoding="utf-8")
    (pages / "methods").mkdir()
    for name in METHODS:
        (pages / "methods" / f"{name}.md").write_text(method_page(name), encoding="utf-8")
    (pages / "settings.md").write_text(settings_page(), encoding="utf-8")
    entries = [f'{{ "{method.title}" = "methods/{name}.md" }},' for name, method in METHODS.items()]
    config = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    config = config.replace(OVERVIEW, "\n        ".join([OVERVIEW, SETTINGS, *entries]))
    config = config.replace('paths = ["src"]', 'paths = ["../src"]').replace('"scripts/', '"../scripts/')
    path = BUILD / "zensical.toml"
    path.write_text(config, encoding="utf-8")
    return path


if __name__ == "__main__":
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(write_sources())]
    sys.exit(subprocess.call(command))
