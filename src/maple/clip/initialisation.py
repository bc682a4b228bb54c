"""Build modules without drawing the weights that are replaced."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_RANDOM_FILLS = (Tensor.normal_, Tensor.uniform_)


@contextmanager
def uninitialised(active: bool = True) -> Iterator[None]:
    """Skip drawing random weights that given ones replace, which takes most of the time to build a large model.

    Their memory is never touched either, so the operating system does not have to provide it. (On PyTorch's "meta"
    device, as `skip_init` uses it, they would have none, but that imports sympy and its compiler: seconds.)
    """
    if not active:
        yield
        return
    with _SkipInitialisation():
        yield


class _SkipInitialisation(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        # Functions of torch.nn.init arrive here as themselves, with the tensor as a keyword; their own calls do not.
        if func in _RANDOM_FILLS or getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))
