"""Every shipped recipe, and the published sizes: SPEC sections 3.9 and 4, on a CLIP of the published widths."""

from typing import Any

import pytest
import torch

from maple.clip import Backbone, load_clip
from maple.config import TrainSettings, preset_names, read_preset, resolve
from maple.data.catalogue import DATASET_GROUPS
from maple.methods import METHODS, build_method
from maple.runs import complete
from maple.runs.spec import target_sentences
from maple.train import learning_rate

# lr, epochs, batch, text prompt length, text depth, vision prompt length, vision depth, parameters on ViT-B/16
RECIPES: dict[str, tuple[float, int, int, int, int, int, int, int]] = {
    "cocoop_base-to-novel": (0.002, 10, 1, 4, 1, 0, 0, 35_360),
    "coop-dagger_base-to-novel": (0.002, 10, 1, 4, 1, 0, 0, 2_048),
    "coop_base-to-novel": (0.002, 200, 32, 4, 1, 0, 0, 2_048),
    "coop_few-shot": (0.002, 200, 32, 16, 1, 0, 0, 8_192),
    "deep_language_base-to-novel": (0.0025, 5, 4, 4, 12, 0, 0, 24_576),
    "independent_vl_base-to-novel": (0.0035, 5, 4, 2, 12, 2, 12, 30_720),
    "maple-reversed_base-to-novel": (0.0035, 5, 4, 2, 9, 2, 9, 9 * (2 * 768 + 768 * 512 + 512)),
    "maple-shallow_base-to-novel": (0.0035, 5, 4, 2, 1, 2, 1, 395_008),
    "maple-unified_base-to-novel": (0.0035, 5, 4, 2, 9, 2, 9, 403_200),
    "maple_base-to-novel": (0.0035, 5, 4, 2, 9, 2, 9, 3_555_072),
    "kgcoop_base-to-novel": (0.002, 100, 128, 4, 1, 0, 0, 2_048),
    "kgcoop_cross-dataset": (0.002, 100, 128, 4, 1, 0, 0, 2_048),
    "kgcoop_few-shot": (0.002, 100, 128, 4, 1, 0, 0, 2_048),
    "maple_cross-dataset": (0.0026, 2, 4, 2, 3, 2, 3, 1_185_024),
    "prograd_base-to-novel": (0.002, 100, 32, 16, 1, 0, 0, 8_192),
    "prograd_cross-dataset": (0.002, 50, 32, 16, 1, 0, 0, 8_192),
    "prograd_few-shot": (0.002, 200, 32, 16, 1, 0, 0, 8_192),
    "promptsrc-maple_base-to-novel": (0.0025, 20, 4, 2, 9, 2, 9, 3_555_072),
    "promptsrc_base-to-novel": (0.0025, 20, 4, 4, 9, 4, 9, 46_080),
    "promptsrc_cross-dataset": (0.0025, 20, 4, 4, 3, 4, 3, 15_360),
    "promptsrc_few-shot": (0.0025, 50, 4, 4, 9, 4, 9, 46_080),
    "vpt_base-to-novel": (0.0025, 5, 4, 0, 0, 8, 12, 73_728),
}
# rate, epochs, batch, optimiser, weight decay, warm-up epochs, views, smallest crop; parameters for two classes
ADAPTERS: dict[str, tuple[float, int, int, str, float, int, int, float, int]] = {
    "clip_adapter_base-to-novel": (0.0035, 10, 4, "sgd", 5e-4, 1, 10, 0.08, 131_072),
    "clip_adapter-own_few-shot": (0.05, 100, 32, "sgd", 5e-4, 1, 10, 0.08, 131_072),
    "clip_adapter_few-shot": (0.002, 200, 32, "sgd", 5e-4, 1, 10, 0.08, 131_072),
    "linear_probe_base-to-novel": (0.002, 0, 4, "sgd", 5e-4, 1, 0, 0.08, 1_026),
    "linear_probe_few-shot": (0.002, 0, 4, "sgd", 5e-4, 1, 0, 0.08, 1_026),
    "taskres_base-to-novel": (0.002, 200, 256, "adam", 5e-4, 1, 10, 0.08, 1_024),
    "taskres_few-shot": (0.002, 200, 256, "adam", 5e-4, 1, 10, 0.08, 1_024),
    "tip-adapter-f_base-to-novel": (0.001, 20, 256, "adamw", 0.01, 0, 10, 0.5, 1_024),
    "tip-adapter-f_few-shot": (0.001, 20, 256, "adamw", 0.01, 0, 10, 0.5, 1_024),
    "tip_adapter_base-to-novel": (0.002, 0, 4, "sgd", 5e-4, 1, 10, 0.5, 0),
    "tip_adapter_few-shot": (0.002, 0, 4, "sgd", 5e-4, 1, 10, 0.5, 0),
    "clap_base-to-novel": (0.1, 300, 256, "sgd", 0.0, 1, 20, 0.08, 1_024),
    "clap_few-shot": (0.1, 300, 256, "sgd", 0.0, 1, 20, 0.08, 1_024),
    "gda_base-to-novel": (0.002, 0, 4, "sgd", 5e-4, 1, 10, 0.5, 1_026),
    "gda_few-shot": (0.002, 0, 4, "sgd", 5e-4, 1, 10, 0.5, 1_026),
    "lpplusplus_base-to-novel": (0.002, 0, 4, "sgd", 5e-4, 1, 1, 0.5, 1_028),
    "lpplusplus_few-shot": (0.002, 0, 4, "sgd", 5e-4, 1, 1, 0.5, 1_028),
    "zs-lp_base-to-novel": (0.1, 300, 256, "sgd", 0.0, 1, 20, 0.08, 1_024),
    "zs-lp_few-shot": (0.1, 300, 256, "sgd", 0.0, 1, 20, 0.08, 1_024),
}


