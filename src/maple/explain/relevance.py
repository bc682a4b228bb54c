"""Heat maps: the relevance of each image patch for a class, from attention weighted by its gradient in all blocks.

In each block the attention A is weighted by the gradient of the class's score, negative evidence is dropped, and the
heads are averaged: E = mean over heads of max(0, A * dscore/dA). Relevance starts as the identity over tokens, and
grows by R <- R + E R from block to block; the class token's row, at its patches, is the map. Where features are pooled
from all rows, the map is a sum of these: each counts by what the score would lose, to first order, with the mean state
in place of its final one.
Prompt tokens are not patches: their rows start empty, and are emptied again wherever a block replaces them, because the
new ones contain nothing of the image.

Source: Chefer, Gur and Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
Transformers", ICCV 2021, section 3, equations 5 and 6. Departs: the prompt rows; towers without a class token; and the
score, which is a class's logit above the mean of the others, so that evidence for all classes alike counts for none.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from maple.clip.edits import LayerEdit, edits_of_all_blocks
from maple.errors import ConfigError
from maple.methods import Method
from maple.prompts import encode_image_with_attention, to_float32
from maple.prompts.splice import write_rows


def relevance(method: Method, images: Tensor, classes: Tensor) -> Tensor:
    """Return the relevance of each patch: [B, G, G], from 0 up, float32; G x G patches, top left first.

    Gradients of parameters are not touched.

    Args:
        images: [B, 3, R, R], normalised.
        classes: [B] int64, the index of the class to explain for each image.

    Raises:
        ConfigError: not one class for each image, or one that does not exist.
        UnsupportedTowerError: the image tower has no readable attention blocks.

    Example:
        >>> method = load_prompts("prompts.safetensors")
        >>> relevance(method, images, method.predict_logits(images).argmax(dim=1)).shape
        torch.Size([2, 14, 14])
    """
    backbone = method.backbone
    count = len(method.class_names)
    if classes.shape != (len(images),) or not all(0 <= index < count for index in classes.tolist()):
        raise ConfigError(
            f"classes are {classes.tolist()} for {len(images)} images and {count} classes; give one index for each "
            f"image, 0 to {count - 1}"
        )
    with torch.no_grad():
        edits = edits_of_all_blocks(method.vision_edits(), backbone.image.depth)
    with torch.inference_mode(False), torch.enable_grad():
        # A copy that requires gradients: through a frozen tower nothing would be recorded otherwise.
        leaf = images.detach().to(backbone.device).clone().requires_grad_()
        states: list[Tensor] = []
        features, attention = attended_features(method, leaf, edits, states)
        logits = explained_logits(method, features)
        # The index is copied too: a tensor of the caller's inference mode cannot be kept for a gradient.
        score = logits.gather(1, torch.tensor(classes.tolist(), device=backbone.device)[:, None])[:, 0]
        if count > 1:
            # Above the mean of the other classes; the only class of a list is explained by its logit.
            score = score - (logits.sum(dim=1) - score) / (count - 1)
        *gradients, slope = torch.autograd.grad(score.sum(), [*attention, *states])
    weighted = [
        (weights.detach().float() * gradient.float()).clamp(min=0).mean(dim=1)
        for weights, gradient in zip(attention, gradients, strict=True)
    ]
    # Relevance [B, n, 1 + N] of class token and patches for every row.
    prompted = inserted = 0
    entered = (edits[0].prompt, edits[0].tokens)
    rows = weighted[0].shape[1] - sum(len(tokens) for tokens in entered if tokens is not None)
    accumulated = torch.eye(rows, device=weighted[0].device).expand(len(images), -1, -1)
    for matrix, edit in zip(weighted, edits, strict=True):
        if edit.prompt is not None:
            accumulated = write_rows(accumulated, accumulated.new_zeros(len(edit.prompt), rows), rows, prompted)
            prompted = len(edit.prompt)
        if edit.tokens is not None:
            empty = accumulated.new_zeros(len(edit.tokens), rows)
            accumulated = write_rows(accumulated, empty, rows + prompted, inserted, edit.keep)
            inserted = len(edit.tokens)
        accumulated = accumulated + matrix @ accumulated
    first = backbone.image.first_patch
    from_patches = accumulated[:, :rows, first:]
    if backbone.image.pools_class_token:
        patches = from_patches[:, 0]
    else:
        final = states[0].detach().float()
        # Not the product with the state itself: a norm of single rows leaves the score as it is where a state grows.
        contributed = ((final - final.mean(dim=1, keepdim=True)) * slope.float()).sum(dim=-1).clamp(min=0)
        patches = (contributed[:, None] @ from_patches)[:, 0]
    grid: Tensor = patches.unflatten(1, (int(patches.shape[1] ** 0.5), -1)).cpu()
    return grid


def attended_features(
    method: Method, images: Tensor, edits: Sequence[LayerEdit], states: list[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The method's raw image features [B, E], and the attention weights of every block.

    The states that are pooled are appended to `states`.
    """
    rows: list[Tensor] = []
    raw, attention = encode_image_with_attention(method.backbone.image, images, edits, rows, states)
    features = to_float32(raw)
    return method.join_token_rows(features, rows[0]) if rows[0].shape[1] else features, attention


def explained_logits(method: Method, image_features: Tensor) -> Tensor:
    """Logits [B, C] of raw features [B, D], with gradients to these."""
    if method.classes_depend_on_image:
        logits: Tensor = method(image_features)
        return logits
    # A copy, since they may have been made in a user's inference mode, which no gradient can pass.
    return method.logits(method.encode_images(image_features), method.class_embeddings().clone())
