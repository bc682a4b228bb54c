"""Evaluate runs: a finished run and images in, scores, a row and predictions out.

The predictions of an evaluation, kept next to its row for reports: arrays in an .npz, readable without pickle.

paths            [n] the images, relative to the root of their data set
labels           [n] the true class
top              [n, k] the k <= 5 likeliest classes, best first
probabilities    [n, k] theirs, float32
feature_items    [m] which images have features: at most 2,000, evenly spread
features         [m, D] their unit features, float16; absent where the text features depend on the image
class_features   [C, D] the unit text features, float16; absent likewise
opened           [2] the data set as it was requested, and its root ("" where none was given)
"""

import errno
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from maple import files
from maple.checkpoint import describe_backbone, load_prompts, read_prompts, with_settings
from maple.config import RunSettings
from maple.data import Dataset, Item, select_dataset
from maple.data.catalogue import canonical_name, place_of_absent, require_images, template_of
from maple.data.records import SPLIT_NAMES, items_hash
from maple.data.saved_split import SavedImages, changes_since, keep_division
from maple.distributed import this_process
from maple.errors import ClassNamesError, ColumnError, ConfigError, DataError, one_of, shortened_list
from maple.evaluation import predict
from maple.feature_files import read_features
from maple.methods import Method
from maple.metrics import Floats, Integers, Scores, calibration_error, score, softmax
from maple.names import is_features, words_of
from maple.runs.folder import append_row, evaluation_key, finished_prompts, place_of, read_settings
from maple.runs.frozen_features import prediction_batches, require_features
from maple.runs.spec import changed_images, columns_of, eval_transform, open_dataset, open_store, target_sentences
from maple.runs.trained_images import TrainedImages

logger = logging.getLogger(__name__)

TOP = 5
MOST_FEATURES = 2000
PARTS = ("test", "val", "train", "all")  # in this order the items of `all` are evaluated, and hashed in their row


def evaluate_run(
    folder: Path,
    *,
    classes: str = "all",
    dataset: str | None = None,
    root: str | None = None,
    part: str | None = None,
    names: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    class_names: dict[str, str] | None = None,
    device: str | None = None,
    method: Method | None = None,
    on_images: Callable[[int, int], None] = lambda _done, _total: None,
) -> tuple[Scores, dict[str, Any]]:
    """Evaluate a finished run, append the result (returned with the scores) to rows.jsonl, and write its predictions.

    Args:
        classes: `all`, `base` or `novel` part of the data set's classes; it applies to images and names.
        dataset, root: another data set than the one it was trained on; a published one is read with its own sentences
            where the method has sentences of data sets, as zero-shot CLIP.
        part: which items: `test`, `val`, `train` or `all`. By default `test`, but `all` of another folder that its user
            has not split. Images that the run was trained on are recognised by their content and left out, unless
            `part` requests `train`, `val` or `all`.
        names: C names to use instead of the data set's, in label order; in the order of the numbers, where all classes
            are called by numbers.
        only: keep these classes only, images and names.
        class_names: other words for some classes, {published name: words}.
        method: the run's method, if it is loaded already.
        on_images: called with (images done, images in all).

    Raises:
        MapleError: the run is not finished, the data set is unreadable, or a name is unknown.

    Example:
        >>> scores, row = evaluate_run(Path("runs/first"), classes="novel")
        >>> scores.top1
        0.8125
    """
    if part is not None and part not in PARTS:
        raise ConfigError(one_of("part", part, PARTS))
    settings = read_settings(folder)
    prompts = finished_prompts(folder)
    if method is None:
        method = load_prompts(prompts, device=this_process(device).device)
    is_own = dataset is None or canonical_name(dataset) == canonical_name(settings.data.dataset)
    changed = {"dataset": dataset, "root": root, "class_names": class_names}
    if not is_own and class_names is None:
        changed["class_names"] = {}  # the words for the training classes do not apply to these
    data = settings.data.changed(**{key: value for key, value in changed.items() if value is not None})
    if not is_own:
        data = data.changed(listing=None)
    sentences = {} if is_own else target_sentences(settings, data.dataset)
    if sentences:
        method = with_settings(method, sentences, read_prompts(prompts).class_names)
    other_root = data.root if data.root != settings.data.root else None
    asked = evaluation_request(data.dataset, classes, part, names, only, class_names, other_root)
    try:
        images = _open_images(folder, settings.changed(data=data), method, asked, is_own=is_own)
    except ColumnError as error:
        if is_own:
            raise
        # Another table need not have the columns that are named for the training.
        logger.warning("%s; its usual columns are read", error)
        data = data.changed(**dict.fromkeys(columns_of(data)))
        images = _open_images(folder, settings.changed(data=data), method, asked, is_own=is_own)
    shown = images.class_names if names is None else _in_label_order(names, images.class_names)
    is_target = not is_own and template_of(data.dataset) is not None
    if is_target:
        method.set_target_class_names(shown)
    else:
        method.set_class_names(shown)
    sample = FeatureSample(len(images.items))
    logits, labels = _predict(method, settings, images, sample, on_images)
    scores = score(logits, labels, temperature=method.temperature)
    row = {
        "method": settings.method,
        "backbone": describe_backbone(method.backbone),
        "source": settings.data.model_dump(mode="json", exclude={"root"}),
        "seed": settings.seed,
        "dataset": images.dataset.name,
        "classes": classes,
        "part": images.part,
        "class_names": list(method.class_names),
        "items": items_hash(images.items),
        **asdict(scores),
        "asked": asked,
        "is_own": is_own,
        "place": place_of(data.dataset),
    }
    if sentences:
        row["sentences"] = sentences
    if is_target and method.target_rule != "each":
        row["target_rule"] = method.target_rule
    if method.backbone.computed_by:
        row["backbone"] |= {"computed_by": method.backbone.computed_by}
    if method.temperature != 1:
        uncalibrated = calibration_error(softmax(logits), labels)
        row |= {"temperature": method.temperature, "uncalibrated_error": uncalibrated}
    # An equal evaluation replaces the file.
    row["predictions"] = f"predictions/{sha256(json.dumps(evaluation_key(row)).encode()).hexdigest()[:16]}.npz"
    class_features = None if method.classes_depend_on_image else method.class_embeddings()
    paths, temperature = [item.path for item in images.items], method.temperature
    arrays = prediction_arrays(paths, logits, labels, sample, class_features, temperature=temperature)
    try:
        # Before the row, which names the file.
        write_predictions(folder / row["predictions"], arrays, opened=(data.dataset, data.root))
        append_row(folder, row)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):  # a full disk, say: make room and repeat
            raise
        del row["predictions"]
        logger.warning("%s cannot be written (%s): this evaluation is not kept there", folder, error.strerror)
    return scores, row


