"""The works of `benchmarks.gpu`: agreement with the CPU, steps, runs in one pass, files to predictions, blocks."""

import gc
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from open_clip import image_transform
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import pipeline, together
from benchmarks.baseline import Plain, build
from benchmarks.common import alternate, class_names
from benchmarks.floors import noise_images, step
from maple.clip import Backbone, load_clip, prompt_edits
from maple.clip.backbone_names import PACKAGED
from maple.clip.cpu_linear import FLOPS
from maple.config import TrainSettings
from maple.data import EvalTransform, Item, eval_batches
from maple.data.images.prefetch import reading_threads
from maple.evaluation import predict
from maple.inference import find_images
from maple.inference.torch_predictor import TorchPredictor
from maple.methods import Method
from maple.methods.maple import MaPLe
from maple.prompts import encode_image, encode_text
from maple.train import Trainer

MODES = {"fp32": ("fp32", True), "fp32 without TF32": ("fp32", False), "bf16": ("bf16", True), "fp16": ("fp16", True)}
"""How a method may be computed: its precision, and whether convolutions may use TF32, as PyTorch lets them."""
TOLERANCE = {"fp32": 1e-2, "fp32 without TF32": 1e-3, "bf16": 0.4, "fp16": 0.2}
"""The largest `difference`. On a CPU with ten classes it is at most 0.08 in bfloat16 and 0.06 in float16; with three
classes and random weights MMA, the worst of the methods, reaches 0.28 and 0.12."""
_LOSS_SCALE = 2.0**12  # as the trainer's first one: small gradients would be zero in float16

Result = dict[str, Any]
Ways = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Sizes:
    """Where the works run and how large they are.

    Attributes:
        seconds: about how long a comparison is timed.
        images: the number of images from files.
        files: how many files there are, each of which is read several times.
        workers: the processes of the plain way's loader.
        precisions: those of the works, the first one for most of them.
        backbones: those on which agreement is checked; the first is that of the other works.
        methods: those whose steps are timed at every size.
    """

    device: torch.device
    batches: tuple[int, int] = (4, 32)
    classes: tuple[int, int] = (50, 1000)
    seeds: tuple[int, int] = (3, 8)
    seconds: float = 2.5
    images: int = 1000
    files: int = 250
    workers: int = 8
    compiler: str = "inductor"
    precisions: tuple[str, ...] = ("bf16", "fp32", "fp16")
    backbones: tuple[str, ...] = ("ViT-B-16-quickgelu", "maple-small")
    methods: tuple[str, ...] = ("maple", "coop", "cocoop", "promptsrc", "clip_lora")

    def clip(self, precision: str) -> Backbone:
        """The first of the backbones."""
        return load(self.backbones[0], precision, self.device)

    def clock(self) -> float:
        """Seconds, after the device has finished its work."""
        pipeline.synchronise(self.device)
        return time.perf_counter()


@cache
def load(name: str, precision: str, device: torch.device) -> Backbone:
    """A packaged backbone, or one with random weights."""
    return load_clip(name, None if name in PACKAGED else "random:0", precision=precision, device=device)


def difference(values: Mapping[str, Tensor], expected: Mapping[str, Tensor], precision: str = "fp32") -> float:
    """The largest norm of a difference, relative to that of the expected tensor; infinite where a name is missing.

    Where a tensor's norm is below a tenth of the largest one, as of a gradient that is zero but for rounding, it is
    relative to that tenth; in 16 bits always to the largest one, since the gradients of layers whose terms cancel, such
    as those of MMA, have few right digits there in every way of computing them.
    """
    if set(values) != set(expected):
        return math.inf
    wide = {name: tensor.detach().cpu().double() for name, tensor in expected.items()}
    largest = max(float(tensor.norm()) for tensor in wide.values())
    least = largest if precision in ("bf16", "fp16") else 0.1 * largest
    return max(
        float((values[name].detach().cpu().double() - tensor).norm()) / max(float(tensor.norm()), least)
        for name, tensor in wide.items()
    )


