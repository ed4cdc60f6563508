"""A docstring as Markdown: Google-style sections become lists, indented blocks become code."""

from __future__ import annotations

import re
import textwrap

SECTIONS = ("Args", "Returns", "Raises", "Attributes", "Yields", "Source", "Sources")
_ITEM = re.compile(r"^(\*{0,2}[A-Za-z_][\w, .]*(?:\([^)]*\))?):\s+(.*)$")
_CODE = re.compile(r"(`[^`]*`)")


def escape(text: str) -> str:
    """Prose whose stars, angle brackets and bars mean themselves; what stands in backticks is left alone."""
    parts = _CODE.split(text)
    for i in range(0, len(parts), 2):
        parts[i] = parts[i].replace("<", "&lt;").replace("*", "\\*").replace("](", "] (").replace("_", "\\_")
    return "".join(parts)


def docstring(text: str) -> str:
    """A cleaned docstring as Markdown."""
    out: list[str] = []
    for title, body in _sections(text):
        if title and title not in ("Source", "Sources"):
            out += [f"**{title}**", _items(body)]
        elif title:
            out.append(f"**{title}**: {escape(' '.join(body.split()))}")
        else:
            out.append(_paragraphs(body))
    return "\n\n".join(part for part in out if part)


def _sections(text: str) -> list[tuple[str, str]]:
    """(title or "", body) in order; a body under a title is dedented."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for line in text.splitlines():
        head = re.match(r"^(\w+):$", line)
        if head and head[1] in SECTIONS:
            found.append((head[1], []))
        elif found[-1][0] and line and not line.startswith(" "):
            found.append(("", [line]))
        else:
            found[-1][1].append(line)
    return [(title, textwrap.dedent("\n".join(lines)).strip("\n")) for title, lines in found]


def _items(body: str) -> str:
    """Entries "name: text" as a list; a body without any is a paragraph."""
    entries: list[list[str]] = []
    for line in body.splitlines():
        item = _ITEM.match(line)
        if item:
            entries.append([f"- `{item[1]}`: {escape(item[2])}"])
        elif entries and line.strip():
            entries[-1].append(escape(line.strip()))
        elif line.strip():
            return _paragraphs(body)
    return "\n".join("\n  ".join(entry) for entry in entries)


def _paragraphs(body: str) -> str:
    """Paragraphs as they are, indented blocks and drawn tables as code."""
    out = []
    for block in re.split(r"\n\s*\n", body.strip("\n")):
        lines = block.splitlines()
        if not lines:
            continue
        if all(line.startswith("    ") or not line.strip() for line in lines):
            code = f"```text\n{textwrap.dedent(block)}\n```"
            out[-1:] = [_joined(out[-1], code)] if out else [code]
        elif _is_table(lines):
            out.append(f"```text\n{block}\n```")
        else:
            out.append(_prose(lines))
    return "\n\n".join(out)


def _joined(before: str, code: str) -> str:
    """Two code blocks with a blank line between are one."""
    if before.startswith("```text\n") and before.endswith("\n```"):
        return before.removesuffix("\n```") + "\n\n" + code.removeprefix("```text\n")
    return f"{before}\n\n{code}"


def _is_table(lines: list[str]) -> bool:
    """Columns aligned with spaces: at least half of several lines have three spaces inside."""
    wide = sum("   " in line.strip() for line in lines)
    return len(lines) > 1 and wide * 2 >= len(lines)


def _prose(lines: list[str]) -> str:
    """A paragraph; lines that lead into an indented block keep it as code."""
    plain: list[str] = []
    code: list[str] = []
    for line in lines:
        (code if line.startswith("    ") else plain).append(line)
    text = escape("\n".join(plain))
    return text if not code else f"{text}\n\n```text\n{textwrap.dedent(chr(10).join(code))}\n```"
