"""Makes docs/images/report.png: the top of a real report, and one of its findings, in a real browser.

    python docs/screenshot.py RUN [FINDING [PICTURE]]

RUN is a folder that `tomoscope scan` wrote, FINDING an id (the first with a heatmap by default). Needs playwright and a
Chromium (`CHROMIUM` names it). The report needs no network, and gets none.

Steps: write the report anew, take the top of the page and the finding, put one above the other.
"""

from __future__ import annotations

import base64
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parent / "images" / "report.png"
WIDTH, TOP, COLUMN = 1280, 745, 372
LIMIT = 300_000
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def main(run: str, finding: str = "", picture: str | Path = PICTURE) -> Path:
    """Takes the picture and returns where it is."""
    from tomoscope import load_report
    from tomoscope.scan import write_report

    browser = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("No Chromium was found: install one, or name it in CHROMIUM.")
    ledger = load_report(run)
    chosen = ledger.finding(finding) if finding else _with_heatmap(ledger)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        report = write_report(ledger, Path(folder) / "report.html")
        opened = driver.chromium.launch(executable_path=browser, args=ARGUMENTS)
        page = opened.new_page(viewport={"width": WIDTH, "height": TOP}, color_scheme="light")
        page.goto(report.as_uri())
        top = page.screenshot()
        article = page.locator("article", has_text=chosen.claim).first
        article.scroll_into_view_if_needed()
        both = opened.new_page(viewport={"width": WIDTH, "height": TOP})
        both.set_content(_sheet(top, article.screenshot()))
        both.screenshot(path=str(picture), full_page=True)
        opened.close()
    size = Path(picture).stat().st_size
    if size > LIMIT:
        sys.exit(f"{picture} has {size:,} bytes, more than {LIMIT:,}: choose a smaller cut.")
    sys.stdout.write(f"{picture}: {size:,} bytes\n")
    return Path(picture)


def _with_heatmap(ledger: Any) -> Any:
    for finding in ledger.findings():
        if finding.verdict == "confirmed" and any(figure.kind == "heatmap" for figure in finding.figures):
            return finding
    return ledger.findings()[0]


def _sheet(top: bytes, article: bytes) -> str:
    images = [base64.b64encode(part).decode() for part in (top, article)]
    style = f"body{{margin:0;background:#fdfdfb}}img{{display:block}}img+img{{padding:24px 0 40px {COLUMN}px}}"
    sources = "".join(f'<img src="data:image/png;base64,{image}">' for image in images)
    return f"<style>{style}</style>{sources}"


if __name__ == "__main__":
    main(*sys.argv[1:])
