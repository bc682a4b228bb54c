"""Fixtures for the real data, where it is available."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session")
def fewshot_lists() -> Path:
    """Return the folder of published few-shot lists."""
    folder = Path(os.environ.get("MAPLE_FEWSHOT_LISTS", SHARED / "data" / "fewshot_lists"))
    if not folder.is_dir():
        pytest.skip("set MAPLE_FEWSHOT_LISTS to the folder of published few-shot lists")
    return folder


@pytest.fixture(scope="session")
def split_files() -> Path:
    """Return the folder of published split files."""
    folder = Path(os.environ.get("MAPLE_SPLITS", SHARED / "data" / "splits"))
    if not folder.is_dir():
        pytest.skip("set MAPLE_SPLITS to the folder of published split files")
    return folder


@pytest.fixture(scope="session")
def published_numbers() -> Path:
    """Return the folder of published numbers."""
    folder = Path(os.environ.get("MAPLE_NUMBERS", SHARED / "paper" / "numbers"))
    if not folder.is_dir():
        pytest.skip("set MAPLE_NUMBERS to the folder of published numbers")
    return folder
