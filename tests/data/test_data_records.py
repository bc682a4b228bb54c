"""Items and data sets: validation and hashing."""

from dataclasses import replace
from pathlib import Path

import pytest

from maple.data import Dataset, Item
from maple.data.records import items_hash
from maple.errors import DataError

CAT = Item("cat/1.jpg", 0, "cat")
DOG = Item("dog/1.jpg", 1, "big_dog")
GOOD = Dataset("pets", Path("pets"), (CAT, DOG), (), (DOG,), ("cat", "big_dog"))


def test_dataset_knows_its_size_and_files() -> None:
    assert GOOD.num_classes == 2
    assert GOOD.counts() == {"train": 2, "val": 0, "test": 1, "classes": 2}
    assert GOOD.file(DOG) == Path("pets/dog/1.jpg")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": (), "test": ()}, "no items in any of its splits"),
        ({"class_names": ()}, "has no classes"),
        ({"class_names": ("cat", " ")}, "class 1 is named ' ', without a word"),
        ({"class_names": ("_", "cat")}, "class 0 is named '_', without a word"),
        ({"class_names": ("cat",)}, "has label 1; labels must be 0 to 0"),
        ({"val": (Item("x.jpg", -1, "cat"),)}, "val item 'x.jpg' has label -1"),
        ({"test": (Item("x.jpg", 0, "lion"),)}, "calls class 0 'lion', but its name is 'cat'"),
        ({"test": (Item("../x.jpg", 0, "cat"),)}, "must be inside the root"),
        ({"test": (Item("/x.jpg", 0, "cat"),)}, "must be inside the root"),
        ({"test": (Item("", 0, "cat"),)}, "must be inside the root"),
    ],
)
def test_malformed_dataset_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(GOOD, **change)


def test_hash_depends_on_every_field_and_on_the_order() -> None:
    base = items_hash([CAT, DOG])
    others = [
        items_hash([DOG, CAT]),
        items_hash([CAT]),
        items_hash([]),
        items_hash([replace(CAT, path="cat/2.jpg"), DOG]),
        items_hash([replace(CAT, label=1), DOG]),
        items_hash([replace(CAT, class_name="Cat"), DOG]),
    ]
    assert len({base, *others}) == 7
    assert base == items_hash((CAT, DOG))


def test_hash_is_the_same_on_every_machine() -> None:
    assert items_hash([]) == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"


def test_names_that_are_not_valid_unicode_have_a_hash() -> None:
    assert len(items_hash([Item("\udcff/é.jpg", 0, "\udcff")])) == 64


def test_without_training_items_it_is_for_evaluation_only() -> None:
    GOOD.require_training()
    only = replace(GOOD, train=())
    assert only.counts()["train"] == 0
    with pytest.raises(DataError, match=r"'pets' has no training images \(val 0, test 1\): it is for evaluation only"):
        only.require_training()
