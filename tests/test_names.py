"""Class names in a text, as people write them."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maple.errors import ClassNamesError
from maple.names import NameRows, clean_class_names, names_in


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("red car, blue car", ["red car", "blue car"]),
        ("red car\nblue car\r\n\n teapot ,\n", ["red car", "blue car", "teapot"]),
        ('"dog, small", hound', ["dog, small", "hound"]),
        ('"a ""big"" dog", 5" disk, it\'s', ['a "big" dog', '5" disk', "it's"]),
        ("a,,b", ["a", "", "b"]),
        (",", [""]),
        ("cat\n  \n", ["cat"]),
        ('cat,\t"dog, small" , \u3000"owl"', ["cat", "dog, small", "owl"]),
        ('"fire\nengine"\rcat', ["fire engine", "cat"]),
        ('"red car", ', ["red car"]),
        ('"", cat', ["", "cat"]),
        ("\ufeffcat", ["cat"]),
        ("x" * 200_000, ["x" * 200_000]),
        ("", []),
    ],
)
def test_names_in(text: str, names: list[str]) -> None:
    assert names_in(text) == names


@pytest.mark.parametrize("text", ['"dog, small', '"dog" small, cat', 'cat, "'])
def test_what_cannot_be_told_apart(text: str) -> None:
    with pytest.raises(ClassNamesError, match=r"cannot be separated; .* in double quotes"):
        names_in(text)


@given(st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1), min_size=1))
def test_what_csv_writes_is_read(names: list[str]) -> None:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(names)
    assert names_in(line.getvalue()) == names


def test_rows_of_names() -> None:
    rows = NameRows(["crane", "Sports car", "crane", "owl"])
    assert rows.find(["crane", "crane", "crane", "Crane"]) == [0, 2, None, None], "equal names in their order"
    assert rows.find(["sports_car", "OWL", "dog"]) == [1, 3, None], "spelled in another way"
    composed, decomposed = "v\u00e9lo", "ve\u0301lo"
    assert NameRows(["cat", composed]).find([decomposed]) == [1], "an accent of its own, as in names of files on a Mac"
    assert clean_class_names([decomposed]) == (composed,)
