"""Methods computed as the published code does: 77 tokens, every class at every step, text features for every batch.

States are tokens first, [n, N, H], and the attention is PyTorch's fused one for them. What the published code computes
once is computed once here too: token embeddings, causal masks, the frozen text features of PromptSRC and MMRL. Where
it does more than the formula needs (CLIP-LoRA multiplies the factors of an update before they meet the states, MMRL
makes its mask anew in every block), the cheaper way is taken.

Source: SPEC sections 2 and 3; muzairkhattak/multimodal-prompt-learning@69bce21 trainers/maple.py:40-204, clip/model.py;
KaiyangZhou/CoOp@ff61507 trainers/coop.py, trainers/cocoop.py:142-190; muzairkhattak/PromptSRC@bb95c77
trainers/promptsrc.py; MaxZanella/CLIP-LoRA@358f0d7 lora.py, loralib/layers.py; ZjjConan/VLM-MultiModalAdapter@c3d0bc2
clip/model.py:188-215, clip/gsl.py; yunncheng/MMRL@27d8821 trainers/mmrl.py, clip/model_mmrl.py.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from maple.clip import Backbone
from maple.methods import Method, build_method
from maple.prompts import TemplateClasses

Tokens = Sequence[Tensor | None]
"""What enters before each of the first blocks: [P, H], or None."""


class Plain:
    """The parameters of `method` and its open_clip model, computed without any shortcut.

    Subclasses change what the method changes: `loss`, `logits`, what enters before a block, and parts of the blocks.
    """

    inserted: ClassVar[int] = 0
    """By how many tokens a method makes the sentences longer."""

    def __init__(self, method: Any, class_names: Sequence[str]) -> None:
        self.method = method
        clip, classes = method.backbone.model, method.classes
        self.clip: Any = clip
        self.dtype = method.backbone.dtype
        if isinstance(classes, TemplateClasses):
            sentence = classes.templates[0]
        else:
            words = classes.init_text or " ".join(["X"] * classes.prompt_length)
            sentence = classes.template or f"{words} {{}}."
        ids = method.backbone.tokenize([sentence.format(name) for name in class_names]).to(method.backbone.device)
        self.ends = ids.argmax(dim=-1)
        self.embedded = clip.token_embedding(ids).detach().to(self.dtype)
        length = ids.shape[1] + self.inserted
        self.mask = torch.full((length, length), -torch.inf, dtype=self.dtype, device=ids.device).triu(1)

    def text_features(self, prompts: Tokens) -> Tensor:
        """Unit text features [C, D] of the sentences with prompts after SOS, [P, Ht] or [C, P, Ht] each."""
        clip, states = self.clip, self.embedded
        if prompts and (first := prompts[0]) is not None:
            tokens = first.to(self.dtype).expand(len(states), -1, -1)
            states = torch.cat([states[:, :1], tokens, states[:, 1 + first.shape[-2] :]], dim=1)
        states = (states + clip.positional_embedding.to(self.dtype)).transpose(0, 1)
        for layer, block in enumerate(clip.transformer.resblocks):
            if 0 < layer < len(prompts):
                states = self.enter("text", prompts, layer, states)
            states = self.block("text", layer, block, states, self.mask[: len(states), : len(states)])
        states = clip.ln_final(states.transpose(0, 1)).to(self.dtype)
        ends = states[
            torch.arange(len(states), device=states.device), self.ends + states.shape[1] - self.embedded.shape[1]
        ]
        return F.normalize((ends @ clip.text_projection).float(), dim=-1)

    def image_states(self, images: Tensor, prompts: Tokens) -> Tensor:
        """The states after the last block, [B, n, Hv], of images [B, 3, R, R] with prompts after the patches."""
        visual = self.clip.visual
        patches = visual.conv1(images.to(self.dtype)).flatten(2).transpose(1, 2)
        first = visual.class_embedding.to(self.dtype).expand(len(patches), 1, -1)
        states = torch.cat([first, patches], dim=1) + visual.positional_embedding.to(self.dtype)
        if prompts and (tokens := prompts[0]) is not None:
            states = torch.cat([states, tokens.to(self.dtype).expand(len(states), -1, -1)], dim=1)
        states = visual.ln_pre(states).transpose(0, 1)
        for layer, block in enumerate(visual.transformer.resblocks):
            if 0 < layer < len(prompts):
                states = self.enter("vision", prompts, layer, states)
            states = self.block("vision", layer, block, states, None)
        return states.transpose(0, 1)

    def image_features(self, images: Tensor, prompts: Tokens) -> Tensor:
        """Unit image features [B, D]."""
        visual = self.clip.visual
        states = visual.ln_post(self.image_states(images, prompts)[:, 0])
        return F.normalize((states @ visual.proj).float(), dim=-1)

    def enter(self, tower: str, prompts: Tokens, layer: int, states: Tensor) -> Tensor:
        """States [n, N, H] before a block after the first: its tokens replace those of the block before."""
        prompt = prompts[layer]
        if prompt is None:
            return states
        tokens = prompt.to(states.dtype).expand(states.shape[1], -1, -1).transpose(0, 1)
        if tower == "text":
            return torch.cat([states[:1], tokens, states[1 + len(tokens) :]])
        return torch.cat([states[: -len(tokens)], tokens])

    def block(self, tower: str, layer: int, block: Any, states: Tensor, mask: Tensor | None) -> Tensor:
        """A block of a tower: [n, N, H] -> [n, N, H]."""
        normed = block.ln_1(states)
        output = states + self.attention(tower, layer, block.attn, normed, mask)
        output = output + block.mlp(block.ln_2(output))
        return self.leave(tower, layer, normed, output)

    def attention(self, tower: str, layer: int, attention: Any, normed: Tensor, mask: Tensor | None) -> Tensor:
        """The output of the attention, [n, N, H]."""
        del tower, layer  # alike in all
        return F.multi_head_attention_forward(
            *(normed, normed, normed, attention.embed_dim, attention.num_heads),
            *(attention.in_proj_weight, attention.in_proj_bias, None, None, False, 0.0),
            *(attention.out_proj.weight, attention.out_proj.bias),
            need_weights=False,
            attn_mask=mask,
        )[0]

    def leave(self, tower: str, layer: int, normed: Tensor, output: Tensor) -> Tensor:
        """The output of a block, [n, N, H], with what a method adds to it; `normed` is the first norm of its input."""
        del tower, layer, normed
        return output

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, C], text features computed afresh."""
        text = self.text_features(self.method.text_prompts())
        return self.method.logit_scale * self.image_features(images, self.method.vision_prompts()) @ text.T

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a training step; by default cross-entropy."""
        return F.cross_entropy(self.logits(images), labels)


class PlainCoCoOp(Plain):
    """All classes for every image, in a loop over the images."""

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, C]."""
        method = self.method
        features = self.image_features(images, [])
        shifts = method.meta_net[1](torch.relu(method.meta_net[0](features)))
        rows = []
        for feature, shift in zip(features, shifts, strict=True):
            text = self.text_features([method.text_prompts()[0] + shift])
            rows.append(method.logit_scale * feature @ text.T)
        return torch.stack(rows)


