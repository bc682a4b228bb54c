"""Train the methods on frozen features with the shipped presets, on features of real photographs by OpenAI's CLIPs.

Usage: python -m benchmarks.real_features [--features FOLDER] [--seeds 1,2,3] [--methods tip_adapter,taskres]
                                          [--data oxford_pets,fgvc_aircraft,stanford_cars] [--tune] [--output FOLDER]
The folder, by default real_features below MAPLE_DATA, holds the .safetensors files that `SOURCES` names; they are not
distributed. Sixteen training images per class. What serves as test is never used in a choice: the settings that a
method selects, it selects on images cut from the rest by the seed, four per class.
`--tune` compares settings of CLIP-Adapter on a quarter of the training images, cut by the seed; no test is looked at.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.common import integers, write
from maple.clip import Backbone
from maple.clip.backbone import Preprocessing
from maple.config import RunSettings, read_preset, resolve
from maple.data import Item, sample_few_shot
from maple.data.batches import derive_seed, feature_batches
from maple.methods import Features, Method, build_method
from maple.methods.clap import CLAP
from maple.runs import complete
from maple.train import Trainer

SHOTS, VAL_SHOTS = 16, 4
# The files hold text features of length 1, and CLAP's rate and constraint are made for raw ones: an assumed length.
RAW_TEXT_LENGTH = 10.0
# The files of each data set, and which of their tensors are the training images, where there are any, and the test.
SOURCES = {
    "oxford_pets": (("oxford_pets.vitb32.train_val",), "train_16shot", "val"),
    "fgvc_aircraft": (("fgvc_aircraft.vitb16.test_text",), "", "test"),
    "stanford_cars": (("stanford_cars.vitb32.train_text", "stanford_cars.vitb32.val"), "train_16shot", "val"),
}
PRESETS = (
    *("zero_shot", "tip_adapter", "tip-adapter-f", "taskres", "clip_adapter", "clip_adapter-own", "linear_probe"),
    *("clap", "zs-lp", "lpplusplus", "gda"),
)
# Accuracy, or gain over zero-shot CLIP, in per cent: a public model card, and the logs of gaopengcuhk/Tip-Adapter and,
# for GDA, mrflogs/ICLR24.
PUBLISHED = {
    ("stanford_cars", "zero_shot"): "59.87 (test part)",
    ("stanford_cars", "tip_adapter"): "+11.0 (RN50)",
    ("fgvc_aircraft", "tip_adapter"): "+12.7 (RN50)",
    ("fgvc_aircraft", "tip-adapter-f"): "+18.5 (RN50)",
    ("stanford_cars", "gda"): "+19.5 (RN50)",
    ("fgvc_aircraft", "gda"): "+23.3 (RN50)",
}
LRS = (0.02, 0.05, 0.1, 0.2)
# CLIP-Adapter as released, and with other ratios and rates in half the epochs.
TUNING = (
    ["method.ratio=0.2", "train.lr=0.002", "train.epochs=200"],
    *([f"method.ratio={ratio}", f"train.lr={lr}", "train.epochs=100"] for ratio in (0.2, 0.5, 0.8) for lr in LRS),
)


@dataclass(frozen=True)
class Parts:
    """Features [N, D] and labels [N] of the training, validation and test images, and text features [C, D]."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    text: Tensor | None
    classes: int


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, default=Path(os.environ.get("MAPLE_DATA", ".")) / "real_features")
    parser.add_argument("--seeds", type=integers, default=[1, 2, 3])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(PRESETS))
    parser.add_argument("--data", type=lambda text: text.split(","), default=list(SOURCES))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if unknown := ({*arguments.methods} - {*PRESETS}) | ({*arguments.data} - {*SOURCES}):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join((*PRESETS, *SOURCES))}")
    if not arguments.features.is_dir():
        raise SystemExit(f"{arguments.features} is not a folder; name the folder of the features with --features")
    results: list[dict[str, Any]] = []
    settings = {key: value for key, value in vars(arguments).items() if key not in ("features", "output")}
    for result in tune(arguments) if arguments.tune else compare(arguments):
        results.append(result)
        print(" | ".join(str(value) for value in result.values()), flush=True)
        write(arguments.output, "real-features-tune" if arguments.tune else "real-features", settings, results)


