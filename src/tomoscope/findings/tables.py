"""Findings and tables as columns: Parquet on disk, `{column: values}` in memory, ready for any data frame."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tomoscope.errors import LedgerError
from tomoscope.findings.finding import Finding


def finding_row(finding: Finding) -> dict[str, Any]:
    """A finding as one flat row; missing is None."""
    control = finding.controls[0] if finding.controls else None
    return {
        "id": finding.id, "exam": finding.exam, "claim": finding.claim, "verdict": finding.verdict,
        "sites": list(finding.sites), "positions": finding.positions,
        "value": finding.estimate.value, "low": finding.estimate.low, "high": finding.estimate.high,
        "unit": finding.estimate.unit, "n": finding.estimate.n, "missing": finding.estimate.missing,
        "control": control.name if control else None, "control_value": control.estimate.value if control else None,
        "p_value": finding.p_value, "p_adjusted": finding.p_adjusted,
        "chosen_on": finding.chosen_on.name, "measured_on": finding.measured_on.name,
        "reason": finding.reason, "seed": finding.seed, "reproduce": finding.reproduce,
    }  # fmt: skip


def to_parquet(columns: Mapping[str, Sequence[Any]]) -> bytes:
    """Columns as the bytes of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    plain = {
        name: column.tolist() if isinstance(column, np.ndarray) else list(column) for name, column in columns.items()
    }
    pyarrow.parquet.write_table(pyarrow.table(plain), buffer, compression="zstd")
    return buffer.getvalue()


def read_parquet(path: Path) -> dict[str, list[Any]]:
    """The columns of a Parquet file. Raises LedgerError where it is damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise LedgerError(f"{path} cannot be read: {error}.", remedy="Run the scan again with --force.") from error
