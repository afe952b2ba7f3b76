"""The page at `/`, driven in Chromium: apt-get install chromium-headless-shell, pip install playwright."""

from __future__ import annotations

import io

import numpy as np
import pytest
import toy
from PIL import Image
from served import served

CHROMIUM = "/usr/bin/chromium-headless-shell"
KEY = "correct-horse-battery-staple"
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture
def page(browser):
    """A page that fails the test if its script does, or if it loads anything from elsewhere."""
    context = browser.new_context()
    opened = context.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("request", lambda request: "127.0.0.1" in request.url or errors.append(request.url))
    yield opened
    assert errors == []
    context.close()


@pytest.fixture(scope="module")
def server(engine, package):
    with served(engine, package) as running:
        yield running


def ask(page, text, policy=None):
    """Type and send a message; the answers that came, each with its badge."""
    if policy:
        page.locator(f"#policies label:has(input[value={policy}])").click()
    before = page.locator(".answer").count()
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    page.locator(".answer").nth(before).wait_for()
    page.locator("#cancel").wait_for(state="hidden")
    return [tuple(answer.inner_text().split("\n\n")) for answer in page.locator(".answer").all()[before:]]


def test_pass_steer_stop_and_beside_gate_off(page, server):
    page.goto(server.url)
    assert ask(page, "red") == [("PASS p_unsafe 0.100 ≤ 0.5", "orange yellow green")]
    assert ask(page, "bad") == [("STEER p_unsafe 0.900 > 0.5, strength 0.1", "sorry refuse")]
    gauge = page.get_by_role("meter", name="p_unsafe")
    assert (gauge.get_attribute("aria-valuenow"), "steer" in gauge.get_attribute("aria-valuetext")) == ("0.900", True)
    assert ask(page, "bad", "stop") == [("STOP p_unsafe 0.900 > 0.5", toy.REFUSAL_TEXT)]
    assert "decoder above the gate: never ran" in page.locator("#stages").get_attribute("aria-label")
    page.get_by_role("button", name="New chat").click()
    page.get_by_label("beside gate off").check()
    assert ask(page, "bad", "steer") == [
        ("GATE OFF not scored", "evil plan"),
        ("STEER p_unsafe 0.900 > 0.5, strength 0.1", "sorry refuse"),
    ]
    assert page.locator("#history circle").count() == 4
    assert ask(page, "yellow")[1][0].startswith("PASS")  # refused turns were left out of the dialogue


def test_a_dropped_picture_is_seen(page, server):
    page.goto(server.url)
    page.locator("#policies label").first.wait_for()
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), (255, 0, 0), np.uint8)).save(file, "PNG")
    picture = {"name": "red.png", "mimeType": "image/png", "buffer": file.getvalue()}
    page.set_input_files("#file", picture)
    page.get_by_role("button", name="Remove picture 1").click()
    page.set_input_files("#file", picture)
    page.get_by_alt_text("picture 1").wait_for()
    assert ask(page, "look")[0][1] == "orange yellow green"
    assert "picture 1:" in page.locator("#cost").inner_text()


def test_a_server_with_a_key_asks_for_it(page, engine, package):
    with served(engine, package, key=KEY) as server:
        page.goto(server.url)
        page.get_by_role("textbox", name="API key").fill(KEY)
        page.keyboard.press("Enter")
        page.locator("#policies label").first.wait_for()
        assert ask(page, "red")[0][1] == "orange yellow green"


def test_errors_are_shown_and_the_dialogue_goes_on(page, server):
    page.goto(server.url)
    page.locator("#policies label").first.wait_for()
    assert ask(page, "crash")[0][0].startswith("FAILED")
    assert "could not score" in page.get_by_role("alert").inner_text()
    assert ask(page, "red")[0][1] == "orange yellow green"
    assert page.get_by_role("alert").count() == 0


def test_policies_that_the_server_forbids_are_not_offered(page, engine, package):
    with served(engine, package, weakest="steer") as server:
        page.goto(server.url)
        page.locator("#policies label").first.wait_for()
        assert page.locator("#policies label").all_inner_texts() == ["stop", "steer"]
        assert page.get_by_label("beside gate off").is_disabled()


def test_the_page_fits_a_phone(browser, server):
    context = browser.new_context(viewport={"width": 360, "height": 720})
    page = context.new_page()
    page.goto(server.url)
    page.locator("#policies label").first.wait_for()
    ask(page, "bad")
    ask(page, "red" * 60)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 360
    context.close()
