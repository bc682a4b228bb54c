"""Products with frozen weights: those of PyTorch's own frozen_linear, by whichever library."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from maple.clip import cpu_linear
from maple.clip.cpu_linear import FLOPS, frozen_linear
from maple.clip.plain_model import QuickGELU
from maple.clip.towers.block_parts import quick_gelu

WHERE = pytest.mark.parametrize("avx2", [False, True], ids=["AVX-512", "AVX2"])
elsewhere = pytest.mark.skipif(cpu_linear._OPERATOR is None, reason="this PyTorch has no oneDNN beside MKL")


@pytest.fixture(autouse=True, scope="module")
def whatever_their_size_and_the_processor() -> Iterator[None]:
    """Small products show what large ones do; oneDNN computes float32 on every processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_linear, "_LEAST", 1)
        patch.setattr(cpu_linear, "_DTYPES", [torch.float32, *cpu_linear._DTYPES])
        yield


def material(shape: tuple[int, ...], out: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(*size, generator=generator) for size in (shape, (out, shape[-1]), (out,), (*shape[:-1], out))]
    return made[0], made[1], made[2], made[3]


def gradient_of(product: object, states: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    states = states.detach().requires_grad_()
    (found,) = torch.autograd.grad(product(states, weight, bias), states, out)  # type: ignore[operator]
    return found


@given(
    lead=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    width=st.integers(1, 70),
    out=st.integers(1, 70),
    bias=st.booleans(),
    form=st.sampled_from(["plain", "strided", "sliced weight", "expanded"]),
    least=st.sampled_from([1, 2**10, 2**24]),
    avx2=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_values_and_gradients_are_those_of_linear(
    lead: list[int], width: int, out: int, bias: bool, form: str, least: int, avx2: bool, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_linear, "_LEAST", least)
        patch.setattr(cpu_linear, "_AVX2", avx2)
        check_values_and_gradients(lead, width, out, bias, form, seed)


def check_values_and_gradients(lead: list[int], width: int, out: int, bias: bool, form: str, seed: int) -> None:
    states, weight, offset, upstream = material((*lead, width), out, seed)
    if form == "strided":
        states = torch.stack([states, states], dim=-1)[..., 0]
    if form == "sliced weight":
        weight = torch.cat([weight, weight])[out:]
    if form == "expanded" and lead:
        upstream = upstream[:1].expand_as(upstream)
    given_bias = offset if bias else None
    exact = F.linear(states.double(), weight.double(), None if given_bias is None else given_bias.double())
    # Errors of a sum of `width` cpu_linear, whatever their order.
    torch.testing.assert_close(frozen_linear(states, weight, given_bias).double(), exact, rtol=1e-5, atol=3e-6 * width)
    exact = gradient_of(F.linear, states.double(), weight.double(), None, upstream.double())
    found = gradient_of(frozen_linear, states, weight, given_bias, upstream)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=3e-6 * out)


@elsewhere
@WHERE
def test_the_same_call_gives_the_same_bits(avx2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed runs end in the same bytes."""
    monkeypatch.setattr(cpu_linear, "_AVX2", avx2)
    states, weight, bias, upstream = material((5, 33, 64), 48)
    for _ in range(3):
        assert torch.equal(frozen_linear(states.clone(), weight.clone(), bias), frozen_linear(states, weight, bias))
        found = [gradient_of(frozen_linear, part.clone(), weight, bias, upstream) for part in (states, states)]
        assert torch.equal(*found)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """The calls of the operator."""
    calls, operator = [], cpu_linear._OPERATOR

    def counted(*arguments: object) -> Tensor:
        calls.append(arguments)
        result: Tensor = operator(*arguments)
        return result

    monkeypatch.setattr(cpu_linear, "_OPERATOR", counted)
    return calls


@elsewhere
@WHERE
@pytest.mark.parametrize("part", [slice(None), slice(16, 48)], ids=["weight", "part of a packed weight"])
@pytest.mark.parametrize("rows", [15, 16])
def test_small_products_are_pytorchs(
    rows: int, part: slice, avx2: bool, calls: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    states, weight, _, upstream = material((rows, 24), 64)
    weight, upstream = weight[part], upstream[:, part]
    monkeypatch.setattr(cpu_linear, "_LEAST", 16 * 24 * len(weight))
    monkeypatch.setattr(cpu_linear, "_AVX2", avx2)
    exact = gradient_of(F.linear, states.double(), weight.double(), None, upstream.double())
    found = gradient_of(frozen_linear, states, weight, None, upstream)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    expected = 0 if rows == 15 else 1 if avx2 else 2
    assert len(calls) == expected, "forwards, and backwards too where MKL does not use AVX-512"


def test_quick_gelu_and_its_derivatives() -> None:
    states = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kept = states.detach().clone()
    torch.testing.assert_close(quick_gelu(states), QuickGELU()(states))
    assert torch.autograd.gradcheck(quick_gelu, states)
    assert torch.autograd.gradgradcheck(quick_gelu, states)
    slopes = torch.func.vmap(torch.func.grad(lambda number: quick_gelu(number).sum()))(kept)
    torch.testing.assert_close(slopes, torch.autograd.grad(quick_gelu(states).sum(), states)[0])
    assert torch.equal(states, kept), "its input is left as it is"


@elsewhere
def test_float32_is_pytorchs_where_mkl_uses_all_of_the_processor(
    calls: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_linear, "_DTYPES", [torch.bfloat16])
    states, weight, bias, upstream = material((3, 8), 6)
    assert torch.equal(frozen_linear(states, weight, bias), F.linear(states, weight, bias))
    assert torch.equal(gradient_of(frozen_linear, states, weight, bias, upstream), upstream @ weight)
    assert not calls


@elsewhere
def test_it_is_used(calls: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "_AVX2", False)
    states, weight, bias, upstream = material((3, 8), 6)
    gradient_of(frozen_linear, states, weight, bias, upstream)
    assert len(calls) == 2
    for other in (
        (states.double(), weight.double(), bias.double()),
        (states.half(), weight.half(), bias.half()),
        (states, weight.clone().requires_grad_(), bias),
        (states, weight, bias.clone().requires_grad_()),
        (states[:0], weight, bias),
    ):
        assert torch.equal(frozen_linear(*other), F.linear(*other))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert frozen_linear(states, weight, bias).dtype == torch.bfloat16
    assert len(calls) == 2


@pytest.mark.skipif(not cpu_linear._BFLOAT16, reason="this processor has no bfloat16 products")
@given(rows=st.integers(1, 90), width=st.integers(1, 70), out=st.integers(1, 70), bias=st.booleans())
@settings(max_examples=40, deadline=None)
def test_bfloat16_is_as_near_as_that_of_linear(rows: int, width: int, out: int, bias: bool) -> None:
    half = [one.bfloat16() for one in material((rows, width), out)]
    states, weight, offset, upstream = half[0], half[1], half[2] if bias else None, half[3]
    exact = F.linear(states.double(), weight.double(), None if offset is None else offset.double())
    scale = float(exact.abs().max()) + 1
    found = frozen_linear(states, weight, offset)
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).abs().max()) <= scale * 2**-8
    slope = gradient_of(frozen_linear, states, weight, offset, upstream)
    exact = upstream.double() @ weight.double()
    assert float((slope.double() - exact).abs().max()) <= (float(exact.abs().max()) + 1) * 2**-8


def test_weights_that_learn_get_their_gradient() -> None:
    states, weight, bias, upstream = material((3, 8), 6)
    weight.requires_grad_()
    found = torch.autograd.grad(frozen_linear(states, weight, bias), weight, upstream)
    torch.testing.assert_close(found[0], upstream.T @ states)


def test_operations_are_counted_alike() -> None:
    states, weight, bias, upstream = material((2, 5, 8), 6)
    counts = []
    for product in (frozen_linear, F.linear):
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            gradient_of(product, states, weight, bias, upstream)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * 10 * 8 * 6] * 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_holds_operators_that_others_know() -> None:
    states, weight, bias, _ = material((3, 8), 6)
    traced = torch.jit.trace(lambda x: frozen_linear(x, weight, bias), states)
    assert "mkldnn" not in str(traced.graph)
    program = torch.export.export(_Layer(weight, bias), (states,))
    assert "mkldnn" not in str(program.graph)
    torch.testing.assert_close(program.module()(states), frozen_linear(states, weight, bias))


class _Layer(torch.nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, states: Tensor) -> Tensor:
        return frozen_linear(states, self.weight, self.bias)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # of PyTorch's own rules
def test_derivatives_of_derivatives_and_transforms_are_those_of_linear() -> None:
    """Of gradients that are differentiated again, and of torch.func's transforms, which do not know the operator."""
    states, weight, bias, _ = material((3, 4), 5)

    def curved(product: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda given: (product(given, weight, bias) ** 3).sum()

    def twice(product: Callable[..., Tensor]) -> Tensor:
        leaf = states.clone().requires_grad_()
        (first,) = torch.autograd.grad(curved(product)(leaf), leaf, create_graph=True)
        return torch.autograd.grad((first**2).sum(), leaf)[0]

    def forwards(product: Callable[..., Tensor]) -> Tensor:
        with fwAD.dual_level():
            dual = fwAD.make_dual(states, torch.ones_like(states))
            return fwAD.unpack_dual(curved(product)(dual)).tangent

    ways: list[Callable[[Callable[..., Tensor]], Tensor]] = [
        twice,
        forwards,
        lambda product: torch.func.grad(curved(product))(states),
        lambda product: torch.func.vmap(curved(product))(states),
        lambda product: torch.func.hessian(curved(product))(states),
        lambda product: torch.autograd.functional.hessian(curved(product), states),
    ]
    for way in ways:
        torch.testing.assert_close(way(frozen_linear), way(F.linear), rtol=1e-4, atol=1e-3)
