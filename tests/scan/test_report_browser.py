"""The report in a real browser: it fits a phone, runs nothing that is not ours, and its buttons work."""

from __future__ import annotations

import shutil

import pytest

from tests.scan.example import example_run
from tests.scan.test_report import hostile_run
from tomoscope.scan import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser():
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


def load(browser, path, *, width=1280, scheme="light", script=True):
    page = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=script
    ).new_page()
    page.heard = []
    page.on("console", lambda message: page.heard.append(message.text))
    page.on("pageerror", lambda error: page.heard.append(str(error)))
    page.on("dialog", lambda dialog: (page.heard.append("dialog"), dialog.dismiss()))
    page.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:")) else page.heard.append(request.url),
    )
    page.goto(path.resolve().as_uri())
    return page


def test_it_reads_on_a_desk_and_on_a_phone(browser, tmp_path):
    path = write_report(example_run(tmp_path / "run", wide=True))
    for scheme in ("light", "dark"):
        for width in (1280, 820, 360):
            page = load(browser, path, width=width, scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.heard == []
            assert page.locator("article").count() == 6
            page.context.close()


def test_filter_and_copy(browser, tmp_path):
    page = load(browser, write_report(example_run(tmp_path / "run")))
    confirmed = page.locator("article.v-confirmed").first
    assert confirmed.is_visible()
    page.locator('button[data-verdict="confirmed"]').click()
    assert not confirmed.is_visible()
    assert page.locator("article.v-refuted, article.v-inconclusive").first.is_visible()
    page.locator('button[data-verdict="confirmed"]').click()
    assert confirmed.is_visible()
    page.locator("button.copy").first.click()
    page.wait_for_function("document.querySelector('button.copy').textContent !== 'Copy'")
    assert page.heard == []


def test_it_reads_without_scripts(browser, tmp_path):
    page = load(browser, write_report(example_run(tmp_path / "run")), script=False)
    assert page.locator("article").first.is_visible()
    assert not page.locator(".filter").is_visible()
    assert not page.locator("button.copy").first.is_visible()


def test_hostile_strings_do_nothing(browser, tmp_path):
    page = load(browser, write_report(hostile_run(tmp_path / "run")), width=360)
    assert page.heard == []
    assert page.locator("img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == 360
