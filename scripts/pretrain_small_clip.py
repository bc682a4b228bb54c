"""Pretrain the small CLIP of the package on emoji scenes, on a CPU, and export it in open_clip's format.

    python scripts/pretrain_small_clip.py train --run DIR --minutes 90
    python scripts/pretrain_small_clip.py export --run DIR [--output src/maple/assets/small_clip]

`train` goes on from DIR/checkpoint.pt where it finds one; the schedule follows the training time, not the steps.
`export` takes the averaged weights of the last checkpoint, scatters the trained rows of the vocabulary into CLIP's
49,408, and measures the exported folder as any user would load it.

Scenes are composed in batches by tensor operations from the glyphs of three styles; the measurements use
`maple.data.scenes.render_scene`, in all five.
"""

import argparse
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from maple.clip import load_clip
from maple.data.scenes import Concept, EmojiArchive, render_scene, scene_seed

SEEN_STYLES = ("openmoji", "noto", "fluent")
PLAIN_TEMPLATE = "a photo of a {}."
TEMPLATES = (
    PLAIN_TEMPLATE, PLAIN_TEMPLATE, PLAIN_TEMPLATE, "a picture of a {}.", "a drawing of a {}.", "{}", "a {}.",
    "an icon of a {}.", "an emoji of a {}.", "a photo of a {}, a type of KIND.", "a {} in a scene.",
)  # fmt: skip
KINDS = {
    "animals": "animal", "food": "food", "objects": "object", "places": "place", "people": "person",
    "symbols": "symbol", "activities": "activity", "flags": "flag",
}  # fmt: skip
CAPTIONS = 24  # per concept
CONTEXT = 18
VOCABULARY = 49408
FULL_CONTEXT = 77
WIDENED = 0.2  # share of drawings in another manner, in the later part of the training
BANK_FROM = 400  # steps before pictures are also held against the remembered captions of all concepts
EVAL_INDEX = 1_000_000  # scenes from this number on are for measurement only
EVAL_DIFFICULTY = 0.5

VISION = {"image_size": 64, "layers": 6, "width": 192, "patch_size": 16, "head_width": 64}
TEXT = {"context_length": FULL_CONTEXT, "vocab_size": VOCABULARY, "width": 128, "heads": 2, "layers": 4}
EMBED = 128


def captions_of(concept: Concept, rng: random.Random) -> list[str]:
    """`CAPTIONS` sentences on one concept: mostly its name in a template, some with keywords, few of a keyword only."""
    captions = []
    for number in range(CAPTIONS):
        text = rng.choice(TEMPLATES).replace("KIND", KINDS[concept.group]).format(concept.name)
        if concept.keywords and number % 4 == 3:
            words = rng.sample(concept.keywords, min(len(concept.keywords), rng.randint(1, 3)))
            text = f"{text.removesuffix('.')}, {', '.join(words)}"
        if concept.keywords and number % 12 == 7:
            text = PLAIN_TEMPLATE.format(rng.choice(concept.keywords))
        captions.append(text)
    return captions


def caption_tables(concepts: tuple[Concept, ...]) -> tuple[Tensor, Tensor]:
    """Tokens (concepts, CAPTIONS, CONTEXT) in the reduced vocabulary, and the rows of CLIP's that it consists of.

    The rows are ascending, so the end token stays the largest, which is what the text tower looks for.
    """
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    rng = random.Random(1)
    tokens = torch.stack([tokenizer(captions_of(concept, rng)) for concept in concepts])
    rows, reduced = torch.unique(tokens, return_inverse=True)
    return reduced, rows


