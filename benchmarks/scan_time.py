"""Seconds and peak memory of a whole scan of the embedded model, by exam, for the quick and the standard protocol."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import tell


def main(protocols: tuple[str, ...] = ("quick", "standard")) -> None:
    for protocol in protocols:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            start = time.perf_counter()
            command = [sys.executable, "-m", "tomoscope.cli.main", "scan", "-p", protocol, "--out", str(out), "--json"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds = time.perf_counter() - start
            document = json.loads(done.stdout)
            peak = 0
            for exam in document["exams"]:
                peak = max(peak, exam["peak_memory_bytes"] or 0)
                tell(f"scan_time.{protocol}.{exam['exam']}", seconds=float(exam["seconds"]))
            tell(f"scan_time.{protocol}", seconds=seconds, peak_memory_MiB=round(peak / 2**20))
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tomoscope.cli.main", "--help"], capture_output=True, check=True)
    tell("scan_time.help", seconds=time.perf_counter() - start)


if __name__ == "__main__":
    main()