@pytest.fixture(scope="module")
def small_clip() -> Backbone:
    return load_clip("maple-small")


every = pytest.mark.parametrize("preset", preset_names())


def test_every_method_has_a_few_shot_recipe() -> None:
    names = {name.rsplit("_", 1)[0] for name in preset_names()}
    assert {name for name in names if f"{name}_few-shot" not in preset_names()} == {"zero_shot"}


@pytest.mark.parametrize("name", ["maple", "independent_vl", "vpt", "deep_language", "cocoop", "coop-dagger"])
def test_few_shot_recipes_that_nobody_published_have_a_budget_of_steps(name: str) -> None:
    few_shot, base = (resolve([read_preset(f"{name}_{kind}")]) for kind in ("few-shot", "base-to-novel"))
    assert few_shot.method == base.method
    assert few_shot.train.steps in (800, 1600, 240)
    assert few_shot.train.changed(steps=None, epochs=base.train.epochs) == base.train


@every
@pytest.mark.parametrize("shots", [1, 4, 16])
def test_the_packaged_clip_has_its_rule_at_any_number_of_shots(preset: str, shots: int) -> None:
    rules = read_preset(preset).get("rules", [])
    packaged = [rule["train"] for rule in rules if rule.get("backbone") == ["maple-small"] and "train" in rule]
    train = resolve([read_preset(preset), {"data": {"dataset": "emoji-animals", "shots": shots}}]).train
    assert all(train == train.changed(**values) for values in packaged[:1])


def test_these_are_shipped() -> None:
    assert {*RECIPES, *ADAPTERS, "zero_shot_base-to-novel"} <= set(preset_names())
    assert {read_preset(name)["method"]["name"] for name in preset_names()} == set(METHODS)


@pytest.mark.parametrize("preset", ADAPTERS)
def test_values_of_adapters(preset: str, vit_b16: Backbone) -> None:
    settings = complete(resolve([read_preset(preset), {"data": {"dataset": "sun397"}}]))
    train = settings.train
    method = build_method(settings.method, vit_b16, ["cat", "dog"])
    found = (train.lr, train.epochs, train.batch_size, train.optimizer, train.weight_decay, train.warmup_epochs)
    assert (*found, train.views, train.crop_scale[0], method.parameter_count()) == ADAPTERS[preset]
    assert (method.text_prompts(), method.vision_prompts(), method.accepts_features) == ([], [], True)


