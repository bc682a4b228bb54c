"""The container files name what exists, and what is served without PyTorch has every package that it needs."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REQUIREMENTS = ROOT / "docker" / "requirements-serve.txt"
IMPORT_ALL = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import maple.cli, maple.inference.onnx_predictor, maple.clip_tokenizer, maple.serve.api, maple.serve.examples
import maple.serve.listen
import ftfy, onnxruntime, regex, tokenizers
"""


def requirements() -> list[str]:
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_requirements_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(requirements()) <= {*project["dependencies"], *extras["serve"], *extras["onnx"]}
    assert {*extras["serve"], *extras["onnx"]} <= set(requirements())


def test_an_export_is_served_without_the_other_packages() -> None:
    """Imports alone: tests/export runs predictions without PyTorch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    modules = {"open_clip_torch": "open_clip", "scikit-learn": "sklearn"}
    left_out = {re.split("[><=]", name)[0] for name in {*project["dependencies"]} - {*requirements()}}
    come_with_listed_ones = {"filelock", "fsspec", "huggingface_hub", "packaging", "tqdm"}
    absent = {modules.get(name, name) for name in left_out} - come_with_listed_ones
    assert "torch" in absent
    code = IMPORT_ALL.replace("{ABSENT}", repr(sorted(absent)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.serve"])
def test_images_are_built_from_files_that_are_sent_and_exist(name: str) -> None:
    text = (ROOT / "docker" / name).read_text(encoding="utf-8")
    sent = re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(encoding="utf-8"), flags=re.MULTILINE)
    sources = [word for line in re.findall(r"^COPY ([^-].*) \S+$", text, flags=re.MULTILINE) for word in line.split()]
    assert {"pyproject.toml", "src"} <= {*sources}
    assert {*sources} <= {*sent}
    assert all((ROOT / source).exists() for source in sources)
    assert re.search(r"^USER maple$", text, flags=re.MULTILINE)
    assert all(re.search(r":\d", image) for image in re.findall(r"^FROM (\S+)", text, flags=re.MULTILINE))
    (instructions,) = re.findall(r"^ENTRYPOINT (\[.*\])$", text, flags=re.MULTILINE)
    assert instructions.startswith('["maple"')
    assert "HEALTHCHECK" in text


def test_the_processes_of_the_example_may_be_addressed_as_it_says() -> None:
    """By the balancer's health checks, and by Prometheus, which reads each process."""
    folder = ROOT / "examples" / "serve"
    allowed = re.search(r"^  command: \[(.+)\]$", (folder / "compose.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    assert allowed is not None
    names = set(re.findall(r'"--allow-host", "(\S+?)"', allowed[1]))
    balancer = (folder / "Caddyfile").read_text(encoding="utf-8")
    assert {*re.findall(r"(\S+):8000", balancer), *re.findall(r"Host (\S+)", balancer)} == names
