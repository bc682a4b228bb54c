"""What is given away with prompts: a model card, what was measured, and no path of the machine of the training."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from maple import files
from maple.checkpoint import PromptsFile, read_prompts, write_tensors
from maple.data.catalogue import short_name
from maple.methods import METHODS, ZERO_SHOT
from maple.plugins import code_files, code_of, code_title, is_code_name
from maple.runs import read_rows

PROMPTS = "prompts.safetensors"
CARD = "README.md"

_SHOWN = 60


def model_card(stored: PromptsFile, repository: str | None = None) -> str:
    """Return a model card in Markdown, with the hub's front matter, for the content of a prompts file.

    Its lines that load the prompts name `repository`, or the folder of the file.
    """
    name, pretrained = stored.backbone["name"], stored.backbone["pretrained"]
    base = name.removeprefix("hf-hub:") if name.startswith("hf-hub:") else None
    is_own = is_code_name(stored.method["name"])
    code = " and ".join(f"`{file}`" for file in sorted({*code_files(stored.method).values()}))
    front_matter = ModelCardData(
        library_name="maple-clip",
        pipeline_tag="zero-shot-image-classification",
        base_model=base,
        tags=["clip", "prompt-learning", "few-shot", *([] if is_own else [stored.method["name"]])],
    )
    settings = ", ".join(f"`{key}={value}`" for key, value in stored.method.items() if key != "name")
    # Code that was never accepted here is not needed to describe what it has learned.
    kind = None if is_own and code_of(stored.method["name"]) is None else METHODS.get(stored.method["name"])
    title = kind.title if kind else code_title(stored.method["name"])
    paper = f" ({kind.paper})" if kind else ""
    count = sum(tensor.numel() for tensor in stored.tensors.values())
    clip = f"{name} / {pretrained}" if pretrained else name
    shown = ", ".join(stored.class_names[:_SHOWN]) + (", ..." if len(stored.class_names) > _SHOWN else "")
    trusting = ", trust_code=True" if code else ""
    local = "" if base or not Path(name).is_absolute() else _LOCAL
    return f"""---
{front_matter.to_yaml()}
---

# {title} prompts for {len(stored.class_names)} classes

{count:,} learned prompt parameters for a frozen CLIP, by {title}{paper}, as
maple-clip writes them. CLIP itself is not included.

| | |
|---|---|
| method | {title}{": " + settings if settings else ""} |
| CLIP | {_cell(clip)}, {stored.backbone["precision"]}, fingerprint `{stored.backbone["fingerprint"]}` |
{_training(stored.info)}| classes | {_cell(shown)} |
{local}{_OWN_CODE.format(code=code) if code else ""}
## Use

```python
from maple import PromptClassifier

classifier = PromptClassifier.from_pretrained("{repository or "path/of/this/folder"}"{trusting})
classifier.predict(["image.jpg"])
classifier.set_class_names(["cat", "dog"])  # other classes, without training
classifier.predict_proba(["image.jpg"])
```

Prompts can make CLIP worse on images or classes far from those they were trained on; compare with zero-shot CLIP.
"""


_LOCAL = """
This CLIP was a folder or file on the machine of the training. Elsewhere, give its path, as in
`from_pretrained(..., backbone="path/of/that/clip")`; the fingerprint is checked.
"""


_OWN_CODE = """
The method needs {code}, next to the prompts. Read it before you accept it: it can do whatever you can.
"""


def _training(info: dict[str, Any]) -> str:
    train, data = (part if isinstance(part := info.get(key), dict) else {} for key in ("train", "data"))
    rows = {
        "data set": info.get("dataset"),
        "shots": data.get("shots"),
        "images": train.get("images"),
        "epochs": train.get("epochs"),
        "last loss": f"{train['loss']:.4f}" if isinstance(train.get("loss"), float) else None,
        "seed": info.get("seed"),
        "measured": "; ".join(map(measured_text, measurements_of(info))) or None,
        "versions": json.dumps(info["versions"]).strip("{}").replace('"', "") if "versions" in info else None,
    }
    return "".join(f"| {key} | {_cell(value)} |\n" for key, value in rows.items() if value is not None)


def _cell(value: object) -> str:
    """Escape a value for a table row, where a bar would end the cell and a tag would be read as HTML."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def without_paths(info: Mapping[str, Any]) -> dict[str, Any]:
    """The training information of prompts that are given away: it does not say in which folder the images were."""
    info = dict(info)
    if isinstance(info.get("dataset"), str):
        info["dataset"] = short_name(info["dataset"])
    if isinstance(info.get("data"), dict) and isinstance(info["data"].get("dataset"), str):
        info["data"] = {**info["data"], "dataset": short_name(info["data"]["dataset"])}
    return info


def measurements_of(info: Mapping[str, Any], folder: Path | None = None) -> list[dict[str, Any]]:
    """What was measured of prompts: {"dataset", "classes", "images", "top1", "zero_shot"} of each evaluation.

    It is in the information of shared prompts, else in the rows of the run in `folder`.
    """
    rows = info.get("measured")
    if isinstance(rows, list):
        return [row for row in rows if isinstance(row, dict)]
    if folder is None:
        return []
    zero_shot = {evaluation_name(row): row["top1"] for row in read_rows(folder / ZERO_SHOT)}
    return [
        {
            "dataset": short_name(row["dataset"]),
            "classes": row["classes"],
            "images": row["images"],
            "top1": row["top1"],
            "zero_shot": zero_shot.get(evaluation_name(row)),
        }
        for row in read_rows(folder)
    ]


def evaluation_name(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The data set, its part and the classes of an evaluation."""
    return row["dataset"], row["part"], row["classes"]


def measured_text(row: Mapping[str, Any]) -> str:
    """A measurement in words: "81.2 % of 640 images (pets, all classes; zero-shot CLIP: 74.5 %)"."""
    try:
        zero_shot = row.get("zero_shot")
        compared = "" if zero_shot is None else f"; zero-shot CLIP: {100 * float(zero_shot):.1f} %"
        images, top1 = int(row["images"]), 100 * float(row["top1"])
        return f"{top1:.1f} % of {images:,} images ({row['dataset']}, {row['classes']} classes{compared})"
    except (KeyError, TypeError, ValueError):
        return "unreadable"


def share_run(path: Path, folder: Path) -> Path:
    """Write the prompts of a file, without the paths of this machine and with what was measured, into a new folder.

    Raises:
        CheckpointError: it is not a prompts file, or the file of its method is missing.
    """
    stored = read_prompts(path)
    measured = measurements_of(stored.info, path.parent if path.name == PROMPTS else None)
    info = {**without_paths(stored.info), **({"measured": measured} if measured else {})}
    folder.mkdir(parents=True, exist_ok=True)
    content = {"method": stored.method, "backbone": stored.backbone, "class_names": list(stored.class_names)}
    write_tensors(folder / PROMPTS, stored.tensors, {**content, "info": info})
    for file in {*code_files(stored.method).values()}:
        shutil.copy(path.parent / file, folder / file)
    return folder


def write_card(folder: Path, repository: str | None = None) -> None:
    """Write the model card of the prompts in a folder; `repository` is their name on the hub."""
    files.write_text(folder / CARD, model_card(read_prompts(folder / PROMPTS), repository))
