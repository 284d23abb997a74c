"""Writes `geko_report.json` and its page for runs without a `GEKOTrainer`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geko_kernels.training.report.efficiency import REPORT_NAME, write_json
from geko_kernels.training.report.summary import row_of


def write_run(
    folder: str | Path, summary: dict[str, Any], not_measured: list[str], skipped_rows: Sequence[int] = ()
) -> Path:
    """Write the figures, then `report.html` and its PNGs into `folder`; returns the page's path.

    Args: summary: from `run_summary`; not_measured: figures that the page names as missing; skipped_rows: rows of the
        user's data that are not in the dataset, ascending.

    Raises:
        ImportError: matplotlib or jinja2 is missing; `geko_report.json` is still written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for sample in summary["most_forgotten"]:
        sample["id"] = row_of(sample["id"], skipped_rows)
    summary["quarantined"] = [row_of(sample, skipped_rows) for sample in summary["quarantined"]]
    write_json(folder / REPORT_NAME, {**summary, "not_measured": not_measured})
    try:
        from geko_kernels.training.report.report import write_report
    except ModuleNotFoundError as error:
        if error.name in ("matplotlib", "jinja2"):
            raise ImportError(
                f"report.html needs {error.name}: pip install matplotlib jinja2. The figures are in "
                f"{folder / REPORT_NAME}"
            ) from error
        raise
    return write_report(folder)
