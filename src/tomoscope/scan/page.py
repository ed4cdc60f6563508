"""The shell of every page: no network, no script or style but those whose hashes it names, an escaped title.

What stands in the body is the caller's to escape (`scan.markup`); the policy is what holds where that was forgotten.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from tomoscope.scan.markup import escape


def asset(name: str) -> str:
    """The text of a file that ships with the pages (page.css, page.js)."""
    return (resources.files("tomoscope.scan") / name).read_text(encoding="utf-8")


def document(title: str, body: str, *, style: str, script: str = "") -> str:
    """A whole HTML document.

    Args:
        title: escaped here.
        body: markup.
        style: the page's only style sheet.
        script: the page's only script; none by default.
    """
    scripts = f"script-src '{_hash(script)}'; " if script else ""
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; {scripts}base-uri 'none'; form-action 'none'"
    )
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{escape(title)}</title><style>{style}</style>"
    )
    end = f"<script>{script}</script>" if script else ""
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}{end}</body></html>\n'


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
