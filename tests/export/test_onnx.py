"""A method on onnxruntime: the answers of PyTorch, under any names, where torch cannot be imported."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
from export_helpers import NAMES, write_prompts
from PIL import Image

from maple.clip import Backbone
from maple.clip_tokenizer import ClipTokenizer
from maple.config import resolve
from maple.data import EvalTransform, EvalView, load_dataset
from maple.data.saved_split import SAVED_SPLIT, saved_split_hash, write_saved_split
from maple.errors import CheckpointError, ClassNamesError, ConfigError, ExportError, UnlearnedClassesError
from maple.export import export_run, export_source, onnx_folder, parity_check
from maple.export.export_source import open_export_source
from maple.inference import ImageSource, Prediction, TorchPredictor, find_images, load_predictor
from maple.inference.manifest import MANIFEST, Slots
from maple.inference.onnx_predictor import OnnxPredictor
from maple.prompts import write_sentences
from maple.runs import evaluate_run, read_settings, train_run
from maple.runs.spec import open_dataset
from maple.runs.trained_images import TrainedImages
from maple.serve.examples import trained_dataset

MERGES = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
WITHOUT_TORCH = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "open_clip", "transformers", "accelerate", "safetensors",
                                  "huggingface_hub", "onnx", "onnxscript"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from maple.cli import main
main()
"""


def pictures() -> list[ImageSource]:
    generator = np.random.default_rng(0)
    made = []
    for number, shape in enumerate([(40, 50, 3), (64, 64, 3), (200, 70, 3), (9, 300, 3), (65, 64, 3)]):
        image = Image.fromarray(generator.integers(0, 256, shape).astype(np.uint8))
        made.append(ImageSource(str(number), lambda image=image: image))
    return made


def test_the_manifest_names_the_data_set_and_no_folder_of_the_user(exported: Path) -> None:
    about = json.loads((exported / MANIFEST).read_text())["about"]
    assert (about["dataset"], about["own_images"]) == ("eurosat", True)
    assert trained_dataset(exported, about, None) is None, "a folder of this name is another one"
    assert "somebody" not in (exported / MANIFEST).read_text()


@pytest.mark.parametrize(
    "names", [NAMES, ("red car", "Blue_car", "grey thing", "a rather long description of it & co.")]
)
def test_answers_are_pytorchs(exported: Path, maple_file: Path, names: tuple[str, ...]) -> None:
    one, other = load_predictor(exported, zero_shot=True), TorchPredictor.load(maple_file, zero_shot=True, device="cpu")
    assert isinstance(one, OnnxPredictor)
    assert one.set_class_names(names) == other.set_class_names(names)
    for found, expected in zip(one.stream(pictures(), batch_size=3), other.stream(pictures()), strict=True):
        assert isinstance(found, Prediction)
        assert isinstance(expected, Prediction)
        assert [ranked.name for ranked in found.best] == [ranked.name for ranked in expected.best]
        for mine, theirs in ((found.best, expected.best), (found.zero_shot, expected.zero_shot)):
            assert mine is not None
            assert theirs is not None
            assert [r.probability for r in mine] == pytest.approx([r.probability for r in theirs], abs=1e-5)


def test_sentences_of_each_class_are_exported_for_trained_names(shallow: Backbone, tmp_path: Path) -> None:
    sentences = {name: [f"a {name}.", f"{name} twice."] for name in NAMES}
    sizes = {"adapter_start": 1, "adapter_end": 2, "adapter_width": 8}
    file = write_prompts(tmp_path, shallow, {"name": "mmapp", **sizes, "sentences": sentences})
    assert export_run(file, tmp_path / "export").difference < 1e-3
    with pytest.raises(ClassNamesError, match="has the sentences of trained names alone; use PyTorch"):
        load_predictor(tmp_path / "export").set_class_names(["red thing", "grey thing"])


