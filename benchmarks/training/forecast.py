"""How well a run's first two epochs foretell its cost: `python -m benchmarks.training.forecast` prints a table.

From the recorded end-to-end runs of GEKO: `geko_kernels/training/report/forecast.py` gets the buckets of their first
epochs, and its figure for a run of that length is compared with the cost that was measured.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import mean
from typing import Any

from benchmarks.end_to_end.report import LARGE, SMALL, grid
from benchmarks.results import Row, read
from geko_kernels import Bucket, GEKOConfig
from geko_kernels.training.report.forecast import forecast

_FIELDS = GEKOConfig().to_dict().keys()
ARMS = ("H", "H:noise_guard_margin=1")
BASES = (1, 2, 3)  # epochs that a forecast comes from
OBSERVED = 2  # epochs of uniform training that a forecast for GEKO comes from


def epochs_of(row: Row, count: int) -> list[dict[str, Any]]:
    """The first `count` epochs as `efficiency["epochs"]` has them; `cost` counts looks at samples for a third."""
    epochs, trained, cost, whole = [], 0, 0.0, row["epochs"] * row["samples"]
    for index, entry in enumerate(row["history"][:count]):
        buckets = {bucket.name: entry["buckets"][bucket] for bucket in Bucket}
        samples, trained = entry["rows_trained"] - trained, entry["rows_trained"]
        now = entry.get("cost", entry["progress"])  # of uniform training
        spent, cost = (now - cost) * whole, now
        probes = round(3 * (spent - samples))
        counts = {"samples": samples, "probes": probes, "quarantined": entry.get("quarantined") or 0}
        epochs.append({"epoch": index, "buckets": buckets, **counts})
    return epochs


def forecast_cost(row: Row, count: int, observed: bool = False) -> float | None:
    """Share of uniform training's work, by a forecast from `count` epochs; None where it does not tell."""
    fields = {name: value for name, value in row["config"].items() if name in _FIELDS}
    told = forecast(epochs_of(row, count), GEKOConfig() if observed else GEKOConfig.from_dict(fields), observed)
    runs = {} if told is None else {run["epochs"]: run["saved"] for run in told["runs"]}
    length = round(row["epochs"] * row["budget"])
    return 1 - runs[length] if length in runs else None


def _told(costs: list[float | None], measured: float) -> str:
    known = [value for value in costs if value is not None]
    if not known or len(known) < len(costs):
        return "cannot tell" if costs else ""
    return f"{mean(known):.2f} ({mean(known) - measured:+.2f})"


def table(rows: list[Row]) -> list[str]:
    """Markdown: one line a task, arm and length; the cost, forecasts of it from `BASES` epochs, and their errors."""
    found: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    uniform: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        arm, length = row["arm"].split(",budget")[0].split(":budget")[0], round(row["epochs"] * row["budget"])
        if arm in ARMS and length > 1:
            found[row["task"], arm, length].append(row)
        elif arm == "A":
            uniform[row["task"], length].append(row)
    lines = []
    for (task, arm, length), group in sorted(found.items()):
        cost = mean(row["cost"] / row["budget"] for row in group)
        cells = [_told([forecast_cost(row, base) for row in group] if base < length else [], cost) for base in BASES]
        watched = uniform[task, length] if arm == "H" else []
        cells.append(_told([forecast_cost(row, OBSERVED, observed=True) for row in watched], cost))
        lines.append([task, arm, str(length), str(len(group)), f"{cost:.2f}", *cells])
    heads = ["task", "arm", "epochs", "seeds", "measured", *(f"from {base} (error)" for base in BASES)]
    return grid([*heads, f"from {OBSERVED} of A, observed"], lines)


if __name__ == "__main__":
    print("\n".join(table([*read(LARGE), *read(SMALL)])))