class _Images(NamedTuple):
    """What is evaluated: items of one part of a data set, numbered by their labels, and the names of these."""

    dataset: Dataset
    items: list[Item]
    class_names: tuple[str, ...]
    part: str


def _open_images(
    folder: Path, settings: RunSettings, method: Method, asked: Mapping[str, Any], *, is_own: bool
) -> _Images:
    """The images that an evaluation asks for, without those that the run was trained on.

    Args:
        settings: those of the run, with the data that is evaluated.
        asked: the arguments of the evaluation, as of `evaluation_request`.
        is_own: whether it is the data set that the run was trained on.
    """
    source, classes, part, only = settings.data.dataset, asked["classes"], asked["part"], asked["only"]
    on_own_images = template_of(source) is None
    trained = TrainedImages(folder) if is_own or on_own_images else None
    if is_own and on_own_images:
        opened = _open_own_images(settings, folder, trained.saved if trained else None)
    else:
        opened = open_dataset(settings, folder, min_classes=1 if on_own_images else 2)
    if opened.has_rows:
        table = read_features(source)
        require_features(method, table.embed_dim, table.backbone, opened.name)
        if not is_features(read_settings(folder).data.dataset):
            logger.warning(
                "%s: the run was trained on images; which of these rows are features of theirs is not known",
                opened.name,
            )
    chosen_part = part or ("all" if not is_own and opened.drawn_split else "test")
    if on_own_images and not is_own and classes == "all" and asked["names"] is None:
        opened = _among_trained_names(opened, read_prompts(finished_prompts(folder)).class_names)
    items, class_names = _select(opened, classes, chosen_part, only)
    require_images(opened, items)
    if trained is not None:
        items = _without_trained(items, opened, trained, is_own, part)
    return _Images(opened, items, class_names, chosen_part)


def _in_label_order(names: Sequence[str], class_names: Sequence[str]) -> Sequence[str]:
    """Names given for all classes, by label; of numbered classes, they are given in the order of the numbers.

    Classes are numbered if they differ in a number alone, as in 1 and 12, 1.0 and 12.0, or class_1 and class_12.
    """
    if len(names) != len(class_names):
        raise ClassNamesError(f"{len(names)} names were given for {len(class_names)} classes: {', '.join(class_names)}")
    parts = [part for name in class_names if (part := re.fullmatch(r"(\D*)(\d+)(.*)", name, re.DOTALL))]
    if len(parts) < len(class_names) or len({(part[1], part[3]) for part in parts}) > 1:
        return names
    # Labels are sorted as text, so that 10 comes before 2.
    number_of = {part[0]: int(part[2]) for part in parts}
    in_order = dict(zip(sorted(class_names, key=number_of.__getitem__), names, strict=True))
    logger.warning("names by number: %s", ", ".join(f"{number} = {name}" for number, name in in_order.items()))
    return [in_order[number] for number in class_names]


