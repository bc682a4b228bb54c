"""The contract of a method: everything that a paper has to provide."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from maple.clip import Backbone, LayerEdit, prompt_edits
from maple.config import Settings
from maple.descriptions import PlotStyle, ReportRole
from maple.errors import CheckpointError, ConfigError
from maple.methods.features import Features
from maple.names import clean_class_names
from maple.prompts import (
    PromptedClasses,
    TemplateClasses,
    encode_image,
    encode_image_and_tokens,
    l2_normalize,
    to_float32,
)

_SENTENCES_AT_ONCE = 1024
DepthLimits = Mapping[str, tuple[Literal["text", "image"], ...]]


class MethodSettings(Settings):
    """Base class of a method's settings.

    Example:
        >>> class ScaleSettings(MethodSettings):
        ...     scale: float = 1.0
    """

    section = "method."

    depth_limits: ClassVar[DepthLimits] = {}
    """Settings that count prompted blocks, and the towers whose number of blocks limits them."""

    prediction_sentences: ClassVar[tuple[str, ...]] = ("template", "templates")
    """Settings whose sentences a trained method predicts with; those of other data sets may replace them."""

    @classmethod
    def for_template(cls, template: str) -> dict[str, Any]:
        """Defaults for a data set whose zero-shot template is, say, "a centered satellite photo of {}."."""
        return {"templates": [template]} if "templates" in cls.model_fields else {}

    @property
    def supports_new_classes(self) -> bool:
        """Whether the method can predict classes that it was not trained on. Sweeps read it before training."""
        return True

    @property
    def draws_random_numbers(self) -> bool:
        """Whether `loss` draws random numbers from torch's generator, which each training step seeds."""
        return False

    @property
    def needs_validation(self) -> bool:
        """Whether a setting is to be selected on validation images."""
        return False


@dataclass(frozen=True)
class TrainingStage:
    """A part of a training, with an optimizer and a schedule of its own.

    Attributes:
        end: the share of all steps of the training after which it ends.
        parameters: the names of those that are trained; others are neither changed nor decayed.

    Example:
        >>> [TrainingStage(0.6, ("shift",)), TrainingStage(1.0, ("scale",))]
    """

    end: float
    parameters: tuple[str, ...]


