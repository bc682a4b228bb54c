"""From a checkpoint to the folder in the package: weights, configuration, log and model card."""

import json
import shutil
from pathlib import Path

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file
from torch import Tensor

from maple.clip import load_clip
from maple.data.emoji.archive import EmojiArchive
from maple.data.icons.archive import IconArchive
from small_clip.captions import CONTEXT, PLAIN_TEMPLATE
from small_clip.corpus import SEEN_STYLES, Corpus
from small_clip.exam import Exam
from small_clip.icons import PACKAGE, TEST_FAMILIES, TRAIN_FAMILIES, VERSION
from small_clip.training import EMBED, FOREIGN, FULL_CONTEXT, TEXT, VISION, VOCABULARY, WIDENED


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

A CLIP in open_clip's format, pretrained on drawings of emoji and icons alone: an image tower (ViT, 64 x 64
pixels, patch 16, width 192, 6 layers), a causal text tower (width 128, 4 layers, CLIP's tokenizer and vocabulary), 128
joint dimensions, QuickGELU; {parameters} million parameters, half precision on disk ({megabytes} MB).

**What it is**: a model small enough to ship and to adapt in minutes on two cores, so that the demo, the examples and
the tests run on a real model. It maps scenes with one drawing, and the English name of what is drawn, to nearby
vectors.

**What it is not**: a general vision model. It was not trained on photographs, knows {words} of the 49,408 entries of
the vocabulary (the embeddings of the others are zero), reads {context} tokens reliably (the positions after that repeat
the last trained one), and one object per image. Do not use it to judge people or for anything but learning and
testing. Results on it do not carry over to large CLIPs.

## Data

{names} names and {drawings} drawings: the bundled emoji in three styles (OpenMoji in colour, Noto and Fluent 3D), and
the icons of {sets} icon sets in the npm package {package} {version} that at least two makers draw. Never shown:
Twemoji and OpenMoji's black line art; and the drawings of the {held_out} families of icon sets of which the bundled
data sets `icons-TOPIC` are made. Their names were shown, drawn by others, as large CLIPs have seen nearly everything.
Icons of one colour are shown in a dark colour on a light ground, or the reverse. Captions are made of templates, names
and keywords. Scenes get harder during training; in its last part {share} per cent of the drawings are shown in grey,
by their outlines, posterised, inverted or blurred. The outlines resemble line art and neon; their drawings and their
manner were not used.

## Training

    python scripts/pretrain_small_clip.py prepare --work WORK
    python scripts/pretrain_small_clip.py train --work WORK --run RUN --minutes {minutes}{initial}
    python scripts/pretrain_small_clip.py export --work WORK --run RUN

{steps} steps of {batch} images and captions of different names, {minutes} minutes on two cores; no GPU. {remark}
CLIP's loss within the batch, and both towers' classification among all names, each of which has a learned vector that
is thrown away in the end. In {foreign} per cent of the steps, one to four random tokens were written into the first
blocks of both towers, so that untrained prompts cost little accuracy. AdamW, cosine schedule over time, averaged
weights. The schedule follows the clock, so a second run gives a similar model, not the same bytes.
`training_log.jsonl` contains the log and, in its last lines, the measurements below.

## Zero-shot accuracy

Per cent over all names of a topic or group (chance: 100 / names), prompt "{template}", with the exported weights.
Styles in bold were never seen.

{tables}
## Licence

The weights: MIT, like the package. They were trained on OpenMoji (CC BY-SA 4.0), Noto Color Emoji (Apache 2.0) and
Fluent Emoji (MIT), credited in `../emoji/CREDITS.md`, and on icon sets under {licences}, named below; whether licences
of drawings apply to weights is an open legal question.

{credits}
"""


def measured_table(table: dict[str, dict[str, float]], sizes: dict[str, int], seen: tuple[str, ...]) -> str:
    """The accuracies as a Markdown table, a row per topic or group; the styles in `seen` come first."""
    styles = [*seen, *sorted(set(next(iter(table.values()))) - set(seen), reverse=True)]
    head = [style if style in seen else f"**{style}**" for style in styles]
    lines = [f"| names of | names | chance | {' | '.join(head)} |", "|---|---|---|" + "---|" * len(styles)]
    for group, row in table.items():
        cells = " | ".join(f"{row[style]:.1f}" for style in styles)
        lines.append(f"| {group} | {sizes[group]} | {100 / sizes[group]:.1f} | {cells} |")
    return "\n".join(lines)


def export(run: Path, drawings: Path, output: Path, remark: str, *, has_initial: bool) -> None:
    """Write the folder that `maple.clip.load_clip` reads, measure it, and describe it.

    Args:
        run: the folder of the checkpoint and the log.
        drawings: the folder of the corpus that the run was trained on.
        output: the folder to write.
        remark: a sentence about this run for the model card, such as where its initial weights are from.
        has_initial: whether the run started from the weights of a folder.
    """
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
    backbone = load_clip(str(output))
    emoji, icon_archive = EmojiArchive(), IconArchive()
    icon_exam = Exam()
    for topic in icon_archive.topics:
        icon_exam.add_icons(topic, drawings=icon_archive.test_count)
    exams = [("Icons, all test drawings", icon_exam, ("ink",))]
    for difficulty in (0.25, 0.5):
        exam = Exam()
        for group in emoji.groups:
            exam.add_emoji(group, scenes=1, difficulty=difficulty)
        exams.append((f"Emoji, scenes of difficulty {difficulty}", exam, SEEN_STYLES))
    tables = []
    for title, exam, seen in exams:
        table = exam.measure(backbone.model, backbone.tokenize)
        record = {"step": state["step"], "exam": title, "exported": table}
        with (output / "training_log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        sizes = {group: len(names) for group, names in exam.names.items()}
        tables.append(f"{title}:\n\n{measured_table(table, sizes, seen)}\n")
        print(tables[-1], flush=True)
    corpus = Corpus(drawings)
    licences = {record["licence"] for record in corpus.sets.values()}
    card = CARD.format(
        parameters=round(sum(value.numel() for value in backbone.model.parameters()) / 1e6, 1),
        megabytes=round(weights.stat().st_size / 1e6),
        words=len(state["rows"]),
        context=CONTEXT,
        names=f"{len(corpus.names):,}",
        drawings=f"{len(corpus.drawings):,}",
        sets=len(corpus.sets),
        package=PACKAGE,
        version=VERSION,
        held_out=len(TRAIN_FAMILIES | TEST_FAMILIES),
        share=round(100 * WIDENED),
        foreign=round(100 * FOREIGN),
        minutes=round(state["seconds"] / 60),
        steps=f"{state['step']:,}",
        batch=state["batch"],
        template=PLAIN_TEMPLATE,
        remark=remark,
        initial=" --initial FOLDER" if has_initial else "",
        tables="\n".join(tables),
        licences=", ".join(sorted(licences)),
        credits="\n".join(f"- {r['name']}, {r['author']}, {r['licence']}" for _, r in sorted(corpus.sets.items())),
    )
    (output / "MODEL_CARD.md").write_text(card)
