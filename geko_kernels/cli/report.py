"""`python -m geko_kernels report RUN_DIR`."""

from __future__ import annotations

from pathlib import Path

from geko_kernels.cli.errors import UsageError
from geko_kernels.training.report.figures import read_figures
from geko_kernels.training.report.report import write_report


def report(run_dir: str) -> str:
    """Make the report of `run_dir`; returns lines with its summary and its path."""
    try:
        run, checkpoint = read_figures(Path(run_dir))
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    try:
        page = write_report(run_dir)
    except OSError as error:
        raise UsageError(
            f"cannot make the report of {run_dir} ({error}): it reads and writes files there; allow that, or give a "
            "copy of the folder"
        ) from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    images = sorted(path.name for path in Path(run_dir).glob("report_*.png"))
    unfinished = f"the run has not ended; the figures are those of {checkpoint}\n" if checkpoint else ""
    said = (run.get("forecast") or {}).get("text") or (run.get("stopping") or {}).get("why")  # never both
    told = f"{said}\n" if said else ""
    return f"{unfinished}{told}{page}\n{page.parent}: {', '.join(images)}"
