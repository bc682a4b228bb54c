"""Settings: layers, overrides, rules, and what is refused."""

from pathlib import Path

import pytest

from maple.config import RunSettings, TrainSettings, options_layer, preset_names, read_preset, resolve
from maple.errors import ConfigError


def test_later_layers_win_and_overrides_win_over_all() -> None:
    layers = [{"train": {"lr": 0.1, "epochs": 3}}, {"train": {"lr": 0.2}}]
    assert resolve(layers).train.lr == 0.2
    found = resolve(layers, ["train.lr=0.3", "seed=0", "train.lr=0.4"])
    assert (found.train.lr, found.train.epochs, found.seed) == (0.4, 3, 0)


def test_layers_are_left_alone() -> None:
    layer = {"train": {"lr": 0.1}, "method": {"name": "maple"}}
    resolve([layer, {"train": {"lr": 0.2}}], ["train.epochs=1", "method.prompt_depth=2"])
    assert layer == {"train": {"lr": 0.1}, "method": {"name": "maple"}}


def test_options_that_are_not_given_are_left_out() -> None:
    options = {"backbone": {"name": None, "precision": "bf16"}, "train": {"lr": None}, "data": {}}
    assert options_layer(**options, seed=0, shots=None) == {"backbone": {"precision": "bf16"}, "seed": 0}
    assert options_layer(data={"shots": 0, "root": ""}) == {"data": {"shots": 0, "root": ""}}


def test_a_backbone_that_is_named_resets_the_pretrained_tag_of_lower_layers() -> None:
    preset = {"backbone": {"name": "ViT-B-16", "pretrained": "openai"}}
    assert resolve([preset, options_layer(backbone={"name": "ViT-L-14"})]).backbone.pretrained is None
    named = options_layer(backbone={"name": "ViT-L-14", "pretrained": "laion2b_s32b_b82k"})
    assert resolve([preset, named]).backbone.pretrained == "laion2b_s32b_b82k"
    assert resolve([preset, options_layer(backbone={"precision": "fp16"})]).backbone.pretrained == "openai"


def test_values_of_overrides() -> None:
    found = resolve(
        [],
        [
            "data.dataset=my pictures",
            'backbone.pretrained="openai"',
            "train.drop_last=false",
            "train.crop_scale=[0.5, 1.0]",
            'data.class_names={"n01" = "tench"}',
            "data.class_names.n02=goldfish",
        ],
    )
    assert found.data.dataset == "my pictures"
    assert found.backbone.pretrained == "openai"
    assert found.train.drop_last is False
    assert found.train.crop_scale == (0.5, 1.0)
    assert found.data.class_names == {"n01": "tench", "n02": "goldfish"}


def test_another_method_drops_the_settings_of_the_first() -> None:
    layers = [{"method": {"name": "maple", "prompt_depth": 9}}, {"method": {"name": "coop"}}]
    assert resolve(layers).method == {"name": "coop"}
    assert resolve(layers[:1], ["method.name=vpt"]).method == {"name": "vpt"}
    assert resolve(layers[:1], ["method.name=maple"]).method == {"name": "maple", "prompt_depth": 9}


@pytest.mark.parametrize("swap", [False, True])
def test_the_order_of_a_method_and_its_settings_does_not_matter(swap: bool) -> None:
    overrides = ["method.name=coop", "method.prompt_length=3"]
    found = resolve([{"method": {"name": "maple", "prompt_depth": 9}}], overrides[::-1] if swap else overrides)
    assert found.method == {"name": "coop", "prompt_length": 3}


def test_settings_without_a_method_are_maples() -> None:
    assert resolve([{"method": {"prompt_depth": 3}}]).method == {"name": "maple", "prompt_depth": 3}
    assert RunSettings().method == {"name": "maple"}


RULED = {
    "train": {"epochs": 200},
    "rules": [
        {"dataset": ["imagenet"], "train": {"epochs": 50}},
        {"shots": [1], "train": {"epochs": 40}},
        {"shots": [2, 4], "train": {"epochs": 100}},
        {"backbone": ["maple-small"], "method": {"prompt_depth": 4}, "train": {"epochs": 9, "lr": 0.5}},
    ],
}


@pytest.mark.parametrize(
    ("data", "epochs"),
    [
        ({"shots": 16, "dataset": "eurosat"}, 200),
        ({"shots": None, "dataset": "eurosat"}, 200),
        ({"shots": 4}, 100),
        ({"shots": 1}, 40),
        ({"shots": 1, "dataset": "imagenet"}, 50),
        ({"dataset": "imagenet"}, 50),
    ],
)
def test_rules(data: dict[str, object], epochs: int) -> None:
    assert resolve([RULED, {"data": data}]).train.epochs == epochs
    assert resolve([RULED, {"data": data}], ["train.epochs=7"]).train.epochs == 7
    assert resolve([RULED, {"data": data}], ["train.lr=1"]).train.epochs == epochs
    assert resolve([RULED, {"data": data, "train": {"epochs": 8}}]).train.epochs == 8


def test_a_rule_lies_directly_over_its_preset() -> None:
    preset = {"method": {"name": "maple", "prompt_depth": 9, "prompt_length": 2}, **RULED}
    small = {"backbone": {"name": "maple-small"}}
    found = resolve([preset, small], ["train.lr=0.25"])
    assert found.method == {"name": "maple", "prompt_depth": 4, "prompt_length": 2}
    assert (found.train.epochs, found.train.lr) == (9, 0.25)
    assert resolve([preset, small, {"method": {"prompt_depth": 2}}]).method["prompt_depth"] == 2
    assert resolve([preset, small, {"method": {"name": "zero_shot"}}]).method == {"name": "zero_shot"}
    assert resolve([preset, {"data": {"dataset": "dtd"}}]).method["prompt_depth"] == 9