def _predict(
    method: Method,
    settings: RunSettings,
    images: _Images,
    sample: "FeatureSample",
    on_images: Callable[[int, int], None],
) -> tuple[Floats, Integers]:
    """Logits [n, C] and labels [n] of the images."""
    store = open_store(settings, images.dataset, eval_transform(method.backbone))
    done = 0

    def count(number: int) -> None:
        nonlocal done
        done += number
        on_images(done, len(images.items))

    return predict(method, prediction_batches(method, images.items, store, settings), count, sample.add)


def evaluation_request(
    dataset: str,
    classes: str = "all",
    part: str | None = None,
    names: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    class_names: Mapping[str, str] | None = None,
    root: str | None = None,
) -> dict[str, Any]:
    """The arguments of an evaluation as its row keeps them (`asked`), by which a repeated sweep recognises it."""
    asked = {"dataset": dataset, "classes": classes, "part": part, "names": names, "only": only}
    # Rows of earlier versions lack these two, so they are kept only where they were given.
    later = {"class_names": class_names, "root": root}
    return asked | {key: value for key, value in later.items() if value is not None}


def _open_own_images(settings: RunSettings, folder: Path, saved: SavedImages | None) -> Dataset:
    """The user's images that the run was made with, divided as then; those that are gone are left out, and reported."""
    source = settings.data.dataset
    if settings.data.listing is None and not (is_features(source) or place_of_absent(source, None) is None):
        raise DataError(
            f"the images of this run were in {source}, which is gone; put them back, or name where they are now: "
            "evaluate the run with dataset=FOLDER (those that were trained on are recognised and left out)"
        )
    opened = open_dataset(settings, folder)
    if saved is None:
        return opened
    if settings.data.listing is None:
        changes = changes_since(saved, opened)
        opened = keep_division(saved, opened) if opened.drawn_split else opened
    else:
        changes = changed_images(settings, saved)
        splits: dict[str, Any] = {
            split: tuple(item for item in getattr(opened, split) if opened.size_of(item) is not None)
            for split in SPLIT_NAMES
        }
        if not any(splits.values()):
            raise DataError(f"{opened.root}: none of the images of this run is there any more; put them back")
        opened = replace(opened, **splits)
    if changes:
        logger.warning("%s: the images have changed since the training: %s", source, changes)
    return opened


def _among_trained_names(dataset: Dataset, trained: Sequence[str]) -> Dataset:
    """Label the images of trained classes among all trained names, also those that the data set lacks.

    Unchanged if the data set has a class that was not trained.

    Raises:
        DataError: it is unchanged, and has only one class.
    """
    labels = {words_of(name): label for label, name in enumerate(trained)}
    words = [words_of(name) for name in dataset.class_names]
    unknown = [name for name, word in zip(dataset.class_names, words, strict=True) if word not in labels]
    if unknown or len(labels) < len(trained):
        if dataset.num_classes < 2:
            raise DataError(
                f"{dataset.root}: holds only one class, {dataset.class_names[0]!r}, which is not one of those trained "
                f"({shortened_list(trained, 10)}); a classifier needs at least two"
            )
        if len(unknown) < len(words):
            logger.warning(
                "%s: %s not trained, so the possible answers are its own %d names",
                *(dataset.name, shortened_list(unknown) + (" was" if len(unknown) == 1 else " were"), len(words)),
            )
        return dataset
    if len(words) < len(trained):
        logger.warning(
            "%s: images of %d of the %d trained classes; all %d names are possible answers (only=NAMES restricts them)",
            *(dataset.name, len(words), len(trained), len(trained)),
        )
    splits: dict[str, Any] = {
        split: tuple(
            replace(item, label=labels[words[item.label]], class_name=trained[labels[words[item.label]]])
            for item in getattr(dataset, split)
        )
        for split in SPLIT_NAMES
    }
    return replace(dataset, class_names=tuple(trained), **splits)