# gaopengcuhk/Tip-Adapter@d0e2d6f configs/: init_alpha and search_scale, whose first is that of beta.
TIP_ADAPTER: dict[str, tuple[float, tuple[int, int]]] = {
    "imagenet": (1.17, (7, 3)),
    "caltech101": (3, (12, 5)),
    "oxford_pets": (1.17, (7, 3)),
    "stanford_cars": (3, (20, 10)),
    "oxford_flowers": (10, (50, 50)),
    "food101": (1.17, (10, 10)),
    "fgvc_aircraft": (5, (30, 30)),
    "sun397": (1.17, (12, 10)),
    "dtd": (2, (13, 13)),
    "eurosat": (2, (12, 10)),
    "ucf101": (3, (7, 3)),
}


@pytest.mark.parametrize("protocol", ["few-shot", "base-to-novel"])
@pytest.mark.parametrize("name", ["tip_adapter", "tip-adapter-f"])
@pytest.mark.parametrize("dataset", [*TIP_ADAPTER, "photos"])
def test_settings_of_tip_adapter(dataset: str, name: str, protocol: str) -> None:
    settings = complete(resolve([read_preset(f"{name}_{protocol}"), {"data": {"dataset": dataset}}]))
    method, train, learns = settings.method, settings.train, name == "tip-adapter-f"
    assert (method["start_alpha"], tuple(method["search_scale"])) == TIP_ADAPTER.get(dataset, (1.17, (7, 3)))
    assert (method["learn_keys"], method["start_beta"], method["search_steps"]) == (learns, 1.0, [200, 20])
    assert train.epochs == (0 if not learns else 100 if dataset == "eurosat" else 20)
    assert settings.data.validation == "all"
    assert train.drop_last is not learns


@pytest.mark.parametrize(
    ("data", "lr", "epochs", "scale"),
    [
        ({"dataset": "dtd", "shots": 16}, 0.002, 200, 0.5),
        ({"dataset": "dtd", "shots": 4}, 0.002, 100, 0.5),
        ({"dataset": "oxford_flowers", "shots": 1}, 0.002, 100, 1.0),
        ({"dataset": "oxford_flowers", "shots": 8}, 0.002, 200, 1.0),
        ({"dataset": "imagenet", "shots": 2}, 2e-4, 100, 0.5),
        ({"dataset": "imagenet", "shots": 16}, 2e-4, 200, 0.5),
    ],
)
def test_recipes_of_taskres(data: dict[str, Any], lr: float, epochs: int, scale: float) -> None:
    settings = resolve([read_preset("taskres_few-shot"), {"data": data}])
    assert (settings.train.lr, settings.train.epochs, settings.method["scale"]) == (lr, epochs, scale)


@pytest.mark.parametrize("preset", [*RECIPES, "zero_shot_base-to-novel"])
def test_values_are_the_published_ones(preset: str, vit_b16: Backbone) -> None:
    settings = complete(resolve([read_preset(preset), {"data": {"dataset": "eurosat"}}]))
    method = build_method(settings.method, vit_b16, ["cat", "dog"])
    prompts = [[tuple(token.shape) for token in side] for side in (method.text_prompts(), method.vision_prompts())]
    count = sum(value.numel() for value in method.prompt_parameters().values())
    if preset == "zero_shot_base-to-novel":
        assert (prompts, count) == ([[], []], 0)
        return
    lr, epochs, batch, text, text_depth, vision, vision_depth, parameters = RECIPES[preset]
    train = settings.train
    assert (train.lr, train.epochs, train.batch_size) == (lr, epochs, batch)
    assert (train.optimizer, train.momentum, train.weight_decay) == ("sgd", 0.9, 5e-4)
    assert (train.warmup_epochs, train.warmup_lr, train.schedule) == (1, 1e-5, "cosine")
    assert (train.crop_scale, train.flip) == ((0.08, 1.0), 0.5)
    assert (settings.data.shots, settings.evaluate.batch_size) == (16, 100)
    assert prompts == [[(text, 512)] * text_depth, [(vision, 768)] * vision_depth]
    assert count == parameters
    random_start = preset == "coop_few-shot"
    words = settings.method.get("init_text", "a photo of a")
    assert words == ("" if random_start else "a photo of a")


