"""From a checkpoint to the folder in the package: weights, configuration, log and model card."""

import json
import shutil
from pathlib import Path

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file
from torch import Tensor

from maple.clip import load_clip
from maple.data.emoji.scenes import EmojiArchive
from small_clip.captions import CONTEXT, PLAIN_TEMPLATE
from small_clip.exam import EVAL_DIFFICULTY, Exam
from small_clip.scenes import SEEN_STYLES
from small_clip.training import EMBED, FULL_CONTEXT, TEXT, VISION, VOCABULARY, WIDENED


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
the tests run on a real model. It maps scenes with one emoji, and that emoji's English name, to nearby vectors.

**What it is not**: a general vision model. It was not trained on photographs, knows {words} of the 49,408 entries of
the vocabulary (the embeddings of the others are zero), reads {context} tokens reliably (the positions after that repeat
the last trained one), and one object per image. Do not use it to judge people or for anything but learning and
testing. Results on it do not carry over to large CLIPs.

## Data

{concepts} concepts in three styles: OpenMoji in colour, Noto and Fluent 3D. Twemoji and OpenMoji's black line art were
never shown: they are the unseen styles. All concepts were shown, as large CLIPs have seen nearly everything. Captions
are made of templates, names and keywords. Scenes get harder during training; in its last part {share} per cent
of the drawings are shown in grey, by their outlines, posterised, inverted or blurred. The outlines resemble line art;
its drawings were not used.

## Training

    python scripts/pretrain_small_clip.py train --run DIR --minutes {minutes}
    python scripts/pretrain_small_clip.py export --run DIR

{steps} steps of 128 images and 64 captions, {minutes} minutes on a CPU; no GPU. {remark}
CLIP's loss within the batch, and images against the remembered captions of all concepts; AdamW, cosine schedule over
time, averaged weights. The schedule follows the clock, so a second run gives a similar model, not the same bytes.
`training_log.jsonl` contains the log and, in its last lines, the measurements below.

## Zero-shot accuracy

Per cent over all names of a group (chance: 100 / names), prompt "{template}", one scene per emoji and style drawn by
`maple.data.emoji.scenes.render_scene`, with the exported weights. Styles in bold were never seen.

{tables}
## Licence

The weights: MIT, like the package. They were trained on OpenMoji (CC BY-SA 4.0), Noto Color Emoji (Apache 2.0) and
Fluent Emoji (MIT), credited in `../emoji/CREDITS.md`; whether ShareAlike applies to weights is an open legal question.
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


def export(run: Path, output: Path, remark: str) -> None:
    """Write the folder that `maple.clip.load_clip` reads, measure it, and describe it; `remark` is about this run."""
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
        remark=remark,
        tables="\n".join(tables),
    )
    (output / "MODEL_CARD.md").write_text(card)
