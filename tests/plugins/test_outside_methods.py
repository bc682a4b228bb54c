"""Methods from outside the package: single files, which are run only if they were named, and installed packages."""

import json
import os
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import maple
from maple import plugins
from maple.checkpoint import load_prompts, read_prompts, save_prompts
from maple.cli import app
from maple.clip import Backbone
from maple.config import read_preset, resolve, toml
from maple.errors import CheckpointError, ConfigError, UntrustedCodeError
from maple.inference import ray_predict
from maple.inference.sharing import model_card, share_run
from maple.methods import METHODS, build_method, method_settings, recipe_of
from maple.runs import complete, content_name

PAGE = Path(__file__).parents[2] / "docs" / "new-method.md"
NAMES = ["cat", "dog"]


def source_of_the_page() -> str:
    """The class of the page "Add a method", without what it then does with it."""
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    return block[1].split("\nbackbone = ")[0]


@pytest.fixture
def shift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a method, as another user of this machine would find it: nothing was accepted yet."""
    forget(monkeypatch, tmp_path / "state")
    path = tmp_path / "mine" / "shift.py"
    path.parent.mkdir()
    path.write_text(source_of_the_page(), encoding="utf-8")
    return path


TRAINABLE = """
from maple.methods import METHODS

class Trainable(METHODS["coop"]):
    title = "trainable"
