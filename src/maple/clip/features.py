"""A backbone of precomputed features: a table in place of two towers."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from maple.clip.backbone import Backbone, Preprocessing
from maple.clip.backbone_names import ASSUMED, is_architecture
from maple.clip.towers import Tower
from maple.errors import BackboneError, ClassNamesError, ConfigError, DataError, UnsupportedTowerError
from maple.feature_files import read_features
from maple.names import FEATURES, words_of

logger = logging.getLogger(__name__)

_METHODS = "zero_shot, linear_probe, tip_adapter, taskres, clip_adapter, clap, lpplusplus and gda"


class FeatureBackbone(Backbone):
    """A frozen CLIP of which only features are known: those of images are given, those of class names are in a table.

    Its one sentence about a class is the class's name. It is what `load_clip("features:FILE.safetensors")` returns; see
    `maple.data.load_features` for the file.

    Raises:
        DataError: a file of features cannot be used.

    Example:
        >>> load_clip("features:cars.safetensors").embed_dim
        512
    """

    templates = ("{}",)

    def __init__(self, name: str, *, device: str | torch.device = "cpu") -> None:
        table = read_features(name.removeprefix(FEATURES))
        self.name, self.pretrained, self.precision = name, None, "fp32"
        self.preprocessing = Preprocessing(1, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # no image is ever read
        self.device, self.dtype = torch.device(device), torch.float32
        self.fingerprint, self.logit_scale = table.fingerprint, table.logit_scale
        self.parameter_count, self.embed_dim = 0, table.embed_dim
        self.has_text, self.computed_by = table.text is not None, table.backbone
        text = table.text if table.text is not None else torch.zeros(len(table.class_names), table.embed_dim)
        self._row_of = {words_of(class_name): row for row, class_name in enumerate(table.class_names)}
        self.text = _Table(text.to(self.device))  # type: ignore[assignment]
        self.image = _Table(None)  # type: ignore[assignment]

    @property
    def activation(self) -> str:
        return ASSUMED

    @property
    def model(self) -> None:
        raise BackboneError(f"trained on features: {self.name} has no CLIP to show or export; train on images for it")

    def require_text(self, method: str) -> None:
        if not self.has_text:
            raise ConfigError(
                f"{method} needs text features of the classes, and the files of features have none: add text [classes, "
                f"{self.embed_dim}], or choose linear_probe, which needs none"
            )

    def tokenize(self, sentences: Sequence[str], *, truncate: bool = False) -> Tensor:
        """Class names to their rows in the table [n, 1]; ClassNamesError if one is not there."""
        del truncate  # a name is a row
        rows = [self._row_of.get(words_of(sentence)) for sentence in sentences]
        for sentence, row in zip(sentences, rows, strict=True):
            if row is None:
                raise ClassNamesError(
                    f"trained on features: the text features of {sentence!r} are not known; use the "
                    f"{len(self._row_of)} class names of the files of features, such as {next(iter(self._row_of))!r}"
                )
        return torch.tensor(rows, dtype=torch.int64)[:, None]

    @property
    def uses_clip_tokenizer(self) -> bool:
        return False

    def token_texts(self, ids: Sequence[int]) -> list[str]:  # noqa: ARG002 - refused whatever they are
        raise BackboneError("trained on features: there is no tokenizer")


def require_features_of(backbone: Backbone, width: int, computed_by: str, source: str) -> None:
    """Refuse features of another CLIP than `backbone`, as far as their width and what their file says show it.

    Args:
        width, computed_by: D, and which CLIP the file names as theirs; "" if none.
        source: what the message calls them.

    Raises:
        DataError: the width differs, or the files of features of the training name another CLIP.

    Example:
        >>> require_features_of(load_clip("ViT-B-16"), 512, "OpenAI CLIP ViT-B/16", "cars.safetensors")
    """
    if width != backbone.embed_dim:
        raise DataError(
            f"{source} has {width} features, and the CLIP of the training {backbone.embed_dim}; "
            "give features of the same CLIP"
        )

    def letters(text: str) -> str:
        return "".join(filter(str.isalnum, text.lower()))

    trained_on = backbone.computed_by
    if trained_on is None:  # a note can call an architecture by another of its names, so it is not refused for that
        if computed_by and is_architecture(backbone.name) and letters(backbone.name) not in letters(computed_by):
            names = backbone.name, backbone.pretrained or "own weights"
            logger.warning("%s: features of %r, and this run has the CLIP %s (%s)", source, computed_by, *names)
    elif computed_by and trained_on and letters(computed_by) != letters(trained_on):
        raise DataError(
            f"{source} has features of {computed_by!r}, and the run was trained on features of {trained_on!r}, as the "
            "files say; give features of the same CLIP, or correct the entry backbone of the metadata"
        )


class _Table(Tower):
    """Stands for a tower that prompts cannot enter, and that knows the features of class names at most."""

    context_length = 77
    reads_padding = True

    def __init__(self, features: Tensor | None) -> None:
        obstacle = f"it is trained on features, without a CLIP; methods that go: {_METHODS}"
        super().__init__(self._features_of, torch.float32, obstacle)
        self._features = features

    def require_promptable(self, method: str) -> None:
        """Raise UnsupportedTowerError."""
        raise UnsupportedTowerError(f"{method} puts prompts into a tower, but {self.obstacle}")

    def require_standard_blocks(self, method: str) -> None:
        """Raise UnsupportedTowerError."""
        raise UnsupportedTowerError(f"{method} changes layers of a tower, but {self.obstacle}")

    def _features_of(self, inputs: Tensor) -> Tensor:
        """The features [n, D] of rows [n, 1]."""
        if self._features is None:
            raise BackboneError(
                "trained on features: images cannot be read without a CLIP; give their features, "
                "as in `maple predict RUN --features FILE`"
            )
        return self._features[inputs[:, 0]]