class PlainPromptSRC(Plain):
    """The frozen image tower at every step, and the frozen text features, which are computed once."""

    def __init__(self, method: Any, class_names: Sequence[str]) -> None:
        super().__init__(method, class_names)
        self.taught_text = method._teacher.text_features(class_names)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, the L1 distances to the frozen features, and the divergence from the frozen predictions."""
        method, settings = self.method, self.method.settings
        text = self.text_features(method.text_prompts())
        image = self.image_features(images, method.vision_prompts())
        with torch.no_grad():
            taught_image = self.image_features(images, [])
            taught = (method.logit_scale * taught_image @ self.taught_text.T).log_softmax(-1)
        logits = method.logit_scale * image @ text.T
        divergence = F.kl_div(logits.log_softmax(-1), taught, reduction="sum", log_target=True) / logits.numel()
        distance = settings.text_loss_weight * F.l1_loss(text, self.taught_text)
        distance = distance + settings.image_loss_weight * F.l1_loss(image, taught_image)
        return F.cross_entropy(logits, labels) + distance + divergence


class PlainCLIPLoRA(Plain):
    """Queries, keys and values by layers of their own, each with its update; in training, dropout of its input."""

    def attention(self, tower: str, layer: int, attention: Any, normed: Tensor, mask: Tensor | None) -> Tensor:
        """The output of the attention, [n, N, H]."""
        updates, heads = self.method.lora[tower], attention.num_heads
        rows, batch, width = normed.shape
        parts = []
        for kind, weight, bias in zip(
            "qkv", attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
        ):
            factors, dropped = updates[str(layer)][kind], F.dropout(normed, updates.dropout, self.method.training)
            down, up = (factors[name].to(normed.dtype) for name in ("down", "up"))
            part = F.linear(normed, weight, bias) + updates.scale * F.linear(F.linear(dropped, down), up)
            parts.append(part.view(rows, batch * heads, -1).transpose(0, 1).view(batch, heads, rows, -1))
        attended = F.scaled_dot_product_attention(*parts, attn_mask=mask)
        return attention.out_proj(attended.permute(2, 0, 1, 3).reshape(rows, batch, width))  # type: ignore[no-any-return]


class PlainMMA(Plain):
    """Adapters around the last blocks, whose parameters learn by the gradient of an unscaled residual."""

    def leave(self, tower: str, layer: int, normed: Tensor, output: Tensor) -> Tensor:
        """The output with `scale * up(relu(shared(relu(down(normed)))))` added."""
        method, key = self.method, str(layer)
        adapters: Any = getattr(method, f"{tower}_adapter")
        if key not in adapters:
            return output
        scale = method.settings.adapter_scale
        inputs = normed.view_as(normed)
        if inputs.requires_grad:
            inputs.register_hook(lambda gradient: gradient * scale)
        hidden = torch.relu(_linear(adapters[key]["down"], inputs))
        hidden = torch.relu(_linear(method.shared_adapter[key], hidden))
        branch = _linear(adapters[key]["up"], hidden)
        if branch.requires_grad:
            branch.register_hook(lambda gradient: gradient / scale)
        return output + scale * branch


def _linear(layer: Any, states: Tensor) -> Tensor:
    return F.linear(states, layer.weight.to(states.dtype), layer.bias.to(states.dtype))


class PlainMMRL(Plain):
    """Tokens after the first one in the last blocks of both towers, and the frozen image tower at every step."""

    def __init__(self, method: Any, class_names: Sequence[str]) -> None:
        self.inserted = method.settings.tokens  # type: ignore[misc]
        super().__init__(method, class_names)
        self.taught_text = method._teacher.text_features(class_names)

    def tokens(self, tower: str) -> Tokens:
        """The mapped tokens of each block that has some."""
        layers = self.method.settings.layers
        mapped = {layer - 1: self.method.mapped(tower, number) for number, layer in enumerate(layers)}
        return [mapped.get(layer) for layer in range(layers[-1])]

    def enter(self, tower: str, prompts: Tokens, layer: int, states: Tensor) -> Tensor:
        """The tokens of the first block that has some are inserted, those of later ones replace them."""
        del tower  # alike in both
        prompt = prompts[layer]
        if prompt is None:
            return states
        tokens = prompt.to(states.dtype).expand(states.shape[1], -1, -1).transpose(0, 1)
        rest = 1 if all(earlier is None for earlier in prompts[:layer]) else 1 + len(tokens)
        return torch.cat([states[:1], tokens, states[rest:]])

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit features: [B, D] of the class token and of the new tokens, and [C, D] of the sentences."""
        method, visual = self.method, self.clip.visual
        text, count = self.text_features(self.tokens("text")), method.settings.tokens
        states = self.image_states(images, self.tokens("vision"))
        first, rows = visual.ln_post(states[:, 0]) @ visual.proj, visual.ln_post(states[:, 1 : 1 + count])
        representation = rows.float().mean(dim=1) @ method.projection
        return F.normalize(first.float(), dim=-1), F.normalize(representation, dim=-1), text

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, C] of trained names: the mixture of both features."""
        first, representation, text = self.features(images)
        alpha = self.method.settings.alpha
        return self.method.logit_scale * (alpha * first @ text.T + (1 - alpha) * representation @ text.T)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropies of both features, and the distances to the frozen features."""
        method, alpha, weight = self.method, self.method.settings.alpha, self.method.settings.weight
        with torch.no_grad():
            taught_image = self.image_features(images, [])
        first, representation, text = self.features(images)
        loss = alpha * F.cross_entropy(method.logit_scale * first @ text.T, labels)
        loss = loss + (1 - alpha) * F.cross_entropy(method.logit_scale * representation @ text.T, labels)
        for feature, taught in ((first, taught_image), (text, self.taught_text)):
            loss = loss + weight * (1 - F.cosine_similarity(feature, taught).mean())
        return loss


