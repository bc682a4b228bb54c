"""The model card of a prompts file: contents, training and use."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from maple.checkpoint import PromptsFile
from maple.methods import METHODS

_SHOWN = 60


def model_card(stored: PromptsFile, repository: str | None = None) -> str:
    """Return a model card in Markdown, with the hub's front matter, for the content of a prompts file.

    Args:
        repository: its name on the hub, for the lines that load it; without one they name this folder.
    """
    name, pretrained = stored.backbone["name"], stored.backbone["pretrained"]
    base = name.removeprefix("hf-hub:") if name.startswith("hf-hub:") else None
    front_matter = ModelCardData(
        library_name="maple-clip",
        pipeline_tag="zero-shot-image-classification",
        base_model=base,
        tags=["clip", "prompt-learning", "few-shot", stored.method["name"]],
    )
    settings = ", ".join(f"`{key}={value}`" for key, value in stored.method.items() if key != "name")
    kind = METHODS.get(stored.method["name"])
    title = kind.title if kind else stored.method["name"]
    paper = f" ({kind.paper})" if kind else ""
    count = sum(tensor.numel() for tensor in stored.tensors.values())
    clip = f"{name} / {pretrained}" if pretrained else name
    shown = ", ".join(stored.class_names[:_SHOWN]) + (", ..." if len(stored.class_names) > _SHOWN else "")
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
{local}
## Use

```python
from maple import PromptClassifier

classifier = PromptClassifier.from_pretrained("{repository or "path/of/this/folder"}")
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


def _training(info: dict[str, Any]) -> str:
    train, data = (part if isinstance(part := info.get(key), dict) else {} for key in ("train", "data"))
    rows = {
        "data set": info.get("dataset"),
        "shots": data.get("shots"),
        "images": train.get("images"),
        "epochs": train.get("epochs"),
        "last loss": f"{train['loss']:.4f}" if isinstance(train.get("loss"), float) else None,
        "seed": info.get("seed"),
        "versions": json.dumps(info["versions"]).strip("{}").replace('"', "") if "versions" in info else None,
    }
    return "".join(f"| {key} | {_cell(value)} |\n" for key, value in rows.items() if value is not None)


def _cell(value: object) -> str:
    """Escape a value for a table row, where a bar would end the cell and a tag would be read as HTML."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
