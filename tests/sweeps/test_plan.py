"""The runs and evaluations that a sweep expands to."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from maple.cli import app
from maple.clip import Backbone, tower_depths
from maple.errors import ConfigError, DataError
from maple.methods import build_method
from maple.runs import read_rows
from maple.runs.evaluation import evaluation_request
from maple.runs.folder import append_row
from maple.sweeps import PlannedRun, SweepSettings, plan_sweep, read_sweep, sweep_names
from maple.sweeps.plan import PlannedEvaluation
from maple.sweeps.runner import status_of


def planned(protocol: str = "base-to-novel", **values: object) -> list[PlannedRun]:
    settings = {"methods": ["maple"], "datasets": ["eurosat"], **values}
    return plan_sweep(SweepSettings(protocol=protocol, **settings))


def test_base_to_novel_trains_on_base_and_evaluates_on_both() -> None:
    runs = planned(methods=["zero_shot", "maple"], datasets=["eurosat", "dtd"], seeds=[0, 1])
    assert len({run.name for run in runs}) == 6, "zero-shot CLIP once on each data set"
    assert {run.settings.data.classes for run in runs} == {"base"}
    assert {run.evaluations for run in runs} == {(PlannedEvaluation(None, "base"), PlannedEvaluation(None, "novel"))}
    assert [(run.label, run.settings.seed) for run in runs[:3]] == [
        ("zero_shot eurosat", 0),
        ("maple eurosat seed 0", 0),
        ("maple eurosat seed 1", 1),
    ]
    assert {run.recipe for run in runs} == {"zero_shot_base-to-novel", "maple_base-to-novel"}
    assert runs[0].settings.method == {"name": "zero_shot", "templates": ["a centered satellite photo of {}."]}


def test_transfer_trains_on_the_source_and_evaluates_every_target() -> None:
    (run,) = planned("cross-dataset", source="dtd", datasets=["eurosat", "dtd", "food101"], seeds=[1])
    assert (run.settings.data.dataset, run.settings.data.classes) == ("dtd", "all")
    assert run.evaluations == (
        PlannedEvaluation(None, "all"),
        PlannedEvaluation("eurosat", "all"),
        PlannedEvaluation("food101", "all"),
    )
    assert (run.recipe, run.settings.method["prompt_depth"]) == ("maple_cross-dataset", 3)
    (repeated,) = planned("cross-dataset", source="dtd", datasets=["cross10", "eurosat"], seeds=[1])
    assert len(repeated.evaluations) == 10, "the run's own, and nine others"
    (domains,) = planned("domain-generalization", source="dtd", seeds=[1])
    assert domains.recipe == "maple_cross-dataset"
    (without_one,) = planned("cross-dataset", source="dtd", seeds=[1], methods=["vpt"])
    assert without_one.recipe == "vpt_base-to-novel"


def test_zero_shot_is_run_once_unless_the_seed_draws_its_images(make_images: Callable[..., Path]) -> None:
    def seeds(dataset: str, **values: object) -> list[int]:
        runs = planned("few-shot", methods=["coop", "zero_shot"], datasets=[dataset], shots=[1, 4, None], **values)
        assert len([run for run in runs if run.settings.method["name"] == "coop"]) == 9 * len(values.get("grid", [1]))
        return [run.settings.seed for run in runs if run.settings.method["name"] == "zero_shot"]

    divided = make_images()
    assert seeds("eurosat") == seeds("emoji-food/lineart") == seeds(str(divided)) == [1]
    undivided = divided / "train"
    assert seeds(str(undivided)) == [1, 2, 3], "each seed holds out other images"
    assert seeds(str(divided / "nothing")) == [1, 2, 3]
    # How the others are trained does not matter; its own settings do.
    methods = {"methods": ["zero_shot"], "grid": {"train.lr": [0.1, 0.2]}}
    assert [run.settings.seed for run in planned(**methods)] == [1]
    sentences = {"methods": ["zero_shot"], "grid": {"templates": [["a {}."], ["the {}."]]}}
    assert [run.label for run in planned(**sentences)] == [
        "zero_shot eurosat templates=['a {}.']",
        "zero_shot eurosat templates=['the {}.']",
    ]
    # Images of other folders are all evaluated; those of the source as its user has divided them.
    targets = {"methods": ["zero_shot"], "datasets": [str(undivided)]}
    assert [run.settings.seed for run in planned("cross-dataset", **targets, source=str(divided))] == [1]
    targets = {"methods": ["zero_shot"], "datasets": ["eurosat"]}
    assert [run.settings.seed for run in planned("cross-dataset", **targets, source=str(undivided))] == [1, 2, 3]


def test_the_one_run_of_zero_shot_is_that_of_earlier_sweeps() -> None:
    alone = planned(methods=["zero_shot"], seeds=[1])
    assert [run.name for run in planned(methods=["zero_shot"], seeds=[1, 2])] == [run.name for run in alone]


def test_few_shot_varies_the_shots() -> None:
    runs = planned("few-shot", methods=["coop"], seeds=[1], shots=[1, 4, 16, None])
    assert [(run.settings.data.shots, run.settings.train.epochs) for run in runs] == [
        (1, 50),
        (4, 100),
        (16, 200),
        (None, 200),
    ]
    assert [run.label for run in runs][-1] == "coop eurosat all shots seed 1"
    assert [run.settings.data.shots for run in planned("few-shot", seeds=[1])] == [1, 2, 4, 8, 16]
    assert [run.settings.data.shots for run in planned(seeds=[1])] == [16]


def test_a_grid_is_every_combination_and_equal_runs_are_one() -> None:
    runs = planned(seeds=[1], grid={"prompt_depth": [1, 9], "train.lr": [0.0035, 0.01]})
    assert [(run.settings.method["prompt_depth"], run.settings.train.lr) for run in runs] == [
        (1, 0.0035),
        (1, 0.01),
        (9, 0.0035),
        (9, 0.01),
    ]
    assert runs[1].label == "maple eurosat prompt_depth=1 lr=0.01 seed 1"
    assert len(planned(seeds=[1], grid={"prompt_depth": [9, 9.0]})) == 1
    assert runs[2].name == planned(seeds=[1])[0].name


def test_settings_of_all_runs_override_the_recipe_and_yield_to_the_grid() -> None:
    runs = planned(seeds=[1], settings={"train": {"lr": 0.5, "epochs": 1}}, grid={"train.lr": [0.25]})
    assert (runs[0].settings.train.lr, runs[0].settings.train.epochs) == (0.25, 1)


def test_methods_are_not_evaluated_on_classes_they_do_not_support() -> None:
    asked = {"protocol": "base-to-novel", "methods": ["coop"], "datasets": ["eurosat"], "seeds": [1]}
    own = {"settings": {"method": {"class_specific": True}}}
    assert [e.classes for e in plan_sweep(SweepSettings(**asked))[0].evaluations] == ["base", "novel"]
    assert [e.classes for e in plan_sweep(SweepSettings(**asked, **own))[0].evaluations] == ["base"]
    transfer = {**asked, "datasets": ["dtd"], "source": "eurosat", **own}
    found = {
        protocol: [e.dataset for e in plan_sweep(SweepSettings(**{**transfer, "protocol": protocol}))[0].evaluations]
        for protocol in ("cross-dataset", "domain-generalization")
    }
    assert found == {"cross-dataset": [None], "domain-generalization": [None, "dtd"]}, "other domains, same classes"


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"methods": []}, ConfigError, "methods = .*at least 1"),
        ({"seeds": [-1]}, ConfigError, "greater than or equal to 0"),
        (
            {"methods": ["mapel"]},
            ConfigError,
            "unknown method 'mapel'; choose one of: .*maple.*zero_shot.*, or the path",
        ),
        ({"protocol": "cross-dataset"}, DataError, "cross-dataset needs a source to train on: give --source"),
        ({"source": "dtd"}, ConfigError, "source = 'dtd': base-to-novel trains on each of its data sets"),
        ({"datasets": ["dtd", "eurosta"]}, DataError, "unknown data set 'eurosta'; choose one of: imagenet, "),
        ({"datasets": ["emoji-fodo"]}, DataError, "unknown data set 'emoji-fodo'; choose one of: emoji-animals, "),
        ({"protocol": "cross-dataset", "source": "imagnet"}, DataError, "unknown data set 'imagnet'"),
        ({"protocol": "base-to-nowhere"}, ConfigError, "base-to-nowhere"),
        ({"grid": {"prompt_dept": [1]}}, ConfigError, "unknown setting 'method.prompt_dept'"),
        ({"settings": {"data": {"shots": 3}}}, ConfigError, r"data.shots cannot be set .*; give --shots \(shots\)"),
        ({"settings": {"seed": 3}}, ConfigError, r"seed cannot be set for all runs of a sweep; give --seeds"),
        (
            {"settings": {"data": {"classes": "all"}}},
            ConfigError,
            "data.classes cannot be set .*; give another protocol",
        ),
        (
            {"methods": ["maple", "zero_shot"], "settings": {"method": {"prompt_depth": 2}}},
            ConfigError,
            "^zero_shot: unknown setting 'method.prompt_depth'; choose one of: templates",
        ),
        ({"extra": 1}, ConfigError, "unknown setting 'extra'"),
    ],
)
def test_refused(values: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        planned(**values)  # type: ignore[arg-type]


def test_variants_are_settings_that_belong_together() -> None:
    variants = [{"init_text": "", "deep_init": "random"}, {"deep_init": "words", "train.lr": 0.1}]
    runs = planned(seeds=[1], variants=variants, grid={"prompt_depth": [1, 2]})
    methods = [run.settings.method for run in runs]
    found = [(method["init_text"], method["deep_init"]) for method in methods]
    assert found == [("", "random")] * 2 + [("a photo of a", "words")] * 2
    assert [run.settings.train.lr for run in runs] == [0.0035, 0.0035, 0.1, 0.1]
    assert [method["prompt_depth"] for method in methods] == [1, 2, 1, 2]
    assert runs[2].label == "maple eurosat deep_init=words lr=0.1 prompt_depth=1 seed 1"


@pytest.mark.parametrize(
    ("method", "key", "kept"),
    [
        ("maple", "prompt_depth", [1, 3]),
        ("deep_language", "prompt_depth", [1, 3]),
        ("vpt", "vision_prompt_depth", [1, 3, 6]),
        ("independent_vl", "text_prompt_depth", [1, 3]),
    ],
)
def test_depths_beyond_the_backbone_are_left_out_with_a_message(
    method: str, key: str, kept: list[int], tmp_path: Path
) -> None:
    """Four text blocks and six image blocks, read from the configuration alone."""
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": {"layers": 6}, "text_cfg": {"layers": 4}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    messages: list[str] = []
    settings = {"backbone": {"name": str(tmp_path)}}
    sweep = SweepSettings(
        protocol="base-to-novel", methods=[method], datasets=["eurosat"], grid={key: [1, 3, 6, 9]}, settings=settings
    )
    runs = plan_sweep(sweep, messages.append)
    assert sorted({run.settings.method[key] for run in runs}) == kept
    assert len(messages) == 4 - len(kept)
    assert messages[-1].startswith(
        f"{key}=9 of {method} is left out: {tmp_path} has {6 if len(kept) == 3 else 4} blocks"
    )
    with pytest.raises(ConfigError, match=f"nothing is left of the sweep: {key}=20 of {method} is left out"):
        plan_sweep(SweepSettings(**{**sweep.model_dump(), "grid": {key: [20]}}))


def test_depths_are_kept_where_the_backbone_is_unknown() -> None:
    runs = planned(seeds=[1], settings={"backbone": {"name": "hf-hub:some/model"}}, grid={"prompt_depth": [1, 40]})
    assert len(runs) == 2


SHIPPED = {
    "ablation-cocoop": 3,
    "ablation-coupling": 4,
    "ablation-depth": 5,
    "ablation-depth-language": 5,
    "ablation-depth-vision": 5,
    "ablation-epochs": 10,
    "ablation-initialisation": 3,
    "ablation-length": 4,
    "ablation-prompting": 7,
    "ablation-sharing": 4,
    "complexity": 9,
    "per-class": 3,
}


def test_shipped_sweeps_expand() -> None:
    assert sweep_names() == sorted([*SHIPPED, "demo"])
    runs = plan_sweep(SweepSettings(**read_sweep("demo")))
    assert len(runs) == 13, "zero-shot CLIP once"
    assert {run.settings.backbone.name for run in runs} == {"maple-small"}
    with pytest.raises(ConfigError, match=r"unknown sweep 'dem'; choose one of: base-to-novel, .*demo, .*or the path"):
        read_sweep("dem")


@pytest.mark.parametrize(("name", "points"), SHIPPED.items())
def test_ablations_expand_to_runs_that_can_be_built(name: str, points: int, vit_b16: Backbone) -> None:
    messages: list[str] = []
    runs = plan_sweep(SweepSettings(**read_sweep(name), datasets=["eurosat"]), messages.append)
    once = sum(run.settings.method["name"] == "zero_shot" for run in runs)
    assert (len(runs), messages) == (3 * points - 2 * once, [])
    assert once <= 1
    for run in runs[:points]:
        assert run.settings.seed == 1
        build_method(run.settings.method, vit_b16, ["cat", "dog"])
    others = {"ablation-cocoop": "cocoop", "ablation-depth-language": "deep_language", "ablation-depth-vision": "vpt"}
    one = planned(methods=[others.get(name, "maple")], seeds=[1])[0]
    assert one.name in {run.name for run in runs}, "the published method is one of the points"


def test_layers_of_known_backbones(tmp_path: Path) -> None:
    assert tower_depths("ViT-L-14") == (12, 24)
    assert tower_depths("maple-tiny") == (4, 4)
    assert tower_depths("RN50") is None
    assert tower_depths("no such") is None
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 5}, "vision_config": {}}))
    assert tower_depths(str(tmp_path)) == (5, 12)


def test_another_backbone_drops_the_weights_of_the_file(tmp_path: Path) -> None:
    """As `maple train` does: the weights belong to the backbone of the file, not to the requested one."""
    path = tmp_path / "sweep.toml"
    path.write_text(
        'protocol = "base-to-novel"\nmethods = ["maple"]\ndatasets = ["eurosat"]\nseeds = [1]\n'
        '[settings.backbone]\nname = "ViT-B-16"\npretrained = "openai"\n'
    )

    def planned_by(*options: str) -> str:
        done = CliRunner().invoke(app, ["sweep", *options, "--plan", "--output", str(tmp_path)])
        assert done.exit_code == 0, done.output
        return done.stdout.split()[-1]

    plain = ("base-to-novel", "--methods", "maple", "--datasets", "eurosat", "--seeds", "1", "--backbone")
    laion = ("--pretrained", "laion400m_e32")
    assert planned_by(str(path), "--backbone", "ViT-B-32") == planned_by(*plain, "ViT-B-32")
    assert planned_by(str(path)) == planned_by(*plain, "ViT-B-16", "--pretrained", "openai")
    assert planned_by(str(path), *laion) == planned_by(*plain, "ViT-B-16", *laion)


def test_plan_for_programs(tmp_path: Path) -> None:
    options = ["base-to-novel", "--methods", "maple", "--datasets", "emoji-food", "--output", str(tmp_path)]

    def plan() -> dict[str, Any]:
        done = CliRunner().invoke(
            app, ["sweep", *options, "--seeds", "1-3", "--plan", "--json"], catch_exceptions=False
        )
        return dict(json.loads(done.stdout))

    content = plan()
    assert content["counts"] == {"new": 3}
    assert content["estimated_seconds"] is None
    first, second, _ = content["runs"]
    assert (first["method"], first["seed"], second["seed"]) == ("maple", 1, 2)
    assert first["evaluations"] == [{"dataset": "emoji-food", "classes": part} for part in ("base", "novel")]
    folder = Path(first["folder"])
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "environment.json").write_text(json.dumps({"started": "2025-05-01T10:00:00+00:00"}))
    (folder / "prompts.safetensors").write_bytes(b"")
    os.utime(folder / "prompts.safetensors", (0, datetime(2025, 5, 1, 10, 1, 30, tzinfo=UTC).timestamp()))
    rows = [{"asked": evaluation_request("emoji-food", part)} for part in ("base", "novel")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = plan()
    assert content["counts"] == {"finished": 1, "new": 2}
    assert content["runs"][0]["seconds"] == 90
    assert content["estimated_seconds"] == 180
    with pytest.raises(ConfigError, match="add --plan, or leave --json out"):
        CliRunner().invoke(app, ["sweep", *options, "--json"], catch_exceptions=False)


def test_an_evaluation_with_other_words_or_images_is_not_the_sweeps_own(tmp_path: Path) -> None:
    (run,) = planned("cross-dataset", source="emoji-food", datasets=["emoji-activities"], seeds=[1])
    run = replace(run, settings=run.settings.changed(data=run.settings.data.changed(root=str(tmp_path / "moved"))))
    folder = tmp_path / "runs" / run.name
    folder.mkdir(parents=True)
    (folder / "prompts.safetensors").write_bytes(b"")
    append_row(folder, {"dataset": "emoji-food", "asked": evaluation_request("emoji-food")})
    for number, other in enumerate(({"class_names": {"soccer": "football"}}, {"root": "/elsewhere"})):
        asked = evaluation_request("emoji-activities", **other)  # type: ignore[arg-type]
        append_row(folder, {"dataset": "emoji-activities", "items": str(number), "asked": asked})
        assert status_of(run, tmp_path / "runs") != "finished"
    asked = evaluation_request("emoji-activities", root=run.settings.data.root)
    append_row(folder, {"dataset": "emoji-activities", "items": "own", "asked": asked})
    assert status_of(run, tmp_path / "runs") == "finished"


def test_one_folder_written_twice_is_one_target(tmp_path: Path) -> None:
    photos, sketches = (tmp_path / name for name in ("photos", "sketches"))
    for folder in (photos, sketches):
        folder.mkdir()
    datasets = [str(sketches), f"{photos}/.", f"{photos}/../sketches"]
    (run,) = planned("cross-dataset", source=str(photos), datasets=datasets, seeds=[1])
    assert run.evaluations == (PlannedEvaluation(None, "all"), PlannedEvaluation(str(sketches), "all"))


def test_targets_of_one_name_and_one_list_of_files_are_two_evaluations(tmp_path: Path) -> None:
    """C/fog/3 and C/snow/3, as ImageNet-C has them."""
    targets = [tmp_path / kind / "3" for kind in ("fog", "snow")]
    for folder in targets:
        folder.mkdir(parents=True)
    (run,) = planned(
        protocol="cross-dataset", datasets=[str(folder) for folder in targets], source="emoji-food", seeds=[1]
    )
    root = tmp_path / "runs"
    (root / run.name).mkdir(parents=True)
    (root / run.name / "prompts.safetensors").write_bytes(b"")
    own = {"dataset": "emoji-food/noto", "asked": evaluation_request("emoji-food")}
    append_row(root / run.name, own)
    for folder in targets:
        assert status_of(run, root) != "finished"
        row = {"dataset": "3", "items": "same", "asked": evaluation_request(str(folder))}
        append_row(root / run.name, row)  # as earlier versions wrote it
    assert status_of(run, root) == "finished"
    append_row(root / run.name, {**row, "place": str(targets[1])})
    assert len(read_rows(root / run.name)) == 3, "it replaces the row of the same folder"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1-99999999999"], "'1-99999999999' are 99,999,999,999 numbers; give at most 10,000"),
        (["--grid", "prompt_depth=1", "--grid", "prompt_depth=3"], "prompt_depth is given twice"),
    ],
)
def test_mistyped_options_are_refused(options: list[str], message: str) -> None:
    asked = ["sweep", "base-to-novel", "--methods", "maple", "--datasets", "eurosat", "--plan"]
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, [*asked, *options], catch_exceptions=False)


@pytest.mark.parametrize(
    ("name", "key", "depths"),
    [
        ("ablation-depth", "prompt_depth", [1, 2, 3, 4]),
        ("ablation-depth-language", "prompt_depth", [1, 2, 3, 4]),
        ("ablation-depth-vision", "vision_prompt_depth", [1, 2, 3, 4, 6]),
    ],
)
def test_ablations_of_depth_are_scaled_to_a_small_clip(name: str, key: str, depths: list[int]) -> None:
    """Four text blocks and six image blocks."""
    messages: list[str] = []
    settings = {"backbone": {"name": "maple-small"}}
    sweep = SweepSettings(**read_sweep(name), datasets=["eurosat"], seeds=[1], settings=settings)
    runs = plan_sweep(sweep, messages.append)
    assert sorted(run.settings.method[key] for run in runs) == depths
    assert f"{key}=12 of 12 blocks is {depths[-1]} of the {depths[-1]} of maple-small" in messages


def test_recipes_with_equal_settings_are_one_run_and_said() -> None:
    messages: list[str] = []
    settings = {"backbone": {"name": "maple-small"}}
    sweep = SweepSettings(
        protocol="base-to-novel", methods=["coop", "coop-dagger"], datasets=["eurosat"], seeds=[1], settings=settings
    )
    assert len(plan_sweep(sweep, messages.append)) == 1
    (message,) = messages
    assert message.startswith("coop_base-to-novel and coop-dagger_base-to-novel have equal settings on maple-small")


def test_lists_of_data_sets() -> None:
    transfer = SweepSettings(protocol="cross-dataset", methods=["maple"])
    assert (transfer.source, len(transfer.datasets)) == ("imagenet", 10)
    shifted = SweepSettings(protocol="domain-generalization", methods=["maple"], source="caltech101")
    assert shifted.source == "caltech101"
    assert shifted.datasets == ["imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"]
    papers = SweepSettings(protocol="base-to-novel", methods=["maple"], datasets=["paper11", "pets"])
    assert len(papers.datasets) == 12
    assert {*transfer.datasets, "imagenet", "pets"} == set(papers.datasets)


def test_the_nearest_of_many_is_suggested() -> None:
    with pytest.raises(ConfigError, match=r"METHOD.toml\) \(did you mean maple"):
        planned(methods=["mapel"])
    with pytest.raises(DataError, match=r"did you mean eurosat\?"):
        planned(datasets=["eurosta"])


def test_a_plan_says_which_data_sets_are_absent(tmp_path: Path) -> None:
    (tmp_path / "eurosat" / "2750").mkdir(parents=True)
    options = [
        "--methods",
        "maple",
        "--datasets",
        "eurosat,dtd,emoji-food",
        "--data-root",
        str(tmp_path),
        "--seeds",
        "1",
    ]
    done = CliRunner().invoke(app, ["sweep", "base-to-novel", *options, "--plan", "--output", str(tmp_path / "runs")])
    absent = [line for line in done.stdout.splitlines() if line.startswith("absent")]
    assert absent == [f"absent: dtd, expected at {tmp_path / 'dtd' / 'images'}"]


def test_a_sweep_file_without_a_protocol_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('methods = ["maple"]\n')
    with pytest.raises(ConfigError, match="names no datasets"):
        CliRunner().invoke(app, ["sweep", str(tmp_path / "mine.toml"), "--plan"], catch_exceptions=False)