class Method(nn.Module):
    """Base class of classifiers made of a frozen backbone and learned parameters.

    A subclass creates its parameters in `__init__` (random numbers come from the given generator only), sets
    `self.classes`, calls `self.set_class_names(...)` last, and overrides `text_prompts`, `vision_prompts`, and whatever
    else its paper changes. The backbone is not a submodule: it is never trained, saved or counted, and `parameters()`
    are exactly the learned ones, under the names by which they are saved.

    Attributes:
        title, paper, summary: for `maple methods`.
        temperature: by which logits are divided for probabilities; 1 unless the run was calibrated. The logits of this
            class are not divided.
        stage: which of `training_stages` is being trained, from 0; a trainer sets it.
        short_title, plot_style, report_roles: how reports name, draw and use the method; "" is the title itself, and
            a style is picked where the class has none.
        Settings: the settings class.
        presets: of a class outside the package, settings for its training by protocol, as a preset's file has them:
            {"few-shot": {"method": {...}, "train": {...}, "rules": [...]}}.
        classes_depend_on_image: whether text features differ per image, so that they cannot be cached.
        log_names: the keys of the logs of `loss`, which a process without images needs too.
        added_names: the keys of `added_terms`.
        auxiliary_losses: names of the logged losses whose gradients are passed to `combine_gradients`; `loss` does not
            detach them.
        selection: what is selected on validation images, and how to set it instead, for an error without any.
        uses_features: whether `fit_features` and `select_hyperparameters` are called, before and after training.
        needs_frozen_features: whether `loss` takes a third argument, the raw features [B, D] of the frozen image tower,
            or None if they have not been computed beforehand.
        target_rule: the published rule for the list of another data set (`set_target_class_names`): "each" name in it
            that was trained counts as trained, or "all" of them if the list has no other names, or "none".
        uses_text_tower: whether a prediction encodes sentences, rather than using weights of each class.

    Example:
        >>> class ScaledZeroShot(Method):
        ...     title, paper, summary, Settings = "scaled CLIP", "none", "a learned scale", MethodSettings
        ...     def __init__(self, settings, backbone, class_names, generator):
        ...         super().__init__(settings, backbone)
        ...         self.scale = nn.Parameter(torch.ones((), device=backbone.device))
        ...         self.classes = TemplateClasses(backbone, ["a photo of a {}."])
        ...         self.set_class_names(class_names)
        ...     def logits(self, image_features, text_features):
        ...         return self.scale * super().logits(image_features, text_features)
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    short_title: ClassVar[str] = ""
    plot_style: ClassVar[PlotStyle | None] = None
    report_roles: ClassVar[frozenset[ReportRole]] = frozenset()
    Settings: ClassVar[type[MethodSettings]]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    classes_depend_on_image: bool = False
    log_names: tuple[str, ...] = ("cross_entropy", "accuracy")
    added_names: ClassVar[tuple[str, ...]] = ()
    auxiliary_losses: ClassVar[tuple[str, ...]] = ()
    selection: ClassVar[tuple[str, str]] = ("a setting is selected", "set it")
    uses_features: ClassVar[bool] = False
    needs_frozen_features: bool = False
    uses_text_tower: ClassVar[bool] = True
    target_rule: ClassVar[Literal["each", "all", "none"]] = "each"

    classes: PromptedClasses | TemplateClasses

    def __init__(self, settings: MethodSettings, backbone: Backbone) -> None:
        super().__init__()
        if self.uses_text_tower:
            backbone.require_text(self.title)
        self.settings = settings
        self._frozen = (backbone,)
        self.class_names: tuple[str, ...] = ()
        self.temperature = 1.0
        self.stage = 0
        self._embeddings: tuple[bytes, Tensor] | None = None

    @property
    def backbone(self) -> Backbone:
        """The frozen CLIP."""
        return self._frozen[0]

    def text_prompts(self) -> list[Tensor]:
        """Prompt tokens of the text tower, one tensor [P, Ht] or [C, P, Ht] per layer."""
        return []

    def vision_prompts(self) -> list[Tensor]:
        """Prompt tokens of the image tower, one tensor [P, Hv] per layer."""
        return []

    def text_edits(self) -> list[LayerEdit]:
        """The edits of the text tower's first blocks; by default those of `text_prompts`."""
        return prompt_edits(self.text_prompts())

    def vision_edits(self) -> list[LayerEdit]:
        """The edits of the image tower's first blocks; by default those of `vision_prompts`."""
        return prompt_edits(self.vision_prompts())

    def prompt_parameters(self) -> dict[str, nn.Parameter]:
        """The learned parameters by name: they are trained, saved and counted."""
        return dict(self.named_parameters())

    def training_stages(self) -> list[TrainingStage]:
        """The stages of a training, one after the other; by default a single one, of all parameters.

        Each begins with an epoch, and the epoch before ends where its stage does, after int(`end` x steps) steps.
        """
        return [TrainingStage(1.0, tuple(self.prompt_parameters()))]

    def saved_tensors(self) -> dict[str, Tensor]:
        """The tensors of a prompts file: the parameters, and persistent buffers, which change without a gradient.

        What is computed from the backbone, such as a teacher, must not be one of them.
        """
        persistent = self.state_dict().keys()
        buffers = {name: buffer for name, buffer in self.named_buffers() if name in persistent}
        return {**self.prompt_parameters(), **buffers}

    def resize_for(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Resize tensors whose shape depends on the training set, before a checkpoint is loaded."""

    def problems_of(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """What is wrong with the values of a checkpoint's tensors, whose names, shapes and types are right."""
        del tensors  # their values are those of the subclass
        return []

    def parameter_count(self) -> int:
        """The number of learned scalars."""
        return sum(parameter.numel() for parameter in self.prompt_parameters().values())

    def set_class_names(self, names: Sequence[str]) -> None:
        """Set the C class names to predict; learned tensors are unchanged.

        Raises:
            ClassNamesError: the list or a name is empty, or a name is too long for the text tower.
        """
        clean_class_names(names)
        # Even if the caller is in inference mode: the tensors made here may be used in training later.
        with torch.inference_mode(False):
            self.classes.set_class_names(names)
        self.class_names = tuple(names)

    def set_target_class_names(self, names: Sequence[str]) -> None:
        """Set the class names of a published data set other than that of the training, by the rule `target_rule`."""
        self.set_class_names(names)

    def with_class_names(self, names: Sequence[str]) -> Self:
        """A shallow copy for other class names, sharing the learned tensors; threads may make and use several at once.

        Raises:
            ClassNamesError: see `set_class_names`.
        """
        other = copy(self)
        other._embeddings = None
        other._buffers = dict(self._buffers)  # a shallow copy of a module shares this
        other.classes = copy(self.classes)
        other.set_class_names(names)
        return other

    def limit_text_memory(self, limit: int | None) -> None:
        """Limit the states of the text tower to about `limit` bytes; None for a quarter of the device's memory."""
        self.classes.memory_limit = limit

    def encode_classes(self) -> Tensor:
        """Unit text features [C, D] of the current classes."""
        if isinstance(self.classes, TemplateClasses):
            return self.classes.features
        return self.classes.encode(self.text_edits())

    def encode_classes_for(self, image_features: Tensor) -> Tensor:
        """Class embeddings for unit image features [B, D]: [C, D]; [B, C, D] where they depend on the image."""
        del image_features  # they do not
        return self.encode_classes()

    def class_features_raw(self, image_features: Tensor) -> Tensor:
        """Text features before they are normalised, for unit image features [B, D]: [C, D] or [B, C, D]."""
        del image_features
        classes = self.classes
        raw = classes.raw_mean if isinstance(classes, TemplateClasses) else classes.encode_raw(self.text_edits())
        return to_float32(raw)

    @property
    def supports_new_classes(self) -> bool:
        """Whether `set_class_names` accepts classes that the method was not trained on."""
        return self.settings.supports_new_classes

    @property
    def accepts_features(self) -> bool:
        """Whether raw features [B, D] of the frozen image tower may be given in place of images."""
        return not self.vision_edits()

    def image_features_raw(self, images: Tensor) -> Tensor:
        """Raw image features [B, D] of normalised images [B, 3, R, R]; given features [B, D] are returned."""
        return images if images.ndim == 2 else self.raw_features_with(self.vision_edits(), images)

    def raw_features_with(self, edits: Sequence[LayerEdit], images: Tensor) -> Tensor:
        """`image_features_raw` of images, with these edits of the image tower."""
        tower = self.backbone.image
        if any(edit.tokens is not None for edit in edits):
            features, rows = encode_image_and_tokens(tower, images, edits)
            return self.join_token_rows(to_float32(features), rows)
        return to_float32(encode_image(tower, images, edits))

    def join_token_rows(self, features: Tensor, rows: Tensor) -> Tensor:
        """The raw image features, of those of the tower [B, D] and the final rows [B, K, Hv] of the edits' tokens."""
        del rows
        return features

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit image features [B, D] of normalised images [B, 3, R, R]."""
        return l2_normalize(self.image_features_raw(images))

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Scaled cosines [B, C] of unit features [B, D] and [C, D], or [B, C, D] of each image."""
        with full_precision(image_features):
            if text_features.ndim == 3:
                return self.logit_scale * torch.einsum("bd,bcd->bc", image_features, text_features)
            return self.logit_scale * image_features @ text_features.T

    @property
    def logit_scale(self) -> float:
        """By which cosines are multiplied."""
        return self.backbone.logit_scale

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C] of normalised images [B, 3, R, R]; nothing is cached."""
        image_features = self.encode_images(images)
        return self.logits(image_features, self.encode_classes_for(image_features))

    @torch.no_grad()
    def class_embeddings(self) -> Tensor:
        """`encode_classes()`, cached until the parameters or the class names change: [C, D]."""
        # The key is a digest of the parameters' content: it notices every way of changing them.
        hasher = blake2b(repr(self.class_names).encode(), digest_size=16)
        for name, parameter in self.prompt_parameters().items():
            hasher.update(name.encode())
            hasher.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        state = hasher.digest()
        if self._embeddings is None or self._embeddings[0] != state:
            self._embeddings = (state, self.encode_classes())
        return self._embeddings[1]

    @torch.no_grad()
    def logits_of(self, image_features: Tensor) -> Tensor:
        """Logits [B, C] of unit image features [B, D], with cached class embeddings where these depend on no image."""
        if self.classes_depend_on_image:
            # A few images at a time, so that their B * C sentences fit into memory.
            parts = image_features.split(max(1, _SENTENCES_AT_ONCE // len(self.class_names)))
            return torch.cat([self.logits(part, self.encode_classes_for(part)) for part in parts])
        return self.logits(image_features, self.class_embeddings())

    @torch.no_grad()
    def predict_logits(self, images: Tensor) -> Tensor:
        """Logits [B, C] of normalised images [B, 3, R, R], with cached class embeddings."""
        return self.logits_of(self.encode_images(images))

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss and its logs: a scalar, and each term and "accuracy" as scalars.

        `images` [B, 3, R, R] are normalised, `labels` [B] int64 are indices into the current class names.
        """
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        return loss, {"cross_entropy": loss.detach(), "accuracy": batch_accuracy(logits, labels)}

    def added_terms(
        self, image_features: Tensor, text_features: Tensor, images: Tensor
    ) -> Mapping[str, tuple[float, Tensor]]:
        """What the loss adds to cross-entropy, for methods that train this one's prompts: {name: (weight, scalar)}.

        Args:
            image_features, text_features: unit features of the batch and of the classes, [B, D] and [C, D].
            images: as for `loss`, or raw features [B, D] of the frozen image tower if they are known.
        """
        del image_features, text_features, images
        return {}

    def learning_rate_factors(self) -> dict[str, float]:
        """Factors of the learning rate after the warm-up, by parameter name; 1 where none is given."""
        return {}

    def on_step_begin(self, generator: Generator) -> None:
        """Called before each training step, for random numbers that all parts of the step share, in all processes.

        Those of `generator` depend on the seed and the number of the step alone.
        """

    def combine_gradients(self, gradients: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The gradient of a training step, by parameter name. Called if there are `auxiliary_losses`.

        `gradients` has those of the loss by parameter name under "loss", and those of each auxiliary loss under its
        name. All are of means over the whole batch, also if it was divided among processes or pieces.
        """
        return gradients["loss"]

    def require_validation(self, images: int) -> None:
        """Raise ConfigError if a setting is to be selected on validation images, and there are none."""
        if self.settings.needs_validation and not images:
            chosen, advice = self.selection
            problem = f"{chosen} on validation images, and this data set has none"
            raise ConfigError(f"{problem}: {advice}, or give it validation images")

    def fit_features(self, features: Features) -> None:
        """Fit to features. Called before the first epoch, and before a resumed one, if `uses_features`."""

    def fit_seconds(self, features: Features) -> float:
        """Estimate how long fitting and selecting take, by doing a part of it; do not use the method afterwards."""
        del features  # by default they take no time that matters
        return 0.0

    def select_hyperparameters(self, features: Features) -> None:
        """Select settings with the trained parameters. Called after the last epoch if `uses_features`."""

    def selected_hyperparameters(self) -> dict[str, float]:
        """The settings selected on validation images, by name; saved with the prompts as information."""
        return {}

    def on_epoch_end(self, epoch: int, epochs: int) -> None:
        """Called after each epoch, `epoch` counting from 0; after a stage's last one, `stage` is still that stage."""

    def training_state(self) -> dict[str, Tensor]:
        """The tensors that a resumed training needs in addition to the prompts, such as an average of them."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `training_state` returned; CheckpointError if it does not fit this method."""
        if state:
            raise CheckpointError(f"{self.title} has no training state, but the checkpoint has {sorted(state)}")


def full_precision(features: Tensor) -> AbstractContextManager[None]:
    """Disable autocast, for what a method adds to the towers: it is computed in float32 also in a user's own loop."""
    kind = features.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def batch_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The fraction of correct predictions of logits [B, C] for labels [B]: a scalar."""
    return (logits.detach().argmax(dim=-1) == labels).float().mean()


def check_depth(depth: int, available: int, *, setting: str, tower: str) -> None:
    """Raise ConfigError if there are more prompted layers than blocks in the tower."""
    if depth > available:
        raise ConfigError(f"{setting}={depth}, but the {tower} tower has {available} blocks; choose 1 to {available}")


def require_both_towers(method: Method, depth: int, setting: str) -> None:
    """Refuse a backbone that prompts cannot enter, or of which a tower has fewer than `depth` blocks."""
    backbone = method.backbone
    for name, tower in (("text", backbone.text), ("image", backbone.image)):
        tower.require_promptable(method.title)
        check_depth(depth, tower.depth, setting=setting, tower=name)


def hidden_width(backbone: Backbone, reduction: int, setting: str) -> int:
    """The width D / `reduction` of a hidden layer; ConfigError if nothing is left of it."""
    if (hidden := backbone.embed_dim // reduction) < 1:
        raise ConfigError(
            f"{setting}={reduction} is larger than the {backbone.embed_dim} dimensions of this CLIP's features, so the "
            f"hidden layer would be empty; choose 1 to {backbone.embed_dim}"
        )
    return hidden


def prompt_list(tokens: Sequence[Tensor], backbone: Backbone) -> nn.ParameterList:
    """Learnable tokens, one tensor per layer, float32, on the backbone's device."""
    return nn.ParameterList(nn.Parameter(token.to(backbone.device, torch.float32)) for token in tokens)
