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
from maple.methods import Features, Method, build_method, linear_probe
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
    ("name", "advice"),
    [("linear_probe", "method.inverse_regularisation=1"), ("tip_adapter", "method.alpha=1 and method.beta=5.5")],
)
def test_without_validation_images_there_is_nothing_to_choose_on(name: str, advice: str, backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match=f"this data set has none: set .*{advice}.* validation images"):
        make(backbone, name=name).fit_features(some_features(backbone, val=0))
    given = {"inverse_regularisation": 1.0} if name == "linear_probe" else {"alpha": 1.0, "beta": 5.5}
    make(backbone, name=name, **given).fit_features(some_features(backbone, val=0))


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
