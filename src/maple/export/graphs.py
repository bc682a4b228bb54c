"""What an export holds: a method cut into an image side, a class side and how logits are made of them.

Nothing here knows a method by name: which of its parts are its own tells where it can be cut.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maple.errors import ExportError
from maple.methods import Method
from maple.methods.wraps_prompts import WrapsPrompts
from maple.prompts import PromptedClasses, encode_image, l2_normalize, to_float32

Head = Literal["cosine", "logits", "shifted"]


def innermost(method: Method) -> Method:
    """The method whose prompts another one trains, or the method itself."""
    while isinstance(method, WrapsPrompts):
        method = method.prompts
    return method


def head_of(method: Method) -> Head:
    """How logits are made of unit image features: see `Manifest.head`.

    Raises:
        ExportError: in a way that cannot be cut from the classes.
    """
    inside = innermost(method)
    plain = type(inside).logits is Method.logits
    if method.classes_depend_on_image:
        if not hasattr(inside, "token_shift") or not plain:
            raise ExportError(f"{method.title}: its classes depend on the image in a way that no export can hold")
        return "shifted"
    if plain:
        return "cosine"
    if method.supports_new_classes:
        raise ExportError(f"{method.title}: its logits are its own for any classes, which no export can hold")
    return "logits"


def leaves_images_alone(method: Method) -> bool:
    """Whether its image features are those of the frozen CLIP."""
    return method.accepts_features and type(innermost(method)).encode_images is Method.encode_images


class ImageSide(nn.Module):
    """Images [B, 3, R, R] to what the head reads of them, with the prompts as constants."""

    def __init__(self, method: Method, head: Head, *, frozen: bool) -> None:
        super().__init__()
        # Parts of this module, so that tracing knows their tensors.
        self.method = method
        self.model = method.backbone.model
        self.head = head
        self.prompts = nn.ParameterList([prompt.detach() for prompt in method.vision_prompts()])
        self.frozen = frozen and not leaves_images_alone(method)
        self.classes: Tensor
        self.register_buffer("classes", method.class_embeddings() if head == "logits" else None)

    @property
    def outputs(self) -> list[str]:
        """The names of what it gives: unit features [B, D], and with them logits [B, C], a shift [B, Ht], or both."""
        own = {"cosine": [], "logits": ["logits"], "shifted": ["shift"]}[self.head]
        return ["features", *own, *(["frozen"] if self.frozen else [])]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See `outputs`."""
        tower = self.method.backbone.image
        plain = to_float32(tower.plain(images)) if self.frozen or not len(self.prompts) else None
        # Every method goes on from raw features that stand in for images.
        raw = to_float32(encode_image(tower, images, list(self.prompts))) if len(self.prompts) else cast(Tensor, plain)
        features = self.method.encode_images(raw)
        found = [features]
        if self.head == "logits":
            found.append(self.method.logits(features, self.classes))
        elif self.head == "shifted":
            inside: Any = innermost(self.method)
            found.append(inside.token_shift(features))
        if self.frozen:
            found.append(l2_normalize(cast(Tensor, plain)))
        return tuple(found)


class TextSide(nn.Module):
    """Sentences to unit features [C, D], with the learned tokens as constants where the slots ask for them.

    Slots that ask for none make it the frozen text tower.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.tower = method.backbone.text
        self.model = method.backbone.model
        prompts: Sequence[Tensor] = []
        if isinstance(innermost(method).classes, PromptedClasses) and method.supports_new_classes:
            prompts = [prompt.detach() for prompt in method.text_prompts()]
        # Row 0 is never looked at: it stands for "no learned token here".
        self.tables = nn.ParameterList([F.pad(prompt, (0, 0, 1, 0)) for prompt in prompts])

    def forward(self, ids: Tensor, slots: Tensor, shift: Tensor | None = None) -> Tensor:
        """Unit features [C, D].

        Args:
            ids: [C, T] int64, T as long as the longest sentence.
            slots: [C, T] int64: which learned token, from 1, stands at each place; 0 none.
            shift: [Ht], added to the learned tokens of the first layer.
        """
        tower = self.tower
        states = tower.embed(ids)
        for layer in range(tower.depth):
            if layer < len(self.tables):
                table = self.tables[layer]
                if shift is not None and layer == 0:
                    table = table + shift
                states = torch.where((slots > 0)[:, :, None], F.embedding(slots, table), states)
            if layer == 0:
                states = tower.enter(states)
            states = tower.block(layer, states)
        ends = tower.end_positions(ids)[:, None, None].expand(-1, 1, states.shape[-1])
        return l2_normalize(tower.finish(states.gather(1, ends)[:, 0]))
