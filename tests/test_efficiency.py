"""Parameters against the published counts, operations against a count by hand, and the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tower_families import family, images
from typer.testing import CliRunner

from maple.cli import app
from maple.clip import Backbone
from maple.config import RunSettings, read_preset, resolve
from maple.efficiency import _step, count_flops, measure_cost, plain_flops
from maple.errors import ConfigError
from maple.methods import build_method
from maple.methods.prograd import ProGrad
from maple.report.records import CostRow

# The small CLIP of the tests. A block of width H with an MLP of 4 H: 12 H^2 multiply-adds a token, and 2 n^2 H for n
# tokens. Text: 3 blocks, H = 64, 77 tokens; image: 4 blocks, H = 128, 4 patches of 16 x 16 pixels and the class token.
TEXT = 3 * (77 * 12 * 64**2 + 2 * 77**2 * 64) + 64 * 32
PATCHES = 4 * 3 * 16**2 * 128


def image_macs(tokens: int) -> int:
    return 4 * (tokens * 12 * 128**2 + 2 * tokens**2 * 128) + PATCHES + 128 * 32


def skipped_macs(tokens: int) -> int:
    """What the last image block leaves out: it works for the class token alone, with the keys and values of all."""
    return (tokens - 1) * 10 * 128**2 + 2 * tokens * (tokens - 1) * 128


def settings(**method: Any) -> RunSettings:
    return resolve([{"method": method}])


def cost(backbone: Backbone, classes: int = 3, **method: Any) -> CostRow:
    return measure_cost(settings(**method), backbone, classes=classes, batches=[2], seconds=1e-3)


def test_zero_shot_by_hand(backbone: Backbone) -> None:
    assert (TEXT, image_macs(5)) == (13_632_896, 4_355_072)
    found = cost(backbone, name="zero_shot")
    macs = 3 * TEXT + image_macs(5) + 3 * 32
    assert (found.parameters, found.flops_plain) == (0, 2 * macs)
    # SOS and "a photo of a class number" once, 7 tokens; then the number, the period and EOT of each of the three.
    shared, own, width = 7, 3, 64
    rows = shared + 3 * own
    block = rows * 12 * width**2 + 2 * shared**2 * width + 3 * 2 * own * (shared + own) * width
    # In the last block only the EOT tokens ask and go on.
    last = rows * 2 * width**2 + 3 * (10 * width**2 + 2 * (shared + own) * width)
    image = image_macs(5) - skipped_macs(5)
    assert found.flops == 2 * (2 * block + last + 3 * width * 32 + image + 3 * 32)
    assert found.flops_cached == 2 * (image + 3 * 32)


def test_prompts_and_coupling_by_hand(backbone: Backbone) -> None:
    """Two tokens more in the image tower; two coupling functions from 64 to 128 for two tokens each."""
    found = cost(backbone, name="maple", prompt_length=2, prompt_depth=2)
    coupling = 2 * 2 * 64 * 128
    assert found.flops_plain == 2 * (3 * TEXT + image_macs(7) + 3 * 32 + coupling)
    assert found.flops_cached == 2 * (image_macs(7) - skipped_macs(7) + 3 * 32 + coupling)
    assert found.flops < found.flops_plain


def test_counting_knows_fused_attention(backbone: Backbone) -> None:
    ids = backbone.tokenize(["a cat"])
    assert count_flops(lambda: backbone.text.plain(ids)) == 2 * TEXT
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("maple", 3_555_072),
        ("maple-shallow", 395_008),
        ("maple-unified", 403_200),
        ("independent_vl", 30_720),
        ("deep_language", 24_576),
        ("vpt", 73_728),
        ("coop", 2_048),
        ("cocoop", 35_360),
    ],
)
def test_published_sizes(preset: str, parameters: int, vit_b16: Backbone) -> None:
    """SPEC section 3.9; and ViT-B/16's 17.6 and 3.0 billion multiply-adds an image and a sentence."""
    method = build_method(
        resolve([read_preset(f"{preset}_base-to-novel"), {"backbone": {"name": "ViT-B-16"}}]).method, vit_b16, ["cat"]
    )
    assert method.parameter_count() == parameters
    # Up to eight tokens more cost up to a billion more.
    assert (plain_flops(method) or 0) / 2e9 == pytest.approx(17.6 + 3.0, abs=0.9)