@pytest.mark.parametrize(
    "description",
    [
        {"name": "mmrl", "layers": [1, 2], "tokens": 2, "token_width": 16},
        {"name": "two_stage", "vision_start": 1},
        {"name": "dept", "base_method": "maple", "prompt_depth": 2},
        {"name": "dept", "base_method": "cocoop", "meta_net_reduction": 4},
        {"name": "mma", "adapter_start": 1, "adapter_end": 2, "adapter_width": 8, "adapter_scale": 0.5},
        {
            "name": "mmapp",
            "adapter_start": 1,
            "adapter_end": 2,
            "adapter_width": 8,
            "adapter_test_scale": 0.5,
            "templates": ["a photo of a {}.", "a sketch of the {}!"],
        },
    ],
    ids=lambda description: description["name"],
)
def test_changed_towers_with_trained_and_new_names(
    description: dict[str, object], shallow: Backbone, tmp_path: Path
) -> None:
    file = write_prompts(tmp_path, shallow, description)
    assert export_run(file, tmp_path / "export", zero_shot=True).difference < 1e-3
    one = load_predictor(tmp_path / "export", zero_shot=True)
    other = TorchPredictor.load(file, zero_shot=True, device="cpu")
    for names in (NAMES, ("grey thing", NAMES[1], "red car", NAMES[0].upper())):
        one.set_class_names(names)
        other.set_class_names(names)
        for found, expected in zip(one.stream(pictures()), other.stream(pictures()), strict=True):
            assert isinstance(found, Prediction)
            assert isinstance(expected, Prediction)
            for mine, theirs in ((found.best, expected.best), (found.zero_shot, expected.zero_shot)):
                assert mine is not None
                assert theirs is not None
                assert [ranked.name for ranked in mine] == [ranked.name for ranked in theirs]
                assert [r.probability for r in mine] == pytest.approx([r.probability for r in theirs], abs=1e-5)


