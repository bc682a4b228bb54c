"""Numbers worked out by hand, and properties that hold for any prediction."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from maple.metrics import (
    accuracy_interval,
    calibration_error,
    harmonic_mean,
    mean_and_deviation,
    score,
    sign_test,
    softmax,
    top_k_accuracy,
)

LOGITS = np.array([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [5.0, 4.0, 0.0], [0.0, 1.0, 2.0], [1.0, 0.0, 3.0]])
LABELS = np.array([0, 1, 1, 2, 0])


def test_by_hand() -> None:
    found = score(LOGITS, LABELS)
    assert found.images == 5
    assert found.top1 == 3 / 5
    assert found.top5 == 1.0
    assert found.per_class == (1 / 2, 1 / 2, 1.0)
    assert found.confusion == ((1, 0, 1), (1, 1, 0), (0, 0, 1))
    assert found.macro_f1 == pytest.approx((2 * 1 / 4 + 2 * 1 / 3 + 2 * 1 / 3) / 3)


def test_calibration_by_hand() -> None:
    probabilities = np.array([[0.95, 0.05], [0.99, 0.01], [0.40, 0.60], [0.38, 0.62], [1.0, 0.0]])
    labels = np.array([0, 1, 1, 0, 0])
    # Bins of 1/15: {0.95, 0.99, 1.0} are in the last, {0.60, 0.62} in that from 0.6 to 0.667.
    expected = (abs(2 - (0.95 + 0.99 + 1.0)) + abs(1 - (0.60 + 0.62))) / 5
    assert calibration_error(probabilities, labels) == pytest.approx(expected)
    assert calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0
    assert calibration_error(np.array([[1.0, 0.0]]), np.array([1])) == 1


def test_bins_do_not_cancel_each_other() -> None:
    probabilities = np.array([[0.9, 0.1], [0.51, 0.49]])
    assert calibration_error(probabilities, np.array([1, 0])) == pytest.approx((0.9 + 0.49) / 2)
    assert calibration_error(probabilities, np.array([1, 0]), bins=1) == pytest.approx(abs(1 - 1.41) / 2)


def test_top5_of_seven() -> None:
    logits = np.tile(np.arange(7.0), (7, 1))
    assert top_k_accuracy(logits, np.arange(7), 5) == 5 / 7
    assert score(logits, np.arange(7)).top5 == 5 / 7
    assert top_k_accuracy(logits, np.arange(7), 1) == 1 / 7


def test_ties_go_to_the_first_class_everywhere() -> None:
    found = score(np.zeros((7, 7)), np.arange(7))
    assert found.top1 == 1 / 7
    assert found.top5 == 5 / 7
    assert [row[0] for row in found.confusion] == [1] * 7


def test_classes_without_images_have_no_accuracy_and_do_not_count() -> None:
    found = score(np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), np.array([0, 0]))
    assert found.per_class == (0.5, None, None)
    assert found.macro_f1 == pytest.approx(2 / 3)
    assert found.confusion == ((1, 0, 1), (0, 0, 0), (0, 0, 0))


def test_a_class_never_predicted_counts_zero() -> None:
    assert score(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1])).macro_f1 == pytest.approx((2 / 3 + 0) / 2)


def test_one_class() -> None:
    found = score(np.array([[0.3], [0.1]]), np.array([0, 0]))
    assert (found.top1, found.top5, found.macro_f1, found.calibration_error) == (1, 1, 1, 0)


def test_narrow_labels_do_not_overflow() -> None:
    logits = np.eye(200, dtype=np.float32)
    assert score(logits, np.arange(200, dtype=np.uint8)).top1 == 1
    assert score(logits, np.arange(200, dtype=np.uint8)).confusion[199][199] == 1


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((0, 3)), np.zeros(0, dtype=int), "no images"),
        (np.zeros((2, 3)), np.array([0, 3]), "0 to 2"),
        (np.zeros((2, 3)), np.array([-1, 0]), "0 to 2"),
        (np.zeros((2, 3)), np.array([0]), "2 whole numbers"),
        (np.array([[0.0, np.nan]]), np.array([0]), "must be finite"),
        (np.array([[0.0, np.inf]]), np.array([0]), "must be finite"),
    ],
)
def test_refused(logits: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(logits, labels)


@st.composite
def predictions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    count, classes = draw(st.integers(1, 30)), draw(st.integers(1, 9))
    logits = draw(arrays(np.float32, (count, classes), elements=st.integers(-8, 8).map(lambda n: n / 4)))
    return logits, draw(arrays(np.int64, count, elements=st.integers(0, classes - 1)))


@given(predictions())
def test_properties(prediction: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = prediction
    found = score(logits, labels)
    count, classes = logits.shape
    rows = [list(row) for row in logits]
    ranks = [sorted(range(classes), key=lambda c, row=row: (-row[c], c)).index(y) for row, y in zip(rows, labels)]  # noqa: B905
    assert found.top1 == pytest.approx(sum(rank == 0 for rank in ranks) / count)
    assert found.top5 == pytest.approx(sum(rank < 5 for rank in ranks) / count)
    assert np.sum(found.confusion) == count
    assert [sum(row) for row in found.confusion] == np.bincount(labels, minlength=classes).tolist()
    assert found.top1 == pytest.approx(np.trace(found.confusion) / count)
    present = [value for value in found.per_class if value is not None]
    assert len(present) == len(set(labels.tolist()))
    f1 = []
    for c in set(labels.tolist()):
        hit = found.confusion[c][c]
        precision = hit / max(sum(row[c] for row in found.confusion), 1)
        recall = hit / sum(found.confusion[c])
        f1.append(2 * precision * recall / (precision + recall) if hit else 0.0)
    assert found.macro_f1 == pytest.approx(np.mean(f1))
    assert 0 <= found.calibration_error <= 1
    assert found == score(logits, labels)
    np.testing.assert_allclose(softmax(logits).sum(1), 1)
    np.testing.assert_allclose(softmax(logits + 100), softmax(logits))


@given(predictions(), st.randoms(use_true_random=False))
def test_the_order_of_images_does_not_matter(prediction: tuple[np.ndarray, np.ndarray], random: object) -> None:
    logits, labels = prediction
    order = list(range(len(labels)))
    random.shuffle(order)  # type: ignore[attr-defined]
    one, other = score(logits, labels), score(logits[order], labels[order])
    assert (one.top1, one.top5, one.confusion, one.per_class) == (
        other.top1,
        other.top5,
        other.confusion,
        other.per_class,
    )
    assert one.calibration_error == pytest.approx(other.calibration_error)


def test_means() -> None:
    assert harmonic_mean(0.8228, 0.7514) == pytest.approx(0.7855, abs=5e-5)
    assert harmonic_mean(0.0, 0.0) == 0
    assert harmonic_mean(1.0, 0.0) == 0
    assert mean_and_deviation([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_and_deviation([0.5]) == (0.5, 0.0)


def test_accuracy_interval() -> None:
    """Wilson's values as tabulated: 0 of 10, 5 of 10, 10 of 10."""
    assert accuracy_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert accuracy_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert accuracy_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    for right, total in ((1, 0), (-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="is not an accuracy"):
            accuracy_interval(right, total)


def test_sign_test() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(3, 3) == 1
    assert sign_test(5, 0) == sign_test(0, 5) == pytest.approx(2 / 32)
    assert sign_test(9, 1) == pytest.approx(2 * 11 / 1024)
    assert 0 < sign_test(1500, 1400) < 0.1
