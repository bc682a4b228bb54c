"""A page that lists prompts by backbone and data set, from an index file that names them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from maple.checkpoint import read_prompts
from maple.config import read_toml_or_json
from maple.data.catalogue import short_name
from maple.data.checks.findings import number_of
from maple.errors import CheckpointError, ConfigError, MapleError, one_of
from maple.inference.sharing import measured_text, measurements_of
from maple.inference.torch_predictor import prompts_file
from maple.methods import describe_methods
from maple.names import repository_of, without_folders
from maple.plugins import code_files, code_title

_ENTRY = ("source", "note")
_SHOWN = 12
_OTHER = "data sets that are not named"


@dataclass(frozen=True)
class Prompts:
    """An entry of a gallery: what its file says, and how it is used.

    Attributes:
        source: as `maple predict` takes it; folders are relative to the folder of the index.
        note: what the index says of it.
        classes: the first class names, and how many there are in all.
        measured: accuracies in words.
        own_code: whether the method needs a file next to the prompts.
    """

    source: str
    note: str
    method: str
    backbone: str
    dataset: str
    classes: tuple[str, ...]
    class_count: int
    shots: str
    parameters: int
    measured: tuple[str, ...]
    own_code: bool


class Unreadable(NamedTuple):
    """An entry that cannot be read, and why."""

    source: str
    reason: str


class Gallery(NamedTuple):
    """A title, prompts by backbone and data set, and entries that cannot be read."""

    title: str
    groups: dict[str, dict[str, list[Prompts]]]
    unreadable: list[Unreadable]


def read_gallery(index: Path, on_entry: Callable[[int, int], None] = lambda _done, _total: None) -> Gallery:
    """Read an index, and the prompts that it names; no backbone is loaded.

    Args:
        index: a TOML or JSON file with a `title`, and for each of `prompts` a `source` (hub:OWNER/NAME, a run folder or
            a prompts file) and, if wanted, a `note`.
        on_entry: called with (entries read, entries in all).

    Raises:
        ConfigError: the index is missing or malformed.

    Example:
        >>> read_gallery(Path("gallery.toml")).groups["ViT-B-16 / openai"].keys()
        dict_keys(['pets'])
    """
    content = read_toml_or_json(index)
    if unknown := content.keys() - {"title", "prompts"}:
        raise ConfigError(f"{index}: {one_of('entry', min(unknown), ('title', 'prompts'))}")
    title, entries = content.get("title", "Prompts"), content.get("prompts")
    if not isinstance(title, str) or not isinstance(entries, list) or not entries:
        raise ConfigError(f"{index}: needs a title, and tables [[prompts]] with source, as in hub:OWNER/NAME, and note")
    groups: dict[str, dict[str, list[Prompts]]] = {}
    unreadable = []
    titles = {name: method.title for name, method in describe_methods().items()}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
            raise ConfigError(f"{index}: prompts[{number}] has no source; give hub:OWNER/NAME, a folder or a file")
        if unknown := entry.keys() - set(_ENTRY):
            raise ConfigError(f"{index}: prompts[{number}]: {one_of('entry', min(unknown), _ENTRY)}")
        source, note = entry["source"], str(entry.get("note", ""))
        try:
            is_on_hub = repository_of(source) is not None
            path = prompts_file(source if is_on_hub else index.parent / Path(source).expanduser())
            prompts = _describe(source, note, path, titles)
            groups.setdefault(prompts.backbone, {}).setdefault(prompts.dataset, []).append(prompts)
        except MapleError as error:
            unreadable.append(Unreadable(source, str(error)))
        on_entry(number + 1, len(entries))
    if not groups:
        raise CheckpointError(f"{index}: no prompts can be read; the first: {unreadable[0].reason}")
    ordered = {backbone: dict(sorted(datasets.items())) for backbone, datasets in sorted(groups.items())}
    return Gallery(title, ordered, unreadable)


def _describe(source: str, note: str, path: Path, titles: Mapping[str, str]) -> Prompts:
    stored = read_prompts(path)
    info, name = stored.info, str(stored.method["name"])
    data: dict[str, Any] = info["data"] if isinstance(info.get("data"), dict) else {}
    dataset = data.get("dataset") or info.get("dataset")
    clip, weights = stored.backbone["name"], stored.backbone["pretrained"]
    clip = without_folders(clip)
    shots = data.get("shots", "")
    return Prompts(
        source=source,
        note=note,
        method=titles.get(name, code_title(name)),
        backbone=f"{clip} / {without_folders(weights)}" if weights else clip,
        dataset=short_name(dataset) if isinstance(dataset, str) and dataset else _OTHER,
        classes=stored.class_names[:_SHOWN],
        class_count=len(stored.class_names),
        shots="all" if shots is None else str(shots),
        parameters=sum(tensor.numel() for tensor in stored.tensors.values()),
        measured=tuple(map(measured_text, measurements_of(info, path.parent))),
        own_code=bool(code_files(stored.method)),
    )


def gallery_page(gallery: Gallery) -> str:
    """The page of a gallery: HTML that needs no other file."""
    from maple.report.page import template_environment

    page: str = template_environment().get_template("gallery.html.j2").render(gallery=gallery, counts=_counts(gallery))
    return page


def _counts(gallery: Gallery) -> str:
    datasets = {dataset for group in gallery.groups.values() for dataset in group}
    prompts = sum(len(entries) for group in gallery.groups.values() for entries in group.values())
    counted = {"entry": prompts, "backbone": len(gallery.groups), "data set": len(datasets)}
    return " · ".join(number_of(count, name, "entries" if name == "entry" else "") for name, count in counted.items())
