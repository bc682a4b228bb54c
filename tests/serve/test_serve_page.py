"""The page in a real browser: an image in, the prediction read from the page."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_helpers import NAMES, Process, expected, png, process

sync = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'maple-clip[test]'")
BROWSER = os.environ.get("MAPLE_BROWSER") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium: install one, or name it in MAPLE_BROWSER"),
]
TOKEN = "the-token-of-the-page"
RED = (200, 30, 30)


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with process(token=TOKEN, upload_bytes=100_000) as started:
        yield started


@pytest.fixture(scope="module")
def page(server: Process) -> Iterator[Any]:
    """The page after the token was requested and given."""
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        asked: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.get_by_label("This server requires a token").fill("a-wrong-one")
        page.keyboard.press("Enter")
        page.get_by_text("This is not the server's token.").wait_for()
        page.get_by_label("This server requires a token").fill(TOKEN)
        page.keyboard.press("Enter")
        page.locator("#examples img").first.wait_for()
        yield page
        assert errors == []
        assert {url.split(":")[0] for url in asked} <= {"http", "blob", "data"}
        assert all(url.startswith((f"{server.url}/", "blob:", "data:")) for url in asked)
        browser.close()


def shown(card: Any, kind: str) -> dict[str, str]:
    card.locator(f".{kind} li").first.wait_for()
    names = card.locator(f".{kind} .name").all_text_contents()
    return dict(zip(names, card.locator(f".{kind} .value").all_text_contents(), strict=True))


def percents(colour: tuple[int, int, int], names: Any) -> dict[str, str]:
    right = expected(colour, names)
    best = sorted(right, key=right.__getitem__, reverse=True)[:5]
    return {name: f"{100 * right[name]:.1f} %" for name in best}


def clear(page: Any) -> None:
    while page.locator(".card .remove").count():
        page.locator(".card .remove").first.click()


DROP = """([content, name]) => {
  const bytes = Uint8Array.from(atob(content), (char) => char.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: "image/png" }));
  const send = (kind) => document.getElementById("drop").dispatchEvent(
    new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true }));
  ["dragenter", "dragover", "drop"].forEach(send);
}"""
PASTE = """([content]) => {
  const bytes = Uint8Array.from(atob(content), (char) => char.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "image.png", { type: "image/png" }));
  document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true }));
}"""


def test_a_dropped_image_is_classified(page: Any) -> None:
    import base64

    content = base64.b64encode(png(RED)).decode()
    page.evaluate(DROP, [content, "dropped <b>.png"])
    card = page.locator(".card", has=page.get_by_role("heading", name="dropped <b>.png"))
    assert shown(card, "tuned") == percents(RED, NAMES)
    assert len(shown(card, "frozen")) == 5
    page.evaluate(PASTE, [content])
    assert shown(page.locator(".card").first, "tuned") == percents(RED, NAMES)
    assert page.locator(".card").count() == 2
    page.get_by_role("button", name="Remove all images").click()
    page.get_by_text("No image yet").wait_for()


def test_class_names_are_changed_and_reset(page: Any, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(png(RED))
    page.set_input_files("#files", [tmp_path / "red.png"])
    card = page.locator(".card").first
    assert shown(card, "tuned") == percents(RED, NAMES)
    page.get_by_label("Class names").fill("cat, dog\nowl")
    page.get_by_text("Note: 3 of 3 class names were not trained").wait_for()
    card.get_by_text("owl").first.wait_for()
    assert shown(card, "tuned") == percents(RED, ["cat", "dog", "owl"])
    page.get_by_label("Class names").fill('"dog, small", cat\nthe "big" owl')
    page.get_by_text("3 names").wait_for()
    card.get_by_text("dog, small").first.wait_for()
    assert shown(card, "tuned") == percents(RED, ["dog, small", "cat", 'the "big" owl'])
    page.get_by_label("Class names").fill('"dog, small"')
    page.get_by_text("Note: 1 of 1 class names were not trained").wait_for()
    assert shown(card, "tuned") == percents(RED, ["dog, small"])
    page.get_by_label("Class names").fill("cat, cat")
    card.get_by_text("named more than once").wait_for()
    page.get_by_label("Class names").fill(" , ")
    page.get_by_text("Give at least one class name.").wait_for()
    page.get_by_role("button", name="Reset to trained names").click()
    card.get_by_text("red thing").first.wait_for()
    assert shown(card, "tuned") == percents(RED, NAMES)
    assert page.locator("#note").is_hidden()
    clear(page)


def test_errors_are_shown_in_words(page: Any, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(png()[:60])
    (tmp_path / "large.png").write_bytes(b"x" * 200_000)
    (tmp_path / "good.png").write_bytes(png(RED))
    page.set_input_files("#files", [tmp_path / name for name in ("cut.png", "large.png", "good.png")])
    cards = page.locator(".card")
    cards.nth(0).get_by_text("cut.png: ").wait_for()
    cards.nth(1).get_by_text("is more than the allowed").wait_for()
    assert shown(cards.nth(2), "tuned") == percents(RED, NAMES)
    clear(page)


def test_predictions_come_into_view_on_a_small_screen(page: Any) -> None:
    page.emulate_media(reduced_motion="reduce")  # the page then jumps, so that there is nothing to wait for
    page.evaluate("scrollTo(0, 0)")
    page.locator("#examples button").first.click()
    shown(page.locator(".card").first, "tuned")
    assert page.evaluate("document.activeElement.id") == "predictions"
    assert 0 <= page.evaluate("document.getElementById('predictions').getBoundingClientRect().top") < 100
    clear(page)
    page.emulate_media(reduced_motion="no-preference")


def test_the_description_of_the_api(page: Any, server: Process) -> None:
    """Every link leads somewhere, and a small screen shows all of it."""
    described = page.context.browser.new_page(viewport={"width": 390, "height": 800})
    described.goto(f"{server.url}/docs")
    described.get_by_role("heading", name="POST /v1/predict").wait_for()
    assert described.get_by_text("Number of classes in a prediction.").count() == 2
    assert f'Bearer $MAPLE_TOKEN" -F images=@cat.jpg -F top=3 {server.url}/v1/predict' in described.inner_text("pre")
    assert described.evaluate("document.documentElement.scrollWidth") <= 390
    links = described.eval_on_selector_all("main a", "all => all.map((one) => one.getAttribute('href').slice(1))")
    assert described.evaluate("(names) => names.filter((name) => !document.getElementById(name))", links) == []
    described.close()


def test_keyboard_and_small_screen(page: Any) -> None:
    page.locator("#examples button").first.focus()
    page.keyboard.press("Enter")
    assert len(shown(page.locator(".card").first, "tuned")) == 5
    assert "per cent" not in page.locator("#status").text_content()
    assert " %" in page.locator("#status").text_content()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea, img')].filter((one) => !(one.labels?.length"
        " || one.textContent.trim() || one.getAttribute('aria-label') || one.alt || one.querySelector?.('img[alt]')))"
        ".map((one) => one.outerHTML)"
    )
    assert unnamed == []
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "BUTTON"
    clear(page)
