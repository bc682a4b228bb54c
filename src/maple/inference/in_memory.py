"""Train on the images of a Python program: one method, or the best of several. No run folder is written."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from maple.clip import Backbone
from maple.config import SECTIONS, BackboneSettings, RunSettings, options_layer, read_preset, resolve
from maple.data import Dataset, Item, hold_out
from maple.distributed import Processes
from maple.errors import ConfigError, ImageError
from maple.inference.sources.array_images import InputError
from maple.inference.sources.image_sources import ImageSource
from maple.methods import Method, method_settings, recipe_of
from maple.plugins import trust_code
from maple.runs import TrainingData, TrainProgress, complete
from maple.runs.calibration import calibrate
from maple.runs.cross_calibration import cross_calibrate
from maple.runs.frozen_features import require_features
from maple.runs.selection import AUTO, CANDIDATES, Selection, select, trial_name
from maple.runs.selection_plan import FOLDS, SelectionSettings, lacks_validation
from maple.runs.spec import sample, spare_items
from maple.runs.training import fresh_method
from maple.train import EpochReport, StepReport, Trainer


class Trained(NamedTuple):
    """A trained method, the reports of its epochs, what a prompts file says of it, its spare images, and its choice."""

    method: Method
    history: tuple[EpochReport, ...]
    info: dict[str, Any]
    spare: list[Item]
    selection: Selection | None


def check_callbacks(callbacks: Any) -> list[TrainProgress]:
    """Return one `TrainProgress`, or several, as a list; raise InputError for anything else."""
    if isinstance(callbacks, TrainProgress):
        return [callbacks]
    if not isinstance(callbacks, Iterable) or isinstance(callbacks, str):
        raise InputError(f"callbacks is {callbacks!r:.80}; give a TrainProgress, or a list of them")
    followers = list(callbacks)
    for follower in followers:
        if not isinstance(follower, TrainProgress):
            advice = "derive it from maple.runs.TrainProgress, and give an instance"
            raise InputError(f"callbacks holds {follower!r:.80}, not a TrainProgress; {advice}")
    return followers


def settings_of_methods(
    methods: Any, layers: Callable[[dict[str, Any]], Sequence[Mapping[str, Any]]]
) -> dict[str, RunSettings]:
    """Return the complete settings of each method to try, by recipe; of `CANDIDATES` where `methods` is None.

    Args:
        layers: returns the layers of settings with a preset among them.

    Raises:
        ConfigError: no list of different methods, or a setting is wrong.

    Example:
        >>> settings_of_methods(["zero_shot", "coop"], lambda preset: [preset, {"seed": 2}]).keys()
        dict_keys(['zero_shot', 'coop'])
    """
    recipes = CANDIDATES if methods is None else methods
    if isinstance(recipes, str) or not isinstance(recipes, Iterable):
        raise ConfigError(f'methods is {recipes!r:.80}; give a list of names, as in ["zero_shot", "coop"]')
    recipes = [trust_code(recipe) if isinstance(recipe, str) else recipe for recipe in recipes]
    if not recipes or not all(isinstance(name, str) for name in recipes) or len(set(recipes)) < len(recipes):
        raise ConfigError(f"methods is {recipes!r:.80}; name at least one, and each once")
    presets = {recipe: read_preset(recipe_of(recipe, ["few-shot", "base-to-novel"])) for recipe in recipes}
    return {recipe: complete(resolve(layers(preset))) for recipe, preset in presets.items()}


def candidates_of(estimator: Any) -> tuple[dict[str, RunSettings], SelectionSettings | None]:
    """Return the complete settings of each method that a `PromptClassifier` tries, and how one is chosen.

    Of the only one where it names its method, and None.

    Raises:
        ConfigError: a parameter is out of range, or does not fit the others.
    """
    settings = {} if estimator.settings is None else estimator.settings
    if not isinstance(settings, Mapping):
        example = '{"train": {"optimizer": "adamw"}}'
        raise ConfigError(f"settings is {settings!r:.80}; give sections, as in {example}")
    if "seed" in settings:
        raise ConfigError(f"settings holds the seed {settings['seed']!r}; give it as seed={settings['seed']!r}")
    for section, values in settings.items():
        if section in SECTIONS and not isinstance(values, Mapping):
            raise ConfigError(f"settings has {section} = {values!r:.80}; give a section, {{{section!r}: {{...}}}}")
    layer = options_layer(
        backbone={"name": estimator.backbone, "pretrained": estimator.pretrained, "precision": estimator.precision},
        train={key: getattr(estimator, key) for key in ("epochs", "lr", "batch_size", "calibrate")},
        data={"shots": estimator.shots},
    )
    layer["seed"] = estimator.seed  # a seed of None is refused, not left out
    # A user's own images need a CLIP of the usual breadth, unless another is named.
    default: dict[str, Any] = {"backbone": {"name": BackboneSettings().name}, "train": {"calibrate": True}}
    shots = {"data": {"shots": None}}
    if estimator.method != AUTO:
        name = trust_code(estimator.method) if isinstance(estimator.method, str) else estimator.method
        if estimator.preset is None:
            method_settings({"name": name})  # reports an unknown method as such, not as an unknown preset
        preset = read_preset(estimator.preset or recipe_of(name, ["base-to-novel"]))
        method = {"method": {"name": name}, **shots}
        return {"": complete(resolve([default, preset, method, settings, layer]))}, None
    if estimator.preset is not None or "method" in settings:
        given = f"preset={estimator.preset!r} has" if estimator.preset is not None else "settings of a method belong to"
        raise ConfigError(f'{given} one method, and "auto" tries several; name it, as in method="coop"')
    candidates = settings_of_methods(estimator.methods, lambda preset: [default, preset, shots, settings, layer])
    return candidates, SelectionSettings(minutes=estimator.minutes, goal=estimator.goal)


def train_in_memory(
    candidates: Mapping[str, RunSettings],
    images: Sequence[ImageSource] | Tensor,
    labels: Sequence[int],
    names: Sequence[str],
    backbone: Backbone,
    *,
    selection: SelectionSettings | None = None,
    validation_fraction: float = 0.25,
    verbose: bool = False,
    callbacks: Iterable[TrainProgress] = (),
) -> Trained:
    """Train the only candidate; or the one that `maple.runs.selection.select` chooses on these images.

    With `train.calibrate` it is calibrated as `maple fit` does: on images that it is not trained on, or, before it is
    trained, by cross-validation.

    Args:
        candidates: complete settings by recipe, simple methods first.
        images: or features [n, D] of the frozen image tower, as they are; there is one view of each.
        labels, names: the class of each image, and the name of each class.
        selection: how the best of several is chosen; None for an only one.
        validation_fraction: the part of each class that is held out where a setting or the best state is chosen on it.
        verbose: show a progress bar on standard error.
        callbacks: receive the progress of the training that is kept, and of no trial before it.

    Raises:
        MapleError: an image cannot be read, no candidate can be tried, or training diverged.

    Example:
        >>> train_in_memory({"": settings}, to_images(arrays), [0, 1], ["cat", "dog"], backbone).history[-1].loss
        0.4217
    """
    access: dict[str, Any]
    if isinstance(images, Tensor):
        rows = images
        access = {"read": _refuse, "features": lambda paths: rows[[int(path) for path in paths]]}
        candidates = {name: each.changed(train=each.train.changed(views=0)) for name, each in candidates.items()}
    else:
        sources = images
        access = {
            "read": lambda number: sources[int(number)].read(),
            "identify": lambda number: sources[int(number)].content_id(),
        }
    # Whatever the settings name: these are the caller's own images, and all of them.
    candidates = {
        recipe: settings.changed(data=settings.data.changed(dataset="images", classes="all"))
        for recipe, settings in candidates.items()
    }
    dataset = Dataset(
        "images",
        Path(),
        train=tuple(Item(str(number), int(label), names[label]) for number, label in enumerate(labels)),
        val=(),
        test=(),
        class_names=tuple(names),
        **access,
    )
    store = dataset.store()  # one for all trials, so that each image is decoded once

    def train(settings: RunSettings, part: Dataset, progress: Sequence[TrainProgress]) -> Trained:
        part = _divided(settings, part, validation_fraction)
        items, val, class_names = sample(settings, part)
        spare = spare_items(settings, part, items, val)
        method = fresh_method(settings, backbone, class_names)
        if isinstance(images, Tensor):
            require_features(method, images.shape[1])
        data = TrainingData(settings, items, store, val, spare)
        data.fit_features(method)
        trainer = Trainer(
            method,
            data.train,
            Processes(0, 1, backbone.device),
            seed=settings.seed,
            steps_per_epoch=data.steps,
        )
        for each in progress:
            each.start(trainer.epochs, data.steps, 0)

        def on_step(report: StepReport) -> None:
            for each in progress:
                each.step(report)

        while not trainer.finished:
            trainer.run_epoch(data.batches(trainer), on_step)
            report = data.validate(trainer)
            for each in progress:
                each.epoch(report)
        trainer.load_best()
        data.select_hyperparameters(method)
        loss = trainer.history[-1].loss if trainer.history else None
        info: dict[str, Any] = {
            "seed": settings.seed,
            "train": {"epochs": trainer.epoch, "images": len(items), "loss": loss},
        }
        if selected := method.selected_hyperparameters():
            info["chosen"] = selected
        if trainer.best is not None:
            info["kept"] = {**trainer.best.as_json(), "epochs": trainer.epoch}
        if not method.saved_tensors():  # it learned nothing, so that it has no training images
            spare = spare_items(settings, part, (), val)
        return Trained(method.eval(), tuple(trainer.history), info, spare, None)

    with ExitStack() as bars:
        (settings, *_), chosen = candidates.values(), None
        trials: dict[str, Method] = {}
        bar = bars.enter_context(_Bar()) if verbose else None

        def train_trial(name: str, settings: RunSettings, part: Dataset) -> Method:
            trials[name] = train(settings, part, [bar] if bar else []).method
            return trials[name]

        if selection is not None:
            on_trial = bar.trying if bar else lambda _title, _done, _total: None
            settings, chosen = select(candidates, dataset, backbone, train_trial, selection, on_trial=on_trial)
            if bar:
                bar.chosen(chosen)
        calibration = None
        if settings.train.calibrate:
            divided = _divided(settings, dataset, validation_fraction)
            # The trials of the choice are used again, if they were trained on the same images.
            name, parts = "calibration", 0
            if chosen is not None and chosen.goal == "trained" and not divided.val:
                name, parts = chosen.chosen.recipe, chosen.folds
            bar = bars.enter_context(_Bar()) if verbose else None

            def train_part(number: int, part: Dataset) -> Method:
                trial = trial_name(name, number)
                if bar and trial not in trials:
                    bar.calibrating(number)
                return trials.get(trial) or train_trial(trial, settings, part)

            calibration = cross_calibrate(settings, divided, train_part, trained_parts=parts)
        progress = [*callbacks, *([bars.enter_context(_Bar())] if verbose else [])]
        trained = train(settings, dataset, progress)
        if settings.train.calibrate:
            calibration = calibration or calibrate(trained.method, trained.spare, store, settings)
            trained.method.temperature = calibration["temperature"]
            trained.info["calibration"] = calibration
        return trained._replace(selection=chosen)


def _divided(settings: RunSettings, part: Dataset, fraction: float) -> Dataset:
    """The images with validation images among them, where a method chooses on these, in the fraction asked for.

    Raises:
        InputError: no class has enough images.
    """
    # A part of a selection comes with validation images of another fraction.
    merged = sorted([*part.train, *part.val], key=lambda item: int(item.path))
    part = replace(part, train=tuple(merged), val=())
    if not lacks_validation(part, settings):
        return part
    remaining, held_out = hold_out(part.train, fraction, settings.seed)
    if held_out:
        return replace(part, train=tuple(remaining), val=tuple(held_out))
    need = f"{settings.method['name']} chooses a setting on validation images"
    advice = 'give more, or give the setting: settings={"method": {...}}'
    if settings.train.keep == "best":
        need = "train.keep=best chooses the best state of the training on validation images"
        advice = "give more, or set train.keep=last"
    raise InputError(f"{need}, but no class has more than one image; {advice}")


def _refuse(row: str) -> NoReturn:
    raise ImageError(f"row {row} is one of features, not an image")


class _Bar(TrainProgress):
    """A bar on standard error, or in a notebook: of the steps of a training; or of the trials of a selection."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._selecting = False

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _open(self, title: str, total: int, unit: str) -> None:
        if self._bar is None:
            # A bar for the terminal or the notebook; imported only where one is shown.
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, desc=title, unit=unit)
        self._bar.set_description(title, refresh=False)

    def trying(self, title: str, done: int, total: int) -> None:
        self._selecting = True
        self._open(f"trying {title}", total, "trial")
        self._bar.set_postfix_str("", refresh=False)
        self._bar.update(done - self._bar.n)

    def calibrating(self, number: int) -> None:
        self._selecting = True
        self._open("calibrating", FOLDS, "part")
        self._bar.update(number - self._bar.n)

    def chosen(self, selection: Selection) -> None:
        # Trials of a method that diverged were left out.
        self._bar.update(self._bar.total - self._bar.n)
        self._bar.set_description("methods tried", refresh=False)
        self._bar.set_postfix_str("", refresh=False)
        self._bar.close()
        self._bar.write(selection.reason)

    def start(self, epochs: int, steps: int, _finished_epochs: int) -> None:
        self._epochs, self._steps = epochs, steps
        if epochs and not self._selecting:
            self._open(f"epoch 1/{epochs}", epochs * steps, "step")

    def step(self, report: StepReport) -> None:
        if self._selecting:
            self._bar.set_postfix_str(f"step {report.step + 1} of {self._epochs * self._steps}", refresh=False)
            self._bar.update(0)
            return
        self._bar.set_description(f"epoch {report.epoch + 1}/{self._epochs}", refresh=False)
        self._bar.set_postfix_str(f"loss {report.loss:.4f}", refresh=False)
        self._bar.update()