def compare(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every method on every data set: the mean and the deviation of its test accuracies, and its training accuracy."""
    for method, dataset in product(arguments.methods, arguments.data):
        parts = {seed: read_parts(arguments.features, dataset, seed) for seed in arguments.seeds}
        if any(part.text is None for part in parts.values()) and method != "linear_probe":
            continue  # there is no text to compare with
        began, runs = time.perf_counter(), []
        for seed, part in parts.items():
            trained = train(preset_settings(method, dataset, seed), part)
            run = {"test": accuracy(trained, part.test), "train": accuracy(trained, part.train)}
            if not trained.settings.needs_validation:
                # Nothing was selected on the validation images, so that all images that are not trained on can test.
                run["test_and_val"] = accuracy(trained, join(part.test, part.val))
            runs.append(run | {name: round(value, 6) for name, value in trained.selected_hyperparameters().items()})
        yield {
            "data": dataset,
            "method": method,
            **summary([run["test"] for run in runs]),
            "train": round(statistics.mean(run["train"] for run in runs), 2),
            "published": PUBLISHED.get((dataset, method), ""),
            "seconds": round((time.perf_counter() - began) / len(runs), 1),
            "images": len(part.test[1]),
            "runs": runs,
        }


def tune(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """CLIP-Adapter with other settings: its accuracy on a quarter of the training images, held out by the seed."""
    for dataset in arguments.data:
        if dataset == "oxford_pets":
            continue  # no text
        for overrides in TUNING:
            began, held_out, seen = time.perf_counter(), [], []
            for seed in arguments.seeds:
                whole = read_parts(arguments.features, dataset, seed)
                inner, outer = cut(whole.train, (SHOTS - VAL_SHOTS, VAL_SHOTS), seed)
                part = Parts(inner, outer, outer, whole.text, whole.classes)
                trained = train(preset_settings("clip_adapter", dataset, seed, overrides), part)
                held_out.append(accuracy(trained, outer))
                seen.append(accuracy(trained, inner))
            yield {
                "data": dataset,
                "settings": " ".join(overrides),
                **summary(held_out),
                "train": round(statistics.mean(seen), 2),
                "seconds": round((time.perf_counter() - began) / len(seen), 1),
            }


def summary(accuracies: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation."""
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return {"accuracy": round(statistics.mean(accuracies), 2), "deviation": round(deviation, 2)}


def read_parts(folder: Path, dataset: str, seed: int) -> Parts:
    """The images of a data set, divided by the seed as its files allow."""
    files, train_name, test_name = SOURCES[dataset]
    tensors: dict[str, Tensor] = {}
    for name in files:
        tensors |= load_file(folder / f"{name}.safetensors")
    rest = tensors[test_name].float(), tensors[f"{test_name}_labels"].long()
    if train_name:
        train_part = tensors[train_name].float(), tensors["train_labels"].long()
        val, test = cut(rest, (VAL_SHOTS, None), seed)
    else:
        train_part, val, test = cut(rest, (SHOTS, VAL_SHOTS, 13), seed)
    text = tensors["text"].float() if "text" in tensors else None
    return Parts(train_part, val, test, text, int(rest[1].max()) + 1)


def cut(images: tuple[Tensor, Tensor], counts: Sequence[int | None], seed: int) -> list[tuple[Tensor, Tensor]]:
    """Divide the images of each class at random: `counts` for the parts, None for all that are left."""
    features, labels = images
    parts = []
    left = [Item(str(index), int(label), str(int(label))) for index, label in enumerate(labels)]
    for number, count in enumerate(counts):
        chosen = sample_few_shot(left, [], count, derive_seed(seed, "cut", number))[0]
        left = [item for item in left if item not in set(chosen)]
        indices = torch.tensor([int(item.path) for item in chosen])
        parts.append((features[indices], labels[indices]))
    return parts


def join(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The features and labels of several parts, one after the other."""
    features, labels = zip(*parts, strict=True)
    return torch.cat(features), torch.cat(labels)


def preset_settings(method: str, dataset: str, seed: int, overrides: Sequence[str] = ()) -> RunSettings:
    """The settings of the few-shot preset; of zero-shot CLIP, its only one."""
    preset = "zero_shot_base-to-novel" if method == "zero_shot" else f"{method}_few-shot"
    return complete(resolve([read_preset(preset), {"data": {"dataset": dataset}, "seed": seed}], overrides))


def feature_backbone(width: int) -> Backbone:
    """A stand-in for the CLIP that made the features: its logit scale and its width; its towers are not used."""
    towers = {
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 64},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    model = open_clip.CLIP(embed_dim=width, **towers)
    model.logit_scale.data.fill_(torch.tensor(100.0).log())
    preprocessing = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    tokenizer = open_clip.SimpleTokenizer()
    return Backbone(model, name="features", pretrained=None, preprocessing=preprocessing, tokenizer=tokenizer)


def train(settings: RunSettings, part: Parts) -> Method:
    """Train as a run does, on one view of each image, whose features are given."""
    names = [f"class {number}" for number in range(part.classes)]
    generator = torch.Generator().manual_seed(derive_seed(settings.seed, "prompts"))
    backbone = feature_backbone(part.train[0].shape[1])
    method = build_method(settings.method, backbone, names, generator=generator)
    if part.text is not None:
        method.classes.features = method.classes.mean = part.text  # type: ignore[union-attr]
        if isinstance(method, CLAP):
            method.classes.mean = RAW_TEXT_LENGTH * part.text
            method.prototypes.data.copy_(method.classes.mean)  # they start there
    features = Features(part.train[0][None], part.train[1], *part.val)
    if method.uses_features:
        method.fit_features(features)
    trainer, options = Trainer(method, settings.train), settings.train
    while not trainer.finished:
        order = {"batch_size": options.batch_size, "seed": settings.seed, "epoch": trainer.epoch}
        batches = feature_batches(features.train, features.train_labels, **order, drop_last=options.drop_last)
        trainer.run_epoch(batches)
    if method.uses_features:
        method.select_hyperparameters(features)
    return method.eval()


def accuracy(method: Method, images: tuple[Tensor, Tensor]) -> float:
    """The per cent of the images that are classified correctly."""
    features, labels = images
    return round(100 * float((method.predict_logits(features).argmax(dim=-1) == labels).float().mean()), 2)


if __name__ == "__main__":
    main()
