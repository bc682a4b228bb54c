"""Raw features of images by the frozen image tower, extracted once for all runs: they are kept in the feature cache.

What is kept is one extraction, of an ordered list of images in one view of them: with other neighbours in its batch an
image's features differ in their last bits, and a result must not depend on what was computed before. So an entry is
used only where computing would give the same bytes. Its key names everything that decides them.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from maple.checkpoint import versions
from maple.clip import Backbone
from maple.clip.features import require_features_of
from maple.config import RunSettings
from maple.data import Batch, EvalTransform, ImageStore, Item, TrainTransform, eval_batches
from maple.data.batches import view_batches
from maple.data.images.prefetch import map_in_order, overlaps, reading_threads
from maple.distributed import processor
from maple.errors import ConfigError
from maple.methods import Method
from maple.prompts import encode_image, to_float32
from maple.runs.feature_cache import FeatureCache
from maple.runs.spec import eval_transform

_FORMAT = 1
_HASHED_AT_ONCE = 32


def frozen_batches(
    backbone: Backbone,
    items: Sequence[Item],
    store: ImageStore,
    transform: EvalTransform | TrainTransform,
    *,
    view: int = 0,
    seed: int = 0,
    batch_size: int = 100,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Iterate over all items in order, with raw features [B, D] in place of images, on the backbone's device.

    They are read from the cache if this list was extracted before, in the same way, from images of the same content;
    then no image is decoded. Otherwise they are computed, batch by batch, and kept after the last one. `view` and
    `seed` are those of `view_batches`, and apply to a training transform only.

    Raises:
        ConfigError: a number is out of its range, or `MAPLE_CACHE_SIZE` is not a size.
        DataError: the store has features in place of images, and their width is not the backbone's.
        ImageError: an image cannot be used.

    Example:
        >>> batches = frozen_batches(clip, dataset.test, dataset.store(), eval_transform(clip))
        >>> torch.cat([batch.images for batch in batches]).shape
        torch.Size([8100, 512])
    """
    if store.features is not None:
        for start in range(0, len(items), batch_size):
            part = items[start : start + batch_size]
            rows = store.features([item.path for item in part])
            require_features_of(backbone, rows.shape[1], "", part[0].path)
            yield Batch(rows.to(backbone.device), torch.tensor([item.label for item in part], dtype=torch.int64))
        return
    overlap = overlaps(backbone.device.type, num_workers)
    numbers: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "overlap": overlap}
    if isinstance(transform, EvalTransform):
        batches = eval_batches(items, store, transform, **numbers)
        seen: dict[str, Any] = {"view": "evaluation"}
    else:
        batches = view_batches(items, store, transform, view=view, seed=seed, **numbers)
        seen = {"view": "training", "number": view, "seed": seed}
        seen |= {"scale": transform.scale, "ratio": transform.ratio, "flip": transform.flip}
    seen |= {"size": transform.size, "mean": transform.mean, "std": transform.std}
    seen |= {"interpolation": transform.interpolation, "batch_size": batch_size}
    # Only where they differ from what was the only way, so that what is cached stays.
    others = {"resize": "shortest", "resize_size": transform.size, "fill": 0, "crop_offset": "rounded"}
    seen |= {key: value for key in others if (value := getattr(transform, key, others[key])) != others[key]}
    seen |= {} if store.least_side is None else {"least_side": store.least_side}
    cache = FeatureCache.open()
    key = None if cache is None else _key(backbone, items, store, seen, num_workers)
    features = None if cache is None or key is None else cache.read(key)
    if features is not None and len(features) == len(items):
        for start in range(0, len(items), batch_size):
            labels = torch.tensor([item.label for item in items[start : start + batch_size]], dtype=torch.int64)
            # Copied, so that a batch has memory of its own, as one that is computed has.
            yield Batch(features[start : start + batch_size].clone().to(backbone.device), labels)
        return
    computed: list[Tensor] = []
    for batch in batches:
        with torch.no_grad():
            raw = to_float32(encode_image(backbone.image, batch.images.to(backbone.device), ())).contiguous()
        computed.append(raw)
        yield Batch(raw, batch.labels)
    # Not if a file was replaced between being identified and being decoded.
    if cache is not None and key is not None and all(store.is_unchanged(item.path) for item in items):
        clip = {"backbone": backbone.name, "pretrained": backbone.pretrained, "precision": backbone.precision}
        view_name = seen["view"] if "number" not in seen else f"training, seed {seed}, view {view + 1}"
        about = {"images": len(items), "root": str(store.root), "view": view_name, **clip}
        cache.write(key, torch.cat(computed).cpu(), about)


