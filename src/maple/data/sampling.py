"""Few-shot sampling and the base / novel split of classes, as pure functions of item lists."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from maple.data.records import SPLIT_NAMES, Dataset, Item
from maple.errors import ConfigError, DataError, one_of

Which = Literal["all", "base", "novel"]

MAX_VAL_SHOTS = 4
"""The most validation images per class, for any number of shots."""


def sample_few_shot(
    train: Sequence[Item],
    val: Sequence[Item],
    shots: int | None,
    seed: int,
    *,
    validation: Literal["few-shot", "shots", "all"] = "few-shot",
) -> tuple[list[Item], list[Item]]:
    """Draw `shots` training items and min(shots, 4) validation items of each class, or as many of these, or all.

    Classes are in order of their first item; a class with fewer items contributes all of them, unshuffled. One
    generator seeded with `seed` (0 is valid) draws the training items first, then the validation items. Sample over all
    classes, before any base / novel split. `shots=None` returns every item.

    Raises:
        ConfigError: `shots` is below 1.

    Source: KaiyangZhou/Dassl.pytorch@c61a1b5 dassl/data/datasets/base_dataset.py `generate_fewshot_dataset`, as
    called by muzairkhattak/multimodal-prompt-learning@69bce21 datasets/oxford_pets.py:35-49; a private generator
    replaces the global one. Departs: seed 0 is used.

    Example:
        >>> train, val = sample_few_shot(dataset.train, dataset.val, shots=16, seed=1)
        >>> len(train) == 16 * dataset.num_classes
        True
    """
    if shots is None:
        return list(train), list(val)
    if shots < 1:
        raise ConfigError(f"shots is {shots}; it must be at least 1, or None for all images")
    rng = random.Random(seed)

    def draw(items: Sequence[Item], count: int) -> list[Item]:
        drawn: list[Item] = []
        for indices in indices_by_label(items).values():
            members = [items[index] for index in indices]
            drawn.extend(rng.sample(members, count) if len(members) >= count else members)
        return drawn

    drawn = draw(train, shots)
    return drawn, list(val) if validation == "all" else draw(val, val_shots(shots, validation))


def val_shots(shots: int, validation: str) -> int:
    """How many validation items of each class are drawn for `shots` training items."""
    return shots if validation == "shots" else min(shots, MAX_VAL_SHOTS)


def hold_out(
    items: Sequence[Item], fraction: float, seed: int, near_copies: Sequence[Sequence[str]] = ()
) -> tuple[list[Item], list[Item]]:
    """Hold out a fraction of each class, chosen by `seed`: (the items that remain, the items held out), in order.

    The fraction is rounded, but at least one item is held out and at least one remains; a single item remains. Groups
    of `near_copies`, given by their paths, are not separated: as many whole ones are held out as the fraction allows,
    or else the smallest.

    Raises:
        ConfigError: the fraction is not above 0 and below 1.

    Example:
        >>> train, val = hold_out(dataset.train, 0.1, seed=1)
    """
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise ConfigError(f"the fraction to hold out is {fraction!r}; it must be above 0 and below 1")
    held_out: set[int] = set()
    sizes = {label: len(indices) for label, indices in indices_by_label(items).items()}
    for label, units in separable_units(items, near_copies).items():
        count = min(max(round(sizes[label] * fraction), 1), sizes[label] - 1)
        # A generator per class: other classes do not change what is held out of this one.
        generator = random.Random(f"{seed}/{label}")
        if len(units) == sizes[label]:
            held_out.update(index for unit in generator.sample(units, count) for index in unit)
            continue
        left = count
        order = generator.sample(units, len(units))
        for unit in order:
            if len(unit) <= left:
                held_out.update(unit)
                left -= len(unit)
        if left == count:
            smallest = min(order, key=len)
            held_out.update(smallest)
    remaining = [item for index, item in enumerate(items) if index not in held_out]
    return remaining, [items[index] for index in sorted(held_out)]


def base_novel_classes(labels: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the base and the novel labels: the first ceil(n/2) of the n sorted distinct labels, and the rest.

    Source: MaPLe section 4 (base-to-novel); muzairkhattak/multimodal-prompt-learning@69bce21
    datasets/oxford_pets.py `subsample_classes`.

    Example:
        >>> base_novel_classes(range(5))
        ((0, 1, 2), (3, 4))
    """
    ordered = sorted(set(labels))
    middle = (len(ordered) + 1) // 2
    return tuple(ordered[:middle]), tuple(ordered[middle:])


def select_classes(
    items: Sequence[Item], which: Which, class_names: Sequence[str]
) -> tuple[list[Item], tuple[str, ...]]:
    """Return the items of all, base or novel classes, with labels renumbered from 0, and the names of these classes.

    The split is over all labels of the data set, 0..len(class_names)-1, so that a class without items in the list
    changes nothing.

    Raises:
        ConfigError: `which` is not "all", "base" or "novel".
        DataError: an item has a label without a name, or no class remains (a single class has no novel half).

    Example:
        >>> items, names = select_classes(dataset.test, "novel", dataset.class_names)
    """
    if which not in get_args(Which):
        raise ConfigError(one_of("choice of classes", which, get_args(Which)))
    labels = tuple(range(len(class_names)))
    base, novel = base_novel_classes(labels)
    kept = {"all": labels, "base": base, "novel": novel}[which]
    if not kept:
        raise DataError(f"there are no {which} classes among {list(class_names)}; the split needs at least two classes")
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
    """Return `dataset` with only all, base or novel classes in each of its splits, labels renumbered from 0.

    Raises:
        ConfigError: `which` is not "all", "base" or "novel".
        DataError: no class remains, or the remaining classes have no items in any split.

    Example:
        >>> select_dataset(dataset, "base").num_classes, select_dataset(dataset, "novel").num_classes
        (51, 50)
    """
    chosen = {split: select_classes(getattr(dataset, split), which, dataset.class_names) for split in SPLIT_NAMES}
    splits: dict[str, Any] = {split: tuple(items) for split, (items, _) in chosen.items()}
    return replace(dataset, class_names=chosen["train"][1], **splits)


def separable_units(items: Sequence[Item], near_copies: Sequence[Sequence[str]]) -> dict[int, list[list[int]]]:
    """What can be set apart of each label: the indices of its items, near copies of each other in one list.

    Near copies are divided where a label has nothing else. Those of several labels are in none, since they would take
    images from each; a label is missing where nothing would remain of it.

    Example:
        >>> items = [Item(f"{name}.png", 0, "cat") for name in ("a", "b", "c")]
        >>> separable_units(items, [("a.png", "c.png")])
        {0: [[0, 2], [1]]}
    """
    group_of = {path: number for number, group in enumerate(near_copies) for path in group}
    units: dict[int | str, list[int]] = {}
    for index, item in enumerate(items):
        units.setdefault(group_of.get(item.path, f"{index}"), []).append(index)
    by_label: dict[int, list[list[int]]] = {}
    mixed: set[int] = set()
    for unit in units.values():
        if len(labels := {items[index].label for index in unit}) == 1:
            by_label.setdefault(min(labels), []).append(unit)
        else:
            mixed |= labels
    for label, each in by_label.items():
        if len(each) == 1 and label not in mixed:
            by_label[label] = [[index] for index in each[0]]
    return {label: each for label, each in by_label.items() if len(each) > 1 or label in mixed}


def indices_by_label(items: Sequence[Item]) -> dict[int, list[int]]:
    """The indices of the items of each label."""
    indices: dict[int, list[int]] = {}
    for index, item in enumerate(items):
        indices.setdefault(item.label, []).append(index)
    return indices