"""


def forget(monkeypatch: pytest.MonkeyPatch, state: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    monkeypatch.setattr(plugins, "_accepted", {})
    monkeypatch.setattr(toml, "_added", {})
    monkeypatch.setattr(METHODS, "_known", {k: v for k, v in METHODS._known.items() if not plugins.is_code_name(k)})


def test_a_file_is_run_only_after_it_was_named(
    shift: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = plugins.trust_code(f"{shift}:Shift")
    assert re.fullmatch(r"shift\.py:Shift@[0-9a-f]{32}", name)
    method = build_method({"name": name, "strength": 2.0}, backbone, NAMES)
    save_prompts(tmp_path / "run" / "prompts.safetensors", method)
    stored = read_prompts(tmp_path / "run" / "prompts.safetensors")
    assert stored.method == {"name": name, "strength": 2.0}
    copied = tmp_path / "run" / "shift.py"
    assert copied.read_bytes() == shift.read_bytes()

    shift.write_text("raise SystemExit", encoding="utf-8")  # the file has changed, and what was accepted has not
    loaded = load_prompts(tmp_path / "run" / "prompts.safetensors", backbone)
    assert type(loaded).__name__ == "Shift"

    forget(monkeypatch, tmp_path / "of another user")
    path = tmp_path / "run" / "prompts.safetensors"
    with pytest.raises(UntrustedCodeError, match=r"needs code that was never named here: .*shift\.py; read it"):
        load_prompts(path, backbone)
    with pytest.raises(UntrustedCodeError, match=r"was never named here; name its file: method=PATH/FILE\.py:CLASS"):
        METHODS.find(name)
    content = copied.read_bytes()
    copied.write_bytes(content + b"\n")
    with pytest.raises(UntrustedCodeError, match="has other content"):
        load_prompts(path, backbone, trust_code=True)
    copied.unlink()
    with pytest.raises(UntrustedCodeError, match="get the file from whoever made this"):
        load_prompts(path, backbone, trust_code=True)
    copied.write_bytes(content)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    again = load_prompts(path, backbone, trust_code=True)
    assert torch.equal(again.predict_logits(images), method.predict_logits(images))
    assert type(load_prompts(path, backbone)).__name__ == "Shift"  # once accepted, it is known


@pytest.mark.parametrize("method", ["dept", "promptsrc"])
def test_a_file_whose_prompts_another_method_trains(
    shift: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    shift.write_text(TRAINABLE, encoding="utf-8")
    key = {"dept": "method.base_method", "promptsrc": "method.prompts.name"}[method]
    settings = resolve([{"method": {"name": method}}], [f"{key}={shift}:Trainable"])  # as --set gives it
    assert resolve([{"method": {"name": method}}], [f'{key}="{shift}:Trainable"']) == settings, "quoted, too"
    learned = build_method(complete(settings).method, backbone, NAMES)
    path = tmp_path / "run" / "prompts.safetensors"
    save_prompts(path, learned)
    assert plugins.accepted_code([settings.method]) == ray_predict._accepted_code(str(path)) == (TRAINABLE.encode(),)
    shared = share_run(path, tmp_path / "shared")
    assert (shared / "shift.py").read_text() == TRAINABLE
    assert "`shift.py`" in model_card(read_prompts(path))

    forget(monkeypatch, tmp_path / "of another user")
    with pytest.raises(UntrustedCodeError, match=r"needs code that was never named here: .*shift\.py; read it"):
        load_prompts(shared / path.name, backbone)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    again = load_prompts(shared / path.name, backbone, trust_code=True)
    assert torch.equal(again.predict_logits(images), learned.predict_logits(images))


def test_two_files_of_one_name_are_refused(shift: Path) -> None:
    """Next to the prompts one would replace the other."""
    shift.write_text(TRAINABLE, encoding="utf-8")
    wrapper = shift.parent / "other" / "Shift.py"
    wrapper.parent.mkdir()
    wrapper.write_text('from maple.methods import METHODS\nclass Wrapper(METHODS["dept"]): title = "wrapper"')
    settings = {"method.name": f"{wrapper}:Wrapper", "method.base_method": f"{shift}:Trainable"}
    with pytest.raises(ConfigError, match=r"Shift\.py:Wrapper and shift\.py:Trainable are from different files of one"):
        complete(resolve([], [f"{key}={value}" for key, value in settings.items()]))
    renamed = wrapper.rename(wrapper.with_name("wrapper.py"))
    settings["method.name"] = f"{renamed}:Wrapper"
    completed = complete(resolve([], [f"{key}={value}" for key, value in settings.items()]))
    assert sorted(plugins.code_files(completed.method).values()) == ["shift.py", "wrapper.py"]


def test_a_damaged_copy_is_not_run(shift: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = plugins.trust_code(f"{shift}:Shift")
    (kept,) = (tmp_path / "state" / "maple" / "code").iterdir()
    kept.write_text("raise SystemExit", encoding="utf-8")
    monkeypatch.setattr(plugins, "_accepted", {})
    with pytest.raises(UntrustedCodeError):
        METHODS.find(name)


@pytest.mark.parametrize(
    ("code", "attribute", "message"),
    [
        ("x = 1\nclass Other: ...", "Shift", r"unknown class of wrong\.py 'Shift'; choose one of: Other"),
        ("class Shift: ...", "Shift", r"must be a class derived from maple\.Method"),
        ("from maple import Method\nclass Shift(Method): ...", "Shift", "has no title"),
        (
            "from maple import Method\nclass Shift(Method): title = paper = summary = ''; Settings = dict",
            "Shift",
            r"the Settings of .* are <class 'dict'>; they must be a class derived from MethodSettings",
        ),
        ("import no_such_module", "Shift", "ModuleNotFoundError.*a file is imported alone"),
        ("def f(:", "Shift", "cannot be imported: SyntaxError"),
        ("1 / 0", "Shift", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_what_is_no_method_is_refused(shift: Path, code: str, attribute: str, message: str) -> None:
    path = shift.with_name("wrong.py")
    path.write_text(code, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        METHODS.find(plugins.trust_code(f"{path}:{attribute}"))


def test_a_class_that_is_assigned_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"the method wrong is <class 'dict'>; it must be a class derived from"):
        METHODS["wrong"] = dict  # type: ignore[assignment]
    assert "wrong" not in METHODS


def test_folders_may_have_an_at_sign(shift: Path) -> None:
    path = shift.parent / "ada@example.org" / "shift.py"
    path.parent.mkdir()
    shift.rename(path)
    name = plugins.trust_code(f"{path}:Shift")
    assert (METHODS.find(name).title, plugins.trust_code(name)) == ("shift", name)
    for other in ("0" * 32, "5f0a"):
        with pytest.raises(UntrustedCodeError):
            METHODS.find(plugins.trust_code(f"{path}:Shift@{other}"))


def test_files_that_cannot_be_named(shift: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*nowhere\.py"):
        plugins.trust_code(f"{shift.with_name('nowhere.py')}:Shift")
    shift.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read as Python text"):
        plugins.trust_code(f"{shift}:Shift")
    with pytest.raises(UntrustedCodeError, match="without a hash of its content"):
        method_settings({"name": f"{shift}:Shift"})
    with pytest.raises(ConfigError, match=r"or PATH/FILE\.py:CLASS for one of your own"):
        method_settings({"name": "shift"})


def test_a_prompts_file_cannot_name_a_path(shift: Path, backbone: Backbone, tmp_path: Path) -> None:
    method = build_method({"name": plugins.trust_code(f"{shift}:Shift")}, backbone, NAMES)
    path = tmp_path / "prompts.safetensors"
    save_prompts(path, method)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"shift.py:Shift", b"../../x.py:Sha"))
    with pytest.raises((UntrustedCodeError, CheckpointError)):
        load_prompts(path, backbone, trust_code=True)


def test_changed_code_is_another_run(shift: Path) -> None:
    first = plugins.trust_code(f"{shift}:Shift")
    shift.write_text(shift.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    second = plugins.trust_code(f"{shift}:Shift")
    names = [content_name(resolve([{"method": {"name": name}}])) for name in (first, second)]
    assert names[0] != names[1]
    assert all(name.startswith("emoji-animals_Shift_all_16shots_seed1_") for name in names)
    assert complete(resolve([{"method": {"name": first}}])).method == {"name": first, "strength": 1.0}


def test_presets_of_the_class(shift: Path) -> None:
    shift.write_text(
        source_of_the_page().replace(
            "    Settings = ShiftSettings\n",
            "    Settings = ShiftSettings\n"
            '    presets = {"few-shot": {"method": {"strength": 3.0}, "train": {"lr": 0.5}}}\n',
        ),
        encoding="utf-8",
    )
    name = plugins.trust_code(f"{shift}:Shift")
    recipe = recipe_of(name, ["few-shot", "base-to-novel"])
    assert recipe == "shift.py:Shift_few-shot"
    settings = complete(resolve([read_preset(recipe)]))
    assert (settings.method, settings.train.lr) == ({"name": name, "strength": 3.0}, 0.5)
    assert recipe_of(name, ["base-to-novel"]) == "shift.py:Shift_base-to-novel"
    shift.write_text(shift.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    other = plugins.trust_code(f"{shift}:Shift")
    assert recipe_of(other, ["few-shot"]) == f"{other}_few-shot"
    assert recipe_of(name, ["few-shot"]) == recipe


def test_the_estimator_takes_a_file(shift: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    classifier = maple.PromptClassifier(f"{shift}:Shift", backbone="maple-tiny", pretrained="random:0", epochs=1)
    labels = ["cat", "dog", "owl"] * 2
    found = classifier.fit(images, labels).predict(images)
    assert set(found) <= set(labels)
    classifier.save_pretrained(shift.parent / "saved")
    again = maple.PromptClassifier.from_pretrained(shift.parent / "saved")
    assert (again.predict(images) == found).all()


@pytest.mark.usefixtures("shift")
def test_the_commands_take_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    few = ["--set", "train.epochs=1", "--shots", "1", "--backbone", "maple-tiny", "--pretrained", "random:0"]
    result = run(app, ["train", "--method", "mine/shift.py:Shift", *few, "--output", "run"])
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert settings["method"]["name"] == plugins.trust_code("mine/shift.py:Shift")
    assert (tmp_path / "run" / "shift.py").is_file()
    image = tmp_path / "image.png"
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(image)
    assert run(app, ["predict", "run", "image.png"]).exit_code == 0
    forget(monkeypatch, tmp_path / "of another user")
    for command in (["predict", "run", "image.png"], ["evaluate", "run"], ["train", "--preset", "run"]):
        with pytest.raises(UntrustedCodeError):
            run(app, command, catch_exceptions=False)
    assert run(app, ["predict", "run", "image.png", "--trust-code"]).exit_code == 0


def entry(monkeypatch: pytest.MonkeyPatch, group: str, folder: Path, name: str, value: str) -> None:
    monkeypatch.syspath_prepend(str(folder))
    found = {name: EntryPoint(name, value, group)}
    monkeypatch.setattr(plugins, "_entry_points", lambda asked: found if asked == group else {})
    monkeypatch.setattr(METHODS, "_known", dict(METHODS._known))


def test_installed_methods_are_known_by_name(
    shift: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shift.rename(shift.with_name("acme_shift.py"))
    entry(monkeypatch, "maple.methods", shift.parent, "acme", "acme_shift:Shift")
    assert "acme" in METHODS
    assert list(METHODS)[-1] == "acme"
    method = build_method({"name": "acme"}, backbone, NAMES)
    save_prompts(tmp_path / "prompts.safetensors", method)
    assert type(load_prompts(tmp_path / "prompts.safetensors", backbone)) is METHODS["acme"]
    assert recipe_of("acme", ["few-shot"]) == "acme_few-shot"
    assert maple.methods.describe_methods()["acme"].title == "shift"


def test_a_broken_package_does_not_break_the_others(
    shift: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entry(monkeypatch, "maple.methods", shift.parent, "acme", "no_such_package:Shift")
    assert "coop" in maple.methods.describe_methods()
    assert "the method 'acme'" in caplog.text
    assert "cannot be imported: ModuleNotFoundError" in caplog.text
    with pytest.raises(ConfigError, match="repair or remove the package"):
        METHODS.find("acme")


def test_entry_points_are_read_from_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "acme-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n", encoding="utf-8")
    (installed / "entry_points.txt").write_text(
        "[maple.methods]\nacme = acme_shift:Shift\nbad name = acme_shift:Shift\n"
        "[maple.datasets]\nacme-birds = acme_birds:BIRDS\n",
        encoding="utf-8",
    )
    (tmp_path / "acme_birds.py").write_text(
        "from maple.data.catalogue import DatasetSpec\n"
        'BIRDS = DatasetSpec("Birds", "birds", "images", "split.json", "a photo of a {}, a bird.")\n',
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins._entry_points.cache_clear()
    try:
        assert "acme" in METHODS
        assert "bad name" not in METHODS
        from maple.data import load_dataset
        from maple.data.catalogue import CATALOGUE, known_names, template_of

        assert "acme-birds" in known_names()
        assert template_of("acme-birds") == "a photo of a {}, a bird."
        folder = tmp_path / "data" / "birds"
        (folder / "images").mkdir(parents=True)
        for name in ("owl", "wren"):
            (folder / "images" / f"{name}.jpg").write_bytes(b"")
        rows = [["owl.jpg", 0, "owl"], ["wren.jpg", 1, "wren"]]
        (folder / "split.json").write_text(json.dumps({"train": rows, "val": [], "test": rows}), encoding="utf-8")
        assert load_dataset("acme-birds", tmp_path / "data").class_names == ("owl", "wren")
        del CATALOGUE["acme-birds"]
    finally:
        plugins._entry_points.cache_clear()


def test_without_a_home_code_is_accepted_in_this_process(shift: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.name == "posix" and os.geteuid() == 0:
        monkeypatch.setattr(plugins, "_folder", lambda: None)
    name = plugins.trust_code(f"{shift}:Shift")
    assert METHODS.find(name).title == "shift"
