"""`maple.testing.check_method` accepts the method of the documentation, and names the promise that another breaks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_outside_methods import source_of_the_page
from torch import nn

from maple.errors import ConfigError
from maple.methods import METHODS
from maple.testing import METHOD_CHECKS, check_method


@pytest.fixture(scope="module")
def shift_class() -> Any:
    content: dict[str, Any] = {"__name__": "the_page"}
    exec(source_of_the_page(), content)
    return content["Shift"]


def test_the_method_of_the_page_keeps_all_promises(shift_class: Any) -> None:
    made: list[str] = []
    check_method(shift_class, {"strength": 0.5}, on_check=made.append)
    assert made == [check.__name__ for check in METHOD_CHECKS]
    assert not [name for name in METHODS if name.startswith("checked-")]


def broken(shift_class: Any, **changes: Any) -> Any:
    return type("Broken", (shift_class,), changes)


def owns_the_backbone(self: Any, settings: Any, backbone: Any, names: Any, generator: Any) -> None:
    type(self).__mro__[1].__init__(self, settings, backbone, names, generator)
    self.model = backbone.model


def draws_globally(self: Any, settings: Any, backbone: Any, names: Any, generator: Any) -> None:
    type(self).__mro__[1].__init__(self, settings, backbone, names, generator)
    torch.randn(1)


def forgets(_self: Any) -> dict[str, Any]:
    return {}


def mixes_images(self: Any, images: Any) -> Any:
    features = type(self).__mro__[1].encode_images(self, images)
    return torch.nn.functional.normalize(features + features.mean(dim=0), dim=-1)


def sums(self: Any, images: Any, labels: Any) -> Any:
    loss, logs = type(self).__mro__[1].loss(self, images, labels)
    return loss * len(labels), logs


def adapted(self: Any, settings: Any, backbone: Any, names: Any, generator: Any) -> None:
    """A bottleneck whose last layer and biases start at zero, and a table that is computed again when it is loaded."""
    type(self).__mro__[1].__init__(self, settings, backbone, names, generator)
    width = backbone.embed_dim
    self.down, self.up = (nn.utils.skip_init(nn.Linear, *shape) for shape in ((width, 8), (8, width)))
    nn.init.normal_(self.down.weight, std=0.1, generator=generator)
    for start in (self.down.bias, self.up.weight, self.up.bias):
        nn.init.zeros_(start)
    self.register_buffer("table", torch.zeros(3), persistent=False)


def adapts(self: Any) -> Any:
    features = type(self).__mro__[1].encode_classes(self)
    return nn.functional.normalize(features + self.up(self.down(features).relu()), dim=-1)


def test_an_adapter_that_starts_at_zero_keeps_all_promises(shift_class: Any, backbone: Any) -> None:
    adapter = type("Adapter", (shift_class,), {"__init__": adapted, "encode_classes": adapts})
    check_method(adapter)
    method = adapter(adapter.Settings(), backbone, ["cat"], torch.Generator().manual_seed(1))
    assert method.saved_tensors().keys() == method.prompt_parameters().keys(), "what is not persistent is not saved"


def keeps_a_count(self: Any, names: Any) -> None:
    type(self).__mro__[1].set_class_names(self, names)
    self.register_buffer("count", torch.tensor(len(names)))


def test_a_copy_for_other_names_has_buffers_of_its_own(shift_class: Any, backbone: Any) -> None:
    counting = type("Counting", (shift_class,), {"set_class_names": keeps_a_count})
    method = counting(counting.Settings(), backbone, ["cat", "dog"], torch.Generator())
    assert (int(method.with_class_names(["cat"]).count), int(method.count)) == (1, 2)


@pytest.mark.parametrize(
    ("changes", "promise"),
    [
        ({"__init__": owns_the_backbone}, "the backbone is not a submodule"),
        ({"__init__": draws_globally}, "torch's global generator is left alone"),
        ({"saved_tensors": forgets}, r"loaded again|saved"),
        ({"encode_images": mixes_images}, "."),
        ({"log_names": ("nothing",)}, "log_names"),
        ({"loss": sums}, "the loss is a mean over images"),
        ({"supports_new_classes": property(lambda _: False)}, "settings alone|UnlearnedClassesError"),
    ],
)
def test_a_broken_promise_is_named(shift_class: Any, changes: dict[str, Any], promise: str) -> None:
    with pytest.raises(AssertionError, match=promise):
        check_method(broken(shift_class, **changes))


def test_unknown_settings_are_errors_of_their_own(shift_class: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'method\.strenght'"):
        check_method(shift_class, {"strenght": 1})
    with pytest.raises(ConfigError, match="there is no file"):
        check_method(f"{tmp_path / 'shift.py'}:Shift")
