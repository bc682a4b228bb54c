"""The numbers, against ones computed by hand, and which may stand in one table."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_rows import METHODS, MakeRun, row

from maple.config import preset_names, read_preset, resolve
from maple.report import Report, Table
from maple.report.comparison import paired_tests
from maple.report.groups import IMAGENET_VARIANTS, Group
from maple.report.published import ELEVEN, follows, published_counts, published_results, recipes_of
from maple.runs import complete


def cells(table: Table, section: int = 0) -> dict[str, list[str]]:
    return {label: [cell.plain for cell in row] for label, row in table.sections[section].rows}


def best(table: Table, section: int = 0) -> dict[str, list[bool]]:
    return {label: [cell.best for cell in row] for label, row in table.sections[section].rows}


def only_group(runs: Path) -> Group:
    (group,) = Report(runs, METHODS).groups
    return group


def test_mean_deviation_and_both_averages(make_run: MakeRun, runs: Path) -> None:
    """Pets: base .8 and .9, novel .6 and .7; cars: base .4 and .5, novel .2 and .4."""
    for seed, base, novel in ((1, 0.8, 0.6), (2, 0.9, 0.7)):
        make_run("maple", "pets", seed, base=base, novel=novel)
    for seed, base, novel in ((1, 0.4, 0.2), (2, 0.5, 0.4)):
        make_run("maple", "cars", seed, base=base, novel=novel)
    (table,) = Report(runs, METHODS).tables
    assert [section.title for section in table.sections] == ["Average over 2 data sets", "cars", "pets"]
    # Deviations: .1 / sqrt 2 for a difference of .1. HM of pets: 2 * .48 / 1.4 and 2 * .63 / 1.6.
    assert cells(table, 2) == {"MaPLe": ["85.00 ± 7.07", "65.00 ± 7.07", "73.66 ± 7.20", "2"]}
    # HM of cars: .16 / .6 and .4 / .9.
    assert cells(table, 1) == {"MaPLe": ["45.00 ± 7.07", "30.00 ± 14.14", "35.56 ± 12.57", "2"]}
    # Base (.85 + .45) / 2, novel (.65 + .3) / 2; HM of .65 and .475; mean of .73661 and .35556. The seeds' own: base .6
    # and .7, novel .4 and .55, HM .48 and .616; averages of HMs .47619 and .61597.
    averages = cells(table)["MaPLe"]
    assert averages == ["65.00 ± 7.07", "47.50 ± 10.61", "54.89 ± 9.62", "54.61 ± 9.88", "2"]
    assert table.sections[0].columns[3:5] == ("HM of averages", "average of HMs")


def test_one_seed_has_no_spread(make_run: MakeRun, runs: Path) -> None:
    make_run("maple", base=0.5, novel=0.5)
    (table,) = Report(runs, METHODS).tables
    assert cells(table) == {"MaPLe": ["50.00", "50.00", "50.00", "1"]}
    assert "One seed, so there is no spread." in table.notes[0]
    assert not any(best(table)["MaPLe"]), "of one method none is the best"


def test_missing_seeds_and_data_sets(make_run: MakeRun, runs: Path) -> None:
    for seed in (1, 2, 3):
        make_run("maple", "pets", seed, base=0.5, novel=0.4 if seed < 3 else None)
        make_run("coop", "pets", seed, base=0.4, novel=0.4)
    make_run("coop", "cars", 1, base=0.4, novel=0.4)
    (table,) = Report(runs, METHODS).tables
    assert cells(table, 2)["MaPLe"][3] == "2–3"
    assert cells(table, 2)["MaPLe"][2] == "44.44 ± 0.00", "of the seeds that have both"
    assert cells(table)["MaPLe"][:4] == ["–"] * 4
    assert cells(table)["CoOp"][0] == "40.00"
    assert "No average where a data set is missing: MaPLe lacks cars." in table.notes
    assert list(cells(table, 1)) == ["CoOp"]


def test_order_and_best(make_run: MakeRun, runs: Path) -> None:
    for method, base in (("maple", 0.5), ("zero_shot", 0.5), ("coop", 0.4), ("aardvark", 0.1)):
        make_run(method, base=base, novel=base)
    (table,) = Report(runs, METHODS).tables
    assert list(cells(table)) == ["zero-shot CLIP", "CoOp", "MaPLe", "aardvark"]
    assert [flags[0] for flags in best(table).values()] == [True, False, True, False], "equal ones are both best"


def test_variants_of_a_method_are_told_apart_by_what_differs(make_run: MakeRun, runs: Path) -> None:
    for depth in (12, 9, 1):
        settings = {"prompt_depth": depth}
        make_run("maple", base=0.5, novel=0.5, folder=f"m{depth}", settings=settings, train={"lr": 0.01})
    make_run("maple", base=0.5, novel=0.5, folder="lr", train={"lr": 0.1})
    make_run("coop", base=0.5, novel=0.5)
    table, _ablation = Report(runs, METHODS).tables
    assert list(cells(table)) == [
        "CoOp",
        "MaPLe (lr=0.01, prompt_depth=1)",
        "MaPLe (lr=0.01, prompt_depth=9)",
        "MaPLe (lr=0.01, prompt_depth=12)",
        "MaPLe (lr=0.1, prompt_depth=9)",
    ]


def test_variants_that_differ_in_much_are_named_by_enough(make_run: MakeRun, runs: Path) -> None:
    """The method's own settings first; the prompts of another method by its name."""
    usual = {"lr": 0.002, "optimizer": "sgd", "weight_decay": 0.1}
    other = {"lr": 0.001, "optimizer": "adamw", "weight_decay": 0.0}
    make_run("tip_adapter", base=0.5, folder="a", settings={"learn_keys": False}, train={**usual, "epochs": 0})
    make_run("tip_adapter", base=0.6, folder="b", settings={"learn_keys": True}, train={**other, "epochs": 20})
    make_run("tip_adapter", base=0.7, folder="c", settings={"learn_keys": True}, train={**other, "epochs": 50})
    make_run("promptsrc", base=0.5, folder="d", settings={"prompts": {}})
    make_run("promptsrc", base=0.5, folder="e", settings={"prompts": {"name": "maple", "prompt_length": 2}})
    assert list(cells(Report(runs, METHODS).tables[0])) == [
        "PromptSRC (prompts=maple)",
        "PromptSRC (prompts=own)",
        "Tip-Adapter (learn_keys=False, epochs=0, ...)",
        "Tip-Adapter (learn_keys=True, epochs=20, ...)",
        "Tip-Adapter (learn_keys=True, epochs=50, ...)",
    ]


