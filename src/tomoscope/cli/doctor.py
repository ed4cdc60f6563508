"""`tomoscope doctor`: what this machine, and this model on it, can and cannot do."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tomoscope.cli import common
from tomoscope.cli.common import DeviceOption, DtypeOption, JsonOption, TracebackOption, told

EXTRAS = {
    "datasets": "corpora from the hub (pip install 'tomoscope[hub]')",
    "accelerate": "models larger than one device (pip install 'tomoscope[large]')",
}


@told
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="A directory or hub id to look at too.", show_default=False)
    ] = None,
    embedded: Annotated[bool, typer.Option("--embedded", help="Look at the model that ships with tomoscope.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Say what this machine can do, and (with a model) which sites and exams that model has, and why not others."""
    document: dict[str, Any] = {"machine": machine_document()}
    if model is not None or embedded:
        document["model"] = model_document(common.open_subject(model, device=device, dtype=dtype))
    if as_json:
        common.print_json(document)
        return
    console = common.out()
    _print_machine(console, document["machine"])
    if "model" in document:
        _print_model(console, document["model"])


def machine_document() -> dict[str, Any]:
    """Python, packages, cores, memory, disk, devices, and what follows from them."""
    import torch

    from tomoscope.findings.provenance import package_versions, this_machine

    machine = this_machine()
    free = shutil.disk_usage(os.getcwd()).free
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    flags = _cpu_flags()
    native = bool(flags & {"amx_bf16", "avx512_bf16"})
    notes = []
    if not devices:
        notes.append("No GPU: models run on the processor.")
        notes.append(
            "bfloat16 is native on this processor."
            if native
            else "bfloat16 and float16 are emulated on this processor and slower than float32."
        )
    if machine.memory_bytes and machine.memory_bytes < 8e9:
        notes.append("Less than 8 GB of memory: models above about one billion parameters will not fit in float32.")
    if free < 2e9:
        notes.append("Less than 2 GB of disk are free here: give --out on another disk for large runs.")
    return {
        "python": platform.python_version(),
        "system": machine.system,
        "processor": machine.processor,
        "cores": machine.cores,
        "threads": torch.get_num_threads(),
        "memory_bytes": machine.memory_bytes,
        "memory_available_bytes": _memory_available(),
        "disk_free_bytes": free,
        "devices": devices,
        "versions": package_versions(),
        "extras": {
            name: {"installed": importlib.util.find_spec(name) is not None, "gives": gives}
            for name, gives in EXTRAS.items()
        },
        "notes": notes,
    }


def model_document(subject: Any) -> dict[str, Any]:
    """A model's facts, its missing sites with reasons, and the exams that apply and those that do not."""
    from tomoscope.cli.sites import grouped, site_rows
    from tomoscope.exams import EXAMS
    from tomoscope.scan.runner import describe_model

    rows = site_rows(subject)
    reasons = {name: exam.applies(subject) for name, exam in EXAMS.items()}
    return describe_model(subject) | {
        "sites": sum(row["available"] for row in rows),
        "sites_unavailable": [
            {"site": row["site"], "reason": row["reason"]}
            for row in grouped([row for row in rows if not row["available"]])
        ],
        "exams": [name for name, why in reasons.items() if not why],
        "exams_not_applicable": [{"exam": name, "reason": why} for name, why in reasons.items() if why],
    }


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("flags"):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        return set()
    return set()


def _memory_available() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _gigabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"


def _print_machine(console: Console, machine: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rows = [
        ("python", machine["python"]),
        ("packages", versions),
        ("system", machine["system"]),
        ("processor", f"{machine['processor']}, {machine['cores']} cores, torch uses {machine['threads']} threads"),
        (
            "memory",
            f"{_gigabytes(machine['memory_bytes'])}, {_gigabytes(machine['memory_available_bytes'])} available",
        ),
        ("disk", f"{_gigabytes(machine['disk_free_bytes'])} free in this folder"),
        ("devices", ", ".join(machine["devices"]) or "processor only"),
    ]
    for name, extra in machine["extras"].items():
        rows.append((name, "installed" if extra["installed"] else f"absent: {extra['gives']}"))
    console.print(Text("This machine", style="bold"))
    _print_rows(console, rows)
    for note in machine["notes"]:
        console.print(Text(f"  · {note}", style="dim"))


def _print_model(console: Console, model: dict[str, Any]) -> None:
    console.print(Text(f"\n{model['name']}", style="bold"))
    rows = []
    for key, value in model.get("facts", {}).items():
        if value in (None, [], ""):
            continue
        said = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        if key == "parity":
            said = "logits while reading are bit-identical" if value == 0 else f"logits while reading differ by {value}"
        rows.append((key, said))
    _print_rows(console, [*rows, ("sites", f"{model['sites']} available")])
    for item in model["sites_unavailable"]:
        console.print(Text.assemble(("  no site ", "yellow"), f"{item['site']}: {item['reason']}"))
    console.print(Text.assemble(("  exams     ", "dim"), ", ".join(model["exams"]) or "none"))
    for item in model["exams_not_applicable"]:
        console.print(Text.assemble(("  no exam ", "yellow"), f"{item['exam']}: {item['reason']}"))


def _print_rows(console: Console, rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(Text.assemble((f"  {name:<{width}}  ", "dim"), str(value)))
