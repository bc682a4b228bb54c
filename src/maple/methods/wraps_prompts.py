"""A paper that trains known prompts in another way: the prompts of one method, the loss of another."""

from collections.abc import Sequence
from copy import copy
from typing import Self

from torch import Tensor, nn

from maple.errors import ConfigError
from maple.methods.base import Method, MethodSettings


class WrapsPrompts(Method):
    """A classifier that is another method's in everything but how it is trained.

    The prompts keep their contract names, so files of either method hold the same tensors.

    Args:
        prompts: the other method; its parameters become this one's.

    Raises:
        ConfigError: the other method has no prompts, has a loss of its own, or text features that depend on the image.
    """

    def __init__(self, settings: MethodSettings, prompts: Method) -> None:
        unfit = prompts.classes_depend_on_image or prompts.uses_features or not prompts.prompt_parameters()
        if unfit or type(prompts).loss is not Method.loss:
            raise ConfigError(
                f"{self.title} cannot train the prompts of {prompts.title}: it takes those of a method that is trained "
                "by cross-entropy alone and whose text features do not depend on the image, such as coop, "
                "deep_language, vpt, independent_vl or maple"
            )
        super().__init__(settings, prompts.backbone)
        self.prompts = prompts
        self.classes = prompts.classes
        self.class_names = prompts.class_names

    def text_prompts(self) -> list[Tensor]:
        """As the other method's."""
        return self.prompts.text_prompts()

    def vision_prompts(self) -> list[Tensor]:
        """As the other method's."""
        return self.prompts.vision_prompts()

    def prompt_parameters(self) -> dict[str, nn.Parameter]:
        """As the other method's, under its names."""
        return self.prompts.prompt_parameters()

    def saved_tensors(self) -> dict[str, Tensor]:
        """As the other method's, under its names."""
        return self.prompts.saved_tensors()

    def set_class_names(self, names: Sequence[str]) -> None:
        """As the contract says.

        Raises:
            ClassNamesError: the other method cannot speak of them.
        """
        self.prompts.set_class_names(names)
        self.class_names = self.prompts.class_names

    def with_class_names(self, names: Sequence[str]) -> Self:
        """As the contract says, with a twin of the other method."""
        twin = copy(self)
        twin._embeddings = None
        # A module keeps its parts in a dictionary, which a copy would share.
        twin._modules = {"prompts": self.prompts.with_class_names(names)}
        twin.classes = twin.prompts.classes
        twin.class_names = twin.prompts.class_names
        return twin

    def limit_text_memory(self, limit: int | None) -> None:
        """As the other method does."""
        self.prompts.limit_text_memory(limit)

    def encode_classes(self) -> Tensor:
        """Unit text features [C, D], as the other method's."""
        return self.prompts.encode_classes()

    def image_features_raw(self, images: Tensor) -> Tensor:
        """Raw image features [B, D], as the other method's."""
        return self.prompts.image_features_raw(images)

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit image features [B, D], as the other method's."""
        return self.prompts.encode_images(images)
