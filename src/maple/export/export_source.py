"""The input of an export: a trained method in float32 on the CPU, the frozen CLIP, and images to check both on."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maple.checkpoint import load_prompts, read_prompts
from maple.data import EvalView, Item, template_of
from maple.data.catalogue import short_name
from maple.errors import ConfigError, MapleError
from maple.inference.manifest import is_export
from maple.inference.predictor import Floats
from maple.inference.torch_predictor import describe, prompts_file, zero_shot_template
from maple.methods import ZERO_SHOT, Method, build_method
from maple.runs import read_settings
from maple.runs.spec import open_dataset
from maple.runs.trained_images import TrainedImages

_RANDOM_IMAGES = 4
_RUN_IMAGES, _SCORED_IMAGES = 16, 100


@dataclass(frozen=True)
class ExportSource:
    """A trained method, ready to be written.

    Attributes:
        method: in float32 on the CPU, with the class names of its training.
        frozen, template: zero-shot CLIP with the template of the run's data set.
        precision: that of the training, of the backbone's weights and states.
        random_images, run_images: preprocessed images [n, 3, R, R] to check an export on: noise, and test images of the
            run (n may be 0).
        labels: [n] the class of each of the latter among the trained names; -1 where it is not one of them.
    """

    method: Method
    frozen: Method
    template: str
    precision: str
    about: dict[str, Any]
    random_images: Floats
    run_images: Floats
    labels: NDArray[np.int64]


def open_export_source(
    run: str | Path, data_root: str | None = None, *, scored: bool = False, **clip: Any
) -> ExportSource:
    """Load what `maple predict` would, in float32 on the CPU; `clip` as in `maple.inference.load_predictor`.

    With `scored`, there are up to 100 test images, of trained classes if there are any, and otherwise up to 16; none
    that the run was trained on.

    Raises:
        ConfigError: `run` is an export.
        MapleError: not a finished run, or a backbone that cannot be loaded.
    """
    if is_export(run):
        raise ConfigError(f"{run} is an export already; give the run that it was made of")
    path = prompts_file(run)
    stored = read_prompts(path)
    info = stored.info
    method = load_prompts(path, precision="fp32", device="cpu", **clip)
    template = zero_shot_template(info)
    frozen = build_method({"name": ZERO_SHOT, "templates": [template]}, method.backbone, method.class_names)
    preprocessing = method.backbone.preprocessing
    shape = (3, preprocessing.size, preprocessing.size)
    noise = torch.randn(_RANDOM_IMAGES, *shape, generator=torch.Generator().manual_seed(0)).numpy()
    images, labels = np.empty((0, *shape), np.float32), list[int]()
    # The run's data set may be on another machine; the check then uses as many images as can be read.
    with suppress(MapleError):
        settings = read_settings(path.parent)
        if data_root is not None:
            settings = settings.changed(data=settings.data.changed(root=data_root))
        dataset, trained = open_dataset(settings, path.parent), TrainedImages(path.parent)
        store, preprocess = dataset.store(0), EvalView.from_preprocessing(preprocessing)
        items: Sequence[Item] = dataset.test
        if scored:
            items = [item for item in items if item.class_name in method.class_names] or items
        most = _SCORED_IMAGES if scored else _RUN_IMAGES
        # They are in the order of their classes: evenly spread, there are some of each.
        for index in np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int):
            item = items[index]
            if trained.contains(dataset, item, is_own=True):  # the division was drawn of other images
                continue
            with suppress(MapleError):  # one image that cannot be read
                images = np.concatenate([images, preprocess(store.get(item.path))[None]])
                name = item.class_name
                labels.append(method.class_names.index(name) if name in method.class_names else -1)
    about = describe(method, info)
    if isinstance(about["dataset"], str):
        # An export may be given away: it does not say in which folder the data set was.
        about |= {"dataset": short_name(about["dataset"]), "own_images": template_of(about["dataset"]) is None}
    return ExportSource(
        method, frozen, template, str(stored.backbone["precision"]), about, noise, images, np.array(labels, np.int64)
    )
