"""Probes, caches and adapters against plain arithmetic, and fitted to features."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from variants import NAMES

from maple.checkpoint import load_prompts, save_prompts
from maple.clip import Backbone
from maple.errors import CheckpointError, ConfigError
from maple.methods import Features, Method, build_method, features, gda, linear_probe, lpplusplus, tip_adapter
from maple.methods.linear_probe import solve


def make(backbone: Backbone, **description: Any) -> Method:
    return build_method(description, backbone, NAMES, generator=torch.Generator().manual_seed(3))


def some_features(backbone: Backbone, *, views: int = 2, shots: int = 4, val: int = 5, noise: float = 1.0) -> Features:
    """Three clusters of features, of any length."""
    generator = torch.Generator().manual_seed(8)
    centres = torch.randn(3, backbone.embed_dim, generator=generator)
    labels, val_labels = torch.arange(3).repeat(shots), torch.arange(3).repeat(val)

    def around(found: Tensor, *shape: int) -> Tensor:
        return 3 * (centres[found] + noise * torch.randn(*shape, len(found), backbone.embed_dim, generator=generator))

    return Features(around(labels, views), labels, around(val_labels), val_labels)


def accuracy(method: Method, features: Tensor, labels: Tensor) -> float:
    return float((method.predict_logits(features).argmax(-1) == labels).float().mean())


# --- linear probe


@pytest.mark.parametrize("c", [1e-2, 1.0, 100.0])
def test_the_regression_is_scikit_learns(c: float) -> None:
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(3).repeat(20)
    x = F.normalize(torch.randn(3, 8, generator=generator)[y] + torch.randn(60, 8, generator=generator), dim=-1)
    weight, bias = solve(x, y, 3, c)
    theirs = LogisticRegression(C=c, max_iter=5000, tol=1e-9).fit(x.double().numpy(), y.numpy())
    torch.testing.assert_close(weight, torch.from_numpy(theirs.coef_), rtol=1e-3, atol=1e-3)
    # A constant added to every bias changes nothing, and only the penalised weights are told apart.
    mine, other = bias - bias.mean(), torch.from_numpy(theirs.intercept_ - theirs.intercept_.mean())
    torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


def test_a_probe_is_solved_on_all_views_at_the_best_strength(backbone: Backbone) -> None:
    method, features = make(backbone, name="linear_probe"), some_features(backbone)
    method.fit_features(features)
    assert accuracy(method, features.val, features.val_labels) > 0.9
    strength = method.selected_hyperparameters()["inverse_regularisation"]
    x, y = F.normalize(features.train.flatten(0, 1), dim=-1), features.train_labels.repeat(2)
    weight, bias = solve(x, y, 3, strength)
    logits = F.normalize(features.val, dim=-1).double() @ weight.T + bias
    torch.testing.assert_close(method.predict_logits(features.val), logits.float(), rtol=1e-4, atol=1e-4)
    best = accuracy(method, features.val, features.val_labels)
    for c in (1e6, 1e2, 1e-2, 1e-6):
        other = make(backbone, name="linear_probe", inverse_regularisation=c)
        other.fit_features(features)
        assert other.selected_hyperparameters() == {"inverse_regularisation": c}
        assert accuracy(other, features.val, features.val_labels) <= best


def test_a_probe_solves_each_problem_of_its_search_once(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[float] = []
    monkeypatch.setattr(linear_probe, "solve", lambda x, y, classes, c: (solved.append(c), solve(x, y, classes, c))[1])
    method, features = make(backbone, name="linear_probe"), some_features(backbone)
    method.fit_features(features)
    assert len(solved) == len(set(solved)) == 15
    assert method.selected_hyperparameters()["inverse_regularisation"] in solved


def test_a_probe_before_it_is_fitted_is_zero_shot_clip(backbone: Backbone, images: Tensor) -> None:
    zero_shot = make(backbone, name="zero_shot").predict_logits(images)
    torch.testing.assert_close(make(backbone, name="linear_probe").predict_logits(images), zero_shot)


# --- Tip-Adapter


def votes_by_hand(features: Features, seen: Tensor, alpha: float, beta: float) -> Tensor:
    keys = F.normalize(features.train.mean(0), dim=-1)
    votes = torch.zeros(len(seen), 3)
    for row, one in enumerate(F.normalize(seen, dim=-1)):
        for key, label in zip(keys, features.train_labels, strict=True):
            votes[row, label] += alpha * torch.exp(-beta * (1 - one @ key))
    return votes


@pytest.mark.parametrize("learn_keys", [False, True])
def test_the_cache_votes(learn_keys: bool, backbone: Backbone) -> None:
    features = some_features(backbone)
    method = make(backbone, name="tip_adapter", alpha=2.5, beta=4.0, learn_keys=learn_keys)
    method.fit_features(features)
    method.select_hyperparameters(features)
    zero_shot = make(backbone, name="zero_shot").predict_logits(features.val)
    expected = zero_shot + votes_by_hand(features, features.val, 2.5, 4.0)
    torch.testing.assert_close(method.predict_logits(features.val), expected)
    assert method.selected_hyperparameters() == {"alpha": 2.5, "beta": 4.0}
    assert method.parameter_count() == (12 * backbone.embed_dim if learn_keys else 0)


@pytest.mark.parametrize("learn_keys", [False, True])
def test_alpha_and_beta_are_the_best_of_the_grid(learn_keys: bool, backbone: Backbone) -> None:
    features = some_features(backbone, noise=2.0)
    grid = {"search_scale": (9.0, 30.0), "search_steps": (4, 5)}
    method = make(backbone, name="tip_adapter", learn_keys=learn_keys, start_alpha=0.5, start_beta=1.5, **grid)
    method.fit_features(features)
    if learn_keys:
        assert method.selected_hyperparameters() == {"alpha": 0.5, "beta": 1.5}, "fine-tuning runs at these"
        method.select_hyperparameters(features)
    zero_shot = make(backbone, name="zero_shot").predict_logits(features.val)
    found: dict[tuple[float, float], int] = {}
    for beta in (0.1 + step * 8.9 / 4 for step in range(4)):
        for alpha in (0.1 + step * 29.9 / 5 for step in range(5)):
            logits = zero_shot + votes_by_hand(features, features.val, alpha, beta)
            found[beta, alpha] = int((logits.argmax(-1) == features.val_labels).sum())
    beta, alpha = max(found, key=lambda pair: found[pair])
    assert len(set(found.values())) > 2, "the grid matters"
    assert method.selected_hyperparameters() == pytest.approx({"alpha": alpha, "beta": beta})


@pytest.mark.parametrize("learn_keys", [False, True])
def test_a_filled_cache_is_saved_and_loaded(learn_keys: bool, backbone: Backbone, tmp_path: Any) -> None:
    features = some_features(backbone)
    method = make(backbone, name="tip_adapter", learn_keys=learn_keys)
    method.fit_features(features)
    method.select_hyperparameters(features)
    save_prompts(tmp_path / "cache.safetensors", method)
    loaded = load_prompts(tmp_path / "cache.safetensors", backbone)
    assert loaded.saved_tensors()["keys"].shape == (12, backbone.embed_dim)
    assert loaded.selected_hyperparameters() == method.selected_hyperparameters()
    assert torch.equal(loaded.predict_logits(features.val), method.predict_logits(features.val))
    loaded.set_class_names(["fire_truck", "cat"])
    some = loaded.predict_logits(features.val)
    torch.testing.assert_close(some, method.predict_logits(features.val)[:, [2, 0]])


def test_a_cache_whose_parts_disagree_is_refused(backbone: Backbone, tmp_path: Any) -> None:
    method = make(backbone, name="tip_adapter")
    method.fit_features(some_features(backbone))
    method.register_buffer("labels", torch.zeros(3, dtype=torch.int64))
    save_prompts(tmp_path / "cache.safetensors", method)
    with pytest.raises(CheckpointError, match=r"keys has shape \[12, 32\] instead of \[3, 32\]"):
        load_prompts(tmp_path / "cache.safetensors", backbone)


@pytest.mark.parametrize(
    ("name", "advice", "given"),
    [
        ("linear_probe", "method.inverse_regularisation=1", {"inverse_regularisation": 1.0}),
        ("tip_adapter", "method.alpha=1 and method.beta=5.5", {"alpha": 1.0, "beta": 5.5}),
        ("gda", "method.alpha=1", {"alpha": 1.0}),
        ("lpplusplus", "method.select_epoch=false", {"select_epoch": False, "epochs": 2}),
    ],
)
def test_without_validation_images_there_is_nothing_to_choose_on(
    name: str, advice: str, given: dict[str, Any], backbone: Backbone
) -> None:
    with pytest.raises(ConfigError, match=f"this data set has none: set .*{advice}.* validation images"):
        make(backbone, name=name).fit_features(some_features(backbone, val=0))
    make(backbone, name=name, **given).fit_features(some_features(backbone, val=0))


@pytest.mark.parametrize(
    ("description", "seconds"),
    [
        ({"name": "linear_probe"}, 15 * 70.0),
        ({"name": "linear_probe", "inverse_regularisation": 1.0}, 70.0),
        ({"name": "tip_adapter"}, 200.0),
        ({"name": "tip_adapter", "search_steps": [30, 2]}, 30.0),
        ({"name": "tip_adapter", "beta": 5.5}, 1.0),
        ({"name": "lpplusplus", "epochs": 25}, 25.0),
        ({"name": "gda"}, 1.0),
        ({"name": "clap"}, 0.0),
        ({"name": "zero_shot"}, 0.0),
    ],
)
def test_the_time_of_a_fit_is_estimated_from_a_few_of_its_steps(
    backbone: Backbone, description: dict[str, Any], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock by which each call takes as many seconds as it makes steps."""
    timed: list[int] = []

    def seconds_of_steps(run: Any, steps: int, few: int) -> float:
        for number in (1, few):
            run(number)  # a few steps do run
        timed.append(few)
        return float(steps)

    for module in (linear_probe, lpplusplus, tip_adapter):
        monkeypatch.setattr(module, "seconds_of_steps", seconds_of_steps)
    monkeypatch.setattr(gda, "seconds_of", lambda compute: (compute(), 1.0)[1])
    method = make(backbone, **description)
    assert method.fit_seconds(some_features(backbone)) == seconds
    assert all(few < 10 for few in timed)