def test_the_command_without_torch(exported: Path, maple_file: Path, tmp_path: Path) -> None:
    for picture in pictures():
        picture.read().save(tmp_path / f"{picture.name}.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WITHOUT_TORCH, "predict", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    found = ask(str(exported), str(tmp_path), "--classes", "red car,blue car", "--zero-shot", "--json")
    assert found.returncode == 1, found.stderr
    assert "broken.png" in found.stderr
    predictor = TorchPredictor.load(maple_file, zero_shot=True, device="cpu")
    predictor.set_class_names(["red car", "blue car"])
    expected = [one for one in predictor.stream(pictures()) if isinstance(one, Prediction)]
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(rows) == len(expected)
    for row, one in zip(rows, expected, strict=True):
        assert [ranked["class"] for ranked in row["best"]] == [ranked.name for ranked in one.best]
        assert row["best"][0]["probability"] == pytest.approx(one.best[0].probability, abs=1e-5)
    refused = ask(str(maple_file), str(tmp_path))
    assert refused.returncode == 2
    assert refused.stderr.startswith("maple: this needs ")
    assert "Traceback" not in refused.stderr


def test_bad_names_are_refused_as_by_pytorch(exported: Path) -> None:
    answerer = OnnxPredictor.load(exported)
    for names, message in (([], "is empty"), (["a", "a"], "named more than once"), (["very " * 90], "needs 9. tokens")):
        with pytest.raises(ClassNamesError, match=message):
            answerer.set_class_names(names)
    assert answerer.class_names == NAMES


def test_votes_of_known_classes_in_8_bits(shallow: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of the method's own, a part of the classes, and what 8-bit weights are allowed to do."""
    file = write_prompts(tmp_path, shallow, {"name": "tip_adapter", "learn_keys": True, "alpha": 2.0, "beta": 3.0})
    export_run(file, tmp_path / "plain")
    monkeypatch.setattr(onnx_folder, "INLINE_BYTES", 1000)  # weights beside the graph
    rough = export_run(file, tmp_path / "rough", int8=True)
    assert (tmp_path / "rough/image.onnx.data").is_file()
    assert rough.bytes < 0.5 * (tmp_path / "plain/image.onnx").stat().st_size
    assert 1e-6 < rough.difference < 5
    assert rough.scores is None  # the images of this run are not here
    one, other = OnnxPredictor.load(tmp_path / "plain"), TorchPredictor.load(file, device="cpu")
    views = np.stack([one.preprocess(picture.read()) for picture in pictures()])
    part = [NAMES[2], NAMES[0]]
    found, _ = one.probabilities(one.encode_images(views), one.encode_class_names(part))
    expected, _ = other.probabilities(other.encode_images(views), other.encode_class_names(part))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(UnlearnedClassesError, match="'submarine' was not trained"):
        one.encode_class_names(["submarine"])
    with pytest.raises(ConfigError, match="exported without the frozen CLIP"):
        OnnxPredictor.load(tmp_path / "plain", zero_shot=True)


def test_8_bits_are_scored_on_held_out_images(make_images: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_images(classes=("cat", "dog"))
    layer = {
        "method": {"name": "linear_probe", "inverse_regularisation": 1.0},
        "backbone": {"name": "maple-tiny", "pretrained": "random"},
        "data": {"dataset": str(folder), "shots": None},
        "train": {"epochs": 1},
    }
    train_run(resolve([layer]), tmp_path / "run")
    accuracy, _ = evaluate_run(tmp_path / "run")
    result = export_run(tmp_path / "run", tmp_path / "out", int8=True)
    assert result.scores is not None
    assert (result.scores["images"], result.scores["accuracy_float32"]) == (accuracy.images, accuracy.top1)
    predictor = OnnxPredictor.load(tmp_path / "out")
    predictions = predictor.stream(find_images([str(folder / "test")], recursive=True))
    right = [Path(one.source).parent.name == one.best[0].name for one in predictions if isinstance(one, Prediction)]
    assert result.scores["accuracy"] == sum(right) / len(right)
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["checked"]["scores"] == result.scores


PROBE = {
    "method": {"name": "linear_probe", "inverse_regularisation": 1.0},
    "backbone": {"name": "maple-tiny", "pretrained": "random"},
    "train": {"epochs": 1},
}


def test_the_sample_is_of_all_classes_and_without_broken_images(
    make_images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_images(classes=("ant", "bee", "cat"), train=1, test=4)
    train_run(resolve([PROBE, {"data": {"dataset": str(folder), "shots": None}}]), tmp_path / "run")
    (folder / "test" / "ant" / "0.png").write_bytes(b"broken")
    monkeypatch.setattr(export_source, "_RUN_IMAGES", 7)  # of 12
    labels = open_export_source(tmp_path / "run").labels.tolist()
    assert len(labels) == 6
    assert set(labels) == {0, 1, 2}


def test_the_sample_is_of_the_runs_own_division(
    make_images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit lists its images, some of which it may have left out; and others may have come to a folder since."""
    folder = make_images(classes=("ant", "bee"), train=12, test=0) / "train"
    whole = load_dataset(str(folder), None)
    listed = replace(whole, test=whole.test[:1])
    (tmp_path / "fitted").mkdir()
    write_saved_split(tmp_path / "fitted" / SAVED_SPLIT, listed, str(folder))
    data = {"dataset": str(folder), "shots": None}
    train_run(resolve([PROBE, {"data": {**data, "listing": saved_split_hash(listed)}}]), tmp_path / "fitted")
    train_run(resolve([PROBE, {"data": data}]), tmp_path / "trained")
    assert len(open_export_source(tmp_path / "fitted").labels) == 1
    assert len(open_export_source(tmp_path / "trained").labels) == len(whole.test)
    for number in range(30):
        Image.new("RGB", (40, 40), (number, 9, 9)).save(folder / "ant" / f"a{number}.png")
    trained = TrainedImages(tmp_path / "trained")
    redrawn = open_dataset(read_settings(tmp_path / "trained"))
    held_out = [item for item in redrawn.test if not trained.contains(redrawn, item, is_own=True)]
    assert 0 < len(held_out) < len(redrawn.test)
    monkeypatch.setattr(export_source, "_RUN_IMAGES", 100)
    labels = open_export_source(tmp_path / "trained").labels.tolist()
    assert labels == [redrawn.class_names.index(item.class_name) for item in held_out]
    assert len(open_export_source(tmp_path / "fitted").labels) == 1


@pytest.mark.parametrize("name", ["clap", "lpplusplus", "gda"])
def test_classifiers_of_known_classes(shallow: Backbone, tmp_path: Path, name: str) -> None:
    file = write_prompts(tmp_path, shallow, {"name": name})
    assert export_run(file, tmp_path / "out").difference < 1e-4
    one, other = OnnxPredictor.load(tmp_path / "out"), TorchPredictor.load(file, device="cpu")
    views = np.stack([one.preprocess(picture.read()) for picture in pictures()])
    part = [NAMES[2], NAMES[0]]
    found, _ = one.probabilities(one.encode_images(views), one.encode_class_names(part))
    expected, _ = other.probabilities(other.encode_images(views), other.encode_class_names(part))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_classes_that_depend_on_the_image(shallow: Backbone, tmp_path: Path) -> None:
    file = write_prompts(tmp_path, shallow, {"name": "cocoop"})
    assert export_run(file, tmp_path / "out").difference < 1e-4
    with pytest.raises(ConfigError, match="is an export already"):
        export_run(tmp_path / "out", tmp_path / "again")
    one, other = OnnxPredictor.load(tmp_path / "out"), TorchPredictor.load(file, device="cpu")
    views = np.stack([one.preprocess(picture.read()) for picture in pictures()])
    found, _ = one.probabilities(one.encode_images(views), one.encode_class_names(["cat", "red car"]))
    expected, _ = other.probabilities(other.encode_images(views), other.encode_class_names(["cat", "red car"]))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_difference_leaves_nothing(maple_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = parity_check.reference_logits
    monkeypatch.setattr(parity_check, "reference_logits", lambda *arguments: honest(*arguments) + 0.002)
    with pytest.raises(
        ExportError, match=r"differs from PyTorch by up to 0.002 in logits, more than the allowed 0.001"
    ):
        export_run(maple_file, tmp_path / "out", "torchscript")
    assert list(tmp_path.iterdir()) == []


def test_damaged_exports_are_named(exported: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(exported, tmp_path / name))

    with pytest.raises(CheckpointError, match=r"is not an exported method"):
        OnnxPredictor.load(tmp_path)
    folder = copy("short")
    (folder / "text.onnx").write_bytes((folder / "text.onnx").read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"text.onnx has .* bytes instead of"):
        OnnxPredictor.load(folder)
    folder = copy("wrong")
    (folder / "image.onnx").write_bytes(b"\0" * (folder / "image.onnx").stat().st_size)
    with pytest.raises(CheckpointError, match=r"image.onnx cannot be opened"):
        OnnxPredictor.load(folder)
    folder = copy("gone")
    (folder / "classes.npy").unlink()
    with pytest.raises(CheckpointError, match=r"classes.npy is missing"):
        OnnxPredictor.load(folder)
    folder = copy("manifest")
    for text, message in (("{", "unreadable or damaged"), ('{"format": 9}', "upgrade maple"), ("[]", "is damaged")):
        (folder / MANIFEST).write_text(text)
        with pytest.raises(CheckpointError, match=message):
            OnnxPredictor.load(folder)


def test_a_gpu_that_cannot_be_used_is_not_replaced(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the libraries of CUDA, onnxruntime computes on the CPU, and says so in its log alone."""
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    opened = []

    class Session:
        def __init__(self, _path: str, _options: object, *, providers: list[object]) -> None:
            opened.append(providers)

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match=rf"device '{device}': onnxruntime cannot use it.*cuDNN"):
            OnnxPredictor.load(exported, device=device)
    assert opened == [["CUDAExecutionProvider"], [("CUDAExecutionProvider", {"device_id": "1"})]]


def test_the_text_side_is_opened_when_new_names_need_it(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "export"))
    (folder / "text.onnx").write_bytes(b"\0" * (folder / "text.onnx").stat().st_size)
    predictor = OnnxPredictor.load(folder)
    assert predictor.classes.names == predictor.trained_names
    with pytest.raises(CheckpointError, match=r"text.onnx cannot be opened"):
        predictor.set_class_names(["a new name"])
    with pytest.raises(CheckpointError, match=r"text.onnx cannot be opened"):
        predictor.prepare()  # as a server does before it accepts requests


@pytest.mark.parametrize("size", [(224, 224), (500, 333), (37, 64), (64, 1), (1, 70), (5000, 20), (223, 225), (65, 64)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_views_are_those_of_torchvision(size: tuple[int, int], interpolation: str) -> None:
    from torchvision.transforms import v2

    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    image, mean, std = Image.fromarray(pixels), (0.48, 0.45, 0.40), (0.26, 0.27, 0.28)
    found = EvalView(64, mean, std, interpolation)(image)
    assert found.dtype == np.float32
    assert torch.equal(torch.from_numpy(found), EvalTransform(64, mean, std, interpolation)(image))
    if max(size) <= 64 * min(size):
        how = v2.InterpolationMode(interpolation)
        resized = v2.functional.center_crop(v2.functional.resize(image, [64], interpolation=how), [64, 64])
        expected = v2.functional.normalize(
            v2.functional.to_dtype(v2.functional.pil_to_tensor(resized), torch.float32, scale=True), mean, std
        )
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-6, rtol=0)


def test_ids_are_those_of_open_clip() -> None:
    mine, theirs = ClipTokenizer(MERGES, 77), open_clip.SimpleTokenizer()
    texts = [
        *("a photo of a cat.", "Ünïcödé naïve CAFÉ", "&amp;amp; &lt;b&gt; &eacute;", "  tabs\t and \n lines  ", ""),
        *("don't you'RE I'LL x'\u017ft", "\uff11\uff12 full \ufb01", "日本語のテキスト", "🦀🍕👩‍👩‍👧🏳️‍🌈"),
        *("<start_of_text> x <END_OF_TEXT> <\u017ftart_of_text>", "a" * 300, "mojibake cafÃ© â€œquotesâ€\x9d"),
        *("ab\0\u200b\u00ad c", "...!!!???", "x²½Ⅷ ٣", "İstanbul ß", "aaaabab", "ͅ \u088f \U0001e030"),
    ]
    drawn = random.Random(0)
    ranges = ((32, 127), (160, 0x2000), (0x3000, 0xD7FF), (0x1F300, 0x1F700), (0x10000, 0x110000))
    vocabulary = [token.removesuffix("</w>") for token in theirs.encoder]
    for _ in range(300):
        texts.append("".join(chr(drawn.randrange(*drawn.choice(ranges))) for _ in range(drawn.randrange(1, 30))))
        texts.append("".join(drawn.choice([" ", "", "'", "-"]) + drawn.choice(vocabulary) for _ in range(8)))
        texts.append("".join(drawn.choice("ab") for _ in range(drawn.randrange(1, 60))))
    for text in texts:
        assert mine.words(text) == theirs.encode(text), text


@pytest.mark.parametrize(
    ("words", "length", "position"), [("", 3, "middle"), ("", 4, "front"), ("a photo of a", 2, "end")]
)
def test_sentences_are_those_of_training(
    exported: Path, tiny: Backbone, words: str, length: int, position: str
) -> None:
    names = ["cat", "fire_truck with a ladder", "Ünï & co"]
    expected = write_sentences(tiny, names, prompt_length=length, init_text=words, position=position)  # type: ignore[arg-type]
    answerer = OnnxPredictor.load(exported)
    slots = Slots(length=length, words=words, position=position)  # type: ignore[arg-type]
    ids, places = answerer._padded(answerer._slotted(names, slots))
    for row, (mine, place) in enumerate(zip(ids, places, strict=True)):
        end = int(expected.ends[row])
        keep = place[: end + 1] == 0
        assert mine[: end + 1][keep].tolist() == expected.ids[row, : end + 1].numpy()[keep].tolist()
        assert place[expected.slots[row]].tolist() == list(range(1, length + 1))


def test_a_place_where_nothing_can_be_written_is_named(maple_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match=r"file/export cannot be made \(.*\); choose another output"):
        export_run(maple_file, tmp_path / "file" / "export", "torchscript")
