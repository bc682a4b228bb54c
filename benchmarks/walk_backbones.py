"""Walk over every architecture and tag that open_clip publishes, without weights: what loads, and which methods run.

Usage: python -m benchmarks.walk_backbones [--only ViT-B-16,RN50] [--output FOLDER] [--page docs/backbones.md]
Each architecture is built in full size on the meta device, where tensors have shapes and no memory. Of those that
differ in their resolution alone, one is run there (but text towers of transformers, which read values), and then its
towers that prompts can enter are built with their widths and heads, but two blocks, images of 4 x 4 patches and
random weights, and one method of each family makes a step on them: the loss must be finite, and gradients must reach
what is learned and nothing else. What does not run has the tower's reason. Of each tag, the preprocessing is read.
Text towers of transformers have their published sizes, and tokenizers that need a download are replaced by one that
has the same special tokens. With --page, the table between the page's two markers is replaced.
"""

import argparse
import functools
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import HFTokenizer
from timm.layers import PatchEmbed
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks.common import write
from maple.clip import Backbone
from maple.clip.backbone import preprocessing_of
from maple.clip.backbone_names import architecture_config
from maple.clip.checkpoints.open_clip_models import build_model, default_preprocess
from maple.clip.describe import FAMILIES, BackboneDescription, describe_model, model_without_weights
from maple.clip.known_backbones import TEXT_CONFIGS
from maple.clip.tokenization.tokenizers import clip_tokenizer
from maple.errors import MapleError, first_line
from maple.methods import build_method

# A method of each family, small enough for two blocks and for sentences of 16 tokens.
EXAMPLES: dict[str, dict[str, Any]] = {
    "text prompts": {"name": "deep_language", "prompt_length": 2, "prompt_depth": 2, "init_text": "a photo"},
    "image prompts": {"name": "vpt", "vision_prompt_length": 2, "vision_prompt_depth": 2},
    "both towers": {"name": "maple", "prompt_length": 2, "prompt_depth": 2, "init_text": "a photo"},
    "features of tokens": {"name": "mmrl", "layers": [1, 2], "tokens": 2, "token_width": 16},
    "inside the blocks": {"name": "clip_lora"},
    "frozen features": {"name": "clip_adapter"},
}
CLASS_NAMES = ("cat", "red car")
WORDS = ("a", "photo", "of", "cat", "red", "car", ".", "image")
MARKERS = "<!-- the table of benchmarks/walk_backbones.py -->", "<!-- end of the table -->"
_WORDS_KEPT = 1000  # token embeddings of a tower whose tokenizer is replaced