COUNTS: list[tuple[dict[str, Any], int]] = [
    ({"name": "zero_shot"}, 0),
    ({"name": "maple", "prompt_length": 2, "prompt_depth": 9}, 3_555_072),
    ({"name": "maple", "prompt_length": 2, "prompt_depth": 3}, 1_185_024),
    ({"name": "maple", "prompt_length": 2, "prompt_depth": 1}, 395_008),
    ({"name": "maple", "prompt_length": 2, "prompt_depth": 9, "coupling_sharing": "unified"}, 403_200),
    ({"name": "independent_vl", "text_prompt_length": 2, "vision_prompt_length": 2}, 30_720),
    ({"name": "deep_language", "prompt_length": 4, "prompt_depth": 12}, 24_576),
    ({"name": "vpt", "vision_prompt_length": 8, "vision_prompt_depth": 12}, 73_728),
    ({"name": "coop", "prompt_length": 4}, 2_048),
    ({"name": "coop", "prompt_length": 16}, 8_192),
    ({"name": "cocoop", "prompt_length": 4}, 35_360),
    ({"name": "cocoop", "meta_net_reduction": 1, "meta_net_layers": 14}, 3_679_232),
    ({"name": "maple", "prompt_sharing": "unified"}, 3_555_072 - 8 * 2 * 512),
    ({"name": "independent_vl", "prompt_sharing": "unified"}, 2 * (512 + 768)),
    ({"name": "tcp"}, 331_904),
    ({"name": "clip_lora"}, 184_320),
    ({"name": "two_stage"}, 61_440 + 512),
    ({"name": "two_stage", "sides": "vision", "vision_start": 6}, 18_432 + 512),
    ({"name": "two_stage", "tuned": "lora"}, 184_320 + 512),
    ({"name": "mma"}, 674_560),
    ({"name": "mmapp"}, 674_560),
    ({"name": "mmrl"}, 4_992_256),
    ({"name": "mmrl", "token_width": 2048}, 18_762_496),
    ({"name": "mmrlpp"}, 813_312),
    ({"name": "dept", "prompt_length": 16}, 8_192 + 2_048 + 513),
    ({"name": "dept", "base_method": "kgcoop"}, 2_048 + 2_048 + 513),
    ({"name": "dept", "base_method": "cocoop"}, 35_360 + 2_048 + 513),
    ({"name": "dept", "base_method": "maple"}, 3_555_072 + 2_048 + 513),
]


@pytest.mark.parametrize(("description", "count"), COUNTS)
def test_published_parameter_counts(description: dict[str, Any], count: int, vit_b16: Backbone) -> None:
    method = build_method(description, vit_b16, ["cat"])
    assert sum(value.numel() for value in method.prompt_parameters().values()) == count


@pytest.mark.parametrize(
    ("preset", "data", "epochs"),
    [
        *(("coop_few-shot", {"shots": shots}, epochs) for shots, epochs in [(16, 200), (8, 200), (4, 100), (2, 100)]),
        ("coop_few-shot", {"shots": 1}, 50),
        *(("coop_few-shot", {"dataset": "imagenet", "shots": shots}, 50) for shots in (1, 2, 4, 8, 16)),
        ("coop_base-to-novel", {"dataset": "imagenet"}, 50),
        ("coop_base-to-novel", {"dataset": "eurosat"}, 200),
        ("coop_base-to-novel", {"dataset": "eurosat", "shots": 1}, 200),
    ],
)
def test_epochs_of_coop(preset: str, data: dict[str, Any], epochs: int) -> None:
    layers = [read_preset(preset), {"data": {"dataset": "eurosat", **data}}]
    assert resolve(layers).train.epochs == epochs
    assert resolve(layers, ["train.epochs=3"]).train.epochs == 3


