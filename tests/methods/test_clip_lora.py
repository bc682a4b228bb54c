"""Dropout of the inputs of low-rank updates."""

import pytest
import torch

from maple.methods.clip_lora import dropout


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.9, 0.999999])
def test_dropout_keeps_the_expectation(rate: float) -> None:
    torch.manual_seed(0)
    inputs = torch.full((401, 503), 2.0, requires_grad=True)
    dropped = dropout(inputs, rate)
    dropped.sum().backward()
    assert inputs.grad is not None
    outputs = dropped.detach()
    torch.testing.assert_close(inputs.grad * 2, outputs)
    assert outputs.shape == inputs.shape
    kept = outputs != 0
    share = float(kept.double().mean())
    error = (rate * (1 - rate) / inputs.numel()) ** 0.5
    assert abs(share - (1 - rate)) < 4 * error + 2**-16
    assert outputs[kept].unique().numel() <= 1, "what is kept has one scale"
    if rate < 0.99:
        assert float(outputs[kept][0]) == pytest.approx(2 / (1 - rate), rel=2**-12)


def test_neighbours_are_dropped_independently() -> None:
    """Four numbers share 64 random bits, and no bit decides for two of them."""
    torch.manual_seed(1)
    kept = (dropout(torch.ones(200_000), 0.25) > 0).double()
    for lag in range(1, 9):
        together = float((kept[lag:] * kept[:-lag]).mean())
        assert together == pytest.approx(0.75**2, abs=0.005)
    for offset in range(4):
        assert float(kept[offset::4].mean()) == pytest.approx(0.75, abs=0.01)


def test_dropout_follows_the_seed() -> None:
    inputs = torch.ones(7, 3)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(dropout(inputs, 0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert dropout(torch.ones(0, 3), 0.5).shape == (0, 3)
