"""What there is, from the registries: exams with their rules and options, protocols, tasks."""

from __future__ import annotations

import json
import sys
from typing import Any

from builder.prose import escape


def exams_page() -> str:
    """Every exam: its question, its method, the rule of its verdict, its options; and the built-in protocols."""
    from tomoscope.exams import EXAMS
    from tomoscope.scan import built_in_protocols

    out = [
        "# Exams and protocols",
        "An exam is a method with its control and a rule that was declared before the run. `tomoscope doctor MODEL` "
        "says which of them apply to a model. How to write one's own: [the scan](../scan.md#an-exam-of-your-own).",
        "## Exams",
    ]
    for name, exam in EXAMS.items():
        out += [f"### {name}", f"**{escape(exam.title)}.** {escape(exam.question)}", escape(exam.method)]
        rules = exam.rules.items()
        out.append("\n".join(f"- rule{f' `{key}`' if key else ''}: {escape(rule.sentence())}" for key, rule in rules))
        out.append(_options(exam))
    out.append("## Protocols")
    for name, text in built_in_protocols().items():
        out += [f"### {name}", f"```toml\n{text.strip()}\n```"]
    return "\n\n".join(part for part in out if part)


def _options(exam: Any) -> str:
    rows = ["| option | default | quick | deep | |", "|---|---|---|---|---|"]
    for key, field in exam.options.model_fields.items():
        default = json.dumps(exam.options().model_dump(mode="json")[key])
        presets = [exam.presets.get(preset, {}).get(key) for preset in ("quick", "deep")]
        told = [f"`{json.dumps(value)}`" if value is not None else "" for value in presets]
        words = escape(field.description or "").replace("|", "\\|")
        rows.append(f"| `{key}` | `{default}` | {told[0]} | {told[1]} | {words} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def tasks_page() -> str:
    """Every task with its metric, corruptions, spans and source."""
    from tomoscope.data import TASKS

    out = [
        "# Tasks",
        "Each makes clean and corrupted pairs for the tokenizer at hand: `TASKS[name].make(tokenizer, n, seed=0)`. "
        "Guide: [data and tasks](../data-and-tasks.md).",
    ]
    for name, spec in TASKS.items():
        rows = [
            f"- scored by: {spec.metric.replace('_', ' ')}",
            f"- corruptions (the default first): {', '.join(f'`{one}`' for one in spec.corruptions)}",
            f"- spans: {', '.join(f'`{one}`' for one in spec.spans)}",
            f"- source: {escape(spec.source)}",
        ]
        words = (sys.modules[spec.make.__module__].__doc__ or "").split("\n\n")
        told = [escape(" ".join(part.split())) for part in words[1:]]
        out += [f"## {name}", escape(spec.description), "\n".join(rows), *told]
    return "\n\n".join(out)
