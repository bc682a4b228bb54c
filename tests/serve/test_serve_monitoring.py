"""Metrics for Prometheus, and a proxy that offers the server under a prefix."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve_helpers import Colours, Start, png
from starlette.testclient import TestClient

from maple.serve.responses import ERROR_CODES

PREFIX = "/maple"


def samples(client: TestClient, path: str = "/metrics") -> dict[tuple[str, ...], float]:
    """The values by name and labels, without those of the process."""
    families = text_string_to_metric_families(client.get(path).text)
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        if family.name.startswith("maple_")
        for sample in family.samples
    }


def predict(client: TestClient, path: str = "/v1/predict", **fields: Any) -> Any:
    images = [("images", (f"{index}.png", png(), "image/png")) for index in range(3)]
    return client.post(path, files=images, data=fields)


def test_metrics_count_what_happened(start: Start) -> None:
    predictor = Colours()
    client = start(predictor, queue=20, images=4)
    assert predict(client, reject=0.999, class_names="red thing,green thing").status_code == 200
    assert predict(client).status_code == 200
    assert predict(client, top="many").status_code == 422
    found = samples(client)
    assert found["maple_requests_total", "/v1/predict", "200"] == 2
    assert found["maple_requests_total", "/v1/predict", "422"] == 1
    assert found["maple_request_seconds_count", "/v1/predict"] == 3
    assert found["maple_images_total",] == 6
    assert found["maple_rejected_images_total",] == 3
    assert found["maple_batch_images_count",] == len(predictor.batches)
    assert found["maple_batch_images_sum",] == sum(predictor.batches) == 6
    assert (found["maple_queue_images",], found["maple_queue_limit_images",]) == (0, 20)


def test_the_labels_take_few_values(client: TestClient) -> None:
    """Whatever addresses, methods and hosts clients invent."""
    before = len(samples(client))
    for number in range(30):
        client.get(f"/v1/examples/{number}")
        client.get(f"/nothing/{number}?x={number}")
        client.request(f"VERB{number}", "/")
        client.get("/healthz", headers={"Host": f"evil{number}.example"})
    routes = {key[1] for key in samples(client) if key[0] == "maple_requests_total"}
    assert routes == {"/metrics", "/v1/examples/{number}", "other", "/", "/healthz"}
    assert len(samples(client)) < before + 100


def test_metrics_need_the_token(start: Start) -> None:
    client = start(token="a-token-of-the-test")
    assert client.get("/metrics").status_code == ERROR_CODES["unauthorized"]
    authorized = client.get("/metrics", headers={"Authorization": "Bearer a-token-of-the-test"})
    assert authorized.headers["content-type"].startswith("text/plain; version=1.0.0")
    assert 'maple_requests_total{route="/metrics",status="401"} 1.0' in authorized.text
    assert client.get("/docs").status_code == client.get("/healthz").status_code == 200


@pytest.mark.parametrize("passed_on", [PREFIX, ""], ids=["the proxy passes the prefix on", "the proxy removes it"])
def test_all_paths_work_behind_a_proxy(start: Start, passed_on: str) -> None:
    client = start(url_prefix=PREFIX)
    for path in (
        "/",
        "/page.js",
        "/page.css",
        "/docs",
        "/docs.js",
        "/openapi.json",
        "/v1/model",
        "/readyz",
        "/metrics",
    ):
        assert client.get(passed_on + path).status_code == 200, path
    assert predict(client, f"{passed_on}/v1/predict").status_code == 200
    assert client.get(f"{passed_on}/openapi.json").json()["servers"] == [{"url": PREFIX}]
    assert samples(client)["maple_requests_total", "/v1/predict", "200"] == 1


def test_a_prefix_neither_opens_nor_doubles_a_path(start: Start) -> None:
    client = start(url_prefix=f"{PREFIX}/", token="a-token-of-the-test")
    good = {"Authorization": "Bearer a-token-of-the-test"}
    assert client.get(f"{PREFIX}/v1/model").status_code == client.get(f"{PREFIX}/metrics").status_code == 401
    for path in (f"{PREFIX}{PREFIX}/v1/model", "/maplev1/model"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers=good).status_code == 404
    redirect = client.get(PREFIX, follow_redirects=False)
    assert (redirect.status_code, redirect.headers["location"]) == (308, f"{PREFIX}/")
    redirect = client.get(f"{PREFIX}?x=%C3%BC&y", follow_redirects=False)
    assert (redirect.status_code, redirect.headers["location"]) == (308, f"{PREFIX}/?x=%C3%BC&y")
    refused = client.get(PREFIX, headers={"Host": "evil.example"}, follow_redirects=False)
    assert refused.status_code == ERROR_CODES["wrong_host"]
    counted = client.get("/metrics", headers=good).text
    assert 'maple_requests_total{route="/",status="308"} 2.0' in counted
    assert 'maple_requests_total{route="/",status="421"} 1.0' in counted
