"""Several trainers in one loop: what happens to one does not happen to the others; and the passes below."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from maple.clip import Backbone, prompt_edits
from maple.clip.load import backbone_from_state_dict
from maple.config import TrainSettings
from maple.data import Batch
from maple.errors import ConfigError, ImageError, TrainingDivergedError
from maple.methods import Method, build_method
from maple.prompts import encode, encode_image, encode_text, share_passes, write_sentences
from maple.train import EpochReport, Trainer, run_epochs

Batches = list[tuple[Batch, int]]
NAMES = ["cat", "dog", "owl"]


def make(backbone: Backbone, seed: int = 1, **settings: Any) -> Method:
    description = settings or {"name": "maple", "prompt_depth": 2}
    return build_method(description, backbone, NAMES, generator=torch.Generator().manual_seed(seed))


def trainer(backbone: Backbone, seed: int = 1, **train: Any) -> Trainer:
    return Trainer(make(backbone, seed), TrainSettings(**{"lr": 0.01, "warmup_epochs": 0, **train}))


def batches(seed: int = 0, count: int = 2, size: int = 4) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % 3
    return [(Batch(torch.randn(size, 3, 32, 32, generator=generator), labels), size) for _ in range(count)]


def close(one: Trainer, other: Trainer, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one.state()[0], other.state()[0], rtol=tolerance, atol=tolerance)
    assert (one.epoch, one.state()[1]["step"]) == (other.epoch, other.state()[1]["step"])


def test_one_alone_is_the_trainer_itself(backbone: Backbone) -> None:
    one, other = trainer(backbone), trainer(backbone)
    (report,) = run_epochs([(one, batches(), lambda _: None)])
    assert report == other.run_epoch(batches())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters.values(), other.parameters.values(), strict=True))


def test_one_that_diverges_leaves_the_others_alone(backbone: Backbone) -> None:
    good, twin, bad = trainer(backbone), trainer(backbone), trainer(backbone, 2)
    spoilt = batches(1, 3)
    spoilt[1][0].images[2, 0, 0, 0] = float("nan")
    before = bad.state()
    steps: list[int] = []
    failed, report = run_epochs([(bad, spoilt, lambda step: steps.append(step.step)), (good, batches(2, 3), print)])
    assert isinstance(failed, TrainingDivergedError)
    assert "at step 1 (epoch 1 of 5)" in str(failed)
    assert steps == [0]
    assert isinstance(report, EpochReport)
    assert twin.run_epoch(batches(2, 3)).losses == pytest.approx(report.losses, rel=1e-5)
    close(good, twin)
    assert bad.state()[1] == before[1]
    assert all(torch.equal(value, before[0][name]) for name, value in bad.state()[0].items() if "prompts" in name)


def test_an_image_that_cannot_be_read_is_one_runs_affair(backbone: Backbone) -> None:
    def broken() -> Iterator[tuple[Batch, int]]:
        yield from batches(1, 1)
        raise ImageError("b.png: is empty (0 bytes)")

    good, twin, bad = trainer(backbone), trainer(backbone), trainer(backbone, 2)
    report, failed = run_epochs([(good, batches(2, 3), print), (bad, broken(), print)])
    assert isinstance(failed, ImageError)
    assert isinstance(report, EpochReport)
    assert (bad.epoch, bad.history, bad.state()[1]["step"]) == (0, [], 0)
    twin.run_epoch(batches(2, 3))
    close(good, twin)


def test_they_need_not_be_equally_far(backbone: Backbone) -> None:
    """As when the process was killed between their writes."""
    ahead, behind = trainer(backbone, epochs=3), trainer(backbone, 2, epochs=3)
    twins = trainer(backbone, epochs=3), trainer(backbone, 2, epochs=3)
    ahead.run_epoch(batches(1))
    run_epochs([(ahead, batches(2), print), (behind, batches(3), print)])
    for data in (1, 2):
        twins[0].run_epoch(batches(data))
    twins[1].run_epoch(batches(3))
    assert [one.history[-1].epoch for one in (ahead, behind)] == [1, 0]
    assert ahead.history[-1].lr != behind.history[-1].lr
    close(ahead, twins[0])
    close(behind, twins[1])


def test_other_methods_and_other_class_names_train_beside_each_other(backbone: Backbone) -> None:
    """Their passes are not alike; nothing is mixed up."""
    made = []
    for _ in range(2):
        methods = [make(backbone), make(backbone, 2, name="vpt", vision_prompt_depth=2), make(backbone, 3)]
        made.append(methods)
    for methods in made:
        methods[2].set_class_names(["teapot", "red fire truck", "x"])
    side, alone = ([Trainer(m, TrainSettings(lr=0.01, warmup_epochs=0)) for m in methods] for methods in made)
    run_epochs([(one, batches(n), print) for n, one in enumerate(side)])
    for number, one in enumerate(alone):
        one.run_epoch(batches(number))
        close(side[number], one)


def test_half_precision_scales_each_loss_by_itself(small_state: dict[str, Tensor]) -> None:
    half = backbone_from_state_dict(small_state, precision="fp16")
    one, other = trainer(half), trainer(half, 2)
    other.scaler.load_state_dict({**other.scaler.state_dict(), "scale": 8.0})
    twin = trainer(half)
    reports = run_epochs([(one, batches(1, 1), print), (other, batches(2, 1), print)])
    assert all(isinstance(report, EpochReport) for report in reports)
    assert [t.state()[1]["scaler"]["scale"] for t in (one, other)] == [2.0**12, 8.0]
    twin.run_epoch(batches(1, 1))
    close(one, twin, 1e-3)


def test_a_method_that_learns_nothing_is_refused(backbone: Backbone) -> None:
    nothing = Trainer(build_method({"name": "zero_shot"}, backbone, NAMES), TrainSettings())
    with pytest.raises(ConfigError, match="there is nothing to train"):
        run_epochs([(trainer(backbone), batches(), print), (nothing, batches(), print)])


# --- passes


def test_passes_keep_their_order_and_their_gradients(double_backbone: Backbone) -> None:
    """Computations that ask for three passes and for one, some of them without gradients."""
    tower, generator = double_backbone.image, torch.Generator().manual_seed(0)
    images = [torch.randn(n, 3, 32, 32, generator=generator).double() for n in (2, 3, 1)]
    prompts = [torch.randn(2, tower.width, generator=generator).double().requires_grad_() for _ in range(3)]

    def twice(n: int) -> Tensor:
        with torch.no_grad():
            frozen = encode_image(tower, images[n], []) + encode_image(tower, images[n], prompt_edits([prompts[n]]))
        assert not frozen.requires_grad
        return (encode_image(tower, images[n], prompt_edits([prompts[n]])) - frozen).square().sum()

    def once(n: int) -> Tensor:
        return encode_image(tower, images[n], prompt_edits([prompts[n]])).square().sum()

    computations: list[Callable[[], Tensor]] = [
        lambda: twice(0),
        lambda: once(1),
        lambda: twice(2),
        lambda: once(0) * 0,
    ]
    found = share_passes(computations)
    alone = [computation() for computation in computations]
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        grads = [
            torch.autograd.grad(value, prompts, retain_graph=True, materialize_grads=True) for value in (one, other)
        ]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 1, 4), (1, 3, 4)], ids=str)
def test_text_passes_of_any_kind_are_made_as_one(shape: tuple[int, ...], double_backbone: Backbone) -> None:
    tower, generator = double_backbone.text, torch.Generator().manual_seed(0)
    sentences = write_sentences(double_backbone, NAMES, prompt_length=4)
    prompts = [[torch.randn(*shape, tower.width, generator=generator).double()] * 2 for _ in range(3)]
    found = share_passes([lambda own=own: encode_text(tower, sentences, prompt_edits(own)) for own in prompts])
    for one, own in zip(found, prompts, strict=True):
        torch.testing.assert_close(one, encode_text(tower, sentences, prompt_edits(own)), rtol=1e-10, atol=1e-12)


def test_a_computation_may_draw_random_numbers_and_is_called_once(backbone: Backbone) -> None:
    """In turn, so that the numbers are the same every time."""
    image, order = torch.zeros(1, 3, 32, 32), []

    def draw(name: str, passes: int) -> tuple[str, list[float]]:
        order.append(name)
        numbers = [float(torch.rand(()))]
        for _ in range(passes):
            assert encode_image(backbone.image, image, []).shape == (1, 32)
            numbers.append(float(torch.rand(())))
        return name, numbers

    computations = [lambda name=name, n=n: draw(name, n) for n, name in enumerate("abc")]
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(share_passes(computations))
    assert results[0] == results[1]
    assert order == [*"abcabc"]
    torch.manual_seed(0)
    rounds = [float(torch.rand(())) for _ in range(6)]
    # First all of them up to their first pass, then those that continue.
    assert [numbers for _, numbers in results[0]] == [rounds[:1], [rounds[1], rounds[3]], [rounds[2], *rounds[4:]]]


def test_modes_and_context_of_the_caller_hold_in_each_computation(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="")
    image, modes = torch.zeros(2, 3, 32, 32), []
    encode_now = encode._encode_image

    def encoding(*arguments: Any) -> Tensor:
        modes.append((len(arguments[1]), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return encode_now(*arguments)

    monkeypatch.setattr(encode, "_encode_image", encoding)

    def compute(grad: bool, inference: bool, autocast: bool) -> tuple[Any, ...]:
        outer = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            first = encode_image(backbone.image, image, [])
        with torch.inference_mode(inference):
            second = encode_image(backbone.image, image, [])
        return *outer, variable.get(), first.dtype, second.is_inference()

    variable.set("set")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        results = share_passes([partial(compute, True, True, False), partial(compute, False, False, True)])
    for outer in results:
        assert outer[:4] == (False, False, True, "set")
    assert [result[5] for result in results] == [True, False]
    # The last one: leaving inference mode is to torch entering grad mode.
    assert modes == [(2, True, False), (2, False, True), (2, False, True), (2, True, True)]
    with torch.inference_mode():
        assert share_passes([torch.is_inference_mode_enabled] * 2) == [True, True]
    modes.clear()
    share_passes([partial(compute, True, False, False)] * 2)
    assert modes == [(4, True, False), (4, True, False)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_error_in_a_computation_ends_all_of_them(error: type[BaseException], after: int, backbone: Backbone) -> None:
    image, left, threads = torch.zeros(1, 3, 32, 32), [], threading.active_count()

    def good() -> None:
        try:
            for _ in range(5):
                encode_image(backbone.image, image, [])
        finally:
            left.append("good")
            with pytest.raises(BaseException):  # noqa: B017, PT011 - whatever ends a computation
                encode_image(backbone.image, image, [])  # one that is being ended has no passes any more

    def wrong() -> None:
        for _ in range(after):
            encode_image(backbone.image, image, [])
        raise error("wrong")

    with pytest.raises(error, match="wrong"):
        share_passes([good, wrong, good])
    # The third has not begun when the second raises at once.
    assert left == ["good"] * (1 if after == 0 else 2)
    assert threading.active_count() == threads
    assert encode_image(backbone.image, image, []).shape == (1, 32), "passes are run at once again"


def test_an_error_in_a_shared_pass_ends_all_computations(backbone: Backbone) -> None:
    threads = threading.active_count()
    wrong = torch.zeros(1, 3, 31, 32)
    with pytest.raises(ImageError, match=r"images of shape \[3, 3, 31, 32\]"):
        share_passes([lambda: encode_image(backbone.image, wrong, [])] * 3)
    assert threading.active_count() == threads


def test_an_interrupt_while_a_computation_runs_ends_all_of_them(backbone: Backbone) -> None:
    """As Ctrl-C: the main thread is interrupted, whichever thread computes."""
    image, threads = torch.zeros(1, 3, 32, 32), threading.active_count()

    def interrupted() -> None:
        encode_image(backbone.image, image, [])
        signal.raise_signal(signal.SIGINT)
        for _ in range(3000):  # ended by the interrupt, which may be late on a busy machine
            time.sleep(0.01)
            encode_image(backbone.image, image, [])

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever other tests have left
    try:
        with pytest.raises(KeyboardInterrupt):
            share_passes([interrupted, lambda: encode_image(backbone.image, image, []), interrupted])
    finally:
        signal.signal(signal.SIGINT, before)
    assert threading.active_count() == threads


def test_shared_passes_within_shared_passes(backbone: Backbone) -> None:
    image = torch.randn(2, 3, 32, 32)

    def inner() -> list[Tensor]:
        return share_passes([lambda: encode_image(backbone.image, image, [])] * 2)

    expected = encode_image(backbone.image, image, [])
    for features in [features for results in share_passes([inner, inner]) for features in results]:
        torch.testing.assert_close(features, expected)


def test_a_loss_that_draws_and_counts_trains_side_by_side(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a loss with dropout: it is called once for each micro-batch, also where others wait for its pass."""
    calls = []

    def noisy(method: Method) -> Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]:
        generator, plain = torch.Generator().manual_seed(0), method.loss

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            calls.append(len(images))
            return plain(images + torch.randn(images.shape, generator=generator), labels)

        return loss

    side, alone = ([trainer(backbone), trainer(backbone, 2)] for _ in range(2))
    for one in (*side, *alone):
        monkeypatch.setattr(one.method, "loss", noisy(one.method))
    run_epochs([(one, batches(n), print) for n, one in enumerate(side)])
    assert calls == [4] * 4
    for number, one in enumerate(alone):
        one.run_epoch(batches(number))
        close(side[number], one)


def test_nobody_to_share_with() -> None:
    assert share_passes([]) == []
