"""The documentation's code runs, its notebooks too, and each method has its page."""

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from maple.cli import app
from maple.config import preset_names, read_preset
from maple.data import emoji
from maple.methods import METHODS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>[^\n]+) -->\n)?```(?P<language>sh|python)\n(?P<code>.*?)^```$", re.M | re.S
)

# What a page's author could not mark, and what it needs; the other blocks of these pages are run.
ELSEWHERE = {
    "make demo": "minutes",
    "maple fit path/to/folder": "your pictures",
    "maple train --dataset path/to/folder": "your pictures",
    "maple predict RUN": "your run",
    "export MAPLE_DATA": "the data sets",
    "maple train --preset maple_base-to-novel --dataset eurosat": "the data sets",
    "maple sweep base-to-novel --methods zero_shot,coop,maple --datasets eurosat": "the data sets",
    "import torch": "OpenAI's weights; run by test_documents.py",
}


def blocks(path: Path) -> list[tuple[str, str]]:
    """(language, code) of the blocks that can run here, in their order."""
    found = []
    for match in BLOCK.finditer(path.read_text(encoding="utf-8")):
        elsewhere = any(match["code"].startswith(start) for start in ELSEWHERE) and path.name == "README.md"
        if not match["needs"] and not elsewhere:
            found.append((match["language"], match["code"]))
    return found


PAGES = [path for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))) if blocks(path)]


def quick(words: list[str]) -> list[str]:
    """The same command with as little training as there can be."""
    if words[0] == "train":
        return [*words, "--shots", "1", "--set", "train.epochs=1", "--device", "cpu"]
    return words


@pytest.fixture
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations ask about two pictures of each class, not ten."""
    monkeypatch.setitem(emoji.PARTS, "test", range(200, 202))


@pytest.mark.usefixtures("few_pictures")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, in a folder of their own, as a reader would."""
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
                f"{path.name}: {words} is no command of ours; mark the block with <!-- needs: -->"
            )
            result = CliRunner().invoke(app, quick(words[1:]))
            assert result.exit_code == 0, f"{path.name}: {shlex.join(words)}: {result.output} {result.exception}"


def test_there_are_blocks_of_both_kinds() -> None:
    assert {path.name for path in PAGES} >= {
        "README.md",
        "quickstart.md",
        "explain.md",
        "new-method.md",
        "benchmark.md",
    }
    assert {language for path in PAGES for language, _ in blocks(path)} == {"sh", "python"}


def test_what_runs_elsewhere_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [start for start in ELSEWHERE if f"\n{start}" not in text] == []


@pytest.mark.usefixtures("few_pictures")
@pytest.mark.parametrize("path", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their cells in one namespace; the last line of a cell is an expression or a statement, as it is."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], f"{path.name} is kept without outputs"
            exec(compile("".join(cell["source"]), f"{path.name}#{cell['id']}", "exec"), names)
    assert names.get("rows") or len(names["again"].predict(names["test"])) == len(names["test"])


def site_pages() -> Any:
    spec = importlib.util.spec_from_file_location("method_pages", ROOT / "scripts" / "method_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", METHODS)
def test_each_method_has_its_page(name: str) -> None:
    text = site_pages().page(name)
    kind = METHODS[name]
    assert text.startswith(f"# {kind.title}\n")
    assert kind.paper in text
    (file,) = re.findall(r"- File: `(.*)`", text)
    assert f"class {kind.__name__}(" in (ROOT / file).read_text(encoding="utf-8")
    for setting in kind.Settings.model_fields:
        assert f"| `{setting}` |" in text
    own = [preset for preset in preset_names() if read_preset(preset).get("method", {}).get("name") == name]
    assert all(f'"{preset}"' in text for preset in own)


def test_published_numbers_are_on_the_page() -> None:
    pages = site_pages()
    assert "| average | MaPLe | 82.28 | 75.14 | 78.55 |" in pages.page("maple")
    assert "None ship with the package." in pages.page("linear_probe")


def test_the_site_asks_for_pages_that_exist() -> None:
    """Every page of the navigation is there."""

    def listed(text: str) -> Iterator[str]:
        yield from re.findall(r": ([\w/-]+\.md)$", text, flags=re.MULTILINE)

    pages = list(listed((ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert len(pages) > 10
    assert [page for page in pages if not (DOCS / page).exists()] == []
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert written <= set(pages), "a page that no reader would find"
