"""The contract of a method: all that a paper has to provide."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maple.clip import Backbone
from maple.config import Settings
from maple.descriptions import PlotStyle, ReportRole
from maple.errors import CheckpointError, ConfigError
from maple.names import clean_class_names
from maple.prompts import PromptedClasses, TemplateClasses, encode_image, l2_normalize, to_float32

DepthLimits = Mapping[str, tuple[Literal["text", "image"], ...]]


class MethodSettings(Settings):
    """Base of a method's own settings."""

    section = "method."

    depth_limits: ClassVar[DepthLimits] = {}
    """Settings that count prompted blocks, and the towers whose number of blocks limits them."""

    @classmethod
    def for_template(cls, template: str) -> dict[str, Any]:
        """Defaults that follow a data set's own zero-shot template, such as "a centered satellite photo of {}."."""
        del template  # a method without such settings
        return {}

    @property
    def supports_new_classes(self) -> bool:
        """Whether the method can name classes that it was not trained on. A sweep asks this before it trains."""
        return True

    @property
    def needs_validation(self) -> bool:
        """Whether a setting is left open, to be chosen on validation images."""
        return False


@dataclass(frozen=True)
class Features:
    """Raw features of the untouched image tower, float32: what a method may be fitted to at once.

    Attributes:
        train, train_labels: [V, N, D], V views of each training image, and [N] int64.
        val, val_labels: [M, D] of the validation images as evaluation sees them, and [M]; M may be 0.
    """

    train: Tensor
    train_labels: Tensor
    val: Tensor
    val_labels: Tensor