def test_settings_that_belong_to_the_data_set_make_no_variant(make_run: MakeRun, runs: Path) -> None:
    """A template, or the epochs that a preset gives to one data set; nor do workers."""
    make_run("zero_shot", "pets", base=0.5, novel=0.5, settings={"templates": ["a pet {}."]})
    make_run("zero_shot", "cars", base=0.5, novel=0.5, settings={"templates": ["a car {}."]})
    make_run("maple", "pets", 1, base=0.5, novel=0.5, train={"epochs": 50})
    make_run("maple", "cars", 1, base=0.5, novel=0.5, train={"epochs": 5})
    make_run("maple", "cars", 2, base=0.5, novel=0.5, train={"epochs": 5, "workers": 8})
    (table,) = Report(runs, METHODS).tables
    assert list(cells(table)) == ["zero-shot CLIP", "MaPLe"]
    assert cells(table, 1)["MaPLe"][3] == "2"


@pytest.mark.parametrize(("key", "value"), [("validation", "all"), ("draft", True), ("label_column", "breed")])
def test_other_images_or_validation_make_a_variant(key: str, value: Any, make_run: MakeRun, runs: Path) -> None:
    make_run("tip_adapter", base=0.5, folder="a")
    make_run("tip_adapter", base=0.6, folder="b", source={key: value})
    report = Report(runs, METHODS)
    usual = {"validation": "few-shot", "draft": False, "label_column": None}[key]
    assert sorted(cells(report.tables[0])) == sorted(f"Tip-Adapter ({key}={one})" for one in (usual, value))
    assert not report.collection.problems


def test_settings_that_an_earlier_version_did_not_have_make_no_variant(make_run: MakeRun, runs: Path) -> None:
    later = {"prompt_sharing": "per_layer"}
    make_run("maple", seed=1, base=0.5, novel=0.5)
    make_run("maple", seed=2, base=0.7, novel=0.7, settings=later, train={"steps": None, "keep": "last"})
    (table,) = Report(runs, METHODS).tables
    assert cells(table) == {"MaPLe": ["60.00 ± 14.14", "60.00 ± 14.14", "60.00 ± 14.14", "2"]}
    make_run("maple", seed=3, base=0.5, novel=0.5, settings={"prompt_sharing": "unified"}, train={"keep": "best"})
    table = Report(runs, METHODS).tables[0]
    labels = ["MaPLe (keep=best, prompt_sharing=unified)", "MaPLe (keep=last, prompt_sharing=per_layer)"]
    assert list(cells(table)) == labels


