"""Few-shot samples and the base / novel cut."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maple.data import Dataset, Item, base_novel_classes, hold_out, sample_few_shot, select_classes, select_dataset
from maple.data.published.split_files import read_split
from maple.data.sampling import separable_units
from maple.errors import ConfigError, DataError

SPLITS = {
    "eurosat": ("split_zhou_EuroSAT.json", "./data/eurosat/2750/"),
    "caltech101": ("split_zhou_Caltech101.json", "./data/caltech-101/101_ObjectCategories/"),
    "oxford_flowers": ("split_zhou_OxfordFlowers.json", "./data/oxford_flowers/jpg/"),
}


def make_items(labels: list[int]) -> list[Item]:
    return [Item(f"{index}.jpg", label, f"class_{label}") for index, label in enumerate(labels)]


item_lists = st.lists(st.integers(0, 5), max_size=40).map(make_items)


@pytest.mark.parametrize("name", SPLITS)
def test_published_samples_are_reproduced_item_for_item(name: str, fewshot_lists: Path, split_files: Path) -> None:
    split, prefix = SPLITS[name]
    parts = read_split(split_files / split)
    lists = sorted((fewshot_lists / name).glob("shot_*-seed_*.json"))
    assert len(lists) == 15
    for path in lists:
        shots, seed = (int(piece.split("_")[1]) for piece in path.stem.split("-"))
        published = json.loads(path.read_text())
        sampled = sample_few_shot(parts.train, parts.val, shots, seed)
        for part, items in zip(("train", "val"), sampled, strict=True):
            expected = [
                Item(row["impath"].removeprefix(prefix), row["label"], row["classname"])
                for row in published[part]["data"]
            ]
            assert items == expected, f"{path.name}: {part}"


def test_shots_none_keeps_everything_and_seed_zero_is_a_seed() -> None:
    items = make_items([0] * 30 + [1] * 30)
    assert sample_few_shot(items, items[:3], None, 0) == (items, items[:3])
    assert sample_few_shot(items, items, 1, 0, validation="all") == (sample_few_shot(items, [], 1, 0)[0], items)
    assert [len(part) for part in sample_few_shot(items, items, 16, 0, validation="shots")] == [32, 32]
    assert sample_few_shot(items, [], 4, 0) == sample_few_shot(items, [], 4, 0)
    assert sample_few_shot(items, [], 4, 0) != sample_few_shot(items, [], 4, 1)


@pytest.mark.parametrize("shots", [0, -1])
def test_shots_below_one_are_refused(shots: int) -> None:
    with pytest.raises(ConfigError, match=f"shots is {shots}; it must be at least 1"):
        sample_few_shot(make_items([0]), [], shots, 1)


@given(train=item_lists, val=item_lists, shots=st.integers(1, 20), seed=st.integers(0, 2**40))
def test_sample_is_k_distinct_items_of_each_class(train: list[Item], val: list[Item], shots: int, seed: int) -> None:
    sampled = sample_few_shot(train, val, shots, seed)
    for items, chosen, count in ((train, sampled[0], shots), (val, sampled[1], min(shots, 4))):
        available = Counter(item.label for item in items)
        assert Counter(item.label for item in chosen) == {k: min(n, count) for k, n in available.items()}
        assert len(set(chosen)) == len(chosen)
        assert set(chosen) <= set(items)
        first_seen = list(dict.fromkeys(item.label for item in items))
        assert list(dict.fromkeys(item.label for item in chosen)) == first_seen


@given(labels=st.lists(st.integers(0, 500)))
def test_base_and_novel_split_the_sorted_labels_in_halves(labels: list[int]) -> None:
    base, novel = base_novel_classes(labels)
    assert list(base + novel) == sorted(set(labels))
    assert len(base) == math.ceil(len(set(labels)) / 2)


@given(labels=st.lists(st.integers(0, 6), max_size=30), count=st.integers(7, 9))
def test_selected_classes_keep_items_and_names_together(labels: list[int], count: int) -> None:
    items = make_items(labels)
    names = [f"class_{label}" for label in range(count)]
    base, base_names = select_classes(items, "base", names)
    novel, novel_names = select_classes(items, "novel", names)
    assert base_names + novel_names == tuple(names)
    assert len(base_names) == math.ceil(count / 2)
    assert {item.path for item in base} | {item.path for item in novel} == {item.path for item in items}
    for chosen, chosen_names in ((base, base_names), (novel, novel_names)):
        assert all(chosen_names[item.label] == item.class_name for item in chosen)
    assert select_classes(items, "all", names) == (items, tuple(names))


def test_the_cut_counts_classes_that_have_no_items_here() -> None:
    names = ["a", "b", "c", "d"]
    only_novel = [Item("d.jpg", 3, "d")]
    assert select_classes(only_novel, "base", names) == ([], ("a", "b"))
    assert select_classes(only_novel, "novel", names) == ([Item("d.jpg", 1, "d")], ("c", "d"))


def test_select_refuses_what_it_cannot_cut() -> None:
    with pytest.raises(ConfigError, match="unknown choice of classes 'new'; choose one of: all, base, novel"):
        select_classes([], "new", ["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no novel classes"):
        select_classes([], "novel", ["a"])
    with pytest.raises(DataError, match="pass the class names of the whole data set"):
        select_classes(make_items([2]), "base", ["a", "b"])


def test_a_dataset_is_cut_in_all_its_parts() -> None:
    items = tuple(make_items([0, 1, 2, 2]))
    dataset = Dataset("d", Path("d"), items, items[:1], items[2:], ("class_0", "class_1", "class_2"))
    novel = select_dataset(dataset, "novel")
    assert novel.class_names == ("class_2",)
    assert {item.label for item in novel.train + novel.test} == {0}
    assert novel.val == ()
    assert select_dataset(dataset, "all") == dataset


@given(item_lists, st.floats(0.01, 0.99), st.integers(0, 5))
def test_hold_out_divides_each_class(items: list[Item], fraction: float, seed: int) -> None:
    stay, taken = hold_out(items, fraction, seed)
    assert sorted([*stay, *taken], key=items.index) == items
    assert [*stay, *taken] == sorted(stay, key=items.index) + sorted(taken, key=items.index)
    total, left = (Counter(item.label for item in some) for some in (items, stay))
    for label, count in total.items():
        assert count - left[label] == min(max(round(count * fraction), 1), count - 1)
    assert hold_out(items, fraction, seed) == (stay, taken)


def test_hold_out_of_one_class_does_not_depend_on_the_others() -> None:
    items = make_items([0, 1] * 20)
    alone = [item for item in items if item.label == 1]
    assert hold_out(alone, 0.25, 3)[1] == [item for item in hold_out(items, 0.25, 3)[1] if item.label == 1]
    assert hold_out(alone, 0.25, 3) != hold_out(alone, 0.25, 4)
    for fraction in (0.0, 1.0, -1.0):
        with pytest.raises(ConfigError, match="must be above 0 and below 1"):
            hold_out(items, fraction, 0)


@given(item_lists, st.floats(0.01, 0.99), st.integers(0, 5), st.lists(st.integers(2, 6), max_size=6))
def test_hold_out_keeps_near_copies_together(items: list[Item], fraction: float, seed: int, sizes: list[int]) -> None:
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    groups = [[f"{start + index}.jpg" for index in range(size)] for start, size in zip(starts, sizes, strict=True)]
    remaining, taken = hold_out(items, fraction, seed, groups)
    assert sorted([*remaining, *taken], key=items.index) == items
    for group in groups:
        labels = {item.label for item in items if item.path in group}
        if len(labels) == 1 and all(item.path in group for item in items if item.label in labels):
            continue  # they are all that there is of their class
        assert not ({item.path for item in remaining} & set(group) and {item.path for item in taken} & set(group))
    assert {item.label for item in remaining} == {item.label for item in items}
    assert hold_out(items, fraction, seed, [["elsewhere.jpg", "0.jpg"]]) == hold_out(items, fraction, seed)


def test_near_copies_that_cannot_be_set_apart() -> None:
    items = make_items([0, 0, 0, 1, 1, 2, 2, 2, 2])
    groups = [["0.jpg", "1.jpg", "2.jpg"], ["3.jpg", "5.jpg"], ["6.jpg", "7.jpg"]]
    units = separable_units(items, groups)
    assert units == {0: [[0], [1], [2]], 1: [[4]], 2: [[6, 7], [8]]}, "label 0 has nothing else, 1 and 2 share a group"
    assert [item.label for item in hold_out(items, 0.25, 1, groups)[1]] == [0, 1, 2]
    assert hold_out(items, 0.25, 1, groups)[1][1:] == [items[4], items[8]]
    # As many as the fraction allows, and the smallest group where that is none.
    alike = make_items([0] * 12)
    pairs = [[f"{number}.jpg", f"{number + 1}.jpg"] for number in range(0, 12, 2)]
    halves = [[f"{number}.jpg" for number in range(start, start + 6)] for start in (0, 6)]
    assert [len(hold_out(alike, 0.4, 1, each)[1]) for each in (pairs, halves)] == [4, 6]