class Method(nn.Module):
    """A classifier made of a frozen backbone and some prompt parameters.

    A subclass creates its parameters in `__init__` (drawing from the given generator only), sets `self.classes`
    to the class side it needs, calls `self.set_class_names(...)` last, and overrides `text_prompts` and
    `vision_prompts`, or whatever else its paper changes. The backbone is not a submodule: it is never trained,
    saved or counted, and `parameters()` are exactly the learned ones, under their contract names.

    Attributes:
        title, paper, summary: for `maple methods`.
        short_title, plot_style, report_roles: how reports name, draw and use the method; "" is the title itself, and
            a style is picked where the class has none.
        Settings: the settings class.
        classes_depend_on_image: text features differ per image (CoCoOp), so they cannot be cached.
        log_names: the names in the logs of `loss` (a process without images must know them too).
        auxiliary_losses: names of the logged losses whose gradients are passed to `combine_gradients`; `loss` leaves
            them attached to the graph.
        uses_features: `fit_features` and `select_hyperparameters` are to be called, before and after training.
        needs_frozen_features: `loss` takes a third argument, the raw features [B, D] of its images by the frozen tower,
            or None where these are not known beforehand.
        uses_text_tower: an answer needs the classes' sentences; not so where each class has weights instead.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    short_title: ClassVar[str] = ""
    plot_style: ClassVar[PlotStyle | None] = None
    report_roles: ClassVar[frozenset[ReportRole]] = frozenset()
    Settings: ClassVar[type[MethodSettings]]
    classes_depend_on_image: ClassVar[bool] = False
    log_names: ClassVar[tuple[str, ...]] = ("cross_entropy", "accuracy")
    auxiliary_losses: ClassVar[tuple[str, ...]] = ()
    uses_features: ClassVar[bool] = False
    needs_frozen_features: ClassVar[bool] = False
    uses_text_tower: ClassVar[bool] = True

    classes: PromptedClasses | TemplateClasses

    def __init__(self, settings: MethodSettings, backbone: Backbone) -> None:
        super().__init__()
        self.settings = settings
        self._frozen = (backbone,)
        self.class_names: tuple[str, ...] = ()
        self._embeddings: tuple[bytes, Tensor] | None = None

    @property
    def backbone(self) -> Backbone:
        """The frozen CLIP."""
        return self._frozen[0]

    def text_prompts(self) -> list[Tensor]:
        """Prompt tokens of the text tower, one tensor per layer: [P, Ht], or [C, P, Ht]."""
        return []

    def vision_prompts(self) -> list[Tensor]:
        """Prompt tokens of the image tower, one tensor [P, Hv] per layer."""
        return []

    def prompt_parameters(self) -> dict[str, nn.Parameter]:
        """The learned parameters by contract name: what is trained, saved and counted."""
        return dict(self.named_parameters())

    def saved_tensors(self) -> dict[str, Tensor]:
        """All that a prompts file holds, by contract name: the parameters, and buffers that were found without a step.

        A teacher or whatever follows from the backbone is no buffer.
        """
        return {**self.prompt_parameters(), **dict(self.named_buffers())}

    def resize_for(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Take on the shapes of tensors that are about to be put in, where they follow from the training images."""

    def parameter_count(self) -> int:
        """How many numbers are learned."""
        return sum(parameter.numel() for parameter in self.prompt_parameters().values())

    def set_class_names(self, names: Sequence[str]) -> None:
        """Speak of these C classes from now on; no trained tensor is touched.

        Raises:
            ClassNamesError: an empty list, an empty name, or a name too long for the text tower.
        """
        clean_class_names(names)
        # Even inside a user's inference mode: what is made here must serve training later.
        with torch.inference_mode(False):
            self.classes.set_class_names(names)
        self.class_names = tuple(names)

    def with_class_names(self, names: Sequence[str]) -> Self:
        """A twin that speaks of other classes and shares every tensor that was learned; this one stays as it is.

        Several threads may make and use twins of one method at once.

        Raises:
            ClassNamesError: as `set_class_names`.
        """
        twin = copy(self)
        twin._embeddings = None
        twin.classes = copy(self.classes)
        twin.set_class_names(names)
        return twin

    def limit_text_memory(self, limit: int | None) -> None:
        """Let the states of the text tower take `limit` bytes, about; None for a part of what the device has."""
        self.classes.memory_limit = limit

    def encode_classes(self) -> Tensor:
        """Unit text features [C, D] of the current classes."""
        if isinstance(self.classes, TemplateClasses):
            return self.classes.features
        return self.classes.encode(self.text_prompts())

    @property
    def supports_new_classes(self) -> bool:
        """Whether `set_class_names` may name classes that it was not trained on."""
        return self.settings.supports_new_classes

    @property
    def accepts_features(self) -> bool:
        """Whether raw features [B, D] of the untouched image tower may be given wherever images are asked for."""
        return not self.vision_prompts()

    def image_features_raw(self, images: Tensor) -> Tensor:
        """Raw image features [B, D] of normalised images [B, 3, R, R]; features given in their place come back."""
        if images.ndim == 2:
            return images
        return to_float32(encode_image(self.backbone.image, images, self.vision_prompts()))

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit image features [B, D] of normalised images [B, 3, R, R]."""
        return l2_normalize(self.image_features_raw(images))

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Scaled cosines [B, C] of unit features [B, D] and [C, D]."""
        with full_precision(image_features):
            return self.backbone.logit_scale * image_features @ text_features.T

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C] of normalised images [B, 3, R, R], everything computed afresh."""
        return self.logits(self.encode_images(images), self.encode_classes())

    @torch.no_grad()
    def class_embeddings(self) -> Tensor:
        """`encode_classes()`, computed once per state of the prompts and class names: [C, D].

        The state is told by the content of the parameters, so no way of changing them goes unnoticed.
        """
        state = self._state_digest()
        if self._embeddings is None or self._embeddings[0] != state:
            self._embeddings = (state, self.encode_classes())
        return self._embeddings[1]

    @torch.no_grad()
    def logits_of(self, image_features: Tensor) -> Tensor:
        """Logits [B, C] of unit image features [B, D], with class embeddings from the cache."""
        return self.logits(image_features, self.class_embeddings())

    @torch.no_grad()
    def predict_logits(self, images: Tensor) -> Tensor:
        """Logits [B, C] of normalised images [B, 3, R, R], with class embeddings from the cache."""
        return self.logits_of(self.encode_images(images))

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What training minimises: (scalar, logs); the logs hold each term and "accuracy", as scalars.

        Args:
            images: [B, 3, R, R], normalised.
            labels: [B] int64, indices into the current class names.
        """
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        return loss, {"cross_entropy": loss.detach(), "accuracy": batch_accuracy(logits, labels)}

    def combine_gradients(self, gradients: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """What a step follows, by parameter name; asked only of methods with `auxiliary_losses`.

        Args:
            gradients: by parameter name, under "loss" those of the loss and under each of `auxiliary_losses` those of
                that log; all are of means over the whole batch, however it was divided among processes and pieces.
        """
        return gradients["loss"]

    def fit_features(self, features: Features) -> None:
        """Called before the first epoch, and again before a resumed one, where `uses_features`: fit what can be."""

    def select_hyperparameters(self, features: Features) -> None:
        """Called after the last epoch where `uses_features`: choose what is chosen with the trained parameters."""

    def selected_hyperparameters(self) -> dict[str, float]:
        """What was chosen on validation images, by name; kept with the prompts for readers."""
        return {}

    def on_epoch_end(self, epoch: int, epochs: int) -> None:
        """Called after epoch `epoch` (from 0) of `epochs`."""

    def training_state(self) -> dict[str, Tensor]:
        """What besides the prompts a resumed training needs (an average of prompts, say); nothing by default."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `training_state` gave.

        Raises:
            CheckpointError: the state is not this method's.
        """
        if state:
            raise CheckpointError(f"{self.title} keeps no training state, but the resume state has {sorted(state)}")

    def _state_digest(self) -> bytes:
        hasher = blake2b(repr(self.class_names).encode(), digest_size=16)
        for name, parameter in self.prompt_parameters().items():
            hasher.update(name.encode())
            hasher.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return hasher.digest()


def full_precision(features: Tensor) -> AbstractContextManager[None]:
    """For what a method adds to the towers: float32, also in a loop of the caller's own under autocast."""
    kind = features.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def batch_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The fraction of logits [B, C] whose largest is at the label [B]: a scalar."""
    return (logits.detach().argmax(dim=-1) == labels).float().mean()


def check_depth(depth: int, available: int, *, setting: str, tower: str) -> None:
    """Refuse to prompt more layers than a tower has.

    Raises:
        ConfigError: depth > available.
    """
    if depth > available:
        raise ConfigError(f"{setting}={depth}, but the {tower} tower has {available} blocks; choose 1 to {available}")


def prompt_list(tokens: Sequence[Tensor], backbone: Backbone) -> nn.ParameterList:
    """Learned tokens, one tensor per layer, float32, on the backbone's device."""
    return nn.ParameterList(nn.Parameter(token.to(backbone.device, torch.float32)) for token in tokens)
