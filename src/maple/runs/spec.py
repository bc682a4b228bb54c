"""From the settings of a run: the complete settings, its name, its data set, its training items, its backbone."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maple.checkpoint import read_prompts
from maple.clip import Backbone
from maple.clip.backbone_names import ASSUMED, with_absolute_paths
from maple.clip.load import load_given
from maple.config import RunSettings, preset_names, read_preset, resolve
from maple.config.settings import LATER_SETTINGS, DataSettings
from maple.data import (
    Dataset,
    EvalTransform,
    ImageStore,
    Item,
    TrainTransform,
    load_dataset,
    sample_few_shot,
    select_dataset,
)
from maple.data.catalogue import canonical_name, known_names, load_published, require_images, template_of
from maple.data.published.split_files import DRAWS
from maple.data.records import DRAWN
from maple.data.sampling import val_shots
from maple.data.saved_split import SAVED_SPLIT, SavedImages, changes_since, read_saved_images, read_saved_split
from maple.errors import DataError, MapleError
from maple.methods import METHODS, method_settings
from maple.names import FEATURES, is_features
from maple.plugins import short_code_name

logger = logging.getLogger(__name__)

_MOST_SPARE = 1000  # of the images that are left over: more would take longer, and change little

# Settings that change the speed or the place of a run, but not its result.
_IRRELEVANT = {"data": {"root"}, "train": {"workers", "images", "text_memory"}, "evaluate": True}


def complete(settings: RunSettings) -> RunSettings:
    """Validate the method's settings and write out its defaults, some of which follow the data set's own template.

    Example:
        >>> complete(resolve([{"method": {"name": "coop"}}])).method["prompt_length"]
        16
    """
    description = dict(settings.method)
    kind = METHODS.get(description.get("name", ""))
    template = template_of(settings.data.dataset)
    if kind is not None and template is not None:
        description = {**kind.Settings.for_template(template), **description}
    name, validated = method_settings(description)
    # The same run, however the path is written and from which folder.
    data = settings.data.changed(dataset=settings.data.dataset and canonical_name(settings.data.dataset))
    backbone = absolute_backbone(settings.backbone.model_dump())
    if is_features(data.dataset):
        # What the files hold is the backbone too, and there is one view of each row, as it is.
        backbone = {"name": f"{FEATURES}{data.dataset}"}
        settings = settings.changed(train=settings.train.changed(views=0))
    return settings.changed(method={"name": name, **validated.model_dump(mode="json")}, data=data, backbone=backbone)


def target_sentences(settings: RunSettings, dataset: str) -> dict[str, Any]:
    """The method's sentences on another published data set, where the run has those of its own: changes of settings.

    They are those of its `cross-dataset` preset if it has one. Sentences that were chosen for the run stay, and those
    that only its training used.

    Example:
        >>> layers = [read_preset("zero_shot_base-to-novel"), {"data": {"dataset": "imagenet"}}]
        >>> target_sentences(resolve(layers), "dtd")
        {'templates': ['{} texture.']}
    """
    if template_of(settings.data.dataset) is None or template_of(dataset) is None:
        return {}
    recipe = f"{settings.method['name']}_cross-dataset"
    layer = read_preset(recipe) if recipe in preset_names() else {"method": {"name": settings.method["name"]}}
    on_source, on_target = (
        complete(resolve([layer, {"data": {"dataset": name}, "backbone": settings.backbone.model_dump()}])).method
        for name in (settings.data.dataset, dataset)
    )
    method = complete(settings).method
    return {
        key: on_target[key]
        for key in method_settings(method)[1].prediction_sentences
        if key in method and method[key] == on_source.get(key) != on_target.get(key)
    }


def absolute_backbone(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """Settings or a description of a backbone, its paths made absolute if they exist as seen from this folder."""
    name, pretrained = backbone.get("name"), backbone.get("pretrained")
    if not isinstance(name, str) or not isinstance(pretrained, str | None):
        return dict(backbone)
    name, pretrained = with_absolute_paths(name, pretrained)
    return {**backbone, "name": name, "pretrained": pretrained}


def content_name(settings: RunSettings) -> str:
    """A readable, unique folder name: data set, method, classes, shots, seed, and a hash of the relevant settings.

    Example:
        >>> content_name(resolve([read_preset("coop_few-shot"), {"data": {"dataset": "photos"}}]))
        'photos_coop_all_16shots_seed1_7bc24d13a7'
    """
    given, settings = settings, complete(settings)
    # The backbone as it is written, so that runs made when it was stored so keep their names.
    values = {**relevant(settings), "backbone": given.backbone.model_dump(mode="json")}
    return folder_name(settings, settings.method["name"], values)


def folder_name(settings: RunSettings, method: str, identity: Mapping[str, Any]) -> str:
    """A readable folder name for complete settings, under this name of the method, with a hash of what identifies it.

    Example:
        >>> folder_name(complete(settings), "auto", {"candidates": ["coop", "maple"]})
        'photos_auto_all_16shots_seed1_0d6a2b9e47'
    """
    method = short_code_name(method).rpartition(":")[2]
    digest = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
    data = settings.data
    published = template_of(data.dataset) is not None
    dataset = data.dataset if published else Path(data.dataset).name
    dataset = re.sub(r"[/:{}*?]", "-", dataset)
    shots = "all" if data.shots is None else data.shots
    return "_".join([dataset or "data", method, data.classes, f"{shots}shots", f"seed{settings.seed}", digest])


def open_dataset(settings: RunSettings, folder: Path | None = None, **options: Any) -> Dataset:
    """The data set of a run, whole; `folder` is the run's, which holds its saved split if it has one.

    `options` are those of `load_dataset`.

    Raises:
        DataError: no data set is named, or it, or the list, cannot be read.
    """
    data = settings.data
    if data.listing is not None and folder is not None:
        return read_saved_split(folder / SAVED_SPLIT, data.listing, columns=columns_of(data))
    if not data.dataset:
        raise DataError(
            f"no data set is named; give dataset=NAME, one of {', '.join(known_names())}, and root=DIR, or the path "
            "of a folder of class-named folders, of FOLDER:DOMAIN, of a table, an archive or shards, or hf:OWNER/NAME"
        )
    root = None if data.root is None else Path(data.root)
    options = {**columns_of(data), **options}
    return load_dataset(data.dataset, root, class_names=data.class_names or None, seed=settings.seed, **options)


def columns_of(data: DataSettings) -> dict[str, str | None]:
    """The columns that these settings name, as arguments of `load_dataset`."""
    return {"image_column": data.image_column, "label_column": data.label_column}


def changed_images(settings: RunSettings, saved: SavedImages) -> str:
    """How a user's own images differ now from those that a run has saved; "" if they do not."""
    # Under their own names: a class that is renamed may have become empty, or have been so from the beginning.
    data = settings.data.changed(listing=None, class_names={})
    try:
        dataset = open_dataset(settings.changed(data=data), drop_empty=True)
    except DataError as error:
        return str(error)
    return changes_since(saved, dataset)


