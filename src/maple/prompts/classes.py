"""The class side of a classifier: class names to unit text features, with learned tokens or with fixed sentences."""

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from maple.clip import Backbone
from maple.errors import ConfigError
from maple.names import clean_class_names
from maple.prompts.encode import encode_text, l2_normalize, to_float32
from maple.prompts.splice import Position, Sentences, read_sentences, write_sentences

_FIXED_CHUNK = 256


class PromptedClasses:
    """Sentences with slots for prompt tokens, rewritten whenever the class names change.

    Attributes:
        memory_limit: see `encode_text`.
    """

    def __init__(self, backbone: Backbone, *, prompt_length: int, init_text: str, position: Position = "end") -> None:
        self._backbone = backbone
        self.prompt_length = prompt_length
        self.init_text = init_text
        self.position: Position = position
        self.sentences: Sentences
        self.memory_limit: int | None = None

    def set_class_names(self, names: Sequence[str]) -> None:
        """Write one sentence per name."""
        self.sentences = write_sentences(
            self._backbone,
            names,
            prompt_length=self.prompt_length,
            init_text=self.init_text,
            position=self.position,
        )

    def encode(self, prompts: Sequence[Tensor]) -> Tensor:
        """Unit text features [C, D] with `prompts`, J tensors [P, Ht] or [C, P, Ht]; [G, C, D] with [G, 1, P, Ht]."""
        return l2_normalize(encode_text(self._backbone.text, self.sentences, prompts, self.memory_limit))


class TemplateClasses:
    """Fixed sentences, encoded once: each class is the normalised mean of its normalised template features.

    With `unit_each` false the features of the templates are averaged as they are (PromptSRC's teacher).

    Source: CLIP section 3.1.4; KaiyangZhou/CoOp@ff61507 trainers/zsclip.py:58-97.
    """

    def __init__(self, backbone: Backbone, templates: Sequence[str], *, unit_each: bool = True) -> None:
        if not templates:
            raise ConfigError("templates is empty; give at least one sentence with {} where the class name goes")
        for template in templates:
            if template.count("{}") != 1:
                raise ConfigError(f"template {template!r} must hold exactly one {{}}, where the class name goes")
        self._backbone = backbone
        self.templates = tuple(templates)
        self.unit_each = unit_each
        self.features: Tensor
        self.memory_limit: int | None = None
        self._sentences: list[Sentences | Tensor] = []
        self.mean: Tensor

    def set_class_names(self, names: Sequence[str]) -> None:
        """Encode every class in every template: `features` [C, D], unit-norm, and `mean`, as averaged."""
        cleaned = clean_class_names(names)
        sentences = [[template.replace("{}", name) for name in cleaned] for template in self.templates]
        whole = self._backbone.text.obstacle is not None
        self._sentences = [
            self._backbone.tokenize(one).to(self._backbone.device) if whole else read_sentences(self._backbone, one)
            for one in sentences
        ]
        self.features = self.encode()

    def of(self, names: Sequence[str]) -> Tensor:
        """Unit features [C, D] of names, as `set_class_names` would make them; nothing is changed."""
        twin = copy(self)
        twin.set_class_names(names)
        return twin.features

    def encode(self) -> Tensor:
        """`features` once more, computed afresh."""
        total: Tensor | float = 0.0
        for sentences in self._sentences:
            total = total + self._encode(sentences)
        self.mean = torch.as_tensor(total) / len(self.templates)
        return l2_normalize(self.mean)

    @torch.no_grad()
    def _encode(self, sentences: Sentences | Tensor) -> Tensor:
        if isinstance(sentences, Sentences):
            raw = encode_text(self._backbone.text, sentences, [], self.memory_limit)
        else:  # a tower that runs whole or not at all
            raw = torch.cat([self._backbone.text.plain(chunk) for chunk in sentences.split(_FIXED_CHUNK)])
        return l2_normalize(raw) if self.unit_each else to_float32(raw)
