"""Methods that predict the class names they were trained on by one rule, and other names by another."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maple.methods.base import Method
from maple.names import NameRows


class TrainedNamesMethod(Method):
    """Base class of methods whose class embeddings depend on whether a name was trained.

    Which rule a name gets is decided here, name by name: a list may have both kinds. A class embedding has E >= D
    entries, and so have image features; that of another name is its text feature, followed by zeros.

    Attributes:
        trained, rows: the positions [n] int64 of the trained names among the current ones, and in the trained list.

    A subclass calls `set_trained_names` before `set_class_names`, and overrides `text_features` and `embed_trained`.
    """

    trained: Tensor
    rows: Tensor

    def set_trained_names(self, names: Sequence[str]) -> None:
        """Set the names that get the rule of trained ones."""
        self._trained = NameRows(names)

    def set_class_names(self, names: Sequence[str]) -> None:
        super().set_class_names(names)
        self.find_trained(names)

    def set_target_class_names(self, names: Sequence[str]) -> None:
        self.set_class_names(names)
        if self.target_rule == "none" or (self.target_rule == "all" and len(self.trained) < len(names)):
            self.trained, self.rows, self._embeddings = self.trained[:0], self.rows[:0], None

    def find_trained(self, names: Sequence[str]) -> None:
        """Set which of the current names are trained ones, and their rows."""
        rows = self._trained.find(names)
        self._embeddings = None  # for these names, they may be of the other rule
        with torch.inference_mode(False):
            pairs = [(index, row) for index, row in enumerate(rows) if row is not None]
            self.trained, self.rows = torch.tensor(pairs, dtype=torch.int64, device=self.backbone.device).view(-1, 2).T

    def text_features(self) -> Tensor:
        """Unit text features [C, D] of the current classes."""
        raise NotImplementedError

    def embed_trained(self, text_features: Tensor, rows: Tensor) -> Tensor:
        """The class embeddings [n, E] of trained names, or [B, n, E].

        Args:
            text_features: their unit text features, [n, D], or [B, n, D] of each image.
            rows: their positions in the list that was trained, [n] int64.
        """
        raise NotImplementedError

    def embed_classes(self, text_features: Tensor) -> Tensor:
        """The class embeddings [..., C, E] of the current classes with these text features [..., C, D]."""
        embedded = self.embed_trained(text_features[..., self.trained, :], self.rows)
        others = F.pad(text_features, (0, embedded.shape[-1] - text_features.shape[-1]))
        return others.index_copy(-2, self.trained, embedded.to(others.dtype))

    def encode_classes(self) -> Tensor:
        """The class embeddings [C, E] of the current classes."""
        return self.embed_classes(self.text_features())