def warn_if_images_changed(settings: RunSettings, folder: Path) -> None:
    """Log how a user's own images differ now from those that the finished run in `folder` was made with."""
    path = folder / SAVED_SPLIT
    warn_if_split_was_drawn(settings, folder)
    if template_of(settings.data.dataset) is not None or not path.exists():
        return
    if changes := changed_images(settings, read_saved_images(path)):
        logger.warning(
            "%s has finished, but the images have changed since: %s; to use those of today, choose another output, "
            "or remove the folder",
            *(folder, changes),
        )


def warn_if_split_was_drawn(settings: RunSettings, folder: Path) -> None:
    """Log that the finished run in `folder` has a split drawn at random, where the published one is there now."""
    data = settings.data
    if data.dataset not in DRAWS:
        return
    with suppress(MapleError):  # of damaged files, which are reported where they are used, and of absent data
        name = str(read_prompts(folder / "prompts.safetensors").info.get("dataset"))
        if not name.endswith(DRAWN):
            return
        if load_published(data.dataset, None if data.root is None else Path(data.root)).name != name:
            logger.warning(
                "%s has finished, with the %s; the published split is there now: to use it, choose another output, or "
                "remove the folder",
                *(folder, name),
            )


def sample(settings: RunSettings, dataset: Dataset) -> tuple[list[Item], list[Item], tuple[str, ...]]:
    """The training and validation items of a run, and the class names that their labels index.

    Where a method selects a setting on validation images, and a published data set has none (ImageNet), min(shots, 4)
    of each class, or as many as shots, are drawn from the training images that the sample leaves over.

    Raises:
        DataError: the data set, or the chosen part of its classes, has no training items.
    """
    # Drawn over all classes, then cut to the part of the classes that is trained on.
    dataset.require_training()
    data = settings.data
    train, val = sample_few_shot(dataset.train, dataset.val, data.shots, settings.seed, validation=data.validation)
    is_published = template_of(data.dataset) is not None
    if data.shots is not None and not val and is_published and method_settings(settings.method)[1].needs_validation:
        used = {item.path for item in train}
        unused = [item for item in dataset.train if item.path not in used]
        val, _ = sample_few_shot(unused, (), val_shots(data.shots, data.validation), settings.seed)
    part = select_dataset(replace(dataset, train=tuple(train), val=tuple(val)), data.classes)
    part.require_training()
    require_images(dataset, [*part.train, *part.val])
    return list(part.train), list(part.val), part.class_names