def test_five_epochs_of_maple() -> None:
    train = resolve([read_preset("maple_base-to-novel"), {"data": {"dataset": "eurosat"}}]).train
    rates = [learning_rate(train, epoch) for epoch in range(5)]
    assert rates == pytest.approx([1e-5, 3.5e-3, 3.1658e-3, 2.2908e-3, 1.2092e-3], rel=2e-5)


def test_zero_shot_takes_the_data_sets_template() -> None:
    layers = [read_preset("zero_shot_base-to-novel")]
    eurosat = complete(resolve([*layers, {"data": {"dataset": "eurosat"}}]))
    assert eurosat.method["templates"] == ["a centered satellite photo of {}."]
    assert complete(resolve(layers)).method["templates"] == ["a photo of a {}."]
    own = complete(resolve([*layers, {"data": {"dataset": "eurosat"}}], ['method.templates=["a {}"]']))
    assert own.method["templates"] == ["a {}"]


@pytest.mark.parametrize(
    ("preset", "dataset", "template"),
    [
        ("kgcoop_base-to-novel", "eurosat", "a centered satellite photo of {}."),
        ("kgcoop_base-to-novel", "oxford_pets", "a photo of a {}, a type of pet."),
        ("dept-kgcoop_base-to-novel", "eurosat", "a centered satellite photo of {}."),
        ("dept-kgcoop_cross-dataset", "dtd", "a photo of a {}, a type of texture."),
        ("kgcoop_cross-dataset", "dtd", "a photo of a {}, a type of texture."),
        ("prograd_base-to-novel", "eurosat", "a centered satellite photo of {}."),
        ("prograd_base-to-novel", "oxford_pets", "a type of pet, a photo of a {}."),
        ("prograd_base-to-novel", "food101", "a type of food, a photo of {}."),
        ("prograd_base-to-novel", "sun397", "a photo of a {}."),
        ("prograd_few-shot", "dtd", "a texture of {}."),
        ("tcp_base-to-novel", "food101", "a photo of a {}, a type of food."),
        ("tcp_cross-dataset", "food101", "a photo of a {}, a type of food."),
        ("tcp_few-shot", "food101", "a photo of a {}, a type of food."),
        ("tcp_few-shot", "fgvc_aircraft", "a photo of an aircraft {}."),
    ],
)
def test_teachers_take_the_data_sets_template(preset: str, dataset: str, template: str) -> None:
    settings = complete(resolve([read_preset(preset), {"data": {"dataset": dataset}}]))
    assert settings.method["teacher_template"] == template


@pytest.mark.parametrize(
    ("preset", "target", "sentences"),
    [
        ("zero_shot_base-to-novel", "dtd", {"templates": ["{} texture."]}),
        ("mmrl_cross-dataset", "eurosat", {"template": "a centered satellite photo of {}."}),
        (
            "tcp_cross-dataset",
            "fgvc_aircraft",
            {"template": "X X X X {}, a type of aircraft.", "teacher_template": "a photo of an aircraft {}."},
        ),
        ("zero_shot_base-to-novel", "imagenetv2", {}),
        ("maple_cross-dataset", "eurosat", {}),
        ("prograd_cross-dataset", "eurosat", {}),
        ("kgcoop_cross-dataset", "oxford_pets", {}),
        ("dept-kgcoop_cross-dataset", "oxford_pets", {}),
        ("clip_lora_base-to-novel", "eurosat", {}),
        ("zero_shot_base-to-novel", "path/to/images", {}),
    ],
)
def test_sentences_of_a_target_data_set(preset: str, target: str, sentences: dict[str, Any]) -> None:
    settings = complete(resolve([read_preset(preset), {"data": {"dataset": "imagenet"}}]))
    assert target_sentences(settings, target) == sentences
    for key in sentences:
        value = ["a {}"] if key == "templates" else "X X X X a {}"
        chosen = settings.changed(method={**settings.method, key: value})
        assert key not in target_sentences(chosen, target), "sentences that were chosen stay"