@pytest.mark.parametrize(
    "change",
    [
        {"source": {"shots": 4}},
        {"backbone": {"name": "huge", "pretrained": "x", "precision": "fp32", "fingerprint": "1"}},
        {"backbone": {"name": "tiny", "pretrained": None, "precision": "fp32", "fingerprint": "other"}},
        {"part": "val"},
    ],
    ids=["shots", "backbone", "weights", "part"],
)
def test_what_differs_is_not_mixed(change: dict[str, Any], make_run: MakeRun, runs: Path) -> None:
    make_run("maple", base=0.5, novel=0.5, folder="a")
    make_run("maple", base=0.9, novel=0.9, folder="b", **change)
    tables = [table for table in Report(runs, METHODS).tables if "against shots" not in table.caption]
    assert sorted(cells(table)["MaPLe"][0] for table in tables) == ["50.00", "90.00"]
    assert len({table.caption for table in tables}) == 2, "and the captions say which is which"


def test_zero_shot_stands_beside_any_number_of_shots(make_run: MakeRun, runs: Path) -> None:
    make_run("zero_shot", base=0.5, novel=0.5, source={"shots": 1, "classes": "all"})
    make_run("maple", base=0.6, novel=0.6, folder="a", source={"shots": 4})
    make_run("maple", base=0.7, novel=0.7, folder="b", source={"shots": 8})
    tables = [table for table in Report(runs, METHODS).tables if "against shots" not in table.caption]
    assert [list(cells(table)) for table in tables] == [["zero-shot CLIP", "MaPLe"]] * 2


def test_transfer_has_its_source_apart(make_run: MakeRun, runs: Path) -> None:
    for method, values in (("zero_shot", (0.5, 0.3, 0.5)), ("maple", (0.8, 0.4, 0.5))):
        found = [
            row(method, dataset, 1, "all", value, ["x", "y"], source={"dataset": "imagenet", "classes": "all"})
            for dataset, value in zip(("imagenet", "pets", "cars"), values, strict=True)
        ]
        make_run(method, "imagenet", rows=found)
    accuracy, transfer = Report(runs, METHODS).tables
    assert accuracy.caption == "Accuracy on all classes: tiny, 16 shots"
    assert transfer.caption == "Trained on imagenet, evaluated elsewhere (all classes): tiny, 16 shots"
    assert transfer.sections[0].columns == ("Method", "imagenet (source)", "cars", "pets", "Average", "Seeds")
    assert cells(transfer)["MaPLe"] == ["80.00", "50.00", "40.00", "45.00", "1"]
    assert best(transfer)["zero-shot CLIP"] == [False, True, False, False, False]


def test_sources_of_one_name_are_two_transfers(make_run: MakeRun, runs: Path) -> None:
    for place, values in (("a", (0.5, 0.3)), ("b", (0.7, 0.4))):
        source = {"dataset": f"/{place}/photos", "classes": "all"}
        found = [
            row("maple", dataset, 1, "all", top1, ["x"], source=source, is_own=dataset == "photos")
            for dataset, top1 in zip(("photos", "pets"), values, strict=True)
        ]
        make_run("maple", rows=found, folder=place)
    tables = {table.caption.split(",")[0]: table for table in Report(runs, METHODS).tables}
    for place, line in (("a", ["50.00", "30.00", "1"]), ("b", ["70.00", "40.00", "1"])):
        table = tables[f"Trained on photos in /{place}"]
        assert table.sections[0].columns == ("Method", f"photos in /{place} (source)", "pets", "Seeds")
        assert cells(table)["MaPLe"] == line


def test_other_class_names_are_another_column(make_run: MakeRun, runs: Path) -> None:
    source = {"classes": "all"}
    plain = [row("maple", "pets", 1, "all", 0.5, ["a", "b"], source=source)]
    renamed = [row("maple", "pets", 1, "all", 0.7, names, source=source) for names in (["c", "d"], ["a"])]
    make_run("maple", rows=plain + renamed)
    make_run("maple", seed=2, rows=[{**plain[0], "seed": 2}])
    (table,) = Report(runs, METHODS).tables
    assert table.sections[0].columns[1:4] == ("pets", "pets (1 classes)", "pets (other names)")


def test_folders_of_one_name_are_two_data_sets(make_run: MakeRun, runs: Path) -> None:
    for place, value in (("a", 0.5), ("b", 0.7)):
        found = row("maple", "pets", 1, "all", value, ["x"], source={"dataset": f"/{place}/pets", "classes": "all"})
        make_run("maple", rows=[found], folder=place)
    (table,) = Report(runs, METHODS).tables
    assert table.sections[0].columns[1:3] == ("pets in /a", "pets in /b")


