"""Methods that train the prompts of another method with a loss of their own."""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, model_validator
from torch import Generator, Tensor, nn

from maple.clip import LayerEdit
from maple.errors import ConfigError, one_of
from maple.methods.base import DepthLimits, Method, MethodSettings


class BaseMethodSettings(MethodSettings):
    """Base class of settings that name another method, and have all settings of it next to their own.

    `dataset_template` sets those of the base method's defaults that depend on the data set.

    Attributes:
        renamed: {base method: {name here: its own name}}, for settings that are called otherwise here.
        base_defaults: {base method: {its own name: value}}, for settings with another default here.
    """

    model_config = ConfigDict(extra="allow")

    renamed: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    base_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    base_method: str

    @classmethod
    def for_template(cls, template: str) -> dict[str, Any]:
        return {"dataset_template": template}

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        from maple.methods import METHODS  # imports subclasses of this

        of_this = {key: value for key, value in values.items() if key in cls.model_fields}
        given = {key: value for key, value in values.items() if key not in cls.model_fields}
        name = of_this.get("base_method", cls.model_fields["base_method"].default)
        kind = METHODS.get(name) if isinstance(name, str) else None
        if kind is None:
            raise ConfigError(one_of("base method", name, METHODS))
        if kind.Settings is cls:
            raise ConfigError(f"method.base_method={name!r} is this method itself; name another one, such as 'coop'")
        template, names = given.pop("dataset_template", None), cls.renamed.get(name, {})
        back = {original: here for here, original in names.items()}
        if taken := sorted(given.keys() & back.keys()):
            here = back[taken[0]]
            raise ConfigError(f"the setting {taken[0]} of {name} is called {here} here; use method.{here}")
        known = [*cls.model_fields, *(back.get(key, key) for key in kind.Settings.model_fields)]
        if unknown := [key for key in given if key not in known]:
            raise ConfigError(one_of("setting", f"method.{unknown[0]}", known))
        defaults = {} if template is None else kind.Settings.for_template(template)
        renamed = {names.get(key, key): value for key, value in given.items()}
        base = settings_of({"name": name, **defaults, **cls.base_defaults.get(name, {}), **renamed})
        return {**of_this, **{back.get(key, key): value for key, value in base.model_dump(mode="json").items()}}

    @property
    def base(self) -> dict[str, Any]:
        """The base method's name and settings, as for `build_method`."""
        names = self.renamed.get(self.base_method, {})
        return {
            "name": self.base_method,
            **{names.get(key, key): value for key, value in (self.model_extra or {}).items()},
        }

    @property
    def depth_limits(self) -> DepthLimits:  # type: ignore[override]
        """Those of the base method."""
        return settings_of(self.base).depth_limits

    @property
    def prediction_sentences(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the base method."""
        return settings_of(self.base).prediction_sentences

    @property
    def supports_new_classes(self) -> bool:
        return settings_of(self.base).supports_new_classes

    @property
    def draws_random_numbers(self) -> bool:
        return settings_of(self.base).draws_random_numbers


def settings_of(description: Mapping[str, Any]) -> MethodSettings:
    """The settings of another method, {"name": ..., **settings}."""
    from maple.methods import method_settings  # imports the methods that call this

    return method_settings(description)[1]


class WrapsPrompts(Method):
    """Base class of methods that differ from another method in their training only.

    The prompts keep their names, so prompts files of the two methods hold the same tensors.

    Raises:
        ConfigError: the other method does not have prompts, has another loss than cross-entropy, or has text features
            that depend on the image.
    """

    def __init__(self, settings: MethodSettings, prompts: Method) -> None:
        if not self.can_train(prompts):
            raise ConfigError(f"{self.title} cannot train the prompts of {prompts.title}: it needs {self.needed}")
        super().__init__(settings, prompts.backbone)
        self.prompts = prompts
        self.classes = prompts.classes
        self.class_names = prompts.class_names

    needed: ClassVar[str] = (
        "a method that is trained by cross-entropy alone and whose text features do not depend on the image, such as "
        "coop, deep_language, vpt, independent_vl or maple"
    )
    """What `can_train` requires, for error messages."""

    def can_train(self, prompts: Method) -> bool:
        """Whether this method's training fits the prompts of the other."""
        unfit = prompts.classes_depend_on_image or prompts.uses_features or not prompts.prompt_parameters()
        return not unfit and type(prompts).loss is Method.loss

    def text_prompts(self) -> list[Tensor]:
        return self.prompts.text_prompts()

    def vision_prompts(self) -> list[Tensor]:
        return self.prompts.vision_prompts()

    def text_edits(self) -> list[LayerEdit]:
        return self.prompts.text_edits()

    def vision_edits(self) -> list[LayerEdit]:
        return self.prompts.vision_edits()

    def prompt_parameters(self) -> dict[str, nn.Parameter]:
        return self.prompts.prompt_parameters()

    def saved_tensors(self) -> dict[str, Tensor]:
        return self.prompts.saved_tensors()

    def set_class_names(self, names: Sequence[str]) -> None:
        self.prompts.set_class_names(names)
        self.class_names = self.prompts.class_names

    def with_class_names(self, names: Sequence[str]) -> Self:
        other = copy(self)
        other._embeddings = None
        # A shallow copy of a module shares the dictionaries of its buffers and submodules.
        other._buffers = dict(self._buffers)
        other._modules = {**self._modules, "prompts": self.prompts.with_class_names(names)}
        other.classes = other.prompts.classes
        other.class_names = other.prompts.class_names
        return other

    def on_step_begin(self, generator: Generator) -> None:
        self.prompts.on_step_begin(generator)

    def limit_text_memory(self, limit: int | None) -> None:
        self.prompts.limit_text_memory(limit)

    @property
    def logit_scale(self) -> float:
        return self.prompts.logit_scale

    def encode_classes(self) -> Tensor:
        return self.prompts.encode_classes()

    def encode_classes_for(self, image_features: Tensor) -> Tensor:
        return self.prompts.encode_classes_for(image_features)

    def class_features_raw(self, image_features: Tensor) -> Tensor:
        return self.prompts.class_features_raw(image_features)

    def image_features_raw(self, images: Tensor) -> Tensor:
        return self.prompts.image_features_raw(images)

    def raw_features_with(self, edits: Sequence[LayerEdit], images: Tensor) -> Tensor:
        return self.prompts.raw_features_with(edits, images)

    def encode_images(self, images: Tensor) -> Tensor:
        return self.prompts.encode_images(images)

    def on_epoch_end(self, epoch: int, epochs: int) -> None:
        self.prompts.on_epoch_end(epoch, epochs)

    def training_state(self) -> dict[str, Tensor]:
        return self.prompts.training_state()

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        self.prompts.load_training_state(state)
