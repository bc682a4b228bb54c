"""The cost of a method: learned parameters, operations, and images per second in training and inference.

Source: MaPLe (CVPR 2023), the complexity table; its operations are those of one image against the prompts of all
classes, each sentence at its full length.
"""

import hashlib
import re
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from maple import files
from maple.clip import Backbone, ImageTower, LayerEdit, TextTower
from maple.clip.cpu_linear import FLOPS
from maple.clip.edits import edits_of_all_blocks
from maple.config import RunSettings
from maple.distributed import processor
from maple.errors import ConfigError
from maple.methods import Method, build_method
from maple.prompts import EnsembleClasses, TemplateClasses
from maple.report.collect import COSTS
from maple.report.records import CostRow, SpeedRow
from maple.runs.folder import environment
from maple.train import Trainer

_EMBEDDINGS = ("token_embedding.weight", "word_embeddings.weight", "embed_tokens.weight")
"""Ends of the names of token embeddings: of open_clip, BERT, and mT5 and M2M100."""
_FEWEST_ROUNDS = 3
_SHOTS = 16
"""Images per class in a method's cache of training images, where the settings say all."""
_SENTENCES_AT_ONCE = 256
"""Sentences per micro-batch, about, where text features depend on the image."""

_NO_RATE = 1e-12
"""A learning rate at which hundreds of steps on random images change nothing; a step costs the same."""


