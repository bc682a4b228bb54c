"""Prompted CLIP once more, as plainly as it can be written: all 77 tokens, one class, one image, one head at a time.

Reads an open_clip model's weights, and shares no code with the package.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import open_clip
import torch
from torch import Tensor

SOS, EOT, CONTEXT = 49406, 49407, 77


Edit = dict[str, Any]
"""What changes in a block: "prompt", "tokens" with "keep", functions "input" and "residual", "norms", and matrices that
are added to the weights of "q", "k", "v" and "o"."""


def _norm(layer: Any, x: Tensor, affine: tuple[Tensor, Tensor] | None = None) -> Tensor:
    weight, bias = affine or (layer.weight, layer.bias)
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + layer.eps) * weight + bias


def _attention(layer: Any, x: Tensor, causal: bool, edit: Edit) -> Tensor:
    """Tokens [n, width], attended one head at a time."""
    width = x.shape[1]
    size = width // layer.num_heads
    added = torch.cat([edit.get(kind, torch.zeros(width, width, dtype=x.dtype)) for kind in "qkv"])
    queries, keys, values = (x @ (layer.in_proj_weight + added).T + layer.in_proj_bias).split(width, dim=1)
    heads = []
    for head in range(layer.num_heads):
        part = slice(head * size, (head + 1) * size)
        weights = torch.exp(queries[:, part] @ keys[:, part].T / size**0.5)
        weights = weights.tril() if causal else weights
        heads.append((weights / weights.sum(1, keepdim=True)) @ values[:, part])
    return torch.cat(heads, dim=1) @ (layer.out_proj.weight + edit.get("o", 0)).T + layer.out_proj.bias


def _block(block: Any, x: Tensor, causal: bool, edit: Edit) -> Tensor:
    norms = edit.get("norms", (None, None))
    normed = _norm(block.ln_1, x, norms[0])
    x = x + _attention(block.attn, normed, causal, edit)
    hidden = _norm(block.ln_2, x, norms[1]) @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias
    hidden = hidden * torch.sigmoid(1.702 * hidden)
    x = x + hidden @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias
    return x + edit["residual"](normed) if "residual" in edit else x


def _write_tokens(x: Tensor, edit: Edit, start: int, present: int) -> tuple[Tensor, int]:
    """Rows of their own at `start`, after `present` of them have been written before."""
    if "tokens" not in edit:
        return x, present
    tokens, keep = edit["tokens"], edit.get("keep", 0) if present else 0
    kept = keep * x[start : start + present] if present else 0
    return torch.cat([x[:start], kept + (1 - keep) * tokens, x[start + present :]]), len(tokens)


@cache
def _tokenizer() -> Any:
    return open_clip.SimpleTokenizer()


def sentence(name: str, init_text: str, length: int, position: str) -> list[int | None]:
    """The tokens between SOS and the padding, EOT included; None is a place for a prompt token."""
    encode = _tokenizer().encode
    fixed: list[int | None] = [*encode(init_text)][length:] if init_text else []
    prompt: list[int | None] = [None] * length
    words: list[int | None] = [*encode(name.replace("_", " "))]
    before = {"end": length, "middle": length // 2, "front": 0}[position]
    return [*prompt[:before], *fixed, *words, *prompt[before:], *encode("."), EOT]


def text_feature(
    model: Any, name: str, prompts: Sequence[Tensor], init_text: str = "", position: str = "end"
) -> Tensor:
    """The unit feature [D] of one class; `prompts` are the tokens [P, Ht] of each prompted layer."""
    edits = [{"prompt": prompt} for prompt in prompts]
    feature = edited_text_feature(model, name, edits, len(prompts[0]) if prompts else 0, init_text, position)
    return feature / feature.pow(2).sum().sqrt()


def edited_text_feature(
    model: Any, name: str, edits: Sequence[Edit], length: int, init_text: str = "", position: str = "end"
) -> Tensor:
    """The raw feature [D] of one class, whose sentence has places for `length` prompt tokens."""
    tokens = [SOS, *sentence(name, init_text, length, position)]
    places = [place for place, token in enumerate(tokens) if token is None]
    end = len(tokens) - 1
    first = edits[0] if edits else {}
    late = first.get("late", False)
    (placeholder,) = _tokenizer().encode("X")
    rows = []
    for place in range(CONTEXT):
        token = tokens[place] if place <= end else 0
        if token is None and "prompt" in first and not late:
            row = first["prompt"][places.index(place)]
        else:
            row = model.token_embedding.weight[placeholder if token is None else token]
        row = row + first["input"](row) if "input" in first else row
        row = row + model.positional_embedding[place]
        rows.append(first["prompt"][places.index(place)] if token is None and "prompt" in first and late else row)
    x, present = torch.stack(rows), 0
    for layer, block in enumerate(model.transformer.resblocks):
        edit = edits[layer] if layer < len(edits) else {}
        if layer and "prompt" in edit:
            x = x.clone()
            for index, place in enumerate(places):
                x[place + present] = edit["prompt"][index]
        x, present = _write_tokens(x, edit, 1, present)
        x = _block(block, x, True, edit)
    feature: Tensor = _norm(model.ln_final, x[end + present]) @ model.text_projection
    return feature


def image_feature(model: Any, image: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """The unit feature [D] of one image [3, R, R]; `prompts` are the tokens [P, Hv] of each prompted layer."""
    feature, _ = edited_image_feature(model, image, [{"prompt": prompt} for prompt in prompts])
    return feature / feature.pow(2).sum().sqrt()


def edited_image_feature(model: Any, image: Tensor, edits: Sequence[Edit]) -> tuple[Tensor, Tensor]:
    """The raw feature [D] of one image, and the rows [K, Hv] of tokens after the final norm."""
    tower = model.visual
    kernel = tower.conv1.weight
    patch = kernel.shape[-1]
    rows = [tower.class_embedding]
    for top in range(0, image.shape[1], patch):
        for left in range(0, image.shape[2], patch):
            pixels = image[:, top : top + patch, left : left + patch]
            rows.append((kernel * pixels).sum(dim=(1, 2, 3)))
    x = torch.stack(rows) + tower.positional_embedding
    count, prompted, present = len(x), 0, 0
    for layer, block in enumerate(tower.transformer.resblocks):
        edit = edits[layer] if layer < len(edits) else {}
        for late in (False, True):
            if late and layer == 0:
                x = _norm(tower.ln_pre, x)
                x = x + edit["input"](x) if "input" in edit else x
            if "prompt" in edit and edit.get("late", False) == late:
                x = torch.cat([x[:count], edit["prompt"], x[count + prompted :]])
                prompted = len(edit["prompt"])
        x, present = _write_tokens(x, edit, count + prompted, present)
        x = _block(block, x, False, edit)
    rows = _norm(tower.ln_post, x)
    return rows[0] @ tower.proj, rows[count + prompted :]