def test_evaluated_folders_of_one_name_are_two_data_sets(make_run: MakeRun, runs: Path) -> None:
    """As the corruptions of ImageNet-C at one severity: C/fog/3 and C/snow/3, with the same images' names."""
    found = [
        row("maple", "3", 1, "all", top1, ["x"], items="same", is_own=False, place=place)
        for place, top1 in (("/C/fog/3", 0.5), ("/C/snow/3", 0.7))
    ]
    make_run("maple", rows=found)
    report = Report(runs, METHODS)
    assert not report.collection.problems
    assert report.tables[0].sections[0].columns[1:3] == ("3 in /C/fog", "3 in /C/snow")
    assert cells(report.tables[0])["MaPLe"][:2] == ["50.00", "70.00"]


def test_paired_comparison(make_run: MakeRun, runs: Path) -> None:
    """Wilcoxon on five positive differences: p = 2 / 2**5 two-sided."""
    for seed in range(5):
        make_run("zero_shot", seed=seed, base=0.5, novel=0.5)
        make_run("maple", seed=seed, base=0.6 + seed / 100, novel=0.5)
    (one,) = paired_tests(only_group(runs))
    assert (one.method, one.baseline, one.pairs, one.wins, one.ties) == ("MaPLe", "zero-shot CLIP", 5, 5, 0)
    assert one.differences["base"] == pytest.approx(0.12)
    assert one.differences["novel"] == 0
    assert one.p == pytest.approx(0.0625)
    table = Report(runs, METHODS).tables[1]
    assert cells(table) == {"MaPLe − zero-shot CLIP": ["+12.00", "0.00", "+5.35", "5 of 5", "0.062"]}


def test_pairs_go_by_seed(make_run: MakeRun, runs: Path) -> None:
    """Zero-shot once serves every seed on the same images; CoOp does not; fewer than five pairs are not compared."""
    make_run("zero_shot", base=0.5, novel=0.5)
    for seed in range(6):
        make_run("maple", seed=seed, base=0.5, novel=0.5)
        make_run("coop", seed=seed + 3, base=0.5, novel=0.5)
    found = paired_tests(only_group(runs))
    assert [(one.method, one.baseline, one.pairs) for one in found] == [
        ("CoOp", "zero-shot CLIP", 6),
        ("MaPLe", "zero-shot CLIP", 6),
    ]
    assert found[0].p == 1
    assert found[0].ties == 6


def test_what_a_method_cannot_speak_of_is_a_dash(make_run: MakeRun, runs: Path) -> None:
    make_run("linear_probe", "food", base=0.9)
    (table,) = Report(runs, METHODS).tables
    assert cells(table)["linear probe"][:3] == ["90.00", "–", "–"]
    assert any("cannot predict classes they were not trained on" in note for note in table.notes)
    make_run("maple", "food", base=0.8, novel=0.6)
    table = Report(runs, METHODS).tables[0]
    assert cells(table)["linear probe"][:3] == ["90.00", "–", "–"]


def test_nothing_is_said_of_dashes_where_there_are_none(make_run: MakeRun, runs: Path) -> None:
    make_run("maple", "food", base=0.8, novel=0.6)
    (table,) = Report(runs, METHODS).tables
    assert not any("cannot predict" in note for note in table.notes)


OPENAI = {"name": "ViT-B-16", "pretrained": "openai", "precision": "fp16", "fingerprint": "v"}
FULL = {"prompt_length": 2, "prompt_depth": 9, "coupling_sharing": "per_layer", "coupling_direction": "text_to_vision"}


EUROSAT = {
    "base": [*("Annual Crop Land", "Forest", "Herbaceous Vegetation Land", "Highway or Road", "Industrial Buildings")],
    "novel": ["Pasture Land", "Permanent Crop Land", "Residential Buildings", "River", "Sea or Lake"],
}


def eurosat_rows(method: str, base: float, novel: float, images: tuple[int, int] = (4200, 3900), **options: Any) -> Any:
    """Rows with the class names and the numbers of images that the published split has."""
    seed, options = options.get("seed", 1), {key: options[key] for key in options.keys() - {"train", "seed"}}
    accuracies = (("base", base, images[0]), ("novel", novel, images[1]))
    return [
        row(method, "eurosat", seed, part, top1, EUROSAT[part], images=n, **options) for part, top1, n in accuracies
    ]