def spare_items(settings: RunSettings, dataset: Dataset, trained: Sequence[Item], val: Sequence[Item]) -> list[Item]:
    """The images that a run is neither trained nor tested on, at most 1,000, evenly spread.

    Its best state is chosen on them, and it is calibrated on them. They are the run's validation images `val` and, of a
    user's own images, those that it leaves over of the training and validation parts and that are not near copies of
    those trained on. Those of a published data set are left alone, as its protocol counts images.

    Raises:
        DataError: an image is missing.
    """
    items = list(val)
    if template_of(settings.data.dataset) is None:
        used = {item.path for item in (*trained, *val)}
        learned = {item.path for item in trained}
        used.update(path for group in dataset.near_copies if not learned.isdisjoint(group) for path in group)
        part = select_dataset(dataset, settings.data.classes)
        items += [item for item in (*part.val, *part.train) if item.path not in used]
    chosen = np.unique(np.linspace(0, len(items) - 1, min(len(items), _MOST_SPARE)).round().astype(int))
    items = [items[index] for index in chosen]
    require_images(dataset, items)
    return items


def open_backbone(settings: RunSettings, device: str | torch.device, *, is_stored: bool = False) -> Backbone:
    """The frozen CLIP of a run; of one that is stored, an activation that weights do not say is what it was then."""
    clip, activation = settings.backbone, ASSUMED if is_stored else None
    options = {"precision": clip.precision, "device": device}
    return load_given(clip.name, clip.pretrained, activation=activation, **options)


@lru_cache(maxsize=1)
def cached_backbone(
    name: str, pretrained: str | None, precision: str, device: torch.device, activation: str | None = None
) -> Backbone:
    """Load a CLIP, or return the one loaded by the last call if it was the same: it is frozen, so it can be shared."""
    return load_given(name, pretrained, precision=precision, device=device, activation=activation)


def eval_transform(backbone: Backbone) -> EvalTransform:
    """The transform of evaluation images for a backbone.

    Example:
        >>> eval_transform(backbone)(image).shape
        torch.Size([3, 224, 224])
    """
    return EvalTransform.from_preprocessing(backbone.preprocessing)


def training_transform(settings: RunSettings, backbone: Backbone) -> TrainTransform | EvalTransform:
    """The transform of training images for a backbone: random crops, unless there is no augmentation."""
    train, image = settings.train, backbone.preprocessing
    if train.views == 0:
        return eval_transform(backbone)
    return TrainTransform(
        *(image.size, image.mean, image.std),
        scale=train.crop_scale,
        flip=train.flip,
        interpolation=image.interpolation,
        resize=image.resize,
        fill=image.fill,
    )


def open_store(
    settings: RunSettings, dataset: Dataset, transform: TrainTransform | EvalTransform, max_bytes: int = 0
) -> ImageStore:
    """The store of a run's images for a transform of these, which keeps up to `max_bytes`; drafts if it is set so."""
    return dataset.store(max_bytes, least_side=transform.least_side if settings.data.draft else None)


def relevant(settings: RunSettings) -> dict[str, Any]:
    """The settings that decide the result, as plain values."""
    relevant: dict[str, Any] = settings.model_dump(mode="json", exclude=_IRRELEVANT)  # type: ignore[arg-type]
    relevant["backbone"] = absolute_backbone(relevant["backbone"])  # earlier versions stored it as it was written
    for section, defaults in LATER_SETTINGS.items():
        for key, default in defaults.items():
            if key in relevant[section] and relevant[section][key] == default:
                del relevant[section][key]  # so that runs made before there was such a setting keep their names
    return relevant


def joint_training_key(settings: RunSettings) -> str:
    """A text that is equal for runs that can be trained together: they differ in seed, lr and weight decay alone.

    A method that draws random numbers in its steps is trained alone.
    """
    values = relevant(complete(settings))
    if method_settings(settings.method)[1].draws_random_numbers:
        return json.dumps(values, sort_keys=True)
    del values["seed"], values["train"]["lr"], values["train"]["weight_decay"]
    return json.dumps(values, sort_keys=True)
