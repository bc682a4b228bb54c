"""Servers for tests, inside the test's process."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from serve_helpers import Colours, Start
from starlette.testclient import TestClient

from maple.serve.api import create_app
from maple.serve.limits import Limits
from maple.serve.middleware import LOOPBACK
from maple.serve.responses import ExampleList


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a server and return a client for it; limits by their names."""
    with ExitStack() as stack:

        def run(
            predictor: Colours | None = None,
            *,
            token: str | None = None,
            url_prefix: str = "",
            find_examples: Callable[[], ExampleList] | None = None,
            **limits: Any,
        ) -> TestClient:
            app = create_app(
                predictor or Colours(),
                Limits(**limits),
                token=token,
                hosts=LOOPBACK,
                find_examples=find_examples,
                url_prefix=url_prefix,
            )
            return stack.enter_context(TestClient(app, base_url="http://127.0.0.1"))

        yield run


@pytest.fixture
def client(start: Start) -> TestClient:
    return start()
