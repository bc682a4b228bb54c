"""Measure how faithful heat maps are, against attention alone and a random order of patches.

    python scripts/measure_maps.py RUN [--images 60] [--seed 0]

RUN was trained on emoji with the packaged CLIP. Deletion: patches are painted over in the colour of the image's edge,
the highest of the map first, and the score of the predicted class (its logit above the mean of the others) is averaged
over all steps; lower is better. Insertion: patches are put onto that colour in the same order; higher is better.
Pointing: with one drawing, half as wide as the image, in one of its quarters, how often the map's highest patch is in
that quarter. Chance is 25 %.
"""

import argparse
import random

import torch
from PIL import Image
from torch import Tensor

from maple.data.emoji import archive, draw
from maple.data.scenes import render_scene
from maple.explain import relevance
from maple.inference import TorchPredictor
from maple.methods import Method
from maple.prompts import encode_image_with_attention

TEST_SCENES = range(200, 210)


def attention_alone(method: Method, images: Tensor) -> Tensor:
    """Attention rollout (Abnar and Zuidema, 2020), which does not depend on the class: [B, N]."""
    with torch.no_grad():
        _, seen = encode_image_with_attention(method.backbone.image, images, method.vision_edits())
    side = images.shape[-1] // 16
    rolled = torch.eye(seen[0].shape[-1])
    for attention in seen:
        rolled = (0.5 * attention.mean(dim=1) + 0.5 * torch.eye(attention.shape[-1])) @ rolled
    return rolled[:, 0, 1 : 1 + side * side]


def orders(method: Method, images: Tensor, classes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Maps [B, N] of the three ways."""
    ours = torch.cat(
        [relevance(method, image[None], label[None]) for image, label in zip(images, classes, strict=True)]
    )
    return {
        "gradient-weighted attention": ours.flatten(1),
        "attention alone": attention_alone(method, images),
        "random": torch.rand(len(images), ours[0].numel(), generator=generator),
    }


def curve(method: Method, images: Tensor, classes: Tensor, order: Tensor, *, insert: bool) -> float:
    """The score of `classes` [B], averaged over deleting (or inserting) none to all patches of `order` [B, N]."""
    count = order.shape[1]
    side = int(count**0.5)
    edge = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], dim=2)
    plain = edge.mean(dim=2)[:, :, None, None].expand_as(images)
    total = 0.0
    for step in range(count + 1):
        chosen = torch.zeros(len(images), count).scatter(1, order[:, :step], 1.0).view(-1, 1, side, side)
        mask = torch.nn.functional.interpolate(chosen, size=images.shape[-2:])
        shown = mask if insert else 1 - mask
        logits = method.predict_logits(images * shown + plain * (1 - shown))
        target = logits.gather(1, classes[:, None])[:, 0]
        total += float((target - (logits.sum(dim=1) - target) / (logits.shape[1] - 1)).mean())
    return total / (count + 1)


def main() -> None:
    """Print a row for each model and order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    predictor = TorchPredictor.load(arguments.run, zero_shot=True, device="cpu")
    drawn = random.Random(arguments.seed)
    style, group = "lineart", "food"
    concepts = [concept for concept in archive().concepts(group) if concept.name in predictor.trained_names]
    scenes, corners, places = [], [], []
    for _ in range(arguments.images):
        code = drawn.choice(concepts).code
        scenes.append(torch.from_numpy(predictor.preprocess(draw(f"{style}/{code}/{drawn.choice(TEST_SCENES)}"))))
        quarter = drawn.randrange(4)
        canvas = Image.new("RGBA", (128, 128))
        canvas.paste(archive().glyph(style, code), (quarter % 2 * 64, quarter // 2 * 64))
        corners.append(
            torch.from_numpy(predictor.preprocess(render_scene(canvas, drawn.getrandbits(32), difficulty=0)))
        )
        places.append(quarter)
    full, small, truth = torch.stack(scenes), torch.stack(corners), torch.tensor(places)
    generator = torch.Generator().manual_seed(arguments.seed)
    for name, method in (("zero-shot CLIP", predictor.classes.zero_shot), (predictor.method.title, predictor.method)):
        if method is None:
            raise SystemExit("the predictor has no frozen CLIP")
        predicted = method.predict_logits(full).argmax(dim=1)
        pointed = orders(method, small, method.predict_logits(small).argmax(dim=1), generator)
        for kind, maps in orders(method, full, predicted, generator).items():
            order = maps.argsort(dim=1, descending=True)
            deleted, inserted = (curve(method, full, predicted, order, insert=insert) for insert in (False, True))
            side = int(maps.shape[1] ** 0.5)
            best = pointed[kind].argmax(dim=1)
            quarter = best // side // (side // 2) * 2 + best % side // (side // 2)
            hits = float((quarter == truth).float().mean())
            print(f"| {name} | {kind} | {deleted:.2f} | {inserted:.2f} | {100 * hits:.0f} % |")


if __name__ == "__main__":
    main()