@pytest.fixture
def any_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published numbers are shown beside results with made-up class names."""
    monkeypatch.setattr("maple.report.published.published_names_hash", lambda _dataset: "")


def eleven_runs(make_run: MakeRun, method: str, epochs: dict[str, int], settings: dict[str, dict[str, Any]]) -> None:
    """A run on each of the papers' data sets, with their numbers of classes and images."""
    for dataset in ELEVEN:
        counts = published_counts()[dataset]
        halves = {"base": counts["classes"] - counts["classes"] // 2, "novel": counts["classes"] // 2}
        rows = [
            row(
                method,
                dataset,
                1,
                part,
                0.8,
                [f"class {n}" for n in range(classes)],
                images=counts["test_base" if part == "base" else "test_new"],
                backbone=OPENAI,
                settings=settings.get(dataset, {}),
            )
            for part, classes in halves.items()
        ]
        make_run(method, dataset, train={"epochs": epochs.get(dataset, epochs[""])}, rows=rows)


def test_published_numbers_stand_beside_ours(make_run: MakeRun, runs: Path) -> None:
    options: dict[str, Any] = {"settings": FULL, "backbone": OPENAI}
    make_run("maple", "eurosat", train={"epochs": 5}, rows=eurosat_rows("maple", 0.95, 0.7, **options))
    make_run("zero_shot", "eurosat", rows=eurosat_rows("zero_shot", 0.5, 0.5, backbone=OPENAI))
    (table,) = Report(runs, METHODS).tables
    assert table.sections[0].columns[4:7] == ("published base", "published novel", "published HM")
    assert cells(table)["MaPLe"][3:6] == ["94.07 (+0.93)", "73.23 (−3.23)", "82.35 (−1.74)"]
    assert "PromptKD" in table.notes[-1]


@pytest.mark.parametrize(
    ("train", "settings", "shown"),
    [
        ({"lr": 0.0035, "batch_size": 4, "crop_scale": [0.08, 1.0]}, {"init_text": "a photo of a"}, True),
        ({"lr": 0.5}, {}, False),
        ({"optimizer": "adamw"}, {}, False),
        ({}, {"init_text": ""}, False),
    ],
)
def test_published_numbers_only_beside_the_recipe(
    train: dict[str, Any], settings: dict[str, Any], shown: bool, make_run: MakeRun, runs: Path
) -> None:
    rows = eurosat_rows("maple", 0.95, 0.7, settings={**FULL, **settings}, backbone=OPENAI)
    make_run("maple", "eurosat", train={"epochs": 5, **train}, rows=rows)
    (table,) = Report(runs, METHODS).tables
    assert ("published base" in table.sections[0].columns) == shown


def test_runs_of_the_presets_follow_the_recipes_of_published_results() -> None:
    """Whatever a preset does not name is completed, and numbers are written in another form then: 25 as 25.0."""
    checked, presets = set(), {name: read_preset(name) for name in preset_names()}
    for result in published_results():
        if result.method == "zero_shot":
            continue
        source = result.source_dataset or (result.dataset if result.dataset in ELEVEN else "eurosat")
        recipes = recipes_of(result.method, result.protocol, source, 16)
        for name, preset in presets.items():
            suffix = {"transfer": "_cross-dataset", "accuracy": "_few-shot"}.get(result.protocol, f"_{result.protocol}")
            if preset["method"]["name"] != result.method or not name.endswith(suffix):
                continue
            data = {"data": {"dataset": source, "shots": 16}, "backbone": {"name": "ViT-B-16"}}
            dumped = complete(resolve([preset, data])).model_dump(mode="json")
            settings = {key: str(value) for key, value in {**dumped["train"], **dumped["method"]}.items()}
            del settings["name"], settings["epochs"]
            assert any(follows(settings, recipe) for recipe in recipes), (name, source)
            checked.add(result.method)
    assert {"maple", "promptsrc", "coop", "mmrl", "dept"} <= checked


def test_every_variant_has_a_label_of_its_own(make_run: MakeRun, runs: Path) -> None:
    methods = {**METHODS, "acme": replace(METHODS["coop"], title=METHODS["maple"].title)}
    beginning = "a photo of a {}, which is one of the kinds of "
    for number, (method, settings) in enumerate(
        [
            ("maple", {}),
            ("acme", {}),
            ("coop", {"init_text": f"{beginning} textures"}),
            ("coop", {"init_text": f"{beginning} patterns"}),
        ]
    ):
        for shots in (1, 2):
            folder = f"run{number}_{shots}"
            source = {"shots": shots}
            make_run(method, base=number / 10, novel=0.5, folder=folder, settings=settings, source=source)
    expected = {
        "MaPLe [maple]",
        "MaPLe [acme]",
        f"CoOp (init_text={beginning} textures)",
        f"CoOp (init_text={beginning} patterns)",
    }
    tables = Report(runs, methods).tables
    assert all(set(cells(table)) == expected for table in tables[:2])
    (by_shots,) = (table for table in tables if "1 shot" in table.sections[0].columns)
    assert set(cells(by_shots)) == expected


def test_the_seeds_of_the_source_count_for_the_spread(make_run: MakeRun, runs: Path) -> None:
    for seed in (1, 2):
        source = {"dataset": "photos", "classes": "all"}
        rows = [row("maple", "photos", seed, "all", 0.5 + seed / 10, ["a", "b"], source=source)]
        if seed == 1:
            rows.append(row("maple", "sketches", seed, "all", 0.4, ["a", "b"], source=source))
        make_run("maple", "photos", seed, rows=rows)
    (table,) = (table for table in Report(runs, METHODS).tables if table.caption.startswith("Trained on"))
    assert "over 1 to 2 seeds" in table.notes[0]


@pytest.mark.usefixtures("any_names")
def test_an_independent_run_stands_beside_what_its_authors_published(make_run: MakeRun, runs: Path) -> None:
    """The average over the eleven data sets; each has the published numbers of classes and images."""
    eleven_runs(make_run, "mmrl", {"": 10, "imagenet": 5}, {})
    (table,) = Report(runs, METHODS).tables
    average = dict(table.sections[0].rows)
    published = [cell.text for cell in average["MMRL"]][4:7]
    assert published == ["85.68 (−5.68)", "77.16 (+2.84)", "81.20 (−1.20)"]
    rerun = [cell.text for cell in average["MMRL, independent re-run"]]
    assert rerun[:4] == [""] * 4
    assert rerun[4:7] == ["85.71 (−5.71)", "76.28 (+3.72)", "80.72 (−0.72)"]
    assert "AlignedNorm" in table.notes[-1]
    assert not any("re-run" in label for section in table.sections[1:] for label, _ in section.rows)


@pytest.mark.usefixtures("any_names")
@pytest.mark.parametrize(("sun397", "shown"), [(25, True), (50, False)])
def test_an_average_over_data_sets_with_epochs_of_their_own(
    sun397: int, shown: bool, make_run: MakeRun, runs: Path
) -> None:
    """Those of TCP's preset, which the paper's numbers have."""
    eleven_runs(make_run, "tcp", {"": 50, "imagenet": 25, "sun397": sun397}, {})
    (table,) = Report(runs, METHODS).tables
    texts = [cell.text for cell in dict(table.sections[0].rows)["TCP"]]
    assert (texts[4:7] == ["84.13 (−4.13)", "75.36 (+4.64)", "79.51 (+0.49)"]) == shown


@pytest.mark.usefixtures("any_names")
@pytest.mark.parametrize("sentences", [{}, {"class 1": ["It has a shape."]}])
def test_the_numbers_of_sentences_stand_beside_sentences_alone(
    sentences: dict[str, list[str]], make_run: MakeRun, runs: Path
) -> None:
    recipe = {"dropout": 0.1, "consistency_weight": 2.5, "sentences": sentences}
    eleven_runs(make_run, "mmapp", {"": 50}, dict.fromkeys(ELEVEN, recipe))
    (table,) = Report(runs, METHODS).tables
    assert ("published HM" in table.sections[0].columns) == bool(sentences)


def test_published_harmonic_means_are_compared_as_papers_compute_them(make_run: MakeRun, runs: Path) -> None:
    """That of the mean base and the mean novel accuracy, not the mean of the seeds' own."""
    options: dict[str, Any] = {"settings": FULL, "backbone": OPENAI}
    for seed, base, novel in ((1, 0.9, 0.5), (2, 0.7, 0.9)):
        rows = eurosat_rows("maple", base, novel, seed=seed, **options)
        make_run("maple", "eurosat", seed, train={"epochs": 5}, rows=rows)
    (table,) = Report(runs, METHODS).tables
    ours = cells(table)["MaPLe"]
    assert ours[2].startswith("71.52"), "2 * .45 / 1.4 and 2 * .63 / 1.6"
    assert ours[5] == "82.35 (−7.68)", "2 * .8 * .7 / 1.5 is .7467"
    assert "as in papers" in table.notes[-1]


@pytest.mark.parametrize(
    ("templates", "shown"),
    [
        (["a centered satellite photo of {}."], True),
        (["a photo of a {}."], False),
        (["a centered satellite photo of {}.", "a photo of a {}."], False),
    ],
)
def test_zero_shot_is_compared_with_the_papers_template_alone(
    templates: list[str], shown: bool, make_run: MakeRun, runs: Path
) -> None:
    rows = eurosat_rows("zero_shot", 0.5, 0.5, backbone=OPENAI, settings={"templates": templates})
    make_run("zero_shot", "eurosat", rows=rows)
    (table,) = Report(runs, METHODS).tables
    assert ("published base" in table.sections[0].columns) == shown


def test_published_templates_are_those_of_the_catalogue() -> None:
    from maple.data.catalogue import CATALOGUE

    results = [result for result in published_results() if result.method == "zero_shot" and result.settings]
    assert len(results) == 15
    for result in results:
        assert result.settings == {"templates": str([CATALOGUE[result.dataset].template])}


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"source": {"class_names": {"River": "a river"}}}, "eurosat: classes are renamed here"),
        ({"class_names": ["a", "b", "c", "d", "e"]}, "eurosat: other class names than the published ones"),
    ],
)
def test_published_numbers_only_beside_the_published_names(
    changes: dict[str, Any], note: str, make_run: MakeRun, runs: Path
) -> None:
    rows = eurosat_rows("maple", 0.95, 0.7, settings=FULL, backbone=OPENAI, source=changes.get("source", {}))
    rows[1] |= {key: value for key, value in changes.items() if key != "source"}
    make_run("maple", "eurosat", train={"epochs": 5}, rows=rows)
    (table,) = Report(runs, METHODS).tables
    assert "published base" not in table.sections[0].columns
    assert note in table.notes[-1]


