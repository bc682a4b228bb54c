"""A CLIP small enough to build for every session, and images for it.

PyTorch and open_clip are imported by the fixtures: the process that distributes the tests among the workers of
pytest-xdist reads this file too, and the workers wait for it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from maple.clip import Backbone

SMALL: dict[str, Any] = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 128, "patch_size": 16, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 3},
}
SMALL_RESNET: dict[str, Any] = {
    **SMALL,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None, "head_width": 64},
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: starts other processes, and takes seconds")
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        import torch

        # The CLIPs of the tests are too small to share among threads, and pytest-xdist already uses the cores.
        torch.set_num_threads(1)


def pytest_runtest_setup() -> None:
    """Random CLIPs are built once: hundreds of tests train on one, and drawing its weights takes longer than training.

    Only where a test has imported open_clip, which takes seconds.
    """
    models: Any = sys.modules.get("maple.clip.checkpoints.open_clip_models")
    if models is None or models._from_own_architecture.__name__ == "copied":
        return
    built = cache(models._from_own_architecture)

    def copied(name: str, pretrained: str | None) -> Any:
        model, *others = built(name, pretrained)
        return deepcopy(model), *others

    models._from_own_architecture = copied


def random_state(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    import open_clip
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        copies = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
        return dict(open_clip.CLIP(**copies).state_dict())


def _build(state: dict[str, Tensor], name: str) -> Backbone:
    from maple.clip.load import backbone_from_state_dict

    return backbone_from_state_dict(state, name=name)


@pytest.fixture(scope="session")
def small_state() -> dict[str, Tensor]:
    """Random weights of a CLIP with 3 text blocks of width 64, 4 image blocks of width 128, and images of 32 x 32."""
    return random_state(SMALL, 0)


@pytest.fixture(scope="session")
def backbone(small_state: dict[str, Tensor]) -> Backbone:
    return _build(small_state, "small")


@pytest.fixture(scope="session")
def other_backbone() -> Backbone:
    """The same sizes, other weights."""
    return _build(random_state(SMALL, 1), "other")


@pytest.fixture(scope="session")
def resnet_backbone() -> Backbone:
    return _build(random_state(SMALL_RESNET, 0), "small-resnet")


@pytest.fixture(scope="session")
def double_backbone(small_state: dict[str, Tensor]) -> Backbone:
    """The small CLIP computing in float64."""
    import torch

    made = _build(small_state, "small")
    made.model.double()
    made.dtype = made.text.dtype = made.image.dtype = torch.float64
    return made


@pytest.fixture(scope="session")
def vit_b16() -> Backbone:
    """A CLIP of the published sizes, with random weights."""
    from maple.clip import load_clip

    return load_clip("ViT-B-16", "random")


@pytest.fixture(scope="session")
def images() -> Tensor:
    """Six images for the small CLIP."""
    import torch

    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def make_images_in() -> Callable[..., Path]:
    """Write, in a folder, a folder of class-named folders of small images, each class of another colour."""
    import numpy as np
    from PIL import Image

    def make(
        parent: Path,
        name: str = "pictures",
        classes: Sequence[str] = ("bird", "cat", "dog", "eel"),
        train: int = 4,
        test: int = 3,
    ) -> Path:
        generator = np.random.default_rng(len(classes))
        for label, class_name in enumerate(classes):
            for part, count in (("train", train), ("test", test)):
                folder = parent / name / part / class_name
                folder.mkdir(parents=True)
                for index in range(count):
                    pixels = generator.integers(0, 80, (40, 40, 3)) + np.array([40 * label, 150 - 40 * label, 90])
                    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
        return parent / name

    return make


@pytest.fixture
def make_images(make_images_in: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`make_images_in` in the folder of one test."""
    return partial(make_images_in, tmp_path)


@pytest.fixture(scope="session", autouse=True)
def no_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of features for fixtures that several tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAPLE_CACHE", str(tmp_path_factory.mktemp("shared_cache")))
        yield


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of features for one test, also of the processes that it starts: empty, and not the user's."""
    with tempfile.TemporaryDirectory(prefix="maple-cache-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("MAPLE_CACHE", folder)
        yield Path(folder) / "features"


@pytest.fixture(autouse=True)
def own_record(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A record of given backbones for one test, also of the processes that it starts."""
    with tempfile.TemporaryDirectory(prefix="maple-state-", ignore_cleanup_errors=True) as state:
        monkeypatch.setenv("XDG_STATE_HOME", state)
        monkeypatch.setattr("maple.clip.backbone_names._given", set())
        yield Path(state) / "maple" / "backbones.json"


@pytest.fixture(scope="session")
def real_data() -> Callable[..., Path]:
    """Return the root of the real data sets; the test is skipped where what it names is not below it."""

    def root_of(*names: str) -> Path:
        if not (folder := os.environ.get("MAPLE_DATA")):
            pytest.skip("set MAPLE_DATA to the folder of unpacked data sets")
        root = Path(folder)
        assert root.is_dir(), f"MAPLE_DATA is {root}, which is not a folder"
        for name in names:
            if not (root / name).exists():
                pytest.skip(f"needs {name} of the unpacked data sets below {root}")
        return root

    return root_of


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster on this machine, of a module's own: a longer one would leak warnings into other tests."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # "local" never connects to a cluster that is already running on this machine.
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()