PLAIN: dict[str, type[Plain]] = {
    "maple": Plain,
    "coop": Plain,
    "cocoop": PlainCoCoOp,
    "promptsrc": PlainPromptSRC,
    "clip_lora": PlainCLIPLoRA,
    "mma": PlainMMA,
    "mmrl": PlainMMRL,
}


def build(name: str, clip: Backbone, class_names: Sequence[str]) -> tuple[Method, Plain]:
    """A method as published, in fewer blocks where the CLIP has fewer, and the same in the plain way."""
    depth = min(clip.text.depth, clip.image.depth)
    prompted, last = min(9, depth), min(12, depth)
    settings: dict[str, dict[str, Any]] = {
        "maple": {"prompt_depth": prompted},
        "promptsrc": {"text_prompt_depth": prompted, "vision_prompt_depth": prompted},
        "mma": {"adapter_start": max(1, last - 7), "adapter_end": last},
        "mmrl": {"layers": list(range(max(2, last - 6), last + 1))},
    }
    description = {"name": name, **settings.get(name, {})}
    generator = torch.Generator().manual_seed(0)
    method = build_method(description, clip, class_names, generator=generator).eval()
    with torch.no_grad():
        for parameter in method.parameters():  # no gradient is zero because a factor of it starts at zero
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    return method, PLAIN[name](method, class_names)