def test_the_source_of_a_transfer_has_its_published_number(make_run: MakeRun, runs: Path) -> None:
    source = {"dataset": "imagenet", "classes": "all"}
    options: dict[str, Any] = {"settings": {"prompt_length": 4}, "backbone": OPENAI, "source": source}
    rows = [
        row("tcp", dataset, 1, "all", 0.7, [f"class {n}" for n in range(classes)], images=images, **options)
        for dataset, classes, images in (("imagenet", 1000, 50000), ("ucf101", 101, 3783))
    ]
    make_run("tcp", "imagenet", train={"epochs": 25}, rows=rows)
    table = Report(runs, METHODS).tables[1]
    assert cells(table)["TCP, published"][:2] == ["71.40 (−1.40)", "–"]


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": {**OPENAI, "pretrained": "laion2b"}},
        {"source": {"shots": 4}},
        {"settings": {**FULL, "prompt_depth": 1}},
        {"train": {"epochs": 1}},
        {"train": {"epochs": 5, "steps": 240}},
        {"source": {"classes": "all"}},
    ],
    ids=["weights", "shots", "method", "epochs", "steps", "classes"],
)
def test_published_numbers_only_where_they_fit(changes: dict[str, Any], make_run: MakeRun, runs: Path) -> None:
    fitting: dict[str, Any] = {"settings": FULL, "train": {"epochs": 5}, "backbone": OPENAI, **changes}
    make_run("maple", "eurosat", train=fitting["train"], rows=eurosat_rows("maple", 0.95, 0.7, **fitting))
    tables = json.dumps([table.notes for table in Report(runs, METHODS).tables])
    assert "ublished" not in tables