def product_rate(sizes: Sizes, precision: str) -> Result:
    """Operations per second of a large matrix product, the best of five."""
    dtype = sizes.clip(precision).dtype
    size = 8192 if sizes.device.type == "cuda" else 256
    left, right = (torch.randn(size, size, device=sizes.device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        start = sizes.clock()
        left @ right
        seconds.append(sizes.clock() - start)
    return {"operations_per_second": 2 * size**3 / min(seconds[1:]), "size": size}


def agreement(sizes: Sizes, name: str, backbone: str) -> Result:
    """Logits, loss and gradients of a method in each precision, against the CPU's in float32."""
    names = class_names(min(10, sizes.classes[0]))
    clip = load(backbone, "fp32", torch.device("cpu"))
    reference, _ = build(name, clip, names)
    images, labels = noise_images(clip, 4), torch.arange(4) % len(names)

    def compute(method: Method) -> dict[str, dict[str, Tensor]]:
        device = method.backbone.device
        inputs, targets = images.to(device), labels.to(device)
        gradients = step(method, _LOSS_SCALE * method.loss(inputs, targets)[0])
        loss = {"loss": gradients.pop("loss") / _LOSS_SCALE}
        return {"logits": {"logits": method.predict_logits(inputs)}, "loss": loss, "gradients": gradients}

    expected, result = compute(reference), {}
    modes = {mode: chosen for mode, chosen in MODES.items() if chosen[0] in sizes.precisions}
    for mode, (precision, tf32) in modes.items():
        method, _ = build(name, load(backbone, precision, sizes.device), names)
        with torch.no_grad():
            for parameter, value in zip(method.parameters(), reference.parameters(), strict=True):
                parameter.copy_(value)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            values = compute(method)
        result[mode] = {part: difference(values[part], tensors, precision) for part, tensors in expected.items()}
    worst = {mode: max(parts.values()) for mode, parts in result.items()}
    return {**result, "agrees": all(worst[mode] <= TOLERANCE[mode] for mode in modes)}


def compare(sizes: Sizes, ways: Ways) -> Result:
    """Time the ways in alternation, with peak memory of a GPU beyond what is held before; a way that fails is left out.

    "repeats" calls make a measurement, so that it is not shorter than the clock's noise.
    """
    on_gpu = sizes.device.type == "cuda"
    peaks, durations, errors = {}, {}, {}
    for name, way in ways.items():
        held = torch.cuda.memory_allocated(sizes.device) if on_gpu else 0
        try:
            way()
            free_memory(sizes.device)
            start = sizes.clock()
            way()
            durations[name] = sizes.clock() - start
        except Exception as error:  # noqa: BLE001 - an unsupported way, or one that needs too much memory, is a result
            errors[name] = describe(error)
        peaks[name] = torch.cuda.max_memory_allocated(sizes.device) - held if on_gpu else None
        free_memory(sizes.device)
    result: Result = {"peak_bytes": peaks, **({"errors": errors} if errors else {})}
    if not durations:
        return result
    repeats = max(1, min(20, math.ceil(min(0.05, sizes.seconds) / min(durations.values()))))
    rounds = max(1, min(10, int(sizes.seconds / (repeats * sum(durations.values())))))

    def repeated(way: Callable[[], object]) -> None:
        for _ in range(repeats):
            way()

    timed = alternate({name: partial(repeated, ways[name]) for name in durations}, rounds, sizes.clock)
    timed["seconds"] = {name: seconds / repeats for name, seconds in timed["seconds"].items()}
    return {**result, **timed, "repeats": repeats}


def describe(error: BaseException) -> str:
    """The kind of an error and the beginning of its message."""
    return f"{type(error).__name__}: {error}"[:400]


def free_memory(device: torch.device) -> None:
    """Give memory that is not used back to a GPU, and forget its peak."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def training(
    sizes: Sizes, name: str, precision: str, batch: int, classes: int, rates: Mapping[str, float | None]
) -> Result:
    """A training step with its update, ours by `Trainer.step`, the plain one in a loop as the published code's."""
    names, clip = class_names(classes), sizes.clip(precision)
    method, plain = build(name, clip, names)
    images = noise_images(clip, batch).to(sizes.device)
    labels = (torch.arange(batch) % classes).to(sizes.device)
    trainer = Trainer(method, TrainSettings(warmup_epochs=1, warmup_lr=1e-6))
    optimizer = torch.optim.SGD(method.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4)

    def plain_step() -> float:
        loss = plain.loss(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    result: Result = {}
    ours, expected = (_gradients(method, way, images, labels) for way in (method, plain))
    if ours and expected:
        loss, expected_loss = ({"loss": values.pop("loss")} for values in (ours, expected))
        result["largest_difference"] = max(
            difference(loss, expected_loss, precision), difference(ours, expected, precision)
        )
        result["agrees"] = result["largest_difference"] <= TOLERANCE[precision]
    method.train()
    result |= compare(sizes, {"ours": lambda: trainer.step(images, labels), "plain": plain_step})
    if "ours" in result.get("seconds", {}):
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            trainer.step(images, labels)
        result["operations"] = counter.get_total_flops()
        if rate := rates.get(precision):
            result["share_of_product_rate"] = result["operations"] / result["seconds"]["ours"] / rate
    return result


def _gradients(method: Method, way: Method | Plain, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Loss and gradients, on the CPU; none where there is too little memory for them."""
    try:
        loss = way.loss(images, labels)
        gradients = step(method, _LOSS_SCALE * (loss[0] if isinstance(loss, tuple) else loss))
        return {key: value.cpu() for key, value in gradients.items()}
    except torch.OutOfMemoryError:
        method.zero_grad(set_to_none=True)
        return {}


def several_runs(sizes: Sizes, precision: str, seeds: int) -> Result:
    """A step of MaPLe for each of several seeds, in one pass against one after another."""
    clip, steps = sizes.clip(precision), 2
    depth = min(9, clip.text.depth, clip.image.depth)

    def work() -> together.Work:
        return together.make(clip, sizes.classes[0], depth, range(1, seeds + 1), sizes.batches[0], steps)

    checked: Result = {"agrees": True}
    try:
        checked["largest_difference"] = together.check(work(), work(), together.TOLERANCE[precision])
    except SystemExit as error:
        checked = {"agrees": False, "errors": {"in one pass": str(error)}}
    timed = work()
    result = compare(sizes, {"in one pass": timed.side_by_side, "one after another": timed.in_turn})
    return {**checked, **result, "steps": steps * seeds}


class _Files(Dataset[tuple[Tensor, int]]):
    """Images as open_clip reads them."""

    def __init__(self, paths: Sequence[Path], clip: Backbone) -> None:
        seen = clip.preprocessing
        self._paths = paths
        self._transform: Any = image_transform(
            seen.size, is_train=False, mean=seen.mean, std=seen.std, interpolation=seen.interpolation
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self._paths[index]) as image:
            return self._transform(image), 0


def files_to_predictions(sizes: Sizes, precision: str) -> Result:
    """Evaluate and predict JPEG files, against a loader with processes and text features for every batch."""
    clip, names = sizes.clip(precision), class_names(sizes.classes[0])
    method, plain = build("maple", clip, names)
    seen = clip.preprocessing
    transform = EvalTransform(seen.size, seen.mean, seen.std, seen.interpolation)
    predictor = TorchPredictor(method)
    with tempfile.TemporaryDirectory() as place:
        folder = pipeline.draw(Path(place), sizes.files)
        paths = sorted(folder.iterdir()) * math.ceil(sizes.images / sizes.files)
        paths = paths[: sizes.images]
        items = [Item(path.name, 0, names[0]) for path in paths]
        batch = min(100, sizes.images)

        def evaluate(threads: int) -> Tensor:
            method._embeddings = None  # an evaluation begins without any
            return torch.from_numpy(
                predict(method, eval_batches(items, folder, transform, batch_size=batch, num_workers=threads))[0]
            )

        def predict_files(threads: int) -> list[str]:
            stream = predictor.stream(find_images([str(path) for path in paths]), workers=threads, batch_size=batch)
            return [prediction.best[0].name for prediction in stream]  # type: ignore[union-attr]

        @torch.no_grad()
        def plainly() -> Tensor:
            loader = DataLoader(_Files(paths, clip), batch, num_workers=sizes.workers, pin_memory=sizes.workers > 0)
            return torch.cat([plain.logits(images.to(sizes.device)).float().cpu() for images, _ in loader])

        threads = reading_threads(None)
        most = pipeline.cores() or 1
        logits, expected, predicted = evaluate(threads), plainly(), predict_files(threads)
        ways: Ways = {
            "evaluate": partial(evaluate, threads),
            f"evaluate, {most} threads": partial(evaluate, most),
            "predict": partial(predict_files, threads),
            f"predict, {most} threads": partial(predict_files, most),
            "plain": plainly,
        }
        result = compare(sizes, ways)
    right = sum(names[row] == name for row, name in zip(expected.argmax(1).tolist(), predicted, strict=True))
    worst = difference({"logits": logits}, {"logits": expected})
    return {
        **result,
        "agrees": worst <= TOLERANCE[precision],
        "largest_difference": worst,
        "same_predictions": right / len(paths),
        "images_per_second": {name: len(paths) / seconds for name, seconds in result["seconds"].items()},
        "threads": threads,
        "processes_of_plain": sizes.workers,
    }


def block_loop(sizes: Sizes, precision: str, tower: str) -> Result:
    """The blocks of a tower, forward and backward: as they are, compiled, and as CUDA graphs, with what these cost."""
    clip, batch = sizes.clip(precision), sizes.batches[0]
    method, _ = build("maple", clip, class_names(sizes.classes[0]))
    if not isinstance(method, MaPLe):
        raise TypeError(f"{type(method).__name__} is not MaPLe, whose prompts are coupled here")
    images = noise_images(clip, batch).to(sizes.device)
    learned = method.vision_prompts() if tower == "image" else method.text_prompts()
    prompts = tuple(prompt.detach().requires_grad_() for prompt in learned)

    def encode(*tokens: Tensor) -> Tensor:
        edits = prompt_edits(tokens)
        if tower == "image":
            return encode_image(clip.image, images, edits)
        return encode_text(clip.text, method.classes.sentences, edits)  # type: ignore[union-attr]

    def run(way: Callable[..., Tensor]) -> dict[str, Tensor]:
        way(*prompts).float().square().sum().backward()
        gradients = {str(layer): prompt.grad.clone() for layer, prompt in enumerate(prompts) if prompt.grad is not None}
        for prompt in prompts:
            prompt.grad = None
        return gradients

    expected = run(encode)
    makers: dict[str, Callable[[], Callable[..., Tensor]]] = {
        "compiled": lambda: torch.compile(encode, dynamic=False, backend=sizes.compiler),
        "CUDA graphs": lambda: torch.cuda.make_graphed_callables(encode, prompts),
    }
    ways: dict[str, Callable[[], object]] = {"as it is": partial(run, encode)}
    costs, differences, errors = {}, {}, {}
    for name, make in makers.items():
        start = sizes.clock()
        try:
            if name == "CUDA graphs" and sizes.device.type != "cuda":
                raise RuntimeError("CUDA graphs need a CUDA device")
            way = make()
            differences[name] = difference(run(way), expected, precision)
        except Exception as error:  # noqa: BLE001 - what PyTorch cannot compile or capture is a result
            errors[name] = describe(error)
            continue
        costs[name] = sizes.clock() - start
        ways[name] = partial(run, way)
    result = compare(sizes, ways)
    gains = {name: result["seconds"]["as it is"] - result["seconds"].get(name, math.inf) for name in costs}
    return {
        **result,
        "errors": {**errors, **result.get("errors", {})},
        "cost_seconds": costs,
        "paid_after_steps": {name: costs[name] / gain if gain > 0 else None for name, gain in gains.items()},
        "differences": differences,
        "agrees": all(worst <= TOLERANCE[precision] for worst in differences.values()),
    }
