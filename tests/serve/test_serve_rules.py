"""Which requests are valid, and the errors of those that are not."""

import base64
import json
from typing import Any

import pytest
from serve_helpers import NAMES, Colours, Start, expected, png
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from maple.errors import ConfigError
from maple.serve.api import create_app
from maple.serve.limits import Limits

RED = (200, 30, 30)
PREDICT = "/v1/predict"


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def files(*contents: bytes) -> list[Any]:
    return [("images", (f"{index}.png", content, "image/png")) for index, content in enumerate(contents)]


def refused(answer: Any, status: int, code: str) -> str:
    """Check an error answer; return its message."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json"), answer.text
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "details"}
    assert error["code"] == code
    assert answer.headers["x-content-type-options"] == "nosniff"
    return str(error["message"])


def as_dict(ranked: list[dict[str, Any]]) -> dict[str, float]:
    return {one["class"]: one["probability"] for one in ranked}


def test_a_form_and_json_get_the_same_answer(client: TestClient) -> None:
    names = ["red car", "blue car", "teapot"]
    form = client.post(
        PREDICT, files=files(png(RED), png((0, 0, 255))), data={"class_names": names, "top": "2", "zero_shot": "true"}
    )
    body = {"images": [b64(png(RED)), f"data:image/png;base64,{b64(png((0, 0, 255)))}"], "class_names": names}
    in_json = client.post(PREDICT, json={**body, "top": 2, "zero_shot": True})
    assert (form.status_code, in_json.status_code) == (200, 200)
    first, second = form.json(), in_json.json()
    assert [one["source"] for one in first["predictions"]] == ["0.png", "1.png"]
    assert [one["source"] for one in second["predictions"]] == ["images[0]", "images[1]"]
    for one, other in zip(first["predictions"], second["predictions"], strict=True):
        assert one["best"] == other["best"]
        assert one["zero_shot"] == other["zero_shot"]
        assert len(one["best"]) == 2
    assert first["class_count"] == 3
    assert first["note"].startswith("3 of 3 class names were not trained")
    right = expected(RED, names)
    best = as_dict(first["predictions"][0]["best"])
    assert best == {name: pytest.approx(right[name], abs=1e-3) for name in sorted(names, key=right.__getitem__)[1:]}
    assert list(best.values()) == sorted(best.values(), reverse=True)


def test_the_trained_names_are_used_where_none_are_given(client: TestClient) -> None:
    found = client.post(PREDICT, files=files(png(RED)), data={"top": "100"}).json()
    (one,) = found["predictions"]
    assert as_dict(one["best"]) == {name: pytest.approx(p, abs=1e-3) for name, p in expected(RED, NAMES).items()}
    assert one["zero_shot"] is None
    assert found["note"] is None


def test_names_of_a_form_may_be_in_one_field(client: TestClient) -> None:
    found = client.post(PREDICT, files=files(png()), data={"class_names": " red car,blue car\nteapot,\r\n"}).json()
    assert set(as_dict(found["predictions"][0]["best"])) == {"red car", "blue car", "teapot"}


def test_names_may_hold_commas(client: TestClient) -> None:
    def names(given: list[str]) -> set[str]:
        found = client.post(PREDICT, files=files(png()), data={"class_names": given}).json()
        return set(as_dict(found["predictions"][0]["best"]))

    assert names(["dog, small", "hound"]) == {"dog, small", "hound"}
    assert names(['"dog, small",hound\n"cat"']) == {"dog, small", "hound", "cat"}
    answer = client.post(PREDICT, files=files(png()), data={"class_names": '"dog, small'})
    assert "in double quotes" in refused(answer, 422, "class_names")


def test_a_form_may_hold_json(client: TestClient) -> None:
    def send(names: str, zero_shot: str = "0") -> Any:
        return client.post(PREDICT, files=files(png()), data={"class_names": names, "zero_shot": zero_shot})

    one = send(' ["red car", "dog, small"]', "1").json()["predictions"][0]
    assert set(as_dict(one["best"])) == set(as_dict(one["zero_shot"])) == {"red car", "dog, small"}
    one = send('"[1]","{2}",[3]').json()["predictions"][0]
    assert set(as_dict(one["best"])) == {"[1]", "{2}", "[3]"}, "names in double quotes"
    assert one["zero_shot"] is None
    assert "at least 1 item" in refused(send("[]"), 422, "invalid_request")
    assert "class_names[0]" in refused(send('["\\ud800", "b"]'), 422, "invalid_request")
    assert "class_names" in refused(send("[" * 100_000), 422, "invalid_request")
    for text in ("['red car', 'blue car']", "[1, 2]", "[1],[2]", ' ["a", "b",]', '{"a": "b"}', '["a", 1]'):
        answer = send(text)
        assert "class_names: begins as JSON, but is not a list of texts" in refused(answer, 422, "invalid_request")
        assert [one["where"] for one in answer.json()["error"]["details"]] == ["class_names"]
    assert "zero_shot: Input should be a valid boolean" in refused(send("a,b", "2"), 422, "invalid_request")


def test_trained_names_that_are_equal_or_no_unicode(start: Start) -> None:
    """Published lists have equal names, and folders of other encodings give names that UTF-8 cannot write."""
    answerer = Colours()
    answerer.trained_names = ("missile", "tea", "missile", "caf\udce9")
    client = start(answerer)
    told = client.get("/v1/model").json()["class_names"]
    assert told == ["missile", "tea", "missile", "caf\ufffd"]
    best = client.post(PREDICT, files=files(png())).json()["predictions"][0]["best"]
    assert sorted(one["class"] for one in best) == sorted(told)
    assert client.post(PREDICT, files=files(png()), data={"class_names": told}).status_code == 422
    answerer.trained_names = ("missile", "tea", "missile")
    for given in (["missile", "tea", "missile"], ["tea", "missile"]):
        answer = client.post(PREDICT, files=files(png()), data={"class_names": given})
        assert answer.json()["class_count"] == len(given)
    answerer.trained_names = ("red_car", "tea")
    answer = client.post(PREDICT, files=files(png()), data={"class_names": ["red car", "tea"]})
    assert {one["class"] for one in answer.json()["predictions"][0]["best"]} == {"red car", "tea"}, "as given"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "images: Field required"),
        ({"images": []}, "images: List should have at least 1 item"),
        ({"images": ["!"]}, "is not base64"),
        ({"images": ["data:image/png,abc"]}, "is not base64"),
        ({"images": "AAAA"}, "images: Input should be a valid array"),
        ({"images": [3]}, "images[0]: Input should be a valid string"),
        ({"images": ["AAAA"] * 3}, "images: List should have at most 2 items"),
        ({"top": 0}, "top: Input should be greater than or equal to 1"),
        ({"top": "5"}, "top: Input should be a valid integer"),
        ({"top": 1.5}, "top: Input should be a valid integer"),
        ({"top": True}, "top: Input should be a valid integer"),
        ({"top": 10**30}, "top: Input should be less than or equal to 1000"),
        ({"zero_shot": 1}, "zero_shot: Input should be a valid boolean"),
        ({"class_names": []}, "class_names: List should have at least 1 item"),
        ({"class_names": ["a", " _ "]}, "class_names[1]: String should match"),
        ({"class_names": ["a", ""]}, "class_names[1]: String should have at least 1"),
        ({"class_names": ["a", "b\u0000"]}, "class_names[1]: contains a control character"),
        ({"class_names": ["a" * 21]}, "class_names[0]: String should have at most 20 characters"),
        ({"class_names": [str(n) for n in range(8)]}, "class_names: List should have at most 7 items"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ([], "body: Input should be an object"),
    ],
)
def test_wrong_values_are_named(start: Start, body: Any, message: str) -> None:
    client = start(images=2, queue=2, name_chars=20, classes=7)
    whole = {"images": [b64(png())], **body} if isinstance(body, dict) and body else body
    assert message in refused(client.post(PREDICT, json=whole), 422, "invalid_request")


def test_duplicate_names_are_refused_by_the_method(client: TestClient) -> None:
    answer = client.post(PREDICT, files=files(png()), data={"class_names": ["cat", "cat"]})
    assert "named more than once" in refused(answer, 422, "class_names")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top": "five"}, 'top: Input should be a valid integer (got "five")'),
        ({"top": "-3"}, "top: Input should be greater than or equal to 1 (got -3)"),
        ({"top": "5" * 50}, "top: Input should be less than or equal to 1000"),
        ({"top": ["1", "2"]}, "top: Input should be a valid integer"),
        ({"zero_shot": "perhaps"}, "zero_shot: Input should be a valid boolean"),
        ({"class_names": ""}, "class_names: List should have at least 1 item"),
        ({"class_names": "a,,b"}, "class_names[1]: String should have at least 1"),
        ({"images": "text"}, "images[0]: must be a file"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
    ],
)
def test_wrong_fields_are_named(client: TestClient, fields: Any, message: str) -> None:
    answer = client.post(PREDICT, files=files(png()), data=fields)
    assert message in refused(answer, 422, "invalid_request")


def test_images_of_a_form_need_a_file_name(client: TestClient) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="images"'
    parts = [head + b'; filename="a.png"\r\n\r\n' + png(), head + b"\r\n\r\n" + png()]
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = client.post(PREDICT, content=b"\r\n".join([*parts, b"--x--\r\n"]), headers=headers)
    assert "images[1]: must be a file, with a file name" in refused(answer, 422, "invalid_request")


def test_options_in_the_address_are_refused(client: TestClient) -> None:
    answer = client.post(f"{PREDICT}?top=1&class_names=a", files=files(png()))
    message = refused(answer, 422, "invalid_request")
    assert message == "query: the address has the options 'top', 'class_names', which belong in the body"


def test_too_many_images_in_a_form(start: Start) -> None:
    answer = start(images=2, queue=2).post(PREDICT, files=files(*[png()] * 3))
    assert "images: List should have at most 2 items" in refused(answer, 422, "invalid_request")


@pytest.mark.parametrize(
    ("kind", "body", "code"),
    [
        ("application/json", b"{", 400),
        ("application/json", b"", 400),
        ("application/json", b"\xff\xfe", 400),
        ("application/json", b'{"images": ["AAAA"], "top": NaN}', 422),
        ("application/json", b'{"class_names": ["\\ud800"]}', 400),
        ("application/json", b"[" * 100_000, 400),
        ("multipart/form-data", b"--x--", 400),
        ("multipart/form-data; boundary=x", b"", 400),
        ("multipart/form-data; boundary=x", b"hello", 400),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="top"\r\n\r\n5\r\n', 400),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\n5\r\n--x--\r\n", 400),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="class_names"\r\n\r\n\xff\r\n--x--\r\n',
            400,
        ),
        ("multipart/form-data; boundary=x", b"--x--\r\n", 422),
        (f"multipart/form-data; boundary={'x' * 300}", b"--x--\r\n", 400),
        ("text/plain", b"hello", 415),
        ("", b"hello", 415),
        ("application/x-www-form-urlencoded", b"top=5", 415),
        ("image/png", png(), 415),
    ],
)
def test_malformed_bodies(client: TestClient, kind: str, body: bytes, code: int) -> None:
    names = {400: "malformed", 415: "unsupported_media_type", 422: "invalid_request"}
    refused(client.post(PREDICT, content=body, headers={"content-type": kind}), code, names[code])


def test_compressed_bodies_are_not_read(client: TestClient) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert "compressed" in refused(client.post(PREDICT, content=b"x", headers=headers), 415, "unsupported_media_type")


def test_unreadable_images_are_all_named(start: Start) -> None:
    client = start(pixels=1000)
    answer = client.post(PREDICT, files=files(png()[:60], png(size=(10, 10)), png(size=(40, 40)), b"text", b""))
    message = refused(answer, 422, "unreadable_image")
    assert message.endswith("(and 3 more)")
    details = answer.json()["error"]["details"]
    assert [one["where"] for one in details] == ["images[0]", "images[2]", "images[3]", "images[4]"]
    assert "0.png: " in details[0]["message"]
    assert "40 x 40 pixels, more than the allowed 1000" in details[1]["message"]
    assert "<bytes>" not in answer.text


def test_uploads_are_bounded_with_and_without_their_length(start: Start) -> None:
    client = start(upload_bytes=2000, uploads_bytes=2000)
    small, large = json.dumps({"images": ["A" * 800]}), json.dumps({"images": ["A" * 2000]})
    headers = {"content-type": "application/json"}

    def parts(text: str) -> Any:
        return (text[start : start + 100].encode() for start in range(0, len(text), 100))

    for _ in range(3):
        for body in (large.encode(), parts(large)):
            message = refused(client.post(PREDICT, content=body, headers=headers), 413, "too_large")
            assert "2,000 bytes" in message
        for body in (small.encode(), parts(small)):
            refused(client.post(PREDICT, content=body, headers=headers), 422, "unreadable_image")


def test_unknown_addresses_and_methods(client: TestClient) -> None:
    assert "'/nothing'" in refused(client.get("/nothing"), 404, "not_found")
    refused(client.get("/v1/model/"), 404, "not_found")
    refused(client.get("/redoc"), 404, "not_found")
    refused(client.get("/page.css/../../serve/api.py"), 404, "not_found")
    wrong = client.put(PREDICT)
    refused(wrong, 405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    refused(client.options(PREDICT, headers={"Access-Control-Request-Method": "POST"}), 405, "method_not_allowed")
    refused(client.delete("/healthz"), 405, "method_not_allowed")
    for number in ("0", "-1", "x", "1e9", "9" * 400, "٣"):
        refused(client.get(f"/v1/examples/{number}"), 404, "not_found")


def test_other_hosts_and_origins_are_refused(client: TestClient) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "", "127.0.0.1@evil.example", "[::1", "localhost:x:y"):
        refused(client.get("/healthz", headers={"host": host}), 421, "wrong_host")
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000"):
        assert client.get("/healthz", headers={"host": host}).status_code == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999", "http://[", ""):
        answer = client.post(PREDICT, files=files(png()), headers={"origin": origin})
        refused(answer, 403, "cross_origin")
        assert "access-control-allow-origin" not in answer.headers
    assert client.get("/v1/model", headers={"origin": "http://127.0.0.1"}).status_code == 200


def test_a_token_is_required_for_the_api(start: Start) -> None:
    client = start(token="0123456789abcdefXYZ")
    for path in ("/", "/page.js", "/page.css", "/icon.svg", "/healthz", "/readyz", "/openapi.json", "/docs"):
        assert client.get(path).status_code == 200
    for value in (None, "", "Bearer", "Bearer 0123456789abcdefXY", "Basic 0123456789abcdefXYZ", "Bearer \xff"):
        headers = {} if value is None else {"authorization": value.encode("latin-1")}
        for answer in (
            client.get("/v1/model", headers=headers),
            client.get("/v1/nothing", headers=headers),
            client.get("/nothing", headers=headers),
            client.get("/v1/model/", headers=headers),
            client.post(PREDICT, files=files(png()), headers=headers),
        ):
            refused(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
    good = {"authorization": "bearer 0123456789abcdefXYZ"}
    assert client.get("/v1/model", headers=good).status_code == 200
    assert client.post(PREDICT, files=files(png()), headers=good).status_code == 200
    refused(client.get("/nothing", headers=good), 404, "not_found")


@pytest.mark.parametrize("token", [None, "0123456789abcdefXYZ"])
def test_paths_with_control_characters_are_refused(start: Start, token: str | None) -> None:
    """Patterns of routes end with $, which ignores a line feed."""
    client = start(token=token)
    for path in ("/metrics%0A", "/v1/model%0A", "/healthz%0A", "/page.css%00", "/v1/examples/%7F"):
        assert "cannot be printed" in refused(client.get(path), 400, "malformed")


@pytest.mark.parametrize("mounted", [True, False], ids=["mounted", "root_path of the server"])
@pytest.mark.parametrize("url_prefix", ["", "/clip"])
def test_the_token_is_required_below_another_application(mounted: bool, url_prefix: str) -> None:
    app = create_app(Colours(), token="0123456789abcdefXYZ", url_prefix=url_prefix)
    outer = Starlette(routes=[Mount("/maple", app)], lifespan=app.router.lifespan_context) if mounted else app
    good = {"authorization": "Bearer 0123456789abcdefXYZ"}
    with TestClient(outer, base_url="http://127.0.0.1", root_path="" if mounted else "/maple") as client:
        for path in (f"/maple{url_prefix}{path}" for path in ("/v1/model", "/metrics", "/nothing")):
            refused(client.get(path), 401, "unauthorized")
        refused(client.post(f"/maple{url_prefix}{PREDICT}", files=files(png())), 401, "unauthorized")
        assert client.post(f"/maple{url_prefix}{PREDICT}", files=files(png()), headers=good).status_code == 200
        for path in ("/", "/page.js", "/docs", "/healthz"):
            assert client.get(f"/maple{url_prefix}{path}").status_code == 200
        counted = client.get(f"/maple{url_prefix}/metrics", headers=good).text
        assert 'maple_requests_total{route="/v1/predict",status="401"} 1.0' in counted
        if url_prefix:
            redirect = client.get("/maple/clip", follow_redirects=False)
            assert (redirect.status_code, redirect.headers["location"]) == (308, "/maple/clip/")


def test_servers_may_leave_out_the_raw_path() -> None:
    app = create_app(Colours())

    async def without_raw_path(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "raw_path": None} if scope["type"] == "http" else scope, receive, send)

    with TestClient(without_raw_path, base_url="http://127.0.0.1") as client:
        assert client.get("/v1/model").status_code == 200
        refused(client.get(f"/v1/{'x' * 9000}"), 414, "url_too_long")


def test_every_response_has_security_headers(client: TestClient) -> None:
    for answer in (client.get("/"), client.get("/v1/model"), client.get("/nothing"), client.post(PREDICT)):
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cache-control"] == "no-store"


def test_head_is_get_without_a_body(client: TestClient) -> None:
    answer = client.head("/healthz")
    assert answer.status_code == 200


def test_the_model_is_described_without_paths(client: TestClient) -> None:
    found = client.get("/v1/model").json()
    assert found["title"] == "Colours on none, trained on paint"
    assert found["about"]["dataset"] == "paint"
    assert found["class_names"] == list(NAMES)
    assert found["limits"]["upload_bytes"] == Limits().upload_bytes


def test_a_clip_of_a_file_is_described_by_its_name(start: Start) -> None:
    predictor = Colours()
    predictor.about = {**predictor.about, "backbone": "/home/me/secret/birds", "pretrained": "C:\\clips\\b.pt"}
    found = start(predictor).get("/v1/model").json()
    assert found["title"] == "Colours on birds, trained on paint"
    assert (found["about"]["backbone"], found["about"]["pretrained"]) == ("birds", "b.pt")


def test_zero_shot_is_refused_where_it_is_not_available(start: Start) -> None:
    client = start(Colours(zero_shot=False))
    answer = client.post(PREDICT, files=files(png()), data={"zero_shot": "true"})
    assert "leave it out" in refused(answer, 422, "invalid_request")
    assert client.post(PREDICT, files=files(png())).json()["predictions"][0]["zero_shot"] is None


def test_errors_of_the_model_do_not_reveal_internals(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    for colour, secret in (((255,) * 3, "white is too bright"), ((0,) * 3, "black is secret")):
        answer = client.post(PREDICT, files=files(png(colour)))
        assert refused(answer, 500, "model_failed") == "the model failed: see the server's log"
        assert secret in caplog.text
    answer = client.post(PREDICT, files=files(png()), data={"class_names": "nan,cat"})
    assert "not a number" in refused(answer, 500, "model_failed")
    assert client.post(PREDICT, files=files(png())).status_code == 200


def test_file_names_come_back_as_they_can_be_written(client: TestClient) -> None:
    content = png()
    body = (
        b'--x\r\nContent-Disposition: form-data; name="images"; filename="<b>\xff\x01\xe2\x80\xae.png"\r\n\r\n'
        + content
        + b"\r\n--x--\r\n"
    )
    answer = client.post(PREDICT, content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 200
    source = answer.json()["predictions"][0]["source"]
    assert source.startswith("<b>")
    assert source.isprintable()


@pytest.mark.parametrize(
    "values",
    [{"images": 0}, {"timeout": 0}, {"timeout": float("nan")}, {"wait": -1}, {"images": 200}, {"upload_bytes": 10**12}],
)
def test_limits_that_make_no_sense_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Limits(**values)