def test_published_numbers_only_beside_the_data_of_the_papers(make_run: MakeRun, runs: Path) -> None:
    options: dict[str, Any] = {"settings": FULL, "backbone": OPENAI}
    rows = eurosat_rows("maple", 0.95, 0.7, images=(4200, 80), **options)
    make_run("maple", "eurosat", train={"epochs": 5}, rows=rows)
    (table,) = Report(runs, METHODS).tables
    assert "published base" not in table.sections[0].columns
    assert table.notes[-1].startswith("Not the papers' data")
    assert table.notes[-1].endswith("eurosat, novel classes: 80 test images here, 3,900 published.")


@pytest.mark.usefixtures("any_names")
@pytest.mark.parametrize(("labels", "shown"), [(range(1000), True), (range(10), False)], ids=["whole", "ten classes"])
def test_published_transfer_only_from_the_whole_source(
    labels: range, shown: bool, make_run: MakeRun, runs: Path
) -> None:
    source = {"dataset": "imagenet", "classes": "all"}
    options: dict[str, Any] = {"settings": {**FULL, "prompt_depth": 3}, "backbone": OPENAI, "source": source}
    names = [f"texture {number}" for number in range(47)]
    rows = [row("maple", "dtd", 1, "all", 0.46, names, images=1692, **options)]
    run = make_run("maple", "imagenet", train={"epochs": 2}, rows=rows)
    (run / "items.json").write_text(json.dumps({"items": [{"path": f"{n}.jpg", "label": n} for n in labels]}))
    (table,) = Report(runs, METHODS).tables
    assert any(label == "MaPLe, published" for label, _ in table.sections[0].rows) == shown
    assert any("trained on 10 classes here, 1,000 published" in note for note in table.notes) != shown


