"""Prompts on the Hugging Face hub."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from maple import files
from maple.checkpoint import PromptsFile, read_prompts
from maple.clip.hub import is_network_error, offline_if_unreachable
from maple.errors import CheckpointError, first_line
from maple.methods import METHODS
from maple.plugins import code_of, is_code_name

_SHOWN = 60


def model_card(stored: PromptsFile, repository: str | None = None) -> str:
    """Return a model card in Markdown, with the hub's front matter, for the content of a prompts file.

    Its lines that load the prompts name `repository`, or the folder of the file.
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


PROMPTS = "prompts.safetensors"
CARD = "README.md"
PREFIX = "hf-hub:"


def is_hub_id(name: str) -> bool:
    """Whether a name may be a repository of the hub: OWNER/NAME."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def fetch_prompts(repository: str, **options: Any) -> Path:
    """Fetch the prompts file of a hub repository, with `options` of `hf_hub_download`; return its path in the cache.

    The file of a method from outside the package is fetched, too; nothing in it is run.

    Raises:
        CheckpointError: no such repository or revision, one without prompts, or a hub that cannot be reached.
    """
    try:
        with offline_if_unreachable():
            path = Path(hf_hub_download(repository, PROMPTS, **options))
            name = str(read_prompts(path).method["name"])
            if is_code_name(name) and code_of(name) is None:
                hf_hub_download(repository, name.partition(":")[0], **options)
            return path
    except Exception as error:
        _require_hub_error(error)
        raise CheckpointError(
            f"{repository!r} is not a run folder or prompts file here, and its {PROMPTS} cannot be fetched from the "
            f"hub: {first_line(error)}"
        ) from error


def write_card(folder: Path, repository: str | None = None) -> None:
    """Write the model card of the prompts in a folder; `repository` is their name on the hub."""
    files.write_text(folder / CARD, model_card(read_prompts(folder / PROMPTS), repository))


def push_folder(
    folder: Path,
    repository: str,
    *,
    message: str,
    branch: str | None,
    token: str | None,
    private: bool | None,
    **options: Any,
) -> str:
    """Upload a folder with prompts to the hub, as one commit with a card under its full name; return its address.

    A `branch` of a new name is created; None: "main". `options` are those of `HfApi.upload_folder`.

    Raises:
        CheckpointError: the hub refuses, or cannot be reached.
    """
    try:
        api = HfApi(token=token)
        # The hub puts the user's name before a repository without one, and the card shall name it in full.
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if branch is not None:
            api.create_branch(name, branch=branch, exist_ok=True)
        write_card(folder, name)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, revision=branch, **options)
    except Exception as error:
        _require_hub_error(error)
        raise CheckpointError(f"nothing was pushed to {repository!r}: {first_line(error)}") from error
    return str(commit.commit_url)


def _require_hub_error(error: Exception) -> None:
    """Raise again what comes neither from the hub nor from the network."""
    if not isinstance(error, HfHubHTTPError | OSError | ValueError) and not is_network_error(error):
        raise error
