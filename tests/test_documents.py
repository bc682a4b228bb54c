"""Commands, options, links and names in the README and the documentation exist."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from maple.cli import app
from maple.config import preset_names
from maple.methods import METHODS
from maple.serve.responses import ERROR_CODES

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_python_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, except for OpenAI's weights, which tests cannot download."""
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "README.md", "python")
    names: dict[str, Any] = {}
    exec(code.replace('"openai"', '"random:0"'), names)
    assert names["method"].class_names == ("cat", "dog", "hamster")
    assert all(parameter.requires_grad for parameter in names["method"].parameters())


def commands() -> list[Any]:
    lines = [line for path in DOCUMENTS for block in blocks(path, "sh") for line in block.splitlines()]
    inline = [code for path in DOCUMENTS for code in re.findall(r"`(maple [^`]*)`", path.read_text(encoding="utf-8"))]
    return sorted({line.split("#")[0].strip() for line in [*lines, *inline] if line.startswith("maple ")})


@pytest.mark.parametrize("line", commands())
def test_commands_exist(line: str) -> None:
    """Every command, option and preset in the documents exists."""
    _, name, *arguments = shlex.split(line)
    command: Any = get_command(app).commands[name.rstrip(",")]  # type: ignore[attr-defined]
    while hasattr(command, "commands") and arguments:
        name = f"{name} {arguments[0]}"
        command = command.commands[arguments.pop(0).rstrip(",")]
    options = {option for parameter in command.params for option in parameter.opts}
    for argument, value in zip(arguments, [*arguments, ""][1:], strict=True):
        if argument.startswith("-"):
            assert argument in options, f"{name} has no option {argument}"
        if argument == "--preset":
            assert value in preset_names()


def test_there_are_commands() -> None:
    assert len(commands()) > 5


def test_every_method_has_its_row() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)) == METHODS.keys()


def test_serving_lists_every_error_code() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d, ]+) \| (`.*?`) \|", text, flags=re.MULTILINE)
    codes = {code: statuses.split(", ") for statuses, listed in rows for code in re.findall(r"`(\w+)`", listed)}
    assert codes.keys() == ERROR_CODES.keys()
    assert [code for code, status in ERROR_CODES.items() if str(int(status)) not in codes[code]] == []


def test_links_inside_the_project_exist() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"(?:\]\(|src=\")(?!http)([^)#\"]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_python_of_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training loops run as written; the other blocks need images, and are compiled."""
    monkeypatch.chdir(tmp_path)
    classifier, choice, loop, trainer, command = blocks(ROOT / "docs" / "python.md", "python")
    for code in (classifier, choice, command):
        compile(code, "python.md", "exec")
    names: dict[str, Any] = {}
    exec(loop, names)
    assert names["logits"].shape == (8, 2)
    assert (tmp_path / "pets.safetensors").is_file()
    exec(trainer, names)
    assert names["trainer"].finished
