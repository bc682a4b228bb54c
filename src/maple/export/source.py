"""What is exported: a trained method in float32 on the CPU, the frozen CLIP beside, and images to check it on."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maple.checkpoint import load_prompts, read_prompts
from maple.data import EvalView, template_of
from maple.data.catalogue import short_name
from maple.errors import ConfigError, MapleError
from maple.inference.manifest import is_export
from maple.inference.predictor import Floats
from maple.inference.torch_predictor import about, prompts_file, template_of_info
from maple.methods import Method, build_method
from maple.runs import open_dataset, read_settings

_RANDOM_IMAGES = 4
_RUN_IMAGES = 16


@dataclass(frozen=True)
class Source:
    """A trained method, ready to be written.

    Attributes:
        method: in float32 on the CPU, speaking of the classes it was trained on.
        frozen: zero-shot CLIP in the template of the run's data set.
        template: that template.
        about: what it is, for people and programs.
        random, own: views [n, 3, R, R] to check an export on: noise, and images of the run's test items (n may be 0).
    """

    method: Method
    frozen: Method
    template: str
    about: dict[str, Any]
    random: Floats
    own: Floats

    @property
    def view(self) -> EvalView:
        """How its image tower sees a picture."""
        return EvalView.from_preprocessing(self.method.backbone.preprocessing)


def open_source(run: str | Path, data_root: str | None = None) -> Source:
    """Load what `maple predict` would, in float32 on the CPU.

    Raises:
        ConfigError: `run` is an export.
        MapleError: no finished run, or a backbone that cannot be loaded.
    """
    if is_export(run):
        raise ConfigError(f"{run} is an export already; give the run that it was made of")
    path = prompts_file(run)
    info = read_prompts(path).info
    method = load_prompts(path, precision="fp32", device="cpu")
    template = template_of_info(info)
    frozen = build_method({"name": "zero_shot", "templates": [template]}, method.backbone, method.class_names)
    size = method.backbone.preprocessing.size
    noise = torch.randn(_RANDOM_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0)).numpy()
    view = EvalView.from_preprocessing(method.backbone.preprocessing)
    own = list(islice(_views(path.parent, view, data_root), _RUN_IMAGES))
    found = np.stack(own) if own else np.empty((0, 3, size, size), np.float32)
    known = about(method, info)
    if isinstance(known["dataset"], str):
        # What is given away need not tell where it was made.
        known |= {"dataset": short_name(known["dataset"]), "own_images": template_of(known["dataset"]) is None}
    return Source(method, frozen, template, known, noise, found)


def _views(folder: Path, view: EvalView, data_root: str | None) -> Iterator[Floats]:
    """Test images of the run in a folder, as far as they can be read here."""
    with suppress(MapleError):
        settings = read_settings(folder)
        if data_root is not None:
            settings = settings.changed(data=settings.data.changed(root=data_root))
        dataset = open_dataset(settings)
        store = dataset.store(0)
        items = dataset.test
        for item in items[:: max(1, len(items) // _RUN_IMAGES)]:
            yield view(store.get(item.path))
