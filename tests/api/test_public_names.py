"""The names of `maple`: listed for tab completion, typed for type checkers, imported when first used."""

import subprocess
import sys
from pathlib import Path

import pytest

import maple

PROGRAM = """
from maple import METHODS, PromptClassifier, build_method, evaluate, fit, load_clip

reveal_type(load_clip)
reveal_type(PromptClassifier().fit)
reveal_type(fit)
reveal_type(evaluate)
reveal_type(METHODS["maple"])
load_clip(3)
"""
# Types of PyTorch and of other libraries do not matter here, and reading them takes
# longer than reading this package.
CONFIGURATION = """
[mypy]
strict = true
[mypy-torch.*,torchvision.*,open_clip.*,transformers.*,accelerate.*,numpy.*,sklearn.*,scipy.*,pandas.*,matplotlib.*,\
PIL.*,pydantic.*,typer.*,rich.*,fastapi.*,starlette.*,safetensors.*,huggingface_hub.*,ray.*,onnx.*,datasets.*,fsspec.*]
follow_imports = skip
ignore_missing_imports = true
"""


def test_public_names_are_listed_and_resolve() -> None:
    assert set(dir(maple)) == set(maple.__all__) - {"__version__"}
    for name in maple.__all__:
        assert getattr(maple, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = maple.no_such_name  # type: ignore[attr-defined]


def test_importing_maple_loads_no_pytorch() -> None:
    code = "import maple, sys; assert dir(maple) and not {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_functions_are_not_hidden_by_modules() -> None:
    code = (
        "import maple.fitting, maple.evaluation, maple.inference.classifier\n"
        "from maple import evaluate, fit\n"
        "assert callable(evaluate) and callable(fit)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_checkers_see_real_types(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "mypy.ini").write_text(CONFIGURATION)
    command = ["--config-file", "mypy.ini", "--cache-dir", "cache", "program.py"]
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    revealed = [line.partition("Revealed type is ")[2] for line in result.stdout.splitlines() if "Revealed" in line]
    assert len(revealed) == 5, result.stdout + result.stderr
    assert revealed[0].endswith('-> maple.clip.backbone.Backbone"')
    assert revealed[1].endswith('-> maple.inference.classifier.PromptClassifier"')
    assert revealed[2].endswith('-> maple.fitting.stored_fit.FitResult"')
    assert revealed[3].endswith('-> maple.metrics.Scores"')
    assert revealed[4] == '"type[maple.methods.base.Method]"'
    errors = [line for line in result.stdout.splitlines() if "error:" in line and line.startswith("program.py")]
    assert len(errors) == 1
    assert 'Argument 1 to "load_clip" has incompatible type "int"; expected "str"' in errors[0]