@pytest.mark.usefixtures("any_names")
def test_both_protocols_on_one_imagenet_run_have_their_own_average(make_run: MakeRun, runs: Path) -> None:
    settings = {"maple": {**FULL, "prompt_depth": 3}, "zero_shot": {}}
    for method, top1 in (("maple", 0.7), ("zero_shot", 0.6)):
        rows = [
            row(
                method,
                dataset,
                1,
                "all",
                top1 - 0.1 * (dataset in IMAGENET_VARIANTS),
                [f"class {n}" for n in range(published_counts()[dataset]["classes"])],
                images=published_counts()[dataset].get("test", 10),
                backbone=OPENAI,
                settings=settings[method],
                source={"dataset": "imagenet", "classes": "all"},
            )
            for dataset in sorted(ELEVEN | IMAGENET_VARIANTS)
        ]
        make_run(method, "imagenet", train={"epochs": 2}, rows=rows)
    tables = {table.caption.partition(" (all classes)")[0]: table for table in Report(runs, METHODS).tables}
    targets = tables["Trained on imagenet, evaluated elsewhere"]
    domains = tables["Trained on imagenet, evaluated on variants of ImageNet"]
    assert cells(targets)["MaPLe"][-2:] == ["70.00", "1"]
    assert cells(targets)["MaPLe, published"][-2] == "66.30 (+3.70)"
    assert cells(domains)["zero-shot CLIP"][-2] == "50.00"
    assert cells(domains)["MaPLe"] == ["70.00", "60.00", "60.00", "60.00", "60.00", "60.00", "1"]
    assert cells(domains)["MaPLe, published"][-2] == "60.27 (−0.27)"


def test_published_settings_are_those_of_the_presets() -> None:
    """Of the protocol's preset, on ViT-B/16: each learned method names its epochs or steps, where it has a preset."""
    for result in published_results():
        base = result.settings.get("base_method", "coop")
        recipe = {"coop": result.method}.get(base, f"{result.method}-{base}")
        recipe = "coop-dagger" if result.title == "CoOp (10 epochs)" else recipe
        recipe = "mmapp-sentences" if result.method == "mmapp" else recipe
        names = [f"{recipe}_{'cross-dataset' if result.protocol == 'transfer' else result.protocol}"]
        if result.method == "cocoop":
            names = ["cocoop_base-to-novel"]  # for every protocol
        for name in set(names) & set(preset_names()) - {"zero_shot_base-to-novel"}:
            assert result.settings.keys() & {"epochs", "steps"}, name
            data = {"dataset": result.source_dataset or (result.dataset if result.dataset in ELEVEN else "pets")}
            settings = complete(resolve([read_preset(name), {"data": data, "backbone": {"name": "ViT-B-16"}}]))
            values = {**settings.train.model_dump(), **settings.method}
            for key in result.settings.keys() & {"epochs", "steps", "batch_size", "meta_net_layers", "adapter_start"}:
                assert str(values[key]) == result.settings[key], (name, result.dataset, key)


def test_no_published_number_was_recalled_from_memory() -> None:
    numbers = published_results()
    assert len(numbers) == 231 + sum(n.rerun for n in numbers)
    assert all(number.read_in and "memory" not in number.read_in.lower() for number in numbers)
    maple = {n.dataset: n.values for n in numbers if (n.method, n.protocol) == ("maple", "base-to-novel")}
    assert maple.keys() == ELEVEN | {"average"}
    assert maple["average"] == {"base": 82.28, "novel": 75.14, "harmonic mean": 78.55}
    assert not any(n.title.startswith("Shallow") for n in numbers)
    for method, values in {
        "promptsrc": {"base": 84.26, "novel": 76.1, "harmonic mean": 79.97},
        "kgcoop": {"base": 80.73, "novel": 73.6, "harmonic mean": 77.0},
        "prograd": {"base": 82.48, "novel": 70.75, "harmonic mean": 76.16},
        "tcp": {"base": 84.13, "novel": 75.36, "harmonic mean": 79.51},
    }.items():
        found = {n.dataset: n.values for n in numbers if (n.method, n.protocol) == (method, "base-to-novel")}
        assert found.keys() == ELEVEN | {"average"}
        assert found["average"] == values
    mean = sum(values["base"] for name, values in maple.items() if name != "average") / 11
    assert mean == pytest.approx(82.28, abs=0.01)
