"""The modules of an export: a method divided into an image side, a text side and a head that combines them.

No method is named here: the parts that a method overrides decide where it can be divided.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maple.clip import LayerEdit
from maple.clip.edits import edits_of_all_blocks
from maple.errors import ExportError
from maple.methods import Method
from maple.methods.trained_names import TrainedNamesMethod
from maple.methods.wraps_prompts import WrapsPrompts
from maple.prompts import PromptedClasses, l2_normalize, to_float32
from maple.prompts.splice import write_rows

Head = Literal["cosine", "logits", "shifted"]


def innermost(method: Method) -> Method:
    """The method whose prompts another one trains, or the method itself."""
    while isinstance(method, WrapsPrompts):
        method = method.prompts
    return method


def head_of(method: Method) -> Head:
    """See `Manifest.head`; an ExportError is raised where logits cannot be separated from the classes."""
    inner = innermost(method)
    is_cosine = type(inner).logits is Method.logits
    if method.classes_depend_on_image:
        if not hasattr(inner, "token_shift") or not is_cosine:
            raise ExportError(f"{method.title}: its classes depend on the image in a way that no export can hold")
        return "shifted"
    if is_cosine:
        return "cosine"
    if method.supports_new_classes:
        raise ExportError(f"{method.title}: it computes logits in a way of its own, which no export can hold")
    return "logits"


def shifted_embeddings(method: Method) -> tuple[float, Tensor] | None:
    """Weight and constant [C, E] of the trained names' embeddings, weight x text + constant; None for other methods."""
    if not isinstance(method, TrainedNamesMethod):
        return None
    text = torch.zeros(len(method.class_names), method.backbone.embed_dim, device=method.backbone.device)
    constant, of_ones = (method.embed_trained(each, method.rows).detach() for each in (text, text + 1))
    return float((of_ones - constant)[0, 0]), constant


def keeps_image_features(method: Method) -> bool:
    """Whether its image features are those of the frozen CLIP."""
    plain = Method.encode_images, WrapsPrompts.encode_images
    return method.accepts_features and all(type(each).encode_images in plain for each in (method, innermost(method)))


class ImageSide(nn.Module):
    """From images [B, 3, R, R] to the inputs of the head, with what was learned as constants."""

    def __init__(self, method: Method, head: Head, *, frozen: bool) -> None:
        super().__init__()
        # Submodules, so that tracing registers their tensors.
        self.method = method
        self.model = method.backbone.model
        self.head = head
        with torch.no_grad():
            self.edits = method.vision_edits()
        self.frozen = frozen and not keeps_image_features(method)
        self.classes: Tensor
        self.register_buffer("classes", method.class_embeddings() if head == "logits" else None)

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs: unit features [B, D], logits [B, C] or a shift [B, Ht], and frozen features [B, D]."""
        extra = {"cosine": [], "logits": ["logits"], "shifted": ["shift"]}[self.head]
        return ["features", *extra, *(["frozen"] if self.frozen else [])]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See `outputs`."""
        tower = self.method.backbone.image
        plain = to_float32(tower.plain(images)) if self.frozen or not self.edits else None
        raw = self.method.raw_features_with(self.edits, images) if self.edits else cast(Tensor, plain)
        # Every method accepts raw features in place of images.
        features = self.method.encode_images(raw)
        outputs = [features]
        if self.head == "logits":
            logits, temperature = self.method.logits(features, self.classes), self.method.temperature
            outputs.append(logits if temperature == 1 else logits / temperature)
        elif self.head == "shifted":
            inner: Any = innermost(self.method)
            outputs.append(inner.token_shift(features[:, : self.method.backbone.embed_dim]))
        if self.frozen:
            outputs.append(l2_normalize(cast(Tensor, plain)))
        return tuple(outputs)


class TextSide(nn.Module):
    """The text tower with what was learned as constants, tokens in the slots; without edits, it is the frozen one."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.tower = method.backbone.text
        self.method = method
        self.model = method.backbone.model
        edits: Sequence[LayerEdit] = []
        if isinstance(innermost(method).classes, PromptedClasses) and method.supports_new_classes:
            with torch.no_grad():
                edits = method.text_edits()
        self.edits = edits_of_all_blocks(edits, self.tower.depth)
        # Row 0 is never used: it stands for "no learned token here".
        prompts = (edit.prompt for edit in self.edits)
        self.tables = [None if prompt is None else F.pad(prompt, (0, 0, 1, 0)).detach() for prompt in prompts]

    def forward(self, ids: Tensor, slots: Tensor, shift: Tensor | None = None) -> Tensor:
        """Unit features [C, D] of sentences.

        `ids` and `slots` are [C, T] int64, T the longest sentence or, where padding is read, the context; a slot is the
        learned token, from 1, at its place, or 0. `shift` [Ht] is added to the learned tokens of the first layer.
        """
        tower = self.tower
        states, inserted = tower.embed(ids), 0
        slots = F.pad(slots, (0, states.shape[1] - slots.shape[1]))  # CoCa appends a class token
        for layer, (edit, table) in enumerate(zip(self.edits, self.tables, strict=True)):
            moved = table if table is None or shift is None or layer else table + shift
            insert = partial(_insert_rows, slots=slots, table=moved)
            enter = partial(tower.enter, positions=tower.positions(ids))
            states = edit.enter(states, insert, None if layer else enter, residual_first=True)
            if edit.tokens is not None:
                states = write_rows(states, edit.tokens, 1, inserted, edit.keep)
                if not inserted:  # rows of their own, without a slot, after the first one
                    none = torch.zeros_like(slots[:, :1]).expand(-1, len(edit.tokens))
                    slots = torch.cat([slots[:, :1], none, slots[:, 1:]], dim=1)
                inserted = len(edit.tokens)
            states = tower.block(layer, states, edit, tower.mask(ids, inserted))
        if inserted:
            states = torch.cat([states[:, :1], states[:, 1 + inserted :]], dim=1)
        return l2_normalize(tower.finish(tower.pool(states, ids)))


def _insert_rows(states: Tensor, _prompt: Tensor, *, slots: Tensor, table: Tensor | None) -> Tensor:
    assert table is not None  # there is one where there is a prompt
    return torch.where((slots > 0)[:, :, None], F.embedding(slots, table), states)
