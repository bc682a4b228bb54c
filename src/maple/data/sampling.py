"""Few-shot samples and the base / novel cut: pure functions of item lists."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, get_args

from maple.data.records import Dataset, Item
from maple.errors import ConfigError, DataError, one_of

Which = Literal["all", "base", "novel"]

MAX_VAL_SHOTS = 4
"""Validation images per class never exceed this, whatever the shots."""


def sample_few_shot(
    train: Sequence[Item], val: Sequence[Item], shots: int | None, seed: int
) -> tuple[list[Item], list[Item]]:
    """Draw `shots` training items and min(shots, 4) validation items of each class.

    Classes come in the order in which they first appear; a class with fewer items gives all of them, unshuffled.
    One generator seeded with `seed` (0 is valid) serves the training items first, then the validation items.
    Sample over all classes, before any base / novel cut. `shots=None` returns every item.

    Raises:
        ConfigError: `shots` is below 1.

    Source: KaiyangZhou/Dassl.pytorch@c61a1b5 dassl/data/datasets/base_dataset.py `generate_fewshot_dataset`, as
    called by muzairkhattak/multimodal-prompt-learning@69bce21 datasets/oxford_pets.py:35-49; a private generator
    takes the place of the global one. Departs: seed 0 is honoured.
    """
    if shots is None:
        return list(train), list(val)
    if shots < 1:
        raise ConfigError(f"shots is {shots}; it must be at least 1, or None for all images")
    rng = random.Random(seed)
    return _per_class(train, shots, rng), _per_class(val, min(shots, MAX_VAL_SHOTS), rng)


def hold_out(items: Sequence[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Take a fraction of each class away, chosen by `seed`: (the items that stay, the items taken), in their order.

    The fraction is rounded, but at least one is taken and at least one stays; a class of one item keeps it.

    Raises:
        ConfigError: the fraction is not above 0 and below 1.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"the fraction to hold out is {fraction}; it must be above 0 and below 1")
    by_label: dict[int, list[int]] = {}
    for place, item in enumerate(items):
        by_label.setdefault(item.label, []).append(place)
    taken: set[int] = set()
    for label, places in by_label.items():
        count = min(max(round(len(places) * fraction), 1), len(places) - 1)
        # A generator per class: another class does not change what is taken of this one.
        taken.update(random.Random(f"{seed}/{label}").sample(places, count))
    stay = [item for place, item in enumerate(items) if place not in taken]
    return stay, [items[place] for place in sorted(taken)]


def base_novel_classes(labels: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the base and the novel labels: the first ceil(n/2) of the n sorted distinct labels, and the rest.

    Source: MaPLe section 4 (base-to-novel); muzairkhattak/multimodal-prompt-learning@69bce21
    datasets/oxford_pets.py `subsample_classes`.
    """
    ordered = sorted(set(labels))
    middle = (len(ordered) + 1) // 2
    return tuple(ordered[:middle]), tuple(ordered[middle:])


def select_classes(
    items: Sequence[Item], which: Which, class_names: Sequence[str]
) -> tuple[list[Item], tuple[str, ...]]:
    """Keep the items of all, base or novel classes, number their labels from 0, and return the kept class names.

    The cut is over all labels of the data set, 0..len(class_names)-1, so that an item list in which a class is
    missing is cut like any other. The names come in the order of the new labels.

    Raises:
        ConfigError: `which` is not "all", "base" or "novel".
        DataError: an item has a label without a name, or no class is kept (a single class has no novel half).
    """
    if which not in get_args(Which):
        raise ConfigError(one_of("choice of classes", which, get_args(Which)))
    labels = tuple(range(len(class_names)))
    base, novel = base_novel_classes(labels)
    kept = {"all": labels, "base": base, "novel": novel}[which]
    if not kept:
        raise DataError(f"there are no {which} classes among {list(class_names)}; a cut needs at least two classes")
    for item in items:
        if item.label not in range(len(class_names)):
            raise DataError(
                f"item {item.path!r} has label {item.label}; with {len(class_names)} class names labels are "
                f"0 to {len(class_names) - 1}: pass the class names of the whole data set"
            )
    renumbered = {old: new for new, old in enumerate(kept)}
    selected = [
        item if renumbered[item.label] == item.label else Item(item.path, renumbered[item.label], item.class_name)
        for item in items
        if item.label in renumbered
    ]
    return selected, tuple(class_names[label] for label in kept)


def select_dataset(dataset: Dataset, which: Which) -> Dataset:
    """Return `dataset` cut to all, base or novel classes in each of its parts, labels numbered from 0.

    Raises:
        ConfigError: `which` is not "all", "base" or "novel".
        DataError: no class is kept, or the kept classes have no items in any part.
    """
    train, names = select_classes(dataset.train, which, dataset.class_names)
    val, _ = select_classes(dataset.val, which, dataset.class_names)
    test, _ = select_classes(dataset.test, which, dataset.class_names)
    return replace(dataset, train=tuple(train), val=tuple(val), test=tuple(test), class_names=names)


def _per_class(items: Sequence[Item], count: int, rng: random.Random) -> list[Item]:
    by_label: dict[int, list[Item]] = {}
    for item in items:
        by_label.setdefault(item.label, []).append(item)
    drawn: list[Item] = []
    for members in by_label.values():
        drawn.extend(rng.sample(members, count) if len(members) >= count else members)
    return drawn
