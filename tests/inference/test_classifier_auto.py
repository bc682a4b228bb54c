"""PromptClassifier: the choice of a method, the progress that it shows, and messages for Python programs."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inference_helpers import QUICK, TINY, pixels
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

from maple import PromptClassifier, build_method, load_clip
from maple.checkpoint import read_prompts
from maple.cli.options import in_options
from maple.clip.backbone_names import require_trusted
from maple.errors import ConfigError, MapleError
from maple.inference.sources.array_images import InputError
from maple.methods import Features
from maple.runs import TrainProgress
from maple.runs.selection import CANDIDATES
from maple.train import EpochReport, StepReport

AUTO: dict[str, Any] = {**TINY, "method": "auto", "methods": ["zero_shot", "tip_adapter", "clip_adapter"], "epochs": 2}
AUTO |= {"settings": {"train": {"warmup_epochs": 0, "views": 0}}}


@pytest.fixture(scope="module")
def chosen() -> PromptClassifier:
    return PromptClassifier(**AUTO).fit(*pixels())


# --- auto


def test_auto_trains_the_best_method_on_all_images(chosen: PromptClassifier) -> None:
    """It is what the method gives that was chosen, with its few-shot preset, to the bit."""
    selection, (images, labels) = chosen.selection_, pixels()
    assert selection is not None
    assert {each.recipe for each in selection.tried} == set(AUTO["methods"])
    assert all(len(each.right) == len(images) for each in selection.tried)
    assert selection.reason in str(selection)
    assert selection.chosen.recipe == "tip_adapter"
    alone = PromptClassifier(**{**AUTO, "method": "tip_adapter", "preset": "tip_adapter_few-shot"}).fit(images, labels)
    assert alone.selection_ is None
    assert np.array_equal(chosen.predict_proba(images), alone.predict_proba(images))
    again = PromptClassifier(**AUTO).fit(images, labels)
    assert again.selection_ is not None
    assert [each.right for each in again.selection_.tried] == [each.right for each in selection.tried]


def test_the_chosen_one_is_saved_copied_and_loaded(chosen: PromptClassifier, tmp_path: Path) -> None:
    images, _ = pixels(6)
    expected = chosen.predict_proba(images)
    copy = pickle.loads(pickle.dumps(chosen))
    assert copy.selection_ == chosen.selection_
    assert np.array_equal(copy.predict_proba(images), expected)
    loaded = PromptClassifier.from_pretrained(chosen.save_pretrained(tmp_path / "saved"), device="cpu")
    assert (loaded.method, loaded.selection_) == ("tip_adapter", None)
    np.testing.assert_allclose(loaded.predict_proba(images), expected, atol=1e-6)
    stored = read_prompts(tmp_path / "saved" / "prompts.safetensors").info["selection"]
    assert (stored["chosen"], len(stored["candidates"])) == ("tip_adapter", 3)
    assert clone(chosen).get_params() == chosen.get_params()
    assert not hasattr(clone(chosen), "selection_")


def test_auto_in_a_search() -> None:
    images, labels = pixels(12)
    made = PromptClassifier(**{**AUTO, "methods": ["zero_shot", "clip_adapter"]})
    search = GridSearchCV(made, {"method": ["auto", "zero_shot"]}, cv=2, error_score="raise").fit(images, labels)
    assert search.best_params_["method"] in ("auto", "zero_shot")


def test_zero_shot_may_win_and_new_names_be_the_goal() -> None:
    images, _ = pixels(16)
    labels = np.array(["a", "b", "c", "d"] * 4)
    made = PromptClassifier(**{**AUTO, "methods": ("zero_shot", "tip_adapter")}, goal="new").fit(images, labels)
    assert made.selection_ is not None
    assert [each.recipe for each in made.selection_.tried] == ["zero_shot"]
    assert "cannot predict class names" in made.selection_.candidates[1].skipped
    assert (made.method_.title, made.history_) == ("zero-shot CLIP", ())


@pytest.mark.parametrize("count", [4, 6, 7])
def test_few_images(count: int) -> None:
    """Some parts hold no image, or leave none for validation."""
    images, _ = pixels(count)
    labels = np.array(["x", "y"] * count)[:count]
    made = PromptClassifier(**AUTO).fit(images, labels)
    assert made.selection_ is not None
    assert len(made.selection_.chosen.right) == count


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": []}, r"methods is \[\]; name at least one"),
        ({"methods": "coop"}, "methods is 'coop'; give a list"),
        ({"methods": ["coop", "coop"]}, "each once"),
        ({"methods": 3}, "methods is 3; give a list"),
        ({"methods": ["nosuch"]}, "unknown method 'nosuch'; choose one of: .*zero_shot"),
        ({"minutes": 0}, "minutes = 0: input should be greater than 0"),
        ({"goal": "old"}, "goal = 'old': input should be 'trained' or 'new'"),
        ({"goal": "new"}, "holds out half of the classes, and there are 3"),
        ({"preset": "coop_few-shot"}, 'preset=.* has one method, and "auto" tries several'),
        ({"settings": {"method": {"prompt_depth": 2}}}, 'settings of a method belong to one method, and "auto"'),
    ],
)
def test_bad_requests(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptClassifier(**{**AUTO, **given}).fit(*pixels(6))


def test_single_images_leave_nothing_to_choose_on() -> None:
    images, labels = pixels(3)
    with pytest.raises(ConfigError, match="no class has more than one image; give more, or name one method"):
        PromptClassifier(**AUTO).fit(images, labels)


def test_auto_is_not_the_default() -> None:
    assert PromptClassifier().method == "maple"
    assert PromptClassifier(method="coop", methods=CANDIDATES, minutes=-1).get_params()["method"] == "coop"


# --- verbose, callbacks


class Follow(TrainProgress):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def start(self, epochs: int, steps: int, finished_epochs: int) -> None:
        self.seen.append(("start", epochs, steps, finished_epochs))

    def step(self, report: StepReport) -> None:
        self.seen.append(("step", report.step))

    def epoch(self, report: EpochReport) -> None:
        self.seen.append(("epoch", report))


def test_callbacks_follow_the_training_and_change_nothing() -> None:
    images, labels = pixels(6)
    quick = {**QUICK, "epochs": 2, "batch_size": 3}
    one, two = Follow(), Follow()
    made = PromptClassifier(**quick).fit(images, labels, callbacks=one)
    PromptClassifier(**quick).fit(images, labels, callbacks=[one, two])
    first, last = made.history_
    epochs = [("step", 0), ("step", 1), ("epoch", first), ("step", 2), ("step", 3), ("epoch", last)]
    assert two.seen == [("start", 2, 2, 0), *epochs]
    assert one.seen == 2 * two.seen
    assert np.array_equal(
        PromptClassifier(**quick).fit(images, labels).predict_proba(images), made.predict_proba(images)
    )


def test_callbacks_see_the_chosen_training_alone() -> None:
    follow = Follow()
    PromptClassifier(**{**AUTO, "methods": ["clip_adapter"]}).fit(*pixels(6), callbacks=[follow])
    assert [entry[0] for entry in follow.seen if entry[0] != "step"] == ["start", "epoch", "epoch"]


def test_an_exception_of_a_callback_ends_fit_and_nothing_changes() -> None:
    class Stop(TrainProgress):
        def step(self, report: StepReport) -> None:
            raise RuntimeError(f"step {report.step}")

    images, labels = pixels(6)
    made = PromptClassifier(**{**QUICK, "epochs": 1}).fit(images, labels)
    before = made.predict_proba(images)
    with pytest.raises(RuntimeError, match="step 0"):
        made.fit(images, labels, verbose=True, callbacks=Stop())
    assert np.array_equal(made.predict_proba(images), before)


@pytest.mark.parametrize("bad", [3, "bar", [print], [TrainProgress], None])
def test_bad_callbacks(bad: Any) -> None:
    with pytest.raises(InputError, match=r"callbacks .*give .*(a TrainProgress|an instance)"):
        PromptClassifier(**QUICK).fit(*pixels(6), callbacks=bad)


def test_verbose_shows_bars(capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = pixels(6)
    quick = PromptClassifier(**{**QUICK, "epochs": 2, "batch_size": 3})
    quick.fit(images, labels)
    assert capsys.readouterr() == ("", "")
    quick.fit(images, labels, verbose=True)
    out, err = capsys.readouterr()
    assert (out, "4/4" in err, "epoch 2/2" in err, "loss" in err) == ("", True, True, True)
    made = PromptClassifier(**{**AUTO, "methods": ["zero_shot", "clip_adapter"]}).fit(images, labels, verbose=True)
    out, err = capsys.readouterr()
    assert made.selection_ is not None
    assert out.strip() == made.selection_.reason
    assert "methods tried: 100%" in err


# --- messages


def _fit(*given: Any, **parameters: Any) -> Any:
    return lambda: PromptClassifier(**{**TINY, **parameters}).fit(*(given or pixels(6)))


@pytest.mark.parametrize(
    "fail",
    [
        _fit(method="nosuch"),
        _fit(method="linear_probe", settings={"method": {"inverse_regularisation": -1}}),
        _fit(preset="nosuch"),
        _fit(preset="zero_shot_base-to-novel", method="coop", epochs=-1),
        _fit(settings={"train": {"nosuch": 1}}),
        _fit(settings={"nosuch": {}}),
        _fit(settings=3),
        _fit(settings={"method": {"prompt_depth": 99}}),
        _fit(seed=None),
        _fit(shots=0),
        _fit(backbone="nosuch"),
        _fit(backbone="maple-tiny", pretrained="nosuch"),
        _fit(backbone="ViT-B-32", pretrained="nosuch.pt"),
        _fit(precision="fp8"),
        _fit(device="tpu"),
        _fit(lr=1e30, epochs=3, settings={"train": {"warmup_epochs": 0, "optimizer": "sgd"}}),
        _fit(method="tip_adapter", validation_fraction=2),
        _fit(*pixels(3), method="tip_adapter"),
        _fit(*pixels(3), method="linear_probe"),
        _fit(pixels(6)[0], np.arange(6)),
        _fit(["nosuch.png", "none.png"], ["cat", "dog"]),
        _fit(["https://example.com/a.png", "none.png"], ["cat", "dog"]),
        _fit(class_names={"cat": "x" * 2000, "dog": "d", "owl": "o"}),
        _fit(class_names=["a"]),
        _fit(**{**AUTO, "preset": "coop_few-shot"}),
        _fit(**{**AUTO, "methods": ["nosuch"]}),
        _fit(*pixels(3), **AUTO),
        lambda: PromptClassifier().predict([]),
        lambda: PromptClassifier.from_pretrained("no/such/folder"),
        lambda: PromptClassifier.from_pretrained(Path(__file__)),
        lambda: PromptClassifier(**{**QUICK, "epochs": 0}).fit(*pixels(6)).save_pretrained(__file__),
        lambda: PromptClassifier(**{**QUICK, "epochs": 0}).fit(*pixels(6)).set_class_names([""]),
        lambda: require_trusted("nosuch/clip.pt", None, "prompts.safetensors"),
        lambda: require_trusted("/nosuch/clip.pt", None, "prompts.safetensors"),
    ],
)
def test_errors_name_no_options_of_the_command_line(fail: Any) -> None:
    with pytest.raises(MapleError) as error:
        fail()
    assert not re.search(r"(^|[ (])--", str(error.value)), error.value


def test_methods_without_validation_images_name_their_settings() -> None:
    """As a run would, whose data set has none."""
    backbone = load_clip("maple-tiny", "random:1")
    features = Features(
        torch.rand(1, 2, backbone.embed_dim), torch.arange(2), torch.rand(0, backbone.embed_dim), torch.arange(0)
    )
    for name, setting in (("tip_adapter", "method.alpha=1"), ("linear_probe", "method.inverse_regularisation=1")):
        with pytest.raises(ConfigError, match=setting) as error:
            build_method({"name": name}, backbone, ["cat", "dog"]).fit_features(features)
        assert " --" not in str(error.value)
        assert f"--set {setting}" in in_options(str(error.value))


def test_the_command_line_names_its_options() -> None:
    for message, shown in (
        ("backbone=PATH", "--backbone PATH"),
        ("or with trust_backbone=True", "or with --trust-backbone"),
        ("as root=DIR or in", "as --data-root DIR or in"),
        ("file a; choose another output: a folder", "file a; choose another --output: a folder"),
        ("a rate (train.lr=...), or", "a rate (--set train.lr=...), or"),
        ("folder/method=NAME", "folder/method=NAME"),
        ("preset='method=x'", "preset='method=x'"),
    ):
        assert in_options(message) == shown