def main() -> None:
    """Walk, print, and write; the exit status is 1 if a step failed that should have run, or ran against the rules."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), help="architectures")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    published: dict[str, list[str]] = {}
    for architecture, tag in open_clip.list_pretrained():
        published.setdefault(architecture, []).append(tag)
    rows: list[dict[str, Any]] = []
    steps: dict[str, list[str]] = {}
    for architecture in sorted(arguments.only or published, key=str.casefold):
        start = time.perf_counter()
        rows.append(walk(architecture, published.get(architecture, []), steps))
        print(f"{architecture}: {summary(rows[-1])} ({time.perf_counter() - start:.1f} s)", flush=True)
    failed = [row for row in rows if row["failures"]]
    tags = sum(len(row["tags"]) for row in rows)
    print(f"{len(rows)} architectures, {tags} tags; {len(failed)} architectures with failures")
    write(arguments.output, "backbones", vars(arguments), rows)
    if arguments.page:
        write_table(arguments.page, rows)
    sys.exit(1 if failed else 0)


def walk(architecture: str, tags: list[str], steps: dict[str, list[str]]) -> dict[str, Any]:
    """What one architecture has and permits, and what failed; `steps` are results of small towers, to be shared."""
    row: dict[str, Any] = {"architecture": architecture, "tags": tags, "failures": []}
    config = architecture_config(architecture)
    assert config is not None, architecture
    try:
        with mock.patch("timm.layers.weight_init._trunc_normal_", lambda tensor, *_: tensor):  # slow, and not needed
            model = model_without_weights(config, architecture)
        described = describe_model(model, config)
        row |= {"parameters": described.parameters, "pixels": described.image_size[0]}
        row |= {"tokens": described.context_length, "families": described.families()}
        for tag in tags:
            stored = open_clip.get_pretrained_cfg(architecture, tag)
            preprocessing_of({**default_preprocess(described.image_size), **stored})
    except MapleError as error:
        return {**row, "refused": first_line(error)}
    small, text_config, sizes = small_config(config, described, model)
    # Many architectures differ in their resolution alone: their towers run once.
    key = re.sub(r"_\d+'", "'", repr((small, text_config, sizes, config["vision_cfg"].get("timm_model_name"))))
    if key not in steps:
        run_on_meta_device(model, described)
        backbone = small_backbone(small, text_config, sizes)
        running = [family for family, reason in described.families().items() if reason is None]
        problems = {family: step(EXAMPLES[family], backbone) for family in running}
        steps[key] = [f"{family}: {problem}" for family, problem in problems.items() if problem is not None]
    return {**row, "failures": steps[key]}


def run_on_meta_device(model: Any, described: BackboneDescription) -> None:
    """Run the towers in full size, without memory."""
    with torch.device("meta"), torch.no_grad():
        images = model.encode_image(torch.empty(2, 3, *described.image_size))
        assert images.shape == (2, described.embed_dim), images.shape
        if not isinstance(getattr(model, "text", None), HFTextEncoder):
            sentences = model.encode_text(torch.zeros(3, described.context_length, dtype=torch.int64))
            assert sentences.shape == (3, described.embed_dim), sentences.shape


def small_config(
    config: Mapping[str, Any], described: BackboneDescription, model: Any
) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """The configuration with two blocks in each tower, that of a text tower of transformers, and timm's sizes.

    In place of a tower that prompts cannot enter, which has run on the meta device, there is a small one.

    Args:
        model: the towers in full size, without memory.
    """
    text, vision = dict(config["text_cfg"]), dict(config["vision_cfg"])
    text_config = dict(TEXT_CONFIGS.get(str(text.get("hf_model_name")), {}))
    sizes: dict[str, int] = {}
    if described.image.prompts is not None:
        vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    elif vision.get("timm_model_name"):
        sizes["depth"] = 2
        patch = model.visual.trunk.patch_embed.patch_size[0]
        if isinstance(model.visual.trunk.patch_embed, PatchEmbed):  # ViTamin's is a network of its own
            vision["image_size"] = sizes["img_size"] = 4 * patch
    else:
        vision |= {"layers": 2, "image_size": 4 * int(vision["patch_size"])}
    if text_config:
        layers = {key: 2 for key in ("num_hidden_layers", "encoder_layers", "decoder_layers") if key in text_config}
        text_config |= {**layers, "vocab_size": _WORDS_KEPT}
    else:
        text |= {"layers": 2, **({"vocab_size": _WORDS_KEPT} if text.get("hf_tokenizer_name") else {})}
    small = {**config, "text_cfg": text, "vision_cfg": vision}
    if "multimodal_cfg" in small:
        small["multimodal_cfg"] = {**small["multimodal_cfg"], "layers": 1}
    return small, text_config, sizes


def small_backbone(small: Mapping[str, Any], text_config: Mapping[str, Any], sizes: Mapping[str, int]) -> Backbone:
    """A CLIP of `small_config`, with random weights."""
    torch.manual_seed(0)
    with mock.patch.object(timm, "create_model", functools.partial(timm.create_model, **sizes)):
        model = build_model(small, None, "walk", text=text_config or None)
    return Backbone(
        model,
        name="walk",
        pretrained=None,
        preprocessing=preprocessing_of(default_preprocess(model.visual.image_size)),
        tokenizer=tokenizer_like(small["text_cfg"], text_config),
    )


def tokenizer_like(text: Mapping[str, Any], text_config: Mapping[str, Any]) -> Any:
    """CLIP's tokenizer, or a stand-in of the special tokens of the one that the text tower was trained with."""
    if not text.get("hf_tokenizer_name"):
        return clip_tokenizer(text.get("context_length", 77))
    name = str(text["hf_tokenizer_name"])
    # Source: tokenizer_config.json of the T5, Gemma, XLM-R, BERT and NLLB tokenizers that open_clip names.
    if text_config.get("model_type") == "bert":
        first, last, padding = "<cls>", "</s>", "<pad>"
    elif text.get("pool_type") == "last" or "mt5" in name:
        first, last, padding = "", "</s>", "<pad>" if "SigLIP2" in name or "mt5" in name else "</s>"
    else:
        first, last, padding = "<s>", "</s>", "<pad>"
    end = text.get("eos_id", 2) if text.get("pool_type") == "eos" else 1 if not first else 2
    ids = {last: end, "<pad>": 0 if end == 1 else 1, "<unk>": 3, "<s>": 4 if end == 1 else 0, "<cls>": 5}
    vocabulary = {**ids, **{word: 100 + number for number, word in enumerate(WORDS)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [(token, vocabulary[token]) for token in (first, last) if token]
    inner.post_processor = processors.TemplateProcessing(f"{first} $A {last}".strip(), None, around)
    stand_in = HFTokenizer.__new__(HFTokenizer)
    stand_in.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=last, pad_token=padding, unk_token="<unk>", padding_side="right"
    )
    stand_in.tokenizer_mode, stand_in.strip_sep_token, stand_in.clean_fn = "", False, str
    stand_in.context_length = text.get("context_length", 77)
    return stand_in


def step(method_settings: Mapping[str, Any], backbone: Backbone) -> str | None:
    """Make a training step with a method; return what is wrong, or None."""
    size = backbone.preprocessing.size
    try:
        method = build_method(method_settings, backbone, CLASS_NAMES)
        loss, _ = method.loss(torch.randn(2, 3, size, size), torch.tensor([0, 1]))
        loss.backward()
    except (MapleError, RuntimeError, AttributeError, TypeError, ValueError, LookupError, AssertionError) as error:
        return f"{type(error).__name__}: {first_line(error)}"
    if not math.isfinite(loss.item()):
        return f"the loss is {loss.item()}"
    learned = method.prompt_parameters()
    if missing := [name for name, value in learned.items() if value.grad is None or not value.grad.isfinite().all()]:
        return f"no finite gradient reaches {', '.join(missing)}"
    if any(value.grad is not None for value in backbone.model.parameters()):
        return "a gradient reaches the frozen weights"
    return None


def summary(row: Mapping[str, Any]) -> str:
    """One line about an architecture."""
    if "refused" in row:
        return f"refused: {row['refused']}"
    running = [family for family, reason in row["families"].items() if reason is None]
    return f"{', '.join(running)}{''.join(f'; FAILED {failure}' for failure in row['failures'])}"


def write_table(page: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the table between the markers of a page."""
    before, rest = page.read_text().split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    reasons: dict[str, int] = {}
    lines = []
    for row in rows:
        tags = ", ".join(row["tags"])
        if "refused" in row or row["failures"]:
            problem = row.get("refused") or "; ".join(row["failures"])
            lines.append(f"| {row['architecture']} | {tags} | | | | {problem} |{' |' * (len(FAMILIES) - 1)}")
            continue
        marks = [
            "yes" if reason is None else f"no ({reasons.setdefault(reason, len(reasons) + 1)})"
            for reason in row["families"].values()
        ]
        size = f"{row['parameters'] / 1e6:,.0f}"
        cells = (row["architecture"], tags, size, row["pixels"], row["tokens"], *marks)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    columns = ("architecture", "tags", "million parameters", "pixels", "tokens", *FAMILIES)
    table = [f"| {' | '.join(columns)} |", f"|---|---|--:|--:|--:|{'---|' * len(FAMILIES)}", *lines, ""]
    table += [f"{number}. {reason[0].upper()}{reason[1:]}." for reason, number in reasons.items()]
    page.write_text(before + "\n".join([MARKERS[0], "", *table, "", MARKERS[1]]) + after)


if __name__ == "__main__":
    main()