def test_what_is_used_when_nothing_is_named() -> None:
    found = resolve([])
    assert (found.data.dataset, found.backbone.name) == ("emoji-animals", "maple-small")
    assert resolve([{"data": {"dataset": "emoji-food/noto"}}]).backbone.name == "maple-small"
    assert resolve([{"data": {"dataset": "pictures"}}]).backbone.name == "ViT-B-16"
    assert resolve([], ["backbone.name=ViT-L-14"]).backbone.name == "ViT-L-14"
    assert resolve([], ["backbone.pretrained=laion2b_s34b_b88k"]).backbone.name == "ViT-B-16"


@pytest.mark.parametrize(
    ("layers", "overrides", "message"),
    [
        ([{"train": {"rate": 1}}], [], r"unknown setting '.*rate'; choose one of: optimizer, lr, "),
        ([{"trian": {}}], [], r"unknown setting 'trian'; choose one of: method, backbone, "),
        ([{"train": {"lr": -1}}], [], r"lr = -1: input should be greater than 0"),
        ([{"train": {"lr": float("inf")}}], [], r"lr = inf: input should be a finite number"),
        ([{"train": {"epochs": "many"}}], [], r"epochs = 'many': input should be a valid integer"),
        ([{"train": 5}], [], r"train = 5: input should be"),
        ([{"data": {"shots": 0}}], [], r"shots = 0: input should be greater than or equal to 1"),
        ([], ["train.epochs=true"], r"train.epochs = True: must be a number, not true or false"),
        ([], ["train.workers=false"], r"train.workers = False: must be a number, not true or false"),
        ([{"backbone": {"precision": "fp8"}}], [], r"precision = 'fp8': .*'fp32', 'bf16' or 'fp16'"),
        ([{"seed": -1}], [], r"seed = -1: input should be greater than or equal to 0"),
        ([], ["train=5"], r"train = 5: input should be"),
        ([], ["lr"], r"the setting 'lr' must have the form section.key=value, as in train.lr=0.002"),
        ([], ["=3"], r"must have the form section.key=value"),
        ([], ["train..lr=3"], r"must have the form section.key=value"),
        ([], ["train.lr="], r"lr = '': input should be a valid number"),
        ([], ["train.optimizer=adagrad"], r"optimizer = 'adagrad': .*'sgd', 'adam' or 'adamw'"),
        ([], ["self=1"], r"unknown setting 'self'"),
        ([], ["rules=[]"], r"rules belong into a preset"),
        ([{"rules": {"epochs": 3}}], [], r"must be tables, each under \[\[rules\]\]"),
        ([{"rules": [{"shots": [1]}]}], [], r"a rule must set something under method or train"),
        ([{"rules": [{"shots": [1], "train": {"epoch": 3}}]}], [], r"unknown setting 'train.epoch'"),
        (
            [{"rules": [{"shot": [1], "train": {"epochs": 3}}]}],
            [],
            r"unknown setting '.*shot'; choose one of: dataset,",
        ),
    ],
)
def test_refused(layers: list[dict[str, object]], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(layers, overrides)


def test_settings_are_fixed_and_changed_by_copies() -> None:
    settings = TrainSettings()
    with pytest.raises(ValueError, match="frozen"):
        settings.lr = 1.0
    assert settings.changed(lr=1.0).lr == 1.0
    with pytest.raises(ConfigError, match="lr = -1"):
        settings.changed(lr=-1)


def test_a_preset_is_a_name_or_a_file(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[method]\nname = "vpt"\n', encoding="utf-8")
    assert read_preset(str(own)) == {"method": {"name": "vpt"}}
    with pytest.raises(
        ConfigError, match=r"unknown preset 'maple'; choose one of: .*cocoop_base.*, or the path of a TOML"
    ):
        read_preset("maple")
    own.write_text("[method\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"own.toml is not valid TOML: "):
        read_preset(str(own))
    own.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"own.toml cannot be read as UTF-8"):
        read_preset(str(own))
    assert read_preset(preset_names()[0])


def test_a_budget_of_steps_gives_the_epochs() -> None:
    budget = TrainSettings(steps=100)
    assert [budget.with_epochs_for(steps).epochs for steps in (1, 7, 100, 5000)] == [100, 15, 2, 2]
    assert budget.with_epochs_for(7).steps is None
    assert TrainSettings(steps=100, warmup_epochs=0).with_epochs_for(5000).epochs == 1
    assert TrainSettings(epochs=3).with_epochs_for(7).epochs == 3


def test_epochs_of_a_later_layer_replace_a_budget_of_steps() -> None:
    preset = {"train": {"steps": 800, "epochs": 5}}
    assert resolve([preset]).train.steps == 800
    assert resolve([preset, {"train": {"lr": 0.1}}]).train.steps == 800
    assert resolve([preset, {"train": {"epochs": 3}}]).train.steps is None
    assert resolve([preset], ["train.epochs=3"]).train.steps is None
    assert resolve([preset], ["train.epochs=3", "train.steps=7"]).train.steps == 7
    own = resolve([read_preset("maple_few-shot"), {"backbone": {"name": "maple-small"}}])
    assert (own.train.steps, own.train.optimizer) == (240, "adamw")
    assert (
        resolve([read_preset("maple_few-shot"), {"backbone": {"name": "maple-small"}}], ["train.epochs=4"]).train.steps
        is None
    )
