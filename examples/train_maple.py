"""MaPLe in one sitting: train on base classes, evaluate base and novel classes, save the prompts, load them again.

    python examples/train_maple.py

Everything comes with the package: a small CLIP (maple-small), and emoji in a drawing style that it was not trained on.
This takes about a minute on two CPU cores. `maple train` and `maple evaluate` add augmentation, resuming and records.
"""

import argparse
import random
from pathlib import Path
from statistics import harmonic_mean

import torch
from torch import Tensor

from maple import Backbone, Method, build_method, load_clip, load_dataset, load_prompts, save_prompts
from maple.config import TrainSettings
from maple.data import Dataset, Item, sample_few_shot, select_classes
from maple.runs import eval_transform
from maple.train import Trainer


def to_tensors(dataset: Dataset, items: list[Item], backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Decode `items` into images [N, 3, R, R], resized and normalised as the backbone expects, and labels [N]."""
    transform, store = eval_transform(backbone), dataset.store()
    # Few-shot data is small: decoded once, it fits in memory, and no loader is needed.
    images = torch.stack([transform(store.get(item.path)) for item in items])
    return images.to(backbone.device), torch.tensor([item.label for item in items], device=backbone.device)


def train(method: Method, images: Tensor, labels: Tensor, *, epochs: int, batch_size: int, seed: int) -> None:
    """Train the prompts of `method` on images [N, 3, R, R] and labels [N]."""
    settings = TrainSettings(epochs=epochs, optimizer="adamw", lr=0.002, weight_decay=0.01, warmup_epochs=1)
    # The trainer makes the step that the method's paper describes. For MaPLe, `method.loss(...)`, `backward()` and an
    # optimiser of your own would do; ProGrad also changes gradients, and PromptSRC averages its prompts.
    trainer = Trainer(method, settings)
    # A generator of our own: the example is reproducible, and leaves torch's global generator unchanged.
    generator = torch.Generator().manual_seed(seed)
    while not trainer.finished:
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        reports = [trainer.step(images[batch], labels[batch]) for batch in order.split(batch_size)]
        epoch = trainer.finish_epoch(reports)
        print(f"epoch {epoch.epoch + 1} of {epochs}: loss {epoch.loss:.3f}, accuracy {epoch.logs['accuracy']:.1%}")


def accuracy(method: Method, images: Tensor, labels: Tensor, batch_size: int = 100) -> float:
    """The fraction of images [N, 3, R, R] that the method classifies correctly among its current class names."""
    method.eval()
    with torch.inference_mode():
        # The class embeddings are computed for the first batch and cached: they depend on prompts and names only.
        logits = torch.cat([method.predict_logits(batch) for batch in images.split(batch_size)])
    return float((logits.argmax(dim=1) == labels).float().mean())


def main() -> None:
    """Train, evaluate, save and load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="emoji-food/lineart", help="a bundled data set, or a folder of images")
    parser.add_argument("--shots", type=int, default=16, help="training images per class")
    parser.add_argument("--test-images", type=int, help="evaluate this many images of each half only")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("maple-prompts.safetensors"))
    options = parser.parse_args()

    # Data. The base classes are the first half, and the only ones that are trained. The few shots are sampled over all
    # classes before the cut, as the published code does, so that the same seed gives the same images.
    dataset = load_dataset(options.dataset, root=None)
    sampled, _ = sample_few_shot(dataset.train, dataset.val, options.shots, options.seed)
    base_items, base_names = select_classes(sampled, "base", dataset.class_names)
    print(f"{dataset.name}: {len(base_names)} base classes with {len(base_items)} training images")

    # Model. The backbone is frozen. The method owns the prompts, and they are its only parameters: here two text tokens
    # in each of the first three blocks, and the linear maps that compute the vision tokens from them. maple-small has
    # four text blocks; with ViT-B/16 the paper uses a depth of nine.
    backbone = load_clip("maple-small", device=options.device)
    settings = {"name": "maple", "prompt_length": 2, "prompt_depth": 3, "init_text": "a photo of a"}
    generator = torch.Generator().manual_seed(options.seed)  # draws the initial values
    method = build_method(settings, backbone, base_names, generator=generator)
    zero_shot = build_method({"name": "zero_shot"}, backbone, base_names)
    print(f"{method.title}: {method.parameter_count():,} learned parameters")

    images, labels = to_tensors(dataset, base_items, backbone)
    train(method, images, labels, epochs=options.epochs, batch_size=options.batch_size, seed=options.seed)

    # Evaluation. Novel classes need no training: their names go through the text tower with the learned prompts. As in
    # the papers, base images are classified among base names and novel images among novel names.
    accuracies: dict[str, list[float]] = {method.title: [], zero_shot.title: []}
    for half in ("base", "novel"):
        items, class_names = select_classes(dataset.test, half, dataset.class_names)
        if options.test_images is not None:
            items = random.Random(options.seed).sample(items, options.test_images)
        images, labels = to_tensors(dataset, items, backbone)
        for classifier in (zero_shot, method):
            classifier.set_class_names(class_names)
            accuracies[classifier.title].append(accuracy(classifier, images, labels))
    for title, (base, novel) in accuracies.items():
        print(f"{title}: base {base:.1%}, novel {novel:.1%}, harmonic mean {harmonic_mean([base, novel]):.1%}")

    # The file holds the prompts and a fingerprint of the backbone, not the backbone: it is refused on other weights.
    save_prompts(options.output, method)
    loaded = load_prompts(options.output, backbone)
    assert torch.equal(loaded.predict_logits(images), method.predict_logits(images))
    print(f"saved to {options.output} ({options.output.stat().st_size / 1024:.0f} KiB), and loaded again")


if __name__ == "__main__":
    main()
