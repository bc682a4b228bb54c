"""Prompted CLIP once more, as plainly as it can be written: all 77 tokens, one class, one image, one head at a time.

Reads an open_clip model's weights, and shares no code with the package.
"""

from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from torch import Tensor

SOS, EOT, CONTEXT = 49406, 49407, 77


def _norm(layer: Any, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + layer.eps) * layer.weight + layer.bias


def _attention(layer: Any, x: Tensor, causal: bool) -> Tensor:
    """Tokens [n, width], attended one head and one query at a time."""
    width = x.shape[1]
    size = width // layer.num_heads
    queries, keys, values = (x @ layer.in_proj_weight.T + layer.in_proj_bias).split(width, dim=1)
    rows = []
    for token in range(len(x)):
        seen = token + 1 if causal else len(x)
        heads = []
        for head in range(layer.num_heads):
            part = slice(head * size, (head + 1) * size)
            weights = torch.softmax(keys[:seen, part] @ queries[token, part] / size**0.5, dim=0)
            heads.append(weights @ values[:seen, part])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ layer.out_proj.weight.T + layer.out_proj.bias


def _block(block: Any, x: Tensor, causal: bool) -> Tensor:
    x = x + _attention(block.attn, _norm(block.ln_1, x), causal)
    hidden = _norm(block.ln_2, x) @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias
    hidden = hidden * torch.sigmoid(1.702 * hidden)
    return x + hidden @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias


def sentence(name: str, init_text: str, length: int, position: str) -> list[int | None]:
    """The tokens between SOS and the padding, EOT included; None is a place for a prompt token."""
    encode = open_clip.SimpleTokenizer().encode
    fixed: list[int | None] = [*encode(init_text)][length:] if init_text else []
    prompt: list[int | None] = [None] * length
    words: list[int | None] = [*encode(name.replace("_", " "))]
    before = {"end": length, "middle": length // 2, "front": 0}[position]
    return [*prompt[:before], *fixed, *words, *prompt[before:], *encode("."), EOT]


def text_feature(
    model: Any, name: str, prompts: Sequence[Tensor], init_text: str = "", position: str = "end"
) -> Tensor:
    """The unit feature [D] of one class; `prompts` are the tokens [P, Ht] of each prompted layer."""
    tokens = [SOS, *sentence(name, init_text, len(prompts[0]) if prompts else 0, position)]
    places = [place for place, token in enumerate(tokens) if token is None]
    end = len(tokens) - 1
    rows = []
    for place in range(CONTEXT):
        token = tokens[place] if place <= end else 0
        row = prompts[0][places.index(place)] if token is None else model.token_embedding.weight[token]
        rows.append(row + model.positional_embedding[place])
    x = torch.stack(rows)
    for layer, block in enumerate(model.transformer.resblocks):
        if 0 < layer < len(prompts):
            x = x.clone()
            for index, place in enumerate(places):
                x[place] = prompts[layer][index]
        x = _block(block, x, causal=True)
    feature = _norm(model.ln_final, x[end]) @ model.text_projection
    return feature / feature.pow(2).sum().sqrt()


def image_feature(model: Any, image: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """The unit feature [D] of one image [3, R, R]; `prompts` are the tokens [P, Hv] of each prompted layer."""
    tower = model.visual
    kernel = tower.conv1.weight
    patch = kernel.shape[-1]
    rows = [tower.class_embedding]
    for top in range(0, image.shape[1], patch):
        for left in range(0, image.shape[2], patch):
            pixels = image[:, top : top + patch, left : left + patch]
            rows.append((kernel * pixels).sum(dim=(1, 2, 3)))
    x = torch.stack(rows) + tower.positional_embedding
    count = len(x)
    if prompts:
        x = torch.cat([x, prompts[0]])
    x = _norm(tower.ln_pre, x)
    for layer, block in enumerate(tower.transformer.resblocks):
        if 0 < layer < len(prompts):
            x = torch.cat([x[:count], prompts[layer]])
        x = _block(block, x, causal=False)
    feature = _norm(tower.ln_post, x[0]) @ tower.proj
    return feature / feature.pow(2).sum().sqrt()