class Scenes:
    """Batches of random scenes, composed by tensor operations."""

    def __init__(self, archive: EmojiArchive, concepts: tuple[Concept, ...], generator: torch.Generator) -> None:
        self.generator = generator
        glyphs = [[np.array(archive.glyph(style, c.code)) for c in concepts] for style in SEEN_STYLES]
        # (styles, concepts, 4, 64, 64), 82 MB
        self.glyphs = torch.from_numpy(np.array(glyphs)).permute(0, 1, 4, 2, 3).contiguous()
        self.mean = torch.tensor(OPENAI_DATASET_MEAN)[:, None, None]
        self.std = torch.tensor(OPENAI_DATASET_STD)[:, None, None]

    def uniform(self, low: Tensor | float, high: Tensor | float, *shape: int) -> Tensor:
        """Uniform numbers between `low` and `high`."""
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def batch(self, styles: Tensor, concepts: Tensor, hardest: float, widening: float) -> Tensor:
        """Normalised pictures (batch, 3, 64, 64); difficulty per picture is uniform up to `hardest`."""
        count = len(styles)
        glyph = self.glyphs[styles, concepts].float() / 255
        level = self.uniform(0, hardest, count)
        drawn, alpha = glyph[:, :3], glyph[:, 3:]
        if widening:
            drawn, alpha = self.widen(drawn, alpha, widening)
        drawn = self.jitter(drawn)
        placed = self.place(torch.cat([drawn * alpha, alpha], 1), level)
        picture = placed[:, :3] + self.ground(level) * (1 - placed[:, 3:])
        return (self.light(picture, level) - self.mean) / self.std

    def place(self, glyph: Tensor, level: Tensor) -> Tensor:
        """The glyphs turned, scaled and moved."""
        count = len(glyph)
        scale = self.uniform(0.84 - 0.39 * level, 0.94 + 0.11 * level, count)
        turn = self.uniform(-1, 1, count) * (5 + 69 * level) / 256
        cosine, sine = (1 - turn**2) / (1 + turn**2), 2 * turn / (1 + turn**2)
        room = 0.02 + (1 - scale).clamp_min(1 / 16) * level / 2
        x, y = (2 * room * self.uniform(-1, 1, count) for _ in range(2))
        rows = torch.stack([cosine, sine, -(cosine * x + sine * y), -sine, cosine, sine * x - cosine * y], 1)
        grid = F.affine_grid((rows / scale[:, None]).view(count, 2, 3), list(glyph.shape), align_corners=False)
        return F.grid_sample(glyph, grid, align_corners=False)

    def ground(self, level: Tensor) -> Tensor:
        """Backgrounds: plain, a gradient, or soft blotches of two colours."""
        count, wide = len(level), level[:, None]
        colours = []
        for _ in range(2):
            grey = self.uniform((216 - 120 * wide) / 255, torch.full_like(wide, 250 / 255), count, 1)
            tint = (12 + 60 * wide) / 255 * self.uniform(-1, 1, count, 3)
            colours.append((grey + tint).clamp(40 / 255, 1)[:, :, None, None])
        cells = int(torch.randint(3, 13, (1,), generator=self.generator))
        blotches = F.interpolate(self.uniform(0, 1, count, 1, cells, cells), size=(64, 64), mode="bilinear")
        corners = F.interpolate(self.uniform(0, 1, count, 1, 2, 2), size=(64, 64), mode="bilinear", align_corners=True)
        plain, gradient = (self.uniform(0, 1, count, 1, 1, 1) for _ in range(2))
        mixed = torch.where(gradient < 0.5, corners, blotches) * (plain < level[:, None, None, None])
        return torch.lerp(colours[0], colours[1], mixed)

    def light(self, picture: Tensor, level: Tensor) -> Tensor:
        """Light that falls off to one side, and grain."""
        count, level = len(picture), level[:, None, None, None]
        line = torch.linspace(-1, 1, 64)
        bright = 1 + self.uniform((-16 - 60 * level) / 256, (12 + 36 * level) / 256, count, 1, 1, 1)
        slopes = [level / 4 * self.uniform(-1, 1, count, 1, 1, 1) for _ in range(2)]
        gain = bright + line.view(1, 1, 1, 64) * slopes[0] + line.view(1, 1, 64, 1) * slopes[1]
        grain = (4 + 24 * level) / 256 * self.uniform(0, 0.4, count, 1, 1, 1)
        noise = torch.randn(picture.shape, generator=self.generator)
        return (picture * gain + noise * grain).clamp(0, 1)

    def jitter(self, drawn: Tensor) -> Tensor:
        """Colours scaled per channel and pulled a little to or from grey."""
        count = len(drawn)
        gains = 1 + 0.15 * self.uniform(-1, 1, count, 3, 1, 1)
        saturation = self.uniform(0.6, 1.3, count, 1, 1, 1)
        grey = drawn.mean(1, keepdim=True)
        return (torch.lerp(grey, drawn, saturation) * gains + 0.05 * self.uniform(-1, 1, count, 1, 1, 1)).clamp(0, 1)

    def widen(self, drawn: Tensor, alpha: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """A share of the glyphs in another manner: grey, drawn by their edges, posterised, inverted or blurred."""
        drawn, alpha = drawn.clone(), alpha.clone()
        kind = torch.rand(len(drawn), generator=self.generator) / share * 6
        for number in range(6):
            chosen = ((kind >= number) & (kind < number + 1)).nonzero()[:, 0]
            if not len(chosen):
                continue
            colour, cover = drawn[chosen], alpha[chosen]
            if number == 0:
                colour = colour.mean(1, keepdim=True).expand_as(colour)
            elif number in (1, 2):
                colour, cover = self.outline(colour, cover)
            elif number == 3:
                colour = (colour * 3).round() / 3
            elif number == 4:
                colour = 1 - colour
            else:
                both = F.avg_pool2d(torch.cat([colour * cover, cover], 1), 5, 1, 2)
                colour, cover = both[:, :3] / both[:, 3:].clamp_min(1e-3), both[:, 3:]
            drawn[chosen], alpha[chosen] = colour, cover
        return drawn, alpha

    def outline(self, colour: Tensor, cover: Tensor) -> tuple[Tensor, Tensor]:
        """Dark lines where the drawing changes, nothing between."""
        laid = torch.cat([colour * cover, cover], 1)
        steepness = (F.max_pool2d(laid, 3, 1, 1) + F.max_pool2d(-laid, 3, 1, 1)).amax(1, keepdim=True)
        threshold = self.uniform(0.15, 0.45, len(colour), 1, 1, 1)
        lines = ((steepness - threshold) * 4).clamp(0, 1)
        ink = self.uniform(0, 0.25, len(colour), 1, 1, 1).expand_as(colour)
        return ink, lines


def build_model(vocabulary: int, context: int) -> nn.Module:
    """The small CLIP with random weights."""
    return open_clip.CLIP(
        embed_dim=EMBED,
        vision_cfg=dict(VISION),
        text_cfg={**TEXT, "context_length": context, "vocab_size": vocabulary},
        quick_gelu=True,
    )


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Both directions of CLIP's loss; two pictures per caption.

    Args:
        image: (2 n, embed) unit vectors: the n concepts once, and once more.
        text: (n, embed) unit vectors.
        scale: the temperature's inverse.
    """
    own = torch.arange(len(text))
    logits = scale * text @ image.T
    to_text = F.cross_entropy(logits.T, own.repeat(2))
    chances = logits.log_softmax(1)
    to_image = -(chances[own, own] + chances[own, own + len(text)]).mean() / 2
    return (to_text + to_image) / 2


def remembered_loss(image: Tensor, scale: Tensor, bank: Tensor, concepts: Tensor) -> Tensor:
    """Pictures (2 n, embed) against the remembered captions of all concepts, `bank` (concepts, embed).

    The right caption is a remembered one too: were it fresh, the towers could tell it from the others by its age
    alone, and they do: they drift together, all captions of a batch alike, and nothing is learnt.
    """
    return F.cross_entropy(scale * image @ bank.T, concepts.repeat(2))


class Trainer:
    """The training run: everything that a checkpoint holds."""

    def __init__(self, run: Path, seconds: float, batch: int, peak: float) -> None:
        self.run, self.budget, self.batch, self.peak = run, seconds, batch, peak
        self.archive = EmojiArchive()
        self.concepts = self.archive.concepts()
        self.tokens, self.rows = caption_tables(self.concepts)
        self.lengths = (self.tokens == len(self.rows) - 1).float().argmax(-1) + 1
        torch.manual_seed(0)
        self.generator = torch.Generator().manual_seed(0)
        self.scenes = Scenes(self.archive, self.concepts, self.generator)
        self.model = build_model(len(self.rows), CONTEXT).train()
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), eps=1e-6)
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.bank = F.normalize(torch.randn(len(self.concepts), EMBED), dim=1)
        self.step, self.seconds = 0, 0.0
        self.order = torch.empty(0, dtype=torch.long)
        self.exam = Exam(self.archive, ("food", "animals"), scenes=1)
        self._resume()

    def _resume(self) -> None:
        path = self.run / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            self.average, self.bank = state["average"], state["bank"]
            self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Write the checkpoint; a reader sees the old one or the new one."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "average": self.average,
            "bank": self.bank,
            "step": self.step,
            "seconds": self.seconds,
            "rows": self.rows,
        }
        torch.save(state, self.run / "checkpoint.tmp")
        (self.run / "checkpoint.tmp").replace(self.run / "checkpoint.pt")

    def train(self) -> None:
        """Train until the time is used up, logging every 50 steps and saving every three minutes."""
        log = self.run / "training_log.jsonl"
        losses: list[float] = []
        saved = examined = self.seconds
        while self.seconds < self.budget:
            started = time.perf_counter()
            losses.append(self.one_step())
            self.seconds += time.perf_counter() - started
            if self.step % 50 == 0:
                record = {
                    "step": self.step,
                    "seconds": round(self.seconds),
                    "loss": round(sum(losses) / len(losses), 4),
                }
                record["logit_scale"] = round(float(self.model.logit_scale.detach().exp()), 2)
                if self.seconds - examined > 240:
                    examined = self.seconds
                    record["zero_shot"] = self.exam.measure(self.averaged(), self.reduced)
                with log.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(record, flush=True)
                losses.clear()
            if self.seconds - saved > 180:
                saved = self.seconds
                self.save()
        self.save()

    def one_step(self) -> float:
        """One optimiser step; returns the loss."""
        progress = self.seconds / self.budget
        warm = min(1.0, (self.step + 1) / 100)
        rate = warm * self.peak * (0.01 + 0.99 * 0.5 * (1 + torch.cos(torch.tensor(progress * torch.pi)).item()))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        hardest = min(0.5, 0.1 + max(0.0, progress - 0.25))
        widening = 0.0 if progress < 0.4 else WIDENED
        concepts, images = self.draw(hardest, widening)
        caption = torch.randint(CAPTIONS, (len(concepts),), generator=self.generator)
        tokens = self.tokens[concepts, caption][:, : int(self.lengths[concepts, caption].max())]
        image = F.normalize(self.model.visual(images), dim=1)
        text = F.normalize(self.text(tokens), dim=1)
        loss = contrastive_loss(image, text, self.model.logit_scale.exp())
        if self.step >= BANK_FROM:
            loss = loss + 0.5 * remembered_loss(image, self.model.logit_scale.detach().exp(), self.bank, concepts)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, 4.6052)
            self.bank[concepts] = text.detach()
            keep = min(0.9985, (1 + self.step) / (10 + self.step))
            state = self.model.state_dict()
            torch._foreach_lerp_(list(self.average.values()), [state[name] for name in self.average], 1 - keep)
        self.step += 1
        return loss.item()

    def draw(self, hardest: float, widening: float) -> tuple[Tensor, Tensor]:
        """The next concepts (n,) of the running permutation, and two pictures of each in different styles."""
        count = self.batch // 2
        if len(self.order) < count:
            self.order = torch.randperm(len(self.concepts), generator=self.generator)
        concepts, self.order = self.order[:count], self.order[count:]
        first = torch.randint(len(SEEN_STYLES), (count,), generator=self.generator)
        second = (first + torch.randint(1, len(SEEN_STYLES), (count,), generator=self.generator)) % len(SEEN_STYLES)
        return concepts, self.scenes.batch(torch.cat([first, second]), concepts.repeat(2), hardest, widening)

    def text(self, tokens: Tensor) -> Tensor:
        """The text tower on tokens of any length up to CONTEXT."""
        model, length = self.model, tokens.shape[1]
        states = model.token_embedding(tokens) + model.positional_embedding[:length]
        states = model.transformer(states, attn_mask=model.attn_mask[:length, :length])
        states = model.ln_final(states)
        return states[torch.arange(len(tokens)), tokens.argmax(-1)] @ model.text_projection

    def averaged(self) -> nn.Module:
        """A model with the averaged weights."""
        model = build_model(len(self.rows), CONTEXT).eval()
        model.load_state_dict(self.average)
        return model

    def reduced(self, texts: list[str]) -> Tensor:
        """Tokens of `texts` in the reduced vocabulary; unknown words become its first row."""
        tokens = open_clip.SimpleTokenizer(context_length=CONTEXT)(texts)
        places = torch.searchsorted(self.rows, tokens).clamp_max(len(self.rows) - 1)
        return torch.where(self.rows[places] == tokens, places, 0)


class Exam:
    """Zero-shot classification over all names of a group, on scenes that no training step draws."""

    def __init__(
        self, archive: EmojiArchive, groups: tuple[str, ...], scenes: int, difficulty: float = EVAL_DIFFICULTY
    ):
        mean, std = (torch.tensor(v)[:, None, None] for v in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
        self.names = {group: [concept.name for concept in archive.concepts(group)] for group in groups}
        self.images: dict[tuple[str, str], Tensor] = {}
        for style in archive.styles:
            for group in groups:
                pictures = [
                    render_scene(
                        archive.glyph(style, concept.code),
                        scene_seed(style, concept.code, EVAL_INDEX + number),
                        difficulty=difficulty,
                    )
                    for concept in archive.concepts(group)
                    for number in range(scenes)
                ]
                pixels = torch.stack([pixels_of(picture) for picture in pictures])
                self.images[style, group] = (pixels.float() / 255 - mean) / std
        self.scenes = scenes

    @torch.no_grad()
    def measure(self, model: Any, tokenize: Any) -> dict[str, dict[str, float]]:
        """Top-1 accuracy in per cent by group and style."""
        table: dict[str, dict[str, float]] = {}
        for group, names in self.names.items():
            text = model.encode_text(tokenize([PLAIN_TEMPLATE.format(name) for name in names]), normalize=True)
            labels = torch.arange(len(names)).repeat_interleave(self.scenes)
            for style in sorted({style for style, _ in self.images}):
                features = torch.cat(
                    [model.encode_image(part, normalize=True) for part in self.images[style, group].split(256)]
                )
                right = (features @ text.T).argmax(1) == labels
                table.setdefault(group, {})[style] = round(100 * right.float().mean().item(), 1)
        return table


def pixels_of(picture: Image.Image) -> Tensor:
    """A picture as uint8 (3, height, width)."""
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(picture.height, picture.width, 3).permute(2, 0, 1)


def full_state(state: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The state dict in CLIP's vocabulary and context; untrained words are zero, positions repeat the last trained."""
    full = {name: value.detach().clone().contiguous() for name, value in state.items()}
    embedding = torch.zeros(VOCABULARY, TEXT["width"])
    embedding[rows] = full["token_embedding.weight"]
    full["token_embedding.weight"] = embedding
    positions = full["positional_embedding"]
    full["positional_embedding"] = torch.cat([positions, positions[-1:].repeat(FULL_CONTEXT - len(positions), 1)])
    return {name: value.half() if value.is_floating_point() else value for name, value in full.items()}


CARD = """# The small CLIP of maple-clip

A CLIP in open_clip's format, pretrained from scratch on drawings of emoji: an image tower (ViT, 64 x 64 pixels, patch
16, width 192, 6 layers), a causal text tower (width 128, 4 layers, CLIP's tokenizer and vocabulary), 128 joint
dimensions, QuickGELU; {parameters} million parameters, half precision on disk ({megabytes} MB).

**What it is**: a model small enough to ship and to adapt in minutes on two cores, so that the demo, the examples and
the tests run on something that sees. It maps scenes with one emoji, and that emoji's English name, to nearby vectors.

**What it is not**: a general vision model. It has seen no photograph, knows {words} of the 49,408 entries of the
vocabulary (the embeddings of the others are zero), reads reliably {context} tokens (the positions after that repeat
the last trained one), and one object per picture. Do not use it to judge people or for anything but learning and
testing. Results on it do not carry over to large CLIPs.

## Data

{concepts} concepts in three styles: OpenMoji in colour, Noto and Fluent 3D. Twemoji and OpenMoji's black line art were
never shown: they are the unseen styles. All concepts were shown, as large CLIPs have seen nearly everything. Captions
are made of templates, names and keywords. Scenes get harder as the training goes on; in its last part {share} per cent
of the drawings are shown in grey, by their outlines, posterised, inverted or blurred. The outlines resemble line art;
its drawings were not used.

## Training

    python scripts/pretrain_small_clip.py train --run DIR --minutes {minutes}
    python scripts/pretrain_small_clip.py export --run DIR

{steps} steps of 128 pictures and 64 captions, {minutes} minutes on two CPU cores that did other work too; no GPU.
CLIP's loss within the batch, and pictures against the remembered captions of all concepts; AdamW, cosine schedule over
time, averaged weights. The schedule follows the clock, so a second run gives a like model, not the same bytes.
`training_log.jsonl` holds the log and, as its last lines, the measurements below.

## Zero-shot accuracy

Per cent over all names of a group (chance: 100 / names), prompt "{template}", one scene per emoji and style drawn by
`maple.data.scenes.render_scene`, with the exported weights. Styles in bold were never seen.

{tables}
## Licence

The weights: MIT, like the package. They were trained on OpenMoji (CC BY-SA 4.0), Noto Color Emoji (Apache 2.0) and
Fluent Emoji (MIT), credited in `../emoji/CREDITS.md`; whether ShareAlike reaches weights is not settled law.
"""


def measured_table(table: dict[str, dict[str, float]], sizes: dict[str, int]) -> str:
    """The accuracies as a Markdown table, a row per group."""
    styles = [*SEEN_STYLES, *sorted(set(next(iter(table.values()))) - set(SEEN_STYLES), reverse=True)]
    head = [style if style in SEEN_STYLES else f"**{style}**" for style in styles]
    lines = [f"| group | names | chance | {' | '.join(head)} |", "|---|---|---|" + "---|" * len(styles)]
    for group, row in table.items():
        cells = " | ".join(f"{row[style]:.1f}" for style in styles)
        lines.append(f"| {group} | {sizes[group]} | {100 / sizes[group]:.1f} | {cells} |")
    return "\n".join(lines)


def export(run: Path, output: Path) -> None:
    """Write the folder that `maple.clip.load_clip` reads, measure it, and describe it."""
    output.mkdir(parents=True, exist_ok=True)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    weights = output / "open_clip_model.safetensors"
    save_file(full_state(state["average"], state["rows"]), weights)
    weights.chmod(0o644)
    config = {
        "model_cfg": {"embed_dim": EMBED, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
        "preprocess_cfg": {
            "mean": list(OPENAI_DATASET_MEAN),
            "std": list(OPENAI_DATASET_STD),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    (output / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    shutil.copy(run / "training_log.jsonl", output / "training_log.jsonl")
    archive = EmojiArchive()
    sizes = {group: len(archive.concepts(group)) for group in archive.groups}
    backbone = load_clip(str(output))
    tables = []
    for difficulty in (0.25, EVAL_DIFFICULTY):
        table = Exam(archive, archive.groups, scenes=1, difficulty=difficulty).measure(
            backbone.model, backbone.tokenize
        )
        record = {"step": state["step"], "difficulty": difficulty, "exported": table}
        with (output / "training_log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        tables.append(f"Scenes of difficulty {difficulty}:\n\n{measured_table(table, sizes)}\n")
        print(tables[-1], flush=True)
    card = CARD.format(
        parameters=round(sum(value.numel() for value in backbone.model.parameters()) / 1e6, 1),
        megabytes=round(weights.stat().st_size / 1e6),
        words=len(state["rows"]),
        context=CONTEXT,
        concepts=sum(sizes.values()),
        share=round(100 * WIDENED),
        minutes=round(state["seconds"] / 60),
        steps=state["step"],
        template=PLAIN_TEMPLATE,
        tables="\n".join(tables),
    )
    (output / "MODEL_CARD.md").write_text(card)


def main() -> None:
    """Train or export."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("train", "export"))
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoint and the log")
    parser.add_argument("--minutes", type=float, default=90, help="training time, all resumed parts together")
    parser.add_argument("--batch", type=int, default=128, help="pictures a step; half as many captions")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "src/maple/assets/small_clip")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    options.run.mkdir(parents=True, exist_ok=True)
    if options.action == "train":
        Trainer(options.run, options.minutes * 60, options.batch, options.learning_rate).train()
    else:
        export(options.run, options.output)


if __name__ == "__main__":
    main()
