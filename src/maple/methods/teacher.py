"""The frozen CLIP as a teacher: what methods compare their own features with, so as not to stray from it.

A teacher is no part of a method: it is made of the backbone that the method is given, has no parameters, and nothing of
it is saved.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from maple.clip import Backbone
from maple.prompts import TemplateClasses, encode_image, l2_normalize


class Teacher:
    """Unit features of the frozen CLIP, text features from fixed sentences.

    Args:
        templates: sentences with {} for the class name.
        unit_each: normalise the features of each template before they are averaged.

    Raises:
        ConfigError: no template, or one without exactly one {}.
    """

    def __init__(self, backbone: Backbone, templates: Sequence[str], *, unit_each: bool = True) -> None:
        self._backbone = backbone
        self._classes = TemplateClasses(backbone, templates, unit_each=unit_each)
        self._names: tuple[str, ...] = ()

    def text_features(self, names: Sequence[str]) -> Tensor:
        """Unit text features [C, D] of the classes, computed once for a list of names.

        Raises:
            ClassNamesError: a name is too long for a template.
        """
        if self._names != tuple(names):
            with torch.inference_mode(False):
                self._classes.set_class_names(names)
            self._names = tuple(names)
        return self._classes.features

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Unit image features [B, D] of normalised images [B, 3, R, R], or of raw features [B, D] in their place."""
        return l2_normalize(images if images.ndim == 2 else encode_image(self._backbone.image, images, []))