def test_what_there_is_to_time(backbone: Backbone) -> None:
    (zero_shot,) = cost(backbone, name="zero_shot").speeds
    assert zero_shot.training is None
    assert zero_shot.batch == 2
    assert zero_shot.cached is not None
    (cocoop,) = cost(backbone, name="cocoop").speeds
    assert (cocoop.cached, cost(backbone, name="cocoop").flops_cached) == (None, None)
    assert cocoop.training is not None
    assert min(cocoop.training, cocoop.inference, zero_shot.cached) > 0


def test_more_classes_cost_more_and_nothing_once_cached(backbone: Backbone) -> None:
    few, many = (cost(backbone, classes, name="coop") for classes in (2, 20))
    assert (many.flops_plain or 0) - (few.flops_plain or 0) == 2 * 18 * (TEXT + 32)
    assert many.flops > few.flops
    assert (many.flops_cached or 0) - (few.flops_cached or 0) == 2 * 18 * 32


def test_towers_without_seams_are_counted_as_they_run(resnet_backbone: Backbone) -> None:
    found = cost(resnet_backbone, name="coop")
    assert found.flops_plain is None
    assert found.flops > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classes": 0}, "classes is 0; it must be at least 1"),
        ({"batches": [4, 0]}, "batch is 0"),
        ({"seconds": 0.0}, "seconds is 0; it must be above 0"),
    ],
)
def test_refused(values: dict[str, Any], message: str, backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match=message):
        measure_cost(settings(name="coop"), backbone, **{"classes": 2, "batches": [1], **values})


def test_a_linear_probe_reads_no_sentences(backbone: Backbone) -> None:
    found = cost(backbone, name="linear_probe")
    assert found.flops_plain == 2 * (image_macs(5) + 3 * 32)
    assert found.flops == found.flops_cached == found.flops_plain - 2 * skipped_macs(5)


def test_a_cache_holds_sixteen_images_of_each_class(backbone: Backbone) -> None:
    found = cost(backbone, name="tip_adapter", learn_keys=True)
    assert found.parameters == 3 * 16 * 32
    # Nearness to 48 keys, and their votes for 3 classes.
    assert found.flops_plain == 2 * (3 * TEXT + image_macs(5) + 3 * 32 + 48 * 32 + 48 * 3)


@pytest.mark.parametrize("name", ["promptsrc", "kgcoop", "prograd"])
def test_methods_on_prompts_of_others(name: str, backbone: Backbone) -> None:
    deep = {"text_prompt_depth": 2, "vision_prompt_depth": 2} if name == "promptsrc" else {}
    found = cost(backbone, name=name, **deep)
    assert found.speeds[0].training is not None
    assert found.flops_cached is not None
    assert found.flops_cached < found.flops


@pytest.mark.parametrize(
    "method",
    [
        {"name": "mmrl", "layers": [2, 3], "tokens": 2, "token_width": 16},
        {"name": "dept", "prompt_length": 4},
        {"name": "dept", "base_method": "vpt", "vision_prompt_depth": 2},
    ],
    ids=str,
)
def test_class_embeddings_with_more_entries_than_a_text_feature(method: dict[str, Any], backbone: Backbone) -> None:
    found = cost(backbone, **method)
    assert found.flops_cached is not None
    assert 0 < found.flops_cached < found.flops
    assert found.speeds[0].training is not None


def test_what_a_recipe_without_steps_trains_is_not_timed(backbone: Backbone) -> None:
    recipe = resolve([{"method": {"name": "linear_probe"}, "train": {"epochs": 0}}])
    (speed,) = measure_cost(recipe, backbone, classes=2, batches=[1], seconds=1e-3).speeds
    assert speed.training is None


