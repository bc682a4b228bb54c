"""How much each patch of an image speaks for a class: attention, weighted by its gradient, through all blocks.

Of each block the attention A is weighted by the gradient of the class's score, what speaks against the class is cut
off, and the heads are averaged: E = mean over heads of max(0, A * dscore/dA). Relevance starts at one for each token
and itself, and grows by R <- R + E R from block to block; the class token's row, at its patches, is the map.
Prompt tokens are not patches: their rows start empty, and are emptied again wherever a block gets new ones, as those
know nothing of the image.

Source: Chefer, Gur and Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
Transformers", ICCV 2021, section 3, equations 5 and 6. Departs: the prompt rows; and the score, which is a class's
logit above the mean of the others, so that what speaks for all classes alike speaks for none.
"""

import torch
from torch import Tensor

from maple.errors import ConfigError
from maple.methods import Method
from maple.prompts import encode_image_with_attention, to_float32
from maple.prompts.splice import append_vision, replace_vision


def relevance(method: Method, images: Tensor, classes: Tensor) -> Tensor:
    """Say for each image where `method` finds the class: [B, G, G], from 0 up, float32; G x G patches, top left first.

    No gradient of a parameter is touched.

    Args:
        images: [B, 3, R, R], normalised.
        classes: [B] int64, one of the method's current classes for each image.

    Raises:
        ConfigError: not one class for each image, or one that does not exist.
        UnsupportedTowerError: the image tower has no attention blocks that can be read.
    """
    backbone = method.backbone
    count = len(method.class_names)
    if classes.shape != (len(images),) or not all(0 <= index < count for index in classes.tolist()):
        raise ConfigError(
            f"classes are {classes.tolist()} for {len(images)} images and {count} classes; give one index for each "
            f"image, 0 to {count - 1}"
        )
    prompts = [prompt.detach() for prompt in method.vision_prompts()]
    with torch.inference_mode(False), torch.enable_grad():
        # A copy that asks for gradients: otherwise a frozen tower would record nothing.
        leaf = images.detach().to(backbone.device).clone().requires_grad_()
        raw, attention = encode_image_with_attention(backbone.image, leaf, prompts)
        asked = torch.tensor(classes.tolist(), device=backbone.device)
        score = _score(_logits(method, to_float32(raw)), asked)
        gradients = torch.autograd.grad(score, attention)
    weighted = [
        (seen.detach().float() * slope.float()).clamp(min=0).mean(dim=1)
        for seen, slope in zip(attention, gradients, strict=True)
    ]
    rows = _roll(weighted, prompts)
    patches = rows[:, 0, 1:] if backbone.image.pools_class_token else rows[:, 1 : rows.shape[2], 1:].mean(dim=1)
    side = int(patches.shape[1] ** 0.5)
    grid: Tensor = patches.unflatten(1, (side, -1)).cpu()
    return grid


def _logits(method: Method, image_features: Tensor) -> Tensor:
    """Logits [B, C] of raw features [B, D], with gradients to these."""
    if method.classes_depend_on_image:
        logits: Tensor = method(image_features)
        return logits
    # A copy, since they may have been made in a user's inference mode, which no gradient can pass.
    return method.logits(method.encode_images(image_features), method.class_embeddings().clone())


def _score(logits: Tensor, classes: Tensor) -> Tensor:
    """The sum over images of a class's logit above the mean of the others; alone, the logit itself."""
    own = logits.gather(1, classes[:, None])[:, 0]
    others = logits.shape[1] - 1
    return (own - (logits.sum(dim=1) - own) / others).sum() if others else own.sum()


def _roll(weighted: list[Tensor], prompts: list[Tensor]) -> Tensor:
    """Relevance [B, n, 1 + N] of class token and patches for every row, of block matrices [B, n, n]."""
    batch, rows, _ = weighted[0].shape
    own = rows - (len(prompts[0]) if prompts else 0)
    found = torch.eye(own, device=weighted[0].device).expand(batch, -1, -1)
    for layer, matrix in enumerate(weighted):
        if layer < len(prompts):
            empty = found.new_zeros(len(prompts[layer]), own)
            found = append_vision(found, empty) if layer == 0 else replace_vision(found, empty)
        found = found + matrix @ found
    return found
