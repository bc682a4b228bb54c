"""Methods that train the prompts of another method with a loss of their own."""

from collections.abc import Sequence
from copy import copy
from typing import Self

from torch import Generator, Tensor, nn

from maple.clip import LayerEdit
from maple.errors import ConfigError
from maple.methods.base import Method, MethodSettings


class WrapsPrompts(Method):
    """Base class of methods that differ from another method in their training only.

    The prompts keep their names, so prompts files of the two methods hold the same tensors.

    Raises:
        ConfigError: the other method does not have prompts, has another loss than cross-entropy, or has text features
            that depend on the image.
    """

    def __init__(self, settings: MethodSettings, prompts: Method) -> None:
        unfit = prompts.classes_depend_on_image or prompts.uses_features or not prompts.prompt_parameters()
        if unfit or type(prompts).loss is not Method.loss:
            raise ConfigError(
                f"{self.title} cannot train the prompts of {prompts.title}: it needs a method that is trained by "
                "cross-entropy alone and whose text features do not depend on the image, such as coop, deep_language, "
                "vpt, independent_vl or maple"
            )
        super().__init__(settings, prompts.backbone)
        self.prompts = prompts
        self.classes = prompts.classes
        self.class_names = prompts.class_names

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
        # A shallow copy of a module shares the dictionary of its submodules.
        other._modules = {"prompts": self.prompts.with_class_names(names)}
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

    def image_features_raw(self, images: Tensor) -> Tensor:
        return self.prompts.image_features_raw(images)

    def raw_features_with(self, edits: Sequence[LayerEdit], images: Tensor) -> Tensor:
        return self.prompts.raw_features_with(edits, images)

    def encode_images(self, images: Tensor) -> Tensor:
        return self.prompts.encode_images(images)