def test_the_command_and_the_report(tmp_path: Path) -> None:
    arguments = ["efficiency", "--backbone", "maple-tiny", "--methods", "zero_shot,coop,maple", "--classes", "3"]
    arguments += ["--batch", "1,2", "--seconds", "0.001", "--device", "cpu", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "maple is left out: prompt_depth=9, but the text tower has 4 blocks" in done.stderr
    assert "Complexity: maple-tiny, fp32, 3 classes, on " in done.stdout
    assert "multiply-add" in done.stdout
    assert "Published" not in done.stdout
    records = sorted((tmp_path / "complexity").iterdir())
    assert [path.name.partition("_maple-tiny_3classes_")[0] for path in records] == ["coop", "zero_shot"]
    content = json.loads(records[0].read_text())
    assert (content["parameters"], content["method"]["name"]) == (4 * 128, "coop")
    assert [speed["batch"] for speed in content["speeds"]] == [1, 2]
    assert content["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert sorted((tmp_path / "complexity").iterdir()) == records, "measured again, the file is replaced"
    told = CliRunner().invoke(app, ["report", str(tmp_path), "--format", "csv,markdown"])
    assert told.exit_code == 0, told.output
    assert "What 2 methods cost: maple-tiny, fp32, 3 classes" in told.stdout.replace("\n", " ")
    assert (tmp_path / "report_complexity.csv").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "mapel"], "unknown method 'mapel'; choose one of: "),
        (["--output", "cost.json"], "--output cost.json must be a folder, as in --output runs/b2n"),
    ],
)
def test_the_command_refuses(options: list[str], message: str) -> None:
    refused = CliRunner().invoke(app, ["efficiency", "--backbone", "maple-tiny", *options])
    assert message in str(refused.exception)


def test_a_timed_step_is_a_whole_step(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """ProGrad's second gradient too; and hundreds of steps on random images leave the prompts where they were."""
    calls = []
    combine = ProGrad.combine_gradients
    monkeypatch.setattr(ProGrad, "combine_gradients", lambda self, found: calls.append(1) or combine(self, found))
    method = build_method({"name": "prograd"}, backbone, ["cat", "dog"])
    before = [parameter.detach().clone() for parameter in method.parameters()]
    step = _step(method, resolve([{"method": {"name": "prograd"}, "train": {"lr": 0.1}}]), torch.randn(3, 3, 32, 32))
    for _ in range(4):
        step()
    assert len(calls) == 4
    torch.testing.assert_close(list(method.parameters()), before, rtol=0, atol=1e-9)


def test_token_embeddings_are_counted_by_themselves(backbone: Backbone) -> None:
    cost = measure_cost(settings(name="zero_shot"), backbone, classes=2, batches=[1], seconds=1e-3)
    assert cost.embedding_parameters == 49408 * backbone.text.width


@pytest.mark.parametrize("name", ["SigLIP", "EVA-02", "CoCa"])
def test_towers_of_other_families(name: str) -> None:
    """By shapes as when every row of every block is computed."""
    backbone = family(name)
    image, text = backbone.image, backbone.text
    method = build_method({"name": "zero_shot"}, backbone, ["cat", "dog", "owl"])
    ids = backbone.tokenize(["a photo of a cat."])

    def every_row() -> None:
        states = image.enter(image.embed(images(1)))
        for layer in range(image.depth):
            states = image.block(layer, states)
        image.finish(states)

    def every_token() -> None:
        states = text.enter(text.embed(ids))
        for layer in range(text.depth):
            states = text.block(layer, states, mask=text.mask(ids))
        text.finish(text.pool(states, ids))

    logits = 2 * 3 * backbone.embed_dim
    assert plain_flops(method) == count_flops(every_row) + 3 * count_flops(every_token) + logits
    found = cost(backbone, name="maple", prompt_depth=2)
    assert found.flops_plain is not None
    assert found.flops_plain > plain_flops(method) > 0