def measure_cost(
    settings: RunSettings,
    backbone: Backbone,
    *,
    classes: int,
    recipe: str | None = None,
    batches: Sequence[int] = (1, 4, 100),
    seconds: float = 1.0,
    on_step: Callable[[str], None] = lambda _: None,
) -> CostRow:
    """Count and time one method on random images.

    Operations are counted of one image: `flops_plain` with every sentence at full length and every row of every block,
    as papers count; `flops` as this package computes the same logits; `flops_cached` with the classes encoded
    beforehand. Speeds in images per second: `training` is a step (forward, backward, optimizer), `inference` encodes
    all classes again for every batch, as the reference does, and `cached` encodes them once. A number is None where
    the method or the towers do not permit it.

    Args:
        recipe: the name that the measurement has in reports; by default the method's.
        batches: batch sizes B to time, each for about `seconds` in each of the three ways; medians are reported.
        on_step: called with a description of each measurement before it starts.

    Raises:
        ConfigError: a number is below 1, or the method does not fit the backbone.
    """
    for name, value in (("classes", classes), *(("batch", batch) for batch in batches)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if not seconds > 0:
        raise ConfigError(f"seconds is {seconds:g}; it must be above 0")
    names = [f"class number {number}" for number in range(classes)]
    method = build_method(settings.method, backbone, names, generator=torch.Generator().manual_seed(0))
    images = classes * (settings.data.shots or _SHOTS)
    method.resize_for({"keys": (images, backbone.embed_dim), "labels": (images,)})
    on_step("counting operations")
    image = _images(backbone, 1)
    cached = None
    if not method.classes_depend_on_image:
        features = method.class_embeddings()
        cached = count_flops(lambda: method.logits(method.encode_images(image), features))
    return CostRow(
        recipe=recipe or settings.method["name"],
        method=settings.method,
        backbone=backbone.name,
        precision=backbone.precision,
        image_size=backbone.preprocessing.size,
        backbone_parameters=sum(parameter.numel() for parameter in backbone.model.parameters()),
        embedding_parameters=sum(
            parameter.numel() for name, parameter in backbone.model.named_parameters() if name.endswith(_EMBEDDINGS)
        ),
        classes=classes,
        device=str(backbone.device),
        machine=machine(backbone.device),
        parameters=method.parameter_count(),
        flops_plain=plain_flops(method),
        flops=count_flops(lambda: _uncached(method, image)),
        flops_cached=cached,
        speeds=tuple(_speed(method, settings, batch, seconds, on_step) for batch in batches),
        environment=environment(),
    )


def write_cost(cost: CostRow, folder: Path) -> None:
    """Write a measurement to where `maple report FOLDER` finds it; an earlier one of the same is replaced."""
    name = re.sub(r"[^\w.-]+", "-", f"{cost.recipe}_{Path(cost.backbone).name}_{cost.classes}classes")
    path = folder / COSTS / f"{name}_{hashlib.sha256(cost.identity.encode()).hexdigest()[:10]}.json"
    with files.output_errors(path):
        files.write_json(path, cost.model_dump(mode="json"))


def machine(device: torch.device) -> str:
    """The name of the hardware, as in tables: the GPU, or the processor and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    kind = f"{threads} thread{'s' if threads != 1 else ''}" if device.type == "cpu" else device.type
    return f"{processor()}, {kind}"


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of `run`, two per multiply-add, without gradients, norms and activations.

    Source: torch.utils.flop_counter, with attention in parts, as it does not know the fused form.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=FLOPS) as counter,
    ):
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            run()
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


def plain_flops(method: Method) -> int | None:
    """One image against all C classes with every sentence at full length, counted by shapes; None for other towers.

    Two per multiply-add: products of weights and of attention, patches and projections included.
    """
    backbone = method.backbone
    text, image = backbone.text, backbone.image
    if text.obstacle is not None or image.obstacle is not None:
        return None
    embed, size = backbone.embed_dim, backbone.preprocessing.size
    pixels = torch.zeros(1, 3, size, size, device=backbone.device)
    ids = torch.zeros(1, text.context_length, dtype=torch.int64, device=backbone.device)
    with torch.inference_mode(False), torch.no_grad():
        states, tokens = image.embed(pixels), text.embed(ids)  # CoCa adds a class token
    image_flops = count_flops(lambda: image.embed(pixels)) + count_flops(lambda: image.finish(states))
    image_flops += _tower_flops(image, method.vision_edits(), states.shape[1], backbone.device)
    text_flops = _tower_flops(text, method.text_edits(), tokens.shape[1], backbone.device, has_slots=True)
    text_flops += count_flops(lambda: text.finish(torch.zeros(1, text.width, dtype=text.dtype, device=backbone.device)))
    classes = len(method.class_names)
    if isinstance(method.classes, EnsembleClasses):
        sentences = sum(method.classes.counts)
    else:
        templates = len(getattr(method.settings, "templates", ())) or 1
        sentences = classes * templates if method.uses_text_tower else 0
    feature = torch.zeros(1, embed, device=backbone.device)
    logits = count_flops(lambda: method.logits(feature, feature.expand(classes, -1)))
    prompting = count_flops(method.vision_edits) + count_flops(method.text_edits)
    if method.accepts_features:
        prompting += count_flops(lambda: method.encode_images(feature))  # operations on the feature itself
    return int(image_flops + sentences * text_flops + logits + prompting)


def _tower_flops(
    tower: TextTower | ImageTower,
    edits: Sequence[LayerEdit],
    rows: int,
    device: torch.device,
    *,
    has_slots: bool = False,
) -> int:
    """Of blocks on `rows` states, those that edits add, and the edits; prompts have slots in a sentence."""
    prompted = inserted = flops = 0
    for layer, edit in enumerate(edits_of_all_blocks(edits, tower.depth)):
        prompted = prompted if edit.prompt is None or has_slots else edit.prompt.shape[-2]
        inserted = inserted if edit.tokens is None else len(edit.tokens)
        count = rows + prompted + inserted
        functions = [edit.input_residual, edit.residual, *edit.low_rank.values()]
        flops += 2 * tower.multiply_adds(layer, count)
        for function in functions:
            if function is not None:
                flops += count_flops(partial(function, torch.zeros(count, tower.width, device=device)))
    return flops


def _images(backbone: Backbone, batch: int) -> Tensor:
    size = backbone.preprocessing.size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(backbone.device)


def _uncached(method: Method, images: Tensor) -> Tensor:
    """Logits [B, C], with all classes encoded for this batch."""
    if method.classes_depend_on_image:
        return method.predict_logits(images)
    if not method.uses_text_tower:
        return method.logits(method.encode_images(images), method.encode_classes())
    if isinstance(method.classes, TemplateClasses):
        method.classes.encode()  # what a method keeps of it is computed anew
    return method.logits(method.encode_images(images), method.encode_classes())


def _speed(
    method: Method, settings: RunSettings, batch: int, seconds: float, on_step: Callable[[str], None]
) -> SpeedRow:
    images = _images(method.backbone, batch)
    on_step(f"inference, batch {batch}")
    method.eval()
    with torch.inference_mode():
        inference = _images_per_second(lambda: _uncached(method, images), images, seconds)
        cached = None
        if not method.classes_depend_on_image:
            features = method.class_embeddings()
            cached = _images_per_second(lambda: method.logits(method.encode_images(images), features), images, seconds)
    training = None
    if method.parameter_count() and settings.train.epochs:
        on_step(f"training, batch {batch}")
        training = _images_per_second(_step(method, settings, images), images, seconds)
    return SpeedRow(batch=batch, training=training, inference=inference, cached=cached)


def _step(method: Method, settings: RunSettings, images: Tensor) -> Callable[[], object]:
    """A training step on `images`, as a run makes it, but at a learning rate that changes nothing."""
    labels = torch.arange(len(images), device=images.device) % len(method.class_names)
    changed: dict[str, Any] = {"lr": _NO_RATE, "warmup_lr": _NO_RATE}
    if method.classes_depend_on_image:
        changed["micro_batch"] = max(1, _SENTENCES_AT_ONCE // len(method.class_names))
    trainer = Trainer(method, settings.train.model_copy(update=changed))
    return lambda: trainer.step(images, labels)


def _images_per_second(run: Callable[[], object], images: Tensor, seconds: float) -> float:
    def synchronize() -> None:  # a GPU still computes after the call has returned
        if images.is_cuda:
            torch.cuda.synchronize(images.device)

    run()
    times: list[float] = []
    while len(times) < _FEWEST_ROUNDS or sum(times) < seconds:
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return len(images) / statistics.median(times)
