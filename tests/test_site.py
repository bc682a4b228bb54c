"""The code blocks and notebooks of the documentation run, and each method has its page."""

import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import maple
from maple.cli import app
from maple.config import preset_names, read_preset
from maple.data import emoji
from maple.methods import METHODS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>[^\n]+) -->\n)?```(?P<language>sh|python)\n(?P<code>.*?)^```$", re.M | re.S
)


def blocks(path: Path) -> list[tuple[str, str]]:
    """(language, code) of the blocks that can run here, in their order."""
    matches = BLOCK.finditer(path.read_text(encoding="utf-8"))
    return [(match["language"], match["code"]) for match in matches if not match["needs"]]


PAGES = [path for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))) if blocks(path)]


def quick(words: list[str]) -> list[str]:
    """The same command with as little training as possible."""
    if words[0] == "train":
        return [*words, "--shots", "1", "--set", "train.epochs=1", "--device", "cpu"]
    return words


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations use two images of each class, not ten."""
    monkeypatch.setitem(emoji.SCENES, "test", range(200, 202))


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, in a new folder, as a reader would run them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MAPLE_DATA", raising=False)
    for language, code in blocks(path):
        if language == "python":
            exec(compile(code, str(path), "exec"), {"__name__": "__main__"})
            continue
        for words in (shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()):
            if not words:
                continue
            assert words[0] == "maple", (
                f"{path.name}: {words} is not a maple command; mark the block with <!-- needs: -->"
            )
            result = CliRunner().invoke(app, quick(words[1:]))
            assert result.exit_code == 0, f"{path.name}: {shlex.join(words)}: {result.output} {result.exception}"


def test_there_are_blocks_of_both_kinds() -> None:
    assert {path.name for path in PAGES} >= {
        "quickstart.md",
        "explain.md",
        "new-method.md",
        "benchmark.md",
    }
    assert {language for path in PAGES for language, _ in blocks(path)} == {"sh", "python"}


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("path", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the cells in one namespace; the last line of a cell may be an expression."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            # Outputs that are kept are of a run without errors, and have no folder of the machine that ran it.
            assert {output["output_type"] for output in cell["outputs"]} <= {"execute_result", "stream"}, path.name
            assert not re.search(r"(/home|/root|/tmp|/Users)/", json.dumps(cell["outputs"])), path.name
            source = "".join(cell["source"]).replace("--shots 16", "--shots 1 --set train.epochs=1")
            exec(compile(source, f"{path.name}#{cell['id']}", "exec"), names)
    assert sum(bool(cell.get("outputs")) for cell in cells) > 3, path.name
    assert names.get("rows") or len(names["again"].predict(names["test"])) == len(names["test"])


@pytest.fixture(scope="module")
def build_docs() -> Any:
    """The script that writes the pages of the methods."""
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "scripts" / "build_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", METHODS)
def test_each_method_has_its_page(name: str, build_docs: Any) -> None:
    text = build_docs.method_page(name)
    kind = METHODS[name]
    assert text.startswith(f"# {kind.title}\n")
    assert kind.paper in text
    (file,) = re.findall(r"- File: `(.*)`", text)
    assert f"class {kind.__name__}(" in (ROOT / file).read_text(encoding="utf-8")
    for setting in kind.Settings.model_fields:
        assert f"| `{setting}` |" in text
    own = [preset for preset in preset_names() if read_preset(preset).get("method", {}).get("name") == name]
    assert all(f'"{preset}"' in text for preset in own)


def test_published_numbers_are_on_the_page(build_docs: Any) -> None:
    assert "| average | MaPLe | 82.28 | 75.14 | 78.55 |" in build_docs.method_page("maple")
    assert "None ship with the package." in build_docs.method_page("linear_probe")


def pages(navigation: list[dict[str, Any]]) -> Iterator[str]:
    """The pages that a navigation lists."""
    for entry in navigation:
        for value in entry.values():
            yield from pages(value) if isinstance(value, list) else [value]


def test_the_navigation_lists_every_page() -> None:
    listed = list(pages(tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]))
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def test_the_site_has_the_pages_of_all_methods(
    build_docs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the site is built from: every page that its navigation lists, and links that lead somewhere."""
    monkeypatch.setattr(build_docs, "BUILD", tmp_path)
    config = build_docs.write_sources()
    project = tomllib.loads(config.read_text(encoding="utf-8"))["project"]
    listed = list(pages(project["nav"]))
    assert [page for page in listed if not (tmp_path / "docs" / page).is_file()] == []
    assert {f"methods/{name}.md" for name in METHODS} <= set(listed)
    assert project["plugins"]["mkdocstrings"]["handlers"]["python"]["paths"] == ["../src"]
    for path in (tmp_path / "docs").rglob("*.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).is_file(), f"{path.name} links to {target}"


def test_the_architecture_page_lists_the_layers_that_are_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = [c for c in project["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    table = (DOCS / "architecture.md").read_text(encoding="utf-8").partition("| layer | packages |")[2]
    rows = re.findall(r"^\| [\w, ]+ \| (`.*`) \|$", table, flags=re.MULTILINE)
    layers = [set(re.findall(r"`(\w+)`", row)) for row in rows]
    assert layers == [set(layer.split(" | ")) for layer in contract["layers"]]


def test_the_paths_of_the_architecture_page_exist() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    paths = re.findall(r"`([\w/]+(?:/|\.py))`", text)
    assert len(paths) > 20
    package = ROOT / "src" / "maple"
    names = {path.name for path in package.rglob("*.py")}
    assert [
        path for path in paths if path not in names and not any((at / path).exists() for at in (package, ROOT))
    ] == []


def test_the_api_page_lists_every_public_name() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    assert [name for name in maple.__all__ if f"`{name}`" not in text] == []