def require_features(method: Method, width: int, computed_by: str = "", source: str = "the array") -> None:
    """Refuse features [n, width] for a method that needs images, or that was trained on another CLIP.

    `computed_by` and `source` are as for `maple.clip.features.require_features_of`.

    Raises:
        ConfigError: the method puts prompts into the image tower.
        DataError: these are features of another CLIP.
    """
    if not method.accepts_features:
        raise ConfigError(
            f"{method.title} puts prompts into the image tower: it needs images, not their frozen features"
        )
    require_features_of(method.backbone, width, computed_by, source)


def prediction_batches(
    method: Method, items: Sequence[Item], store: ImageStore, settings: RunSettings
) -> Iterator[Batch]:
    """Iterate over what a method needs to predict: images, or their frozen features where it accepts these.

    Raises:
        ImageError: an image cannot be used.

    Example:
        >>> logits, labels = predict(method, prediction_batches(method, dataset.test, dataset.store(), settings))
    """
    transform, size = eval_transform(method.backbone), settings.evaluate.batch_size
    threads = reading_threads(settings.evaluate.workers)
    numbers = {"batch_size": size, "num_workers": threads}
    if method.accepts_features:
        return frozen_batches(method.backbone, items, store, transform, **numbers)
    return eval_batches(items, store, transform, **numbers, overlap=overlaps(method.backbone.device.type, threads))


def _key(
    backbone: Backbone, items: Sequence[Item], store: ImageStore, seen: dict[str, Any], num_workers: int
) -> str | None:
    """The SHA-256 of all that decides the features; None if an image cannot be identified."""
    paths = [item.path for item in items]
    images: list[str] = []
    with closing(map_in_order(store.content_id, paths, num_workers, _HASHED_AT_ONCE)) as identified:
        for content in identified:
            if content is None:
                return None
            images.append(content)
    kind = backbone.device.type
    # What else changes the last bits: the machine, and how it shares and rounds its products.
    computing: list[Any] = [kind, torch.get_float32_matmul_precision()]
    if torch.is_autocast_enabled(kind):
        computing.append(str(torch.get_autocast_dtype(kind)))
    if kind == "cuda":
        computing += [torch.cuda.get_device_name(backbone.device), torch.backends.cudnn.allow_tf32, torch.version.cuda]
    else:
        computing += [processor(), torch.get_num_threads()]
    facts = {
        "format": _FORMAT,
        "versions": versions(),
        "computing": computing,
        "backbone": [backbone.fingerprint, backbone.precision, str(backbone.image.dtype), _architecture(backbone)],
        "max_pixels": store.max_pixels,
        "seen": seen,
        "images": images,
    }
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _architecture(backbone: Backbone) -> list[Any]:
    """What the fingerprint of the weights leaves open: the kind of each module of the tower, and its plain settings.

    Two CLIPs may share their weights and differ in their activation or their number of heads.
    """
    tower: nn.Module = getattr(backbone.model, "visual", backbone.model)
    plain = (int, float, bool, str, tuple, type(None))

    def settings(module: nn.Module) -> dict[str, str]:
        values = {key: getattr(value, "__qualname__", value) for key, value in vars(module).items()}
        return {key: str(value) for key, value in values.items() if isinstance(value, plain)}

    return [[name, type(module).__name__, settings(module)] for name, module in tower.named_modules()]