def test_seconds_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed part, and one for each step."""
    clock = [0.0]

    def run(steps: int) -> None:
        clock[0] += 5 + 2 * steps

    monkeypatch.setattr(features.time, "perf_counter", lambda: clock[0])
    assert features.seconds_of_steps(run, 100, 4) == pytest.approx(5 + 2 * 100)


# --- CLIP-Adapter and TaskRes


def test_the_adapter_mixes_its_features_with_the_towers(backbone: Backbone, images: Tensor) -> None:
    method = make(backbone, name="clip_adapter", reduction=8, ratio=0.3)
    first, second = method.prompt_parameters().values()
    assert (first.shape, second.shape) == ((4, 32), (32, 4))
    raw = backbone.image.plain(images)
    adapted = (raw @ first.T).clamp(min=0) @ second.T
    expected = F.normalize(0.3 * adapted.clamp(min=0) + 0.7 * raw, dim=-1)
    torch.testing.assert_close(method.encode_images(images), expected)


def test_the_residual_is_added_to_raw_text_features(backbone: Backbone) -> None:
    method = make(backbone, name="taskres", scale=0.25, templates=["a {}.", "the {}."])
    ids = [
        backbone.tokenize([sentence.format(name.replace("_", " ")) for name in NAMES])
        for sentence in ("a {}.", "the {}.")
    ]
    base = sum(backbone.text.plain(one) for one in ids) / 2
    torch.testing.assert_close(method.encode_classes().detach(), F.normalize(base, dim=-1))
    (residual,) = method.prompt_parameters().values()
    residual.data.normal_(generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(method.encode_classes().detach(), F.normalize(base + 0.25 * residual.detach(), dim=-1))


# --- CLAP, LP++ and GDA


def test_gda_is_the_published_estimate(backbone: Backbone) -> None:
    method, features = make(backbone, name="gda", alpha=0.5), some_features(backbone)
    method.fit_features(features)
    x, y = F.normalize(features.train.flatten(0, 1), dim=-1).double(), features.train_labels.repeat(2)
    means = torch.stack([x[y == label].mean(dim=0) for label in range(3)])
    covariance, width = (x - means[y]).T.cov(), x.shape[1]
    precision = width * torch.linalg.pinv((len(x) - 1) * covariance + covariance.trace() * torch.eye(width))
    images = F.normalize(features.val, dim=-1).double()
    scores = images @ (means @ precision).T - torch.einsum("cd,de,ce->c", means, precision, means) / 2
    zero_shot = backbone.logit_scale * images @ method.encode_classes().double().T
    expected = (zero_shot + 0.5 * scores).detach().float()
    torch.testing.assert_close(method.predict_logits(features.val), expected, rtol=1e-4, atol=1e-3)


def test_gda_selects_alpha_on_validation_images(backbone: Backbone) -> None:
    method, features = make(backbone, name="gda"), some_features(backbone)
    method.fit_features(features)
    best = accuracy(method, features.val, features.val_labels)
    alpha = method.selected_hyperparameters()["alpha"]
    for other in (1e-4, 1.0, 100.0):
        fixed = make(backbone, name="gda", alpha=other)
        fixed.fit_features(features)
        assert accuracy(fixed, features.val, features.val_labels) <= best
        assert accuracy(fixed, features.val, features.val_labels) < best or alpha <= other * 1.001


def test_gda_of_one_image_per_class_is_zero_shot(backbone: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    method, features = make(backbone, name="gda", alpha=1.0), some_features(backbone, views=1, shots=1)
    before = method.predict_logits(features.val)
    method.fit_features(features)
    assert torch.equal(method.predict_logits(features.val), before)
    assert "give more images, or more views (train.views)" in caplog.text


@pytest.mark.parametrize(
    "description",
    [
        {"name": "clap"},
        {"name": "lpplusplus", "epochs": 30, "select_epoch": False},
        {"name": "gda", "alpha": 1.0},
    ],
    ids=lambda description: description["name"],
)
def test_degenerate_training_sets(backbone: Backbone, description: dict[str, Any]) -> None:
    """A class without images keeps a finite score; of one class, that is predicted; the others are learned."""
    features = some_features(backbone, views=1)
    method = make(backbone, **description)
    method.fit_features(without_class(features, 2))
    assert method.predict_logits(features.val).isfinite().all()
    loss, _ = method.loss(features.train[0], features.train_labels)
    assert loss.isfinite()
    names = NAMES[:1]
    alone = build_method(description, backbone, names)
    alone.fit_features(without_class(without_class(features, 2), 1))
    assert alone.predict_logits(features.val).shape == (len(features.val), 1)
    assert alone.predict_logits(features.val).isfinite().all()


def without_class(features: Features, label: int) -> Features:
    """The features without the training and validation images of a class."""
    train, val = features.train_labels != label, features.val_labels != label
    return Features(features.train[:, train], features.train_labels[train], features.val[val], features.val_labels[val])


def test_a_class_without_images_gets_the_mean_of_the_others(backbone: Backbone) -> None:
    features = without_class(some_features(backbone), 2)
    method = make(backbone, name="gda", alpha=1.0)
    method.fit_features(features)
    weight = method.prompt_parameters()["weight"].detach()
    torch.testing.assert_close(weight[2], weight[:2].mean(dim=0), rtol=1e-4, atol=1e-4)
    clap: Any = make(backbone, name="clap")
    clap.fit_features(features)
    torch.testing.assert_close(clap.constraint_weights[2], clap.constraint_weights[:2].mean())


def test_lpplusplus_keeps_the_last_of_the_best_epochs(backbone: Backbone) -> None:
    method: Any = make(backbone, name="lpplusplus", epochs=25)
    features = some_features(backbone, noise=3.0)
    method.fit_features(features)
    accuracies = method.val_accuracies
    epoch = int(method.selected_hyperparameters()["epoch"])
    assert accuracies[epoch - 1] == max(accuracies)
    assert max(accuracies) not in accuracies[epoch:]
    assert accuracy(method, features.val, features.val_labels) == pytest.approx(max(accuracies))
    shorter = make(backbone, name="lpplusplus", epochs=epoch, select_epoch=False)
    shorter.fit_features(features)
    torch.testing.assert_close(shorter.predict_logits(features.val), method.predict_logits(features.val))


def test_the_weights_of_claps_constraint(backbone: Backbone) -> None:
    features = some_features(backbone)
    weights = {}
    for constraint in ("l2", "l2_corrected", "l2_constant", "l2_balanced"):
        method: Any = make(backbone, name="clap", constraint=constraint)
        method.fit_features(features)
        weights[constraint] = method.constraint_weights
    probabilities = make(backbone, name="clap").predict_logits(features.train.flatten(0, 1)).softmax(-1)
    labels = features.train_labels.repeat(2)
    expected = torch.stack([probabilities[labels == label, label].mean() for label in range(3)])
    torch.testing.assert_close(weights["l2"], expected)
    torch.testing.assert_close(weights["l2_corrected"], expected / expected.mean())
    torch.testing.assert_close(weights["l2_constant"], expected.mean().expand(3))
    assert torch.equal(weights["l2_balanced"], torch.ones(3))


def test_the_seed_decides_where_lpplusplus_starts(backbone: Backbone) -> None:
    features, biases = some_features(backbone), []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        description = {"name": "lpplusplus", "epochs": 1, "select_epoch": False}
        method = build_method(description, backbone, NAMES, generator=generator)
        method.fit_features(features)
        biases.append(method.prompt_parameters()["bias"].detach())
    assert torch.equal(biases[0], biases[1])
    assert not torch.equal(biases[0], biases[2])
