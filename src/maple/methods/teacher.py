"""The frozen CLIP as a teacher: reference features that keep a method close to zero-shot CLIP.

A teacher has no parameters and is not saved: it is computed from the backbone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from maple.clip import Backbone
from maple.prompts import TemplateClasses, encode_image, l2_normalize


class Teacher:
    """Unit features of the frozen CLIP; those of text from fixed sentences, as in `TemplateClasses`."""

    def __init__(self, backbone: Backbone, templates: Sequence[str], *, normalize_each: bool = True) -> None:
        self._backbone = backbone
        self._classes = TemplateClasses(backbone, templates, normalize_each=normalize_each)
        self._last: tuple[tuple[str, ...], Tensor] | None = None

    def text_features(self, names: Sequence[str]) -> Tensor:
        """Unit text features [C, D] of the classes, cached for the last list of names."""
        last = self._last  # one read: another thread may put another list there
        if last is None or last[0] != tuple(names):
            with torch.inference_mode(False):
                last = self._last = tuple(names), self._classes.features_of(names)
        return last[1]

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Unit image features [B, D] of normalised images [B, 3, R, R], or of raw features [B, D]."""
        return l2_normalize(images if images.ndim == 2 else encode_image(self._backbone.image, images, []))