def _without_trained(
    items: list[Item], dataset: Dataset, trained: TrainedImages, is_own: bool, requested: str | None
) -> list[Item]:
    """The items that the run was not trained on; all of them, with a warning, if their part was requested."""
    if is_own and requested in ("train", "val"):
        return items
    unseen = [item for item in items if not trained.contains(dataset, item, is_own=is_own)]
    count = len(items) - len(unseen)
    if not count:
        return items
    be = f"{count} of {len(items)} images {'was' if count == 1 else 'were'} trained on"
    if requested in ("train", "val", "all"):
        logger.warning("%s: %s; they are counted, as the part %r was requested", dataset.name, be, requested)
        return items
    if not unseen:
        raise DataError(
            f"{dataset.root}: all {count} images were trained on, so none is held out; give other images, or "
            "part=all to measure on these"
        )
    logger.warning("%s: %s and left out (part=all includes them)", dataset.name, be)
    return unseen


def _select(
    dataset: Dataset, classes: str, part: str, only: Sequence[str] | None
) -> tuple[list[Item], tuple[str, ...]]:
    """The items of one part and some classes, labels numbered from 0, and the names of those classes."""
    selected = select_dataset(dataset, classes)  # type: ignore[arg-type]
    items = [item for name in PARTS[:3] if part in (name, "all") for item in getattr(selected, name)]
    class_names = selected.class_names
    if only is not None:
        allowed = ", ".join(class_names)
        if not only:
            raise ClassNamesError(f"the list of classes to keep is empty; choose some of: {allowed}")
        if unknown := [name for name in only if name not in class_names]:
            raise ClassNamesError(f"no class is called {', '.join(map(repr, unknown))}; there are: {allowed}")
        labels = [label for label, name in enumerate(class_names) if name in set(only)]
        renumbered = {label: position for position, label in enumerate(labels)}
        items = [replace(item, label=renumbered[item.label]) for item in items if item.label in renumbered]
        class_names = tuple(class_names[label] for label in labels)
    if not items:
        raise DataError(
            f"the {part} part of {dataset.name} has no images of these {len(class_names)} classes (train "
            f"{len(selected.train)}, val {len(selected.val)}, test {len(selected.test)}); "
            "choose another part, or add images to the folders"
        )
    return items, class_names


class FeatureSample:
    """The features of at most `most` of `total` images, evenly spread, collected batch by batch."""

    def __init__(self, total: int, most: int = MOST_FEATURES) -> None:
        self.items: Integers = np.unique(np.linspace(0, total - 1, min(total, most)).round().astype(np.int64))
        self._seen = 0
        self._kept: list[Floats] = []

    def add(self, image_features: Tensor) -> None:
        """Collect those of the next batch [B, D] that belong to the sample."""
        end = self._seen + len(image_features)
        wanted = self.items[(self.items >= self._seen) & (self.items < end)] - self._seen
        self._kept.append(image_features.float().cpu().numpy()[wanted].astype(np.float16))
        self._seen = end

    @property
    def features(self) -> Floats | None:
        """[m, D] float16; None where no features were given."""
        return np.concatenate(self._kept) if self._kept else None


def prediction_arrays(
    images: list[str],
    logits: Floats,
    labels: Integers,
    sample: FeatureSample,
    class_features: Tensor | None,
    *,
    temperature: float = 1.0,
) -> dict[str, Any]:
    """The arrays named above, without `opened`, of logits [n, C] on n images; the temperature divides these."""
    remaining = logits.astype(np.float32, copy=True)
    top = np.empty((len(logits), min(TOP, logits.shape[1])), dtype=np.int64)
    for place in range(top.shape[1]):
        top[:, place] = remaining.argmax(axis=1)  # of equal ones the first, as everywhere
        remaining[np.arange(len(logits)), top[:, place]] = -np.inf
    arrays: dict[str, Any] = {
        "paths": np.array(images, dtype=np.str_),
        "labels": labels.astype(np.int32),
        "top": top.astype(np.int32),
        "probabilities": np.take_along_axis(softmax(logits / temperature), top, axis=1).astype(np.float32),
    }
    if sample.features is not None and class_features is not None:
        arrays["feature_items"] = sample.items
        arrays["features"] = sample.features
        arrays["class_features"] = class_features.float().cpu().numpy().astype(np.float16)
    return arrays


def write_predictions(path: Path, arrays: dict[str, Any], *, opened: tuple[str, str | None]) -> None:
    """Write the arrays, and how their data set was opened (its name as requested, its root), atomically."""
    with files.replacing(path) as temporary, temporary.open("wb") as file:  # savez would add .npz to a path
        np.savez_compressed(file, **arrays, opened=np.array([opened[0], opened[1] or ""], dtype=np.str_))
