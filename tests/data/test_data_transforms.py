"""Transforms: pixels equal to torchvision's and open_clip's, randomness from the generator alone."""

import io
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import normalize, to_tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from maple.data import EvalTransform, TrainTransform, read_image
from maple.data.images.train_transform import crop_box
from maple.errors import ConfigError

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("shape", [(64, 64), (300, 200), (201, 333), (7, 90), (1, 1), (224, 224)])
def test_evaluation_equals_open_clip_to_the_bit(shape: tuple[int, int], size: int, interpolation: str) -> None:
    image = noise(*shape)
    expected = open_clip.image_transform(size, is_train=False, mean=MEAN, std=STD, interpolation=interpolation)(image)
    found = EvalTransform(size, MEAN, STD, interpolation)(image)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("resize", "fill"), [("squash", 0), ("longest", 0), ("longest", 128)])
@pytest.mark.parametrize("shape", [(64, 64), (300, 200), (201, 333), (7, 90), (1, 1), (224, 224), (90, 3000)])
def test_every_resize_mode_equals_open_clip_to_the_bit(
    shape: tuple[int, int], resize: str, fill: int, interpolation: str
) -> None:
    image = noise(*shape)
    options: dict[str, Any] = {"interpolation": interpolation, "resize_mode": resize, "fill_color": fill}
    expected = open_clip.image_transform(48, is_train=False, mean=MEAN, std=STD, **options)(image)
    assert torch.equal(EvalTransform(48, MEAN, STD, interpolation, resize=resize, fill=fill)(image), expected)


def test_a_part_of_a_squashed_or_filled_image_is_seen_in_training() -> None:
    """With the whole area, a view is the image as evaluation sees it."""
    image = noise(90, 40)
    for resize in ("squash", "longest"):
        seen = EvalTransform(32, MEAN, STD, resize=resize, fill=77)(image)
        whole = TrainTransform(32, MEAN, STD, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, resize=resize, fill=77)(
            image, generator(3)
        )
        assert torch.cosine_similarity(whole.flatten(), seen.flatten(), dim=0) > 0.99
        part = TrainTransform(32, MEAN, STD, resize=resize, fill=77)(image, generator(3))
        assert part.shape == (3, 32, 32)
    strip = TrainTransform(32, MEAN, STD, resize="longest")(Image.new("RGB", (60_000, 1), "red"), generator(1))
    assert strip.shape == (3, 32, 32)


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("shape", [(341, 257), (257, 341), (1001, 643)])
def test_a_draft_is_seen_where_the_whole_image_is(shape: tuple[int, int], resize: str) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((shape[0] // 8, shape[1] // 8), 60).convert("RGB").resize(shape).save(buffer, "JPEG", quality=95)
    transform = EvalTransform(60, (0, 0, 0), (1, 1, 1), resize=resize)
    whole, draft = (read_image(buffer.getvalue(), least_side=side) for side in (None, transform.least_side))
    assert draft.width < whole.width
    difference = 255 * (transform(draft) - transform(whole)).abs()
    assert difference.mean() < 1
    assert difference.max() < 16  # moved by half a pixel, it is several times as much


def test_strips_are_cut_before_they_fill_the_memory() -> None:
    transform = EvalTransform(32, MEAN, STD)
    for image in (Image.new("RGB", (60_000, 1), "red"), Image.new("RGB", (1, 60_000), "red")):
        assert torch.equal(transform(image), transform(Image.new("RGB", (32, 32), "red")))


@pytest.mark.parametrize("shape", [(64, 64), (300, 200), (20, 333)])
def test_training_pixels_equal_torchvision_for_the_same_crop(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    flips = 0
    for seed in range(12):
        state = generator(seed)
        top, left, height, width = crop_box(shape[1], shape[0], SCALE, RATIO, state)
        flipped = torch.rand(1, generator=state).item() < 0.5
        flips += flipped
        cropped = reference.resized_crop(
            image, top, left, height, width, [48, 48], interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        # The first version of torchvision's transforms, as CLIP uses them: divides by 255, the second multiplies.
        expected = normalize(
            to_tensor(cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else cropped), MEAN, STD
        )
        found = TrainTransform(48, MEAN, STD)(image, generator(seed))
        assert torch.equal(found, expected)
    assert 0 < flips < 12


@pytest.mark.parametrize("shape", [(64, 64), (300, 200), (10, 100), (100, 10), (2, 1)])
def test_crops_are_torchvision_crops_for_the_same_stream(shape: tuple[int, int]) -> None:
    image = torch.empty(3, shape[1], shape[0])
    for seed in range(200):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected = RandomResizedCrop.get_params(image, list(SCALE), list(RATIO))
        assert crop_box(shape[1], shape[0], SCALE, RATIO, generator(seed)) == tuple(expected)


def test_crops_of_one_stream_are_distributed_as_torchvision_crops() -> None:
    state, count = generator(0), 3000
    found = np.array([crop_box(600, 800, SCALE, RATIO, state) for _ in range(count)], dtype=float)
    image = torch.empty(1, 600, 800)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected = np.array([RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)) for _ in range(count)])
    for boxes in (found, expected):
        areas = boxes[:, 2] * boxes[:, 3] / (600 * 800)
        assert areas.min() >= 0.079
        assert areas.max() <= 1.0
        assert np.abs(np.log(boxes[:, 3] / boxes[:, 2])).max() <= np.log(4 / 3) + 0.01
    # Two samples of 3000 differ in a decile by a few hundredths of the spread.
    deciles = np.linspace(0.1, 0.9, 9)
    for column in range(4):
        first, second = (np.quantile(boxes[:, column], deciles) for boxes in (found, expected))
        assert np.abs(first - second).max() < 0.12 * expected[:, column].std()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1), (3, 2)])
def test_crops_stay_inside_tiny_and_thin_images(height: int, width: int) -> None:
    for seed in range(50):
        top, left, crop_height, crop_width = crop_box(height, width, SCALE, RATIO, generator(seed))
        assert 0 <= top <= height - crop_height
        assert 0 <= left <= width - crop_width
        assert crop_height >= 1
        assert crop_width >= 1


def test_equal_generators_give_equal_views_and_the_global_one_is_untouched() -> None:
    transform = TrainTransform(32, MEAN, STD)
    image = noise(80, 60)
    before = torch.get_rng_state()
    first, again, other = (transform(image, generator(seed)) for seed in (1, 1, 2))
    assert first.shape == (3, 32, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_flip_is_a_probability(flip: float) -> None:
    image = noise(40, 40)
    plain = TrainTransform(40, MEAN, STD, flip=0.0)(image, generator(5))
    found = TrainTransform(40, MEAN, STD, flip=flip)(image, generator(5))
    assert torch.equal(found, plain.flip(-1) if flip else plain)


def test_the_image_is_not_changed() -> None:
    image = noise(40, 30)
    before = image.tobytes()
    TrainTransform(16, MEAN, STD)(image, generator(0)).fill_(0)
    EvalTransform(30, MEAN, STD)(image).fill_(0)
    assert image.tobytes() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "image size is 0"),
        ({"mean": (0.5,)}, "image mean is .* three numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "above 0"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic'; choose one of: bicubic, bilinear"),
        ({"scale": (0.0, 1.0)}, "crop scale"),
        ({"scale": (0.5, 0.1)}, "crop scale"),
        ({"ratio": (2.0, 1.0)}, "crop ratio"),
        ({"flip": 1.5}, "flip probability is 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainTransform(**{"size": 8, "mean": MEAN, "std": STD, **settings})
