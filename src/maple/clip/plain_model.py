"""A CLIP of two plain transformers in PyTorch's own modules, with the names that open_clip's has.

open_clip imports torchvision, timm and transformers, which takes longer than PyTorch itself. A command that only uses
the packaged CLIP does without: the tower files read the same attributes of this model as of open_clip's.

Source: open_clip 3.3.0 src/open_clip/model.py `CLIP`, src/open_clip/transformer.py `VisionTransformer`,
`TextTransformer`, `ResidualAttentionBlock`.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from maple.clip.initialisation import uninitialised
from maple.errors import BackboneError, shortened_list

_QUICK_GELU = ("maple.clip.plain_model", "open_clip.transformer")


class QuickGELU(nn.Module):
    """The activation of OpenAI's CLIP."""

    def forward(self, states: Tensor) -> Tensor:
        return states * torch.sigmoid(1.702 * states)


def is_quick_gelu(module: nn.Module) -> bool:
    """Whether an activation is QuickGELU, this one or open_clip's, which is not imported to compare."""
    return type(module).__name__ == QuickGELU.__name__ and type(module).__module__ in _QUICK_GELU


class PlainBlock(nn.Module):
    """A residual attention block of `width` channels, `hidden` in its MLP."""

    def __init__(self, width: int, heads: int, hidden: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ls_1 = nn.Identity()
        self.ln_2 = nn.LayerNorm(width)
        layers = ("c_fc", nn.Linear(width, hidden)), ("gelu", activation()), ("c_proj", nn.Linear(hidden, width))
        self.mlp = nn.Sequential(OrderedDict[str, nn.Module](layers))
        self.ls_2 = nn.Identity()

    def forward(self, states: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        normed = self.ln_1(states)
        states = states + self.attn(normed, normed, normed, need_weights=False, attn_mask=attn_mask)[0]
        return states + cast(Tensor, self.mlp(self.ln_2(states)))


class _Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, mlp_ratio: float, activation: type[nn.Module]) -> None:
        super().__init__()
        blocks = (PlainBlock(width, heads, int(width * mlp_ratio), activation) for _ in range(layers))
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, states: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            states = block(states, attn_mask)
        return states


class _ImageTower(nn.Module):
    attn_pool = None
    pool_type = "tok"

    def __init__(self, embed_dim: int, config: Mapping[str, Any], activation: type[nn.Module]) -> None:
        super().__init__()
        width, side, patch = config["width"], config["image_size"], config["patch_size"]
        heads, ratio = width // config.get("head_width", 64), config.get("mlp_ratio", 4.0)
        self.image_size = (side, side)
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((side // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = _Transformer(width, heads, config["layers"], ratio, activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, embed_dim))

    def _pool(self, states: Tensor) -> tuple[Tensor, Tensor]:
        states = self.ln_post(states)
        return states[:, 0], states[:, 1:]

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        # Sizes, not lengths: exports record these as variable.
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        states = self.transformer(self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding))
        return self._pool(states)[0] @ self.proj


class PlainCLIP(nn.Module):
    """Two transformers from a configuration of open_clip, with its `state`, in float32.

    Raises:
        BackboneError: the weights are not those of the configuration.
    """

    def __init__(self, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        super().__init__()
        text, width = config["text_cfg"], config["text_cfg"]["width"]
        activation = QuickGELU if config.get("quick_gelu") else nn.GELU
        with uninitialised():  # the weights are given
            self.visual = _ImageTower(config["embed_dim"], config["vision_cfg"], activation)
            self.transformer = _Transformer(
                width, text["heads"], text["layers"], text.get("mlp_ratio", 4.0), activation
            )
            self.token_embedding = nn.Embedding(text["vocab_size"], width)
            self.positional_embedding = nn.Parameter(torch.empty(text["context_length"], width))
            self.ln_final = nn.LayerNorm(width)
            self.text_projection = nn.Parameter(torch.empty(width, config["embed_dim"]))
            self.logit_scale = nn.Parameter(torch.empty(()))
        self.context_length, self.vocab_size = int(text["context_length"]), int(text["vocab_size"])
        mask = torch.full((self.context_length, self.context_length), -torch.inf).triu(1)
        self.register_buffer("attn_mask", mask, persistent=False)
        shapes = {name: value.shape for name, value in self.state_dict().items()}
        other = [key for key in shapes.keys() | state.keys() if key not in state or shapes.get(key) != state[key].shape]
        if other:
            raise BackboneError(f"these weights are not those of the configuration: {shortened_list(sorted(other), 4)}")
        self.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)

    def encode_image(self, images: Tensor) -> Tensor:
        """Raw features [B, D] of images [B, 3, R, R]."""
        return cast(Tensor, self.visual(images))

    def encode_text(self, ids: Tensor) -> Tensor:
        """Raw features [C, D] of sentences [C, T]."""
        states = self.transformer(self.token_embedding(ids) + self.positional_embedding, self.attn_mask)
        ends = torch.arange(ids.shape[0], device=ids.device), ids.argmax(dim=-1)
        return cast(Tensor, self.ln_final(states)[ends] @ self.text_projection)
