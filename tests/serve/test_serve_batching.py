"""Many requests at once: each gets its own result, and memory stays bounded."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from serve_helpers import NAMES, Colours, Start, expected, png
from starlette.testclient import TestClient

from maple.serve.batching import Batcher, Job
from maple.serve.limits import Limits
from maple.serve.middleware import Capacity
from maple.serve.responses import ApiError


def view(colour: tuple[int, int, int]) -> Any:
    return np.broadcast_to(np.array(colour, np.float32)[:, None, None] / 255, (3, 16, 16))


@pytest.fixture
def gated() -> tuple[Colours, threading.Event]:
    gate = threading.Event()
    return Colours(gate=gate), gate


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition was never met")


def test_jobs_share_batches_and_keep_their_results(gated: tuple[Colours, threading.Event]) -> None:
    predictor, gate = gated
    batcher = Batcher(predictor, Limits(batch=8))
    batcher.start()
    colours = [(7 * n, 250 - 7 * n, 90 + n) for n in range(30)]
    lists = [None, ("cat", "dog"), ("owl", "cat", "teapot"), NAMES]
    jobs = [Job(lists[n % 4], [view(colour)] * (1 + n % 3)) for n, colour in enumerate(colours)]
    for job in jobs:
        batcher.put(job)
    gate.set()
    for n, (job, colour) in enumerate(zip(jobs, colours, strict=True)):
        result = job.result.result(20)
        assert result.names == (lists[n % 4] or NAMES)
        right = list(expected(colour, result.names).values())
        np.testing.assert_allclose(result.tuned, [right] * (1 + n % 3), atol=1e-5)
        assert result.frozen is not None
        assert result.frozen.shape == result.tuned.shape
    assert batcher.close(10)
    assert sum(predictor.batches) == sum(len(job.views) for job in jobs)
    assert max(predictor.batches) <= 8
    assert len(predictor.batches) < len(jobs) / 2


def test_a_failing_image_does_not_fail_other_requests(gated: tuple[Colours, threading.Event]) -> None:
    predictor, gate = gated
    batcher = Batcher(predictor, Limits())
    batcher.start()
    good = [Job(None, [view((200, 30, 30))]) for _ in range(3)]
    bad = [Job(None, [view((0, 0, 0))]), Job(("a", "a"), [view((1, 2, 3))]), Job(("nan",), [view((1, 2, 3))])]
    for pair in zip(good, bad, strict=True):
        for job in pair:
            batcher.put(job)
    gate.set()
    for job in good:
        np.testing.assert_allclose(job.result.result(20).tuned[0], list(expected((200, 30, 30), NAMES).values()), 1e-4)
    codes = []
    for job in bad:
        with pytest.raises(ApiError) as caught:
            job.result.result(20)
        codes.append(caught.value.code)
    assert codes == ["model_failed", "class_names", "model_failed"]
    assert batcher.close(10)
    with pytest.raises(ApiError, match="is stopping"):
        batcher.put(Job(None, [view((0, 0, 9))]))


def test_abandoned_jobs_are_skipped(gated: tuple[Colours, threading.Event]) -> None:
    predictor, gate = gated
    batcher = Batcher(predictor, Limits(batch=1))
    batcher.start()
    first, second = Job(None, [view((9, 9, 9))]), Job(None, [view((9, 9, 9))])
    batcher.put(first)
    batcher.put(second)
    second.abandoned = True
    second.result.cancel()
    gate.set()
    first.result.result(20)
    assert batcher.close(10)
    assert predictor.batches == [1]


def test_a_capacity_is_not_exceeded() -> None:
    capacity = Capacity(3, "{used} of {total} are taken")
    capacity.take(2)
    with pytest.raises(ApiError, match="2 of 3 are taken; retry"):
        capacity.take(2)
    assert capacity.used == 2
    capacity.release(2)
    capacity.take(3)


def ask(client: TestClient, colour: tuple[int, int, int], names: list[str]) -> Any:
    return client.post("/v1/predict", files={"images": ("x.png", png(colour))}, data={"class_names": names})


def test_a_full_queue_is_reported_and_passes(start: Start, gated: tuple[Colours, threading.Event]) -> None:
    predictor, gate = gated
    client = start(predictor, queue=3, images=3)
    with ThreadPoolExecutor(8) as pool:
        first = [pool.submit(ask, client, (200, 30, 30), ["cat", "dog"]) for _ in range(3)]
        until(lambda: client.app.state.service.queue.used == 3)  # type: ignore[attr-defined]
        full = ask(client, (1, 2, 3), ["cat"])
        assert full.json()["error"]["code"] == "busy"
        assert full.headers["retry-after"] == "1"
        assert client.get("/healthz").status_code == 200
        gate.set()
        right = expected((200, 30, 30), ["cat", "dog"])
        for answer in first:
            best = answer.result(20).json()["predictions"][0]["best"]
            assert {one["class"]: one["probability"] for one in best} == pytest.approx(right, abs=1e-3)
    assert ask(client, (1, 2, 3), ["cat"]).status_code == 200


def test_a_slow_request_times_out(start: Start, gated: tuple[Colours, threading.Event]) -> None:
    predictor, gate = gated
    client = start(predictor, timeout=0.2, queue=1, images=1)
    late = ask(client, (200, 30, 30), ["cat"])
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    # The image is still being processed, so its place is still taken.
    assert ask(client, (200, 30, 30), ["cat"]).status_code == 503
    gate.set()
    until(lambda: ask(client, (200, 30, 30), ["cat"]).status_code == 200)


def test_concurrent_clients_each_get_their_own(start: Start) -> None:
    predictor = Colours(seconds=0.002)
    client = start(predictor)
    words = ["cat", "dog", "owl", "teapot", "car", "tree"]

    def one(number: int) -> None:
        colour = (number * 5 % 256, number * 11 % 256, 100)
        names = [f"{word} {number % 7}" for word in words[: 2 + number % 5]]
        answer = ask(client, colour, names)
        assert answer.status_code == 200, answer.text
        right = expected(colour, names)
        best = {rank["class"]: rank["probability"] for rank in answer.json()["predictions"][0]["best"]}
        assert best == {name: pytest.approx(right[name], abs=1e-3) for name in best}
        assert len(best) == min(5, len(names))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(80)))
    assert len(predictor.batches) < 80
