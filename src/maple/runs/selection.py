"""Choose a method by cross-validation on training images; a data set's test images are not looked at.

The training images of each class are divided into `FOLDS` parts. Each candidate is trained without one part and scored
on it, for as many parts as the time allows, the same for all; the best one is then trained on all images. With the goal
"new", half of the classes is trained on, and the other half scored too: names that were not trained.

The plan is made once, from measured speeds, and kept with the scores in a file, if one is named: a selection that is
resumed makes the same choice.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maple import files
from maple.clip import Backbone
from maple.config import RunSettings
from maple.data import Dataset, Item
from maple.errors import BackboneError, CheckpointError, MapleError, TrainingDivergedError
from maple.evaluation import predict
from maple.methods import ZERO_SHOT, Method
from maple.metrics import accuracy_interval, harmonic_mean, p_text, sign_test
from maple.runs.frozen_features import prediction_batches
from maple.runs.selection_plan import (
    FOLDS,
    NO_MEMORY,
    PLAN_FORMAT,
    Goal,
    SelectionSettings,
    is_out_of_memory,
    make_fold,
    make_plan,
    require_candidate,
    with_changes,
)
from maple.runs.spec import eval_transform, open_store

AUTO = "auto"
"""The name that stands for the choice of a method."""
CANDIDATES: tuple[str, ...] = (
    *("zero_shot", "tip_adapter", "gda", "linear_probe", "taskres", "clip_adapter-own", "tip-adapter-f"),
    *("coop", "maple", "independent_vl", "vpt"),
)
"""The recipes that `fit` tries by default: zero-shot CLIP, methods on frozen features, prompt learning."""


@dataclass(frozen=True)
class Candidate:
    """A method that was tried, or why it was not.

    Attributes:
        recipe, title: the first part of its preset's name, and the method's title.
        right, new: for each scored image whether the prediction is correct: of trained names, and of new names.
        seconds: what training and scoring were estimated to take, for all parts.
        skipped: why it was not tried; "" if it was.
        remark: how its recipe was changed to fit the time; "" if it was not.
    """

    recipe: str
    title: str
    right: tuple[bool, ...] = field(repr=False)
    new: tuple[bool, ...] = field(repr=False)
    seconds: float
    skipped: str = ""
    remark: str = ""

    @property
    def accuracy(self) -> float:
        """The accuracy on trained names, a fraction; NaN without images, as earlier versions scored a few."""
        return float(np.mean(self.right)) if self.right else float("nan")

    @property
    def new_accuracy(self) -> float:
        """The accuracy on names that were not trained, a fraction; NaN where they were not scored."""
        return float(np.mean(self.new)) if self.new else float("nan")

    @property
    def score(self) -> float:
        """What decides: the accuracy on trained names, or its harmonic mean with that on new names."""
        return harmonic_mean(self.accuracy, self.new_accuracy) if self.new else self.accuracy

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy on trained names; without images it may be any."""
        return accuracy_interval(sum(self.right), len(self.right)) if self.right else (0.0, 1.0)

    @property
    def new_interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy on new names; without images it may be any."""
        return accuracy_interval(sum(self.new), len(self.new)) if self.new else (0.0, 1.0)


@dataclass(frozen=True)
class Selection:
    """The candidates of a selection, the best first, then those that were not tried; and the choice.

    Example:
        >>> print(read_selection(Path("runs/flowers/selection.json")))
    """

    goal: Goal
    minutes: float
    folds: int
    candidates: tuple[Candidate, ...]

    @property
    def tried(self) -> tuple[Candidate, ...]:
        """Those that were scored."""
        return tuple(candidate for candidate in self.candidates if not candidate.skipped)

    @property
    def chosen(self) -> Candidate:
        """The best one."""
        return self.candidates[0]

    @property
    def conditions(self) -> str:
        """How the candidates were scored."""
        text = (
            f"In per cent, on {self._images}, each predicted by a model that was not trained on it ({self.folds} of "
            f"{FOLDS} parts)."
        )
        if self.goal == "new":
            text += " Each model was trained on half of the classes; new names are those of the other half."
        return text

    @property
    def _images(self) -> str:
        right, new = len(self.chosen.right), len(self.chosen.new)
        return f"{right:,} training images" + (f" of trained names and {new:,} of new names" if new else "")

    @property
    def reason(self) -> str:
        """The choice and its reason, in a sentence or two."""
        best, *others = self.tried
        score, images = f"{100 * best.score:.1f} %", self._images
        measure = f"{score} of {images} are predicted correctly by a model that was not trained on them"
        if self.goal == "new":
            measure = (
                f"the harmonic mean of its accuracies on trained and on new names is {score}, over {images}, none of "
                "which the model was trained on"
            )
        text = f"{best.title[:1].upper()}{best.title[1:]} was chosen: {measure}."
        if best.recipe == ZERO_SHOT and others:
            text += " None of the other methods did better, so nothing was learned."
        if not others:
            return f"{text} No other method was tried."
        second = others[0]
        text += f" Next comes {second.title} with {100 * second.score:.1f} %"
        pairs = list(zip(best.right + best.new, second.right + second.new, strict=True))
        only_best, only_second = (sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))
        p = sign_test(only_best, only_second)
        # The harmonic mean may be higher where fewer images are predicted correctly in all.
        may_be_chance = p >= 0.05 or only_best <= only_second
        return f"{text} (sign test: {p_text(p)}{', may be chance' if may_be_chance else ''})."

    def __str__(self) -> str:
        """The candidates, a line each, with what each would cost, and the reason of the choice."""
        lines = [f"methods tried. {self.conditions}"]
        width = max(len(candidate.title) for candidate in self.tried)
        for candidate in self.tried:
            low, high = (100 * bound for bound in candidate.interval)
            trained = f"{100 * candidate.accuracy:5.1f}  ({low:.1f} to {high:.1f})"
            low, high = (100 * bound for bound in candidate.new_interval)
            new = f"  new names {100 * candidate.new_accuracy:5.1f}  ({low:.1f} to {high:.1f})" if candidate.new else ""
            remark = f"  {candidate.remark}" if candidate.remark else ""
            lines.append(f"  {candidate.title:<{width}}  {trained}{new}  {candidate.seconds:5.0f} s{remark}")
        skipped = (candidate for candidate in self.candidates if candidate.skipped)
        lines += [f"  not tried: {candidate.title} ({candidate.skipped})" for candidate in skipped]
        return "\n".join([*lines, self.reason])

    def as_json(self) -> dict[str, Any]:
        """Plain values, for programs."""

        def entry(candidate: Candidate) -> dict[str, Any]:
            values = {"recipe": candidate.recipe, "title": candidate.title, "seconds": candidate.seconds}
            if candidate.skipped:
                return {**values, "skipped": candidate.skipped}
            measured = {"accuracy": candidate.accuracy, "images": len(candidate.right), "interval": candidate.interval}
            if candidate.new:
                measured |= {"new_accuracy": candidate.new_accuracy, "new_images": len(candidate.new)}
                measured |= {"new_interval": candidate.new_interval, "harmonic_mean": candidate.score}
            return {**values, **measured, "remark": candidate.remark}

        entries = [entry(candidate) for candidate in self.candidates]
        return {"goal": self.goal, "chosen": self.chosen.recipe, "reason": self.reason, "candidates": entries}


def trial_name(recipe: str, number: int) -> str:
    """The name of the trial of a recipe that leaves out the part `number`, which is also that of its folder.

    A recipe may be the path of a file; a hash then stands for it.

    Example:
        >>> trial_name("coop", 0), trial_name("recipes/own.toml", 0)
        ('coop_0', '72c8ed216d_0')
    """
    is_plain = re.fullmatch(r"\w[\w-]*", recipe) is not None
    return f"{recipe if is_plain else sha256(os.fsencode(recipe)).hexdigest()[:10]}_{number}"


def read_selection(path: Path) -> Selection:
    """Read the plan and the scores that `select` keeps.

    Raises:
        CheckpointError: the file is missing or damaged.

    Example:
        >>> [candidate.title for candidate in read_selection(Path("runs/flowers/selection.json")).tried]
    """
    return _selection(_read(path), path)


def select(
    candidates: Mapping[str, RunSettings],
    dataset: Dataset,
    backbone: Backbone,
    train: Callable[[str, RunSettings, Dataset], Method],
    options: SelectionSettings | None = None,
    *,
    path: Path | None = None,
    on_trial: Callable[[str, int, int], None] = lambda _title, _done, _total: None,
) -> tuple[RunSettings, Selection]:
    """Try the candidates on the training images of a data set; return the settings of the best one, and all scores.

    One that diverges, or does not fit into the device's memory, is skipped, but for zero-shot CLIP.

    Args:
        candidates: settings by recipe, simple methods first: of equally good ones the first is chosen.
        dataset: its test images are not used.
        train: trains a method with these settings on the training images of this data set; the text is a name.
        path: where the plan and the scores are kept, to resume.
        on_trial: called before each trial, with the method's title, and how many trials of how many were finished.

    Raises:
        ConfigError: no candidate can be tried.
        MapleError: an image cannot be read, or zero-shot CLIP gives logits that are not finite.

    Example:
        >>> settings, selection = select(candidates, dataset, backbone, train)
        >>> print(selection.reason)
    """
    options = options or SelectionSettings()
    is_new = path is None or not path.exists()
    state = make_plan(candidates, dataset, backbone, options) if path is None or is_new else _read(path)

    def keep() -> None:
        if path is not None:
            files.write_json(path, state)

    if is_new:
        keep()
    planned = [entry for entry in state["candidates"] if not entry["skipped"]]
    total, done = len(planned) * state["folds"], sum(len(entry["scores"]) for entry in planned)
    for entry in planned:
        settings = with_changes(candidates[entry["recipe"]], entry["changes"])
        for number in range(len(entry["scores"]), state["folds"]):
            on_trial(entry["title"], done, total)
            fold = make_fold(dataset, settings, options.goal, number)
            try:
                method = train(trial_name(entry["recipe"], number), settings, fold.train)
                scores = [_right(method, dataset, fold.trained, fold.train.class_names, settings)]
                if fold.new:
                    scores.append(_right(method, dataset, fold.new, fold.new_names, settings))
            except (TrainingDivergedError, BackboneError, RuntimeError, MemoryError) as error:
                too_large = is_out_of_memory(error)
                if settings.method["name"] == ZERO_SHOT or not (too_large or isinstance(error, MapleError)):
                    raise
                entry["skipped"], entry["scores"] = NO_MEMORY if too_large else str(error), []
            if entry["skipped"]:
                torch.cuda.empty_cache()  # not earlier: the traceback of an error holds tensors
                keep()
                break
            entry["scores"].append(scores)
            keep()
            done += 1
    require_candidate(state["candidates"])
    selection = _selection(state, path)
    chosen = next(entry for entry in planned if entry["recipe"] == selection.chosen.recipe)
    return with_changes(candidates[chosen["recipe"]], chosen["changes"]), selection


def _right(method: Method, dataset: Dataset, items: list[Item], names: Sequence[str], settings: RunSettings) -> str:
    """Whether each image is predicted correctly, as a text of 0 and 1."""
    if not items:
        return ""  # of few images, a part may have none
    method.set_class_names(names)
    store = open_store(settings, dataset, eval_transform(method.backbone))
    batches = prediction_batches(method, items, store, settings)
    logits, labels = predict(method, batches)
    return "".join("1" if right else "0" for right in logits.argmax(axis=1) == labels)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = files.read_json(path, advice=f"remove {path.parent} to start again")
    if content.get("format") != PLAN_FORMAT:
        raise CheckpointError(f"{path} is damaged, or of another version; remove {path.parent} to start again")
    return content


def _selection(state: Mapping[str, Any], path: Path | None) -> Selection:
    def flags(scores: list[list[str]], part: int) -> Iterator[bool]:
        yield from (mark == "1" for fold in scores if len(fold) > part for mark in fold[part])

    try:
        candidates = [
            Candidate(
                recipe=str(entry["recipe"]),
                title=str(entry["title"]),
                right=tuple(flags(entry["scores"], 0)),
                new=tuple(flags(entry["scores"], 1)),
                seconds=float(entry["seconds"]),
                skipped=str(entry["skipped"]),
                remark=str(entry["remark"]),
            )
            for entry in state["candidates"]
        ]
        tried = sorted((each for each in candidates if not each.skipped), key=lambda each: -each.score)
        skipped = (each for each in candidates if each.skipped)
        return Selection(state["goal"], float(state["minutes"]), int(state["folds"]), (*tried, *skipped))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"{path} is damaged ({error!r})"
        raise CheckpointError(f"{problem}; remove {path and path.parent} to start again") from error
