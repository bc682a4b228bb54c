"""Class names to unit text features, from sentences with learned tokens or from fixed templates."""

from collections.abc import Mapping, Sequence
from copy import copy
from itertools import chain

import torch
from torch import Tensor

from maple.clip import Backbone, LayerEdit
from maple.errors import ClassNamesError, ConfigError, shortened_list
from maple.names import clean_class_names, words_of
from maple.prompts.encode import encode_text, l2_normalize, to_float32
from maple.prompts.splice import Position, Sentences, read_sentences, write_sentences

_CHUNK = 256


def check_template(template: str) -> None:
    """Raise ConfigError if a sentence does not have exactly one {} for the class name."""
    if template.count("{}") != 1:
        raise ConfigError(f"template {template!r} must have exactly one {{}}, where the class name goes")


class PromptedClasses:
    """Text features of sentences with slots for prompt tokens; `memory_limit` is that of `encode_text`.

    With a `template`, that is the sentence: its first P tokens are slots, and the others stay.

    Raises:
        ConfigError: there are more prompt tokens than a sentence can have, not exactly one {} in the template, or one
            in `init_text`.

    Example:
        >>> classes = PromptedClasses(clip, prompt_length=4, init_text="a photo of a")
        >>> classes.set_class_names(["cat", "dog"])
        >>> classes.encode(prompt_edits([word_tokens(clip, "a photo of a", 4)])).shape
        torch.Size([2, 512])
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        prompt_length: int,
        init_text: str = "",
        position: Position = "end",
        template: str = "",
    ) -> None:
        if template:
            check_template(template)
        if "{}" in init_text:
            raise ConfigError(f"init_text {init_text!r} has {{}}; leave it out: the class name follows by itself")
        most = backbone.text.context_length
        if prompt_length > most:  # before the tokens take memory
            raise ConfigError(f"prompt_length={prompt_length}, but this CLIP reads at most {most} tokens; choose fewer")
        self._backbone = backbone
        self.prompt_length = prompt_length
        self.init_text = init_text
        self.position: Position = position
        self.template = template
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
            template=self.template,
        )

    def encode(self, edits: Sequence[LayerEdit]) -> Tensor:
        """Unit text features [C, D] with these edits of the text tower; [G, C, D] with G prompts."""
        return l2_normalize(self.encode_raw(edits))

    def encode_raw(self, edits: Sequence[LayerEdit]) -> Tensor:
        """The text features of `encode` before they are normalised."""
        return encode_text(self._backbone.text, self.sentences, edits, self.memory_limit)


class EnsembleClasses(PromptedClasses):
    """Text features of several sentences for each class, with a method's edits of the text tower.

    Args:
        templates: sentences with {} for the class name.
        sentences: those of each class name instead, whole; if there are any, every class needs some. Capital letters,
            underscores and repeated spaces of a name make no difference.

    Raises:
        ConfigError: a template does not have exactly one {}, or there is neither a template nor a sentence.

    Example:
        >>> classes = EnsembleClasses(clip, ["a photo of a {}.", "a sketch of a {}."])
        >>> classes.set_class_names(["cat", "dog"])
        >>> classes.encode([]).shape, classes.counts
        (torch.Size([2, 512]), (2, 2))
    """

    def __init__(
        self, backbone: Backbone, templates: Sequence[str] = (), sentences: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        super().__init__(backbone, prompt_length=0)
        if not templates and not sentences:
            raise ConfigError("templates is empty; give at least one sentence with {} where the class name goes")
        for template in templates:
            check_template(template)
        self.templates = () if sentences else tuple(templates)
        self._sentences_of = {words_of(name): tuple(texts) for name, texts in (sentences or {}).items()}
        self.counts: tuple[int, ...] = ()

    def set_class_names(self, names: Sequence[str]) -> None:
        """Write the sentences of each name.

        Raises:
            ClassNamesError: as ever, or a class has no sentences.
        """
        cleaned = clean_class_names(names)
        texts = [[template.replace("{}", name) for template in self.templates] for name in cleaned]
        if self._sentences_of:
            lacking = [name for name in cleaned if not self._sentences_of.get(words_of(name))]
            if lacking:
                raise ClassNamesError(
                    f"the setting sentences has none for {shortened_list(map(repr, lacking))}, only for "
                    f"{shortened_list(self._sentences_of)}; add some to its file and train with it, or train with "
                    "templates, which every name fits"
                )
            texts = [list(self._sentences_of[words_of(name)]) for name in cleaned]
        # A description may lose its end, as published; a template would lose the class name.
        sentences, is_described = list(chain.from_iterable(texts)), bool(self._sentences_of)
        self.sentences = read_sentences(self._backbone, sentences, truncate=is_described)
        self.counts = tuple(map(len, texts))

    def encode(self, edits: Sequence[LayerEdit]) -> Tensor:
        """Unit text features [C, D]: the normalised mean of the unit features of all sentences of a class."""
        parts = super().encode(edits).split(self.counts)
        return l2_normalize(torch.stack([part.mean(dim=0) for part in parts]))

    def encode_one(self, edits: Sequence[LayerEdit], chosen: Tensor) -> Tensor:
        """Unit text features [C, D] of one sentence of each class, [C] int64 of 0 to its number of sentences - 1."""
        starts = torch.tensor([0, *self.counts[:-1]]).cumsum(0)
        sentences = self.sentences.select((starts + chosen).to(self.sentences.ids.device))
        return l2_normalize(encode_text(self._backbone.text, sentences, edits, self.memory_limit))


class TemplateClasses:
    """Text features of fixed sentences: each class is the normalised mean of its template features, encoded once.

    `set_class_names` sets `features` [C, D], unit-norm, `mean` [C, D], the average before it is normalised, and
    `raw_mean` [C, D], that of features of which none is normalised.

    Args:
        templates: sentences with {} for the class name.
        normalize_each: normalise the features of each template before they are averaged.

    Raises:
        ConfigError: there is no template, or one does not have exactly one {}.

    Example:
        >>> TemplateClasses(clip, ["a photo of a {}.", "a sketch of a {}."]).set_class_names(["cat", "dog"])

    Source: CLIP section 3.1.4; KaiyangZhou/CoOp@ff61507 trainers/zsclip.py:58-97.
    """

    def __init__(self, backbone: Backbone, templates: Sequence[str], *, normalize_each: bool = True) -> None:
        if not templates:
            raise ConfigError("templates is empty; give at least one sentence with {} where the class name goes")
        for template in templates:
            check_template(template)
        self._backbone = backbone
        self.templates = backbone.templates or tuple(templates)
        self.normalize_each = normalize_each
        self.features: Tensor
        self.mean: Tensor
        self.raw_mean: Tensor
        self.memory_limit: int | None = None
        self._sentences: list[Sentences | Tensor] = []

    def set_class_names(self, names: Sequence[str]) -> None:
        """Encode every class in every template."""
        cleaned = clean_class_names(names)
        self._sentences = []
        for template in self.templates:
            texts = [template.replace("{}", name) for name in cleaned]
            if self._backbone.text.obstacle is None:
                self._sentences.append(read_sentences(self._backbone, texts))
            else:
                self._sentences.append(self._backbone.tokenize(texts).to(self._backbone.device))
        self.features = self.encode()

    def features_of(self, names: Sequence[str]) -> Tensor:
        """Unit features [C, D] of other class names; the current ones stay."""
        other = copy(self)
        other.set_class_names(names)
        return other.features

    @torch.no_grad()
    def encode(self) -> Tensor:
        """Compute `mean` again, and return `features` computed from it."""
        total: Tensor | float = 0.0
        raw_total: Tensor | float = 0.0
        for sentences in self._sentences:
            if isinstance(sentences, Sentences):
                raw = encode_text(self._backbone.text, sentences, [], self.memory_limit)
            else:  # ids, of a tower that prompts cannot enter
                raw = torch.cat([self._backbone.text.plain(chunk) for chunk in sentences.split(_CHUNK)])
            raw_total = raw_total + to_float32(raw)
            total = total + (l2_normalize(raw) if self.normalize_each else to_float32(raw))
        self.mean, self.raw_mean = (torch.as_tensor(each) / len(self.templates) for each in (total, raw_total))
        return l2_normalize(self.mean)
