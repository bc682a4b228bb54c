"""PromptClassifier as one of scikit-learn's estimators."""

import json
import subprocess
import sys

import numpy as np
import pytest
from inference_helpers import QUICK, pixels
from sklearn.ensemble import VotingClassifier
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.utils import estimator_checks

from maple import PromptClassifier
from maple.inference.sources.array_images import LabelNamesError

# Checks that need no features [n, d]. All others bring random floats [n, d], which are no images: `check_estimator`
# leaves them out by itself, because the tags say that the input is no such table. What they are about is tested here
# with images instead: fitting twice, subsets and order, read-only input, parameters untouched, pickles.
CHECKS = (
    "check_estimator_cloneable",
    "check_estimator_tags_renamed",
    "check_valid_tag_types",
    "check_estimator_repr",
    "check_no_attributes_set_in_init",
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_mixin_order",
    "check_parameters_default_constructible",
    "check_get_params_invariance",
    "check_set_params",
    "check_estimators_unfitted",
)


@pytest.mark.parametrize("check", CHECKS)
def test_checks_of_scikit_learn(check: str) -> None:
    getattr(estimator_checks, check)("PromptClassifier", PromptClassifier(**QUICK))


def test_scikit_learn_knows_that_it_takes_images() -> None:
    from sklearn.utils import get_tags

    tags = get_tags(PromptClassifier())
    assert (tags.estimator_type, tags.input_tags.two_d_array, tags.target_tags.required) == ("classifier", False, True)


def test_fitting_again_forgets_and_repeats() -> None:
    images, labels = pixels(6)
    images.flags.writeable = False
    made = PromptClassifier(**{**QUICK, "epochs": 1})
    before = json.dumps(made.get_params())
    first = made.fit(images, labels).predict_proba(images)
    made.fit(images[:4], np.array(["x", "y", "x", "y"]))
    assert made.classes_.tolist() == ["x", "y"]
    assert np.array_equal(made.fit(images, labels).predict_proba(images), first)
    assert json.dumps(made.get_params()) == before
    order = np.array([3, 0, 5])
    np.testing.assert_allclose(made.predict_proba(images[order]), first[order], atol=1e-6)
    known = set(made.get_params())
    assert all(name in known or name.startswith("_") or name.endswith("_") for name in vars(made))


def test_cross_validation_and_search() -> None:
    images, labels = pixels(12)
    quick = PromptClassifier(**{**QUICK, "epochs": 1})
    scores = cross_val_score(quick, images, labels, cv=2)
    assert np.array_equal(cross_val_score(quick, list(images), list(labels), cv=2), scores)
    search = GridSearchCV(quick, {"lr": [0.01, 1e-9], "seed": [0, 1]}, cv=2, error_score="raise").fit(images, labels)
    assert len(search.cv_results_["params"]) == 4
    assert search.best_estimator_.predict(images).shape == (12,)


@pytest.mark.slow
def test_importing_maple_loads_nothing_heavy() -> None:
    code = "import sys, maple; maple.__all__; print(sorted({'torch', 'sklearn', 'numpy', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_tools_that_number_the_labels_are_told_the_words() -> None:
    images, labels = pixels(6)
    made = PromptClassifier(**{**QUICK, "epochs": 1})
    with pytest.raises(LabelNamesError, match=r"give class_names=sorted\(labels\)"):
        VotingClassifier([("one", made)]).fit(images, labels)
    made = made.set_params(class_names=sorted(set(labels.tolist())))
    vote = VotingClassifier([("one", made)], voting="soft").fit(images, labels)
    assert vote.estimators_[0].class_names_ == tuple(sorted(set(labels.tolist())))
    assert set(vote.predict(images)) <= set(labels.tolist())
    assert cross_val_predict(made, images, labels, cv=2, method="predict_proba").shape == (6, 3)