@pytest.mark.parametrize(
    ("data", "epochs", "strength"),
    [
        ({"dataset": "dtd", "shots": 16}, 200, 0.8),
        ({"dataset": "dtd", "shots": 4}, 100, 1.0),
        ({"dataset": "dtd", "shots": 1}, 50, 1.0),
        ({"dataset": "eurosat", "shots": 8}, 200, 0.8),
        ({"dataset": "eurosat", "shots": 2}, 100, 1.0),
        ({"dataset": "food101", "shots": 16}, 200, 1.0),
        ({"dataset": "imagenet", "shots": 16}, 50, 1.0),
    ],
)
def test_few_shot_recipes_of_prograd(data: dict[str, Any], epochs: int, strength: float) -> None:
    settings = resolve([read_preset("prograd_few-shot"), {"data": data}])
    assert (settings.train.epochs, settings.method["strength"]) == (epochs, strength)


@pytest.mark.parametrize(
    ("preset", "dataset", "mean", "std"),
    [
        ("promptsrc_base-to-novel", "eurosat", 15, 1),
        ("promptsrc_cross-dataset", "imagenet", 6, 10),
        ("promptsrc_few-shot", "food101", 30, 30),
        ("promptsrc_few-shot", "eurosat", 45, 5),
    ],
)
def test_gaussians_of_promptsrc(preset: str, dataset: str, mean: float, std: float) -> None:
    settings = complete(resolve([read_preset(preset), {"data": {"dataset": dataset}}]))
    method = settings.method
    assert (method["gpa_mean"], method["gpa_std"]) == (mean, std)
    assert (method["text_loss_weight"], method["image_loss_weight"]) == (25, 10)
    assert len(set(method["teacher_templates"])) == 60


@every
def test_every_recipe_fits_the_packaged_clip(preset: str, small_clip: Backbone) -> None:
    settings = complete(resolve([read_preset(preset)]))
    assert (settings.backbone.name, settings.data.dataset) == ("maple-small", "emoji-animals")
    assert (
        build_method(settings.method, small_clip, ["cat", "dog"])
        .encode_images(torch.zeros(1, 3, 64, 64))
        .isfinite()
        .all()
    )


@every
def test_every_recipe_fits_the_packaged_clip_on_every_data_set(preset: str, small_clip: Backbone) -> None:
    """What a preset says of single data sets does not hide what it says of the packaged CLIP."""
    for data in ({"dataset": "eurosat"}, {"dataset": "imagenet"}, {"dataset": "stanford_cars", "shots": 1}):
        settings = complete(resolve([read_preset(preset), {"data": data, "backbone": {"name": "maple-small"}}]))
        assert build_method(settings.method, small_clip, ["cat", "dog"]).class_names == ("cat", "dog")


@pytest.mark.parametrize("preset", [name for name in preset_names() if name.startswith("prograd_")])
def test_prograd_fits_the_packaged_clip_with_every_published_sentence(preset: str, small_clip: Backbone) -> None:
    for dataset in (*DATASET_GROUPS["paper11"], *DATASET_GROUPS["imagenet-variants"]):
        settings = complete(
            resolve([read_preset(preset), {"data": {"dataset": dataset}, "backbone": {"name": "maple-small"}}])
        )
        assert settings.train.optimizer == "adamw"
        build_method(settings.method, small_clip, ["cat", "dog"])


@every
def test_every_value_is_a_setting(preset: str) -> None:
    content = read_preset(preset)
    assert content.get("train", {}).keys() <= TrainSettings.model_fields.keys()
    assert complete(complete(resolve([content]))) == complete(resolve([content]))
