"""The OpenAPI description is exact: a fuzzer sends requests that it allows and forbids, and checks the responses.

MAPLE_FUZZ_EXAMPLES sets how many requests are made of each kind.
"""

import json
import os
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from serve_helpers import process

from maple.serve.responses import ERROR_CODES

TOKEN = "a-token-for-the-fuzzer"
COUNT = int(os.environ.get("MAPLE_FUZZ_EXAMPLES", "15"))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def schemathesis() -> Any:
    """Imported here: it takes seconds, in every process that collects the tests."""
    return pytest.importorskip("schemathesis", reason="no schemathesis: pip install 'maple-clip[test]'")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with process(token=TOKEN, images=3, classes=8, name_chars=30) as server:
        yield server.url
        assert server.stop() == (0, "")


@pytest.fixture(scope="module")
def schema(schemathesis: Any, url: str) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


PATHS = [
    *(("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/metrics"), ("GET", "/v1/model")),
    *(("GET", "/v1/examples"), ("GET", "/v1/examples/{number}"), ("POST", "/v1/predict")),
]


@pytest.mark.parametrize("positive", [True, False], ids=["allowed", "not allowed"])
@pytest.mark.parametrize(("method", "path"), PATHS)
def test_responses_are_as_described(schemathesis: Any, schema: Any, method: str, path: str, positive: bool) -> None:
    mode = schemathesis.GenerationMode.POSITIVE if positive else schemathesis.GenerationMode.NEGATIVE
    operation = schema[path][method]
    if not (positive or operation.path_parameters or operation.body):
        pytest.skip("no request can be invalid")
    # Text is not an image, so a request that the description allows may still be refused for its content.
    excluded = [schemathesis.checks.positive_data_acceptance] if method == "POST" else []

    @settings(
        max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"}, excluded_checks=excluded)

    ask()


def test_the_paths_are_all_there_are(schema: Any) -> None:
    assert {(found.ok().method.upper(), found.ok().path) for found in schema.get_all_operations()} == set(PATHS)


def test_every_response_and_error_is_described(url: str) -> None:
    with urllib.request.urlopen(f"{url}/openapi.json", timeout=20) as answer:
        found = json.load(answer)
    predict = found["paths"]["/v1/predict"]["post"]
    general = {"not_found", "method_not_allowed"}
    assert set(predict["responses"]) == {"200", *(str(int(ERROR_CODES[code])) for code in ERROR_CODES.keys() - general)}
    assert set(predict["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert predict["security"] == [{"token": []}]
    assert "security" not in found["paths"]["/healthz"]["get"]
    for path in found["paths"].values():
        for operation in path.values():
            for status, response in operation["responses"].items():
                (content,) = response["content"].values()
                if int(status) >= 400:
                    assert content["schema"] == {"$ref": "#/components/schemas/ErrorResponse"}
    codes = found["components"]["schemas"]["ErrorBody"]["properties"]["code"]["enum"]
    assert set(codes) == ERROR_CODES.keys()
