"""Rows of the scaling benchmark out of what its processes measured, and what they must reach."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean, median, quantiles

from benchmarks.kernels.targets import Target
from benchmarks.results import Row


def step_row(rounds: list[list[float]], samples: int, length: int) -> Row:
    """`rounds` holds the milliseconds of each round's steps, `samples` what one step trains on all GPUs."""
    steps = [step for steps in rounds for step in steps]
    cuts = quantiles(steps, n=5, method="inclusive")
    middle = median(steps)
    return {
        "step_ms": middle,
        "step_ms_p20": cuts[0],
        "step_ms_p80": cuts[3],
        "step_ms_mean": mean(steps),
        "rounds_ms": [median(steps) for steps in rounds],
        "steps_per_second": 1e3 / middle,
        "tokens_per_second": 1e3 / middle * samples * length,
    }


def selection_row(selection: Row, step_ms: float, probe_step_ms: float, samples: int) -> Row:
    """`selection` with the shares of its epochs' time, had their plans been trained and their probes been run."""
    seconds = {
        "selection": sum(selection["selection_seconds"]),
        "probe": sum(selection["probed"]) / samples * probe_step_ms / 1e3,
        "step": sum(selection["planned"]) / samples * step_ms / 1e3,
    }
    shares = {f"{part}_share": seconds[part] / sum(seconds.values()) for part in ("selection", "probe")}
    return {**selection, "probe_step_ms": probe_step_ms, **shares}


def with_ratios(rows: list[Row]) -> list[Row]:
    """The rows with `efficiency` and `of_standard`, None where the row to compare with is missing.

    efficiency: tokens a second and GPU, over the same arm's on one GPU. of_standard: step_ms over the standard arm's.
    """
    single = {(row["model"], row["arm"]): row["tokens_per_second"] for row in rows if row["gpus"] == 1}
    standard = {(row["model"], row["gpus"], row["kind"]): row["step_ms"] for row in rows if row["arm"] == "standard"}
    complete = []
    for row in rows:
        one = single.get((row["model"], row["arm"]))
        other = standard.get((row["model"], row["gpus"], row["kind"]))
        ratios = {
            "efficiency": row["tokens_per_second"] / row["gpus"] / one if one else None,
            "of_standard": row["step_ms"] / other if other else None,
        }
        complete.append({**row, **ratios})
    return complete


def targets(rows: list[Row]) -> Iterator[Target]:
    """Every target that the rows of one run allow to judge; `rows` as from `with_ratios`."""
    arms = {(row["model"], row["gpus"], row["kind"], row["arm"]): row for row in rows}
    for (model, gpus, kind, arm), row in arms.items():
        if arm != "geko":
            continue
        name = f"{model}, {gpus} GPU{'s' if gpus > 1 else ''}, {kind}"
        standard = arms.get((model, gpus, kind, "standard"))
        if gpus > 1 and standard and row["efficiency"] and standard["efficiency"]:
            points = 100 * (row["efficiency"] - standard["efficiency"])
            yield Target(f"{name}: efficiency of geko - standard's (points)", points, -1.0, at_least=True)
        if "selection_share" in row:
            what = f"{name}: share of sync and planning, {row['table']:,} samples (%)"
            yield Target(what, 100 * row["selection_share"], 1.0)
        if gpus > 1 and "plans_equal" in row:
            yield Target(f"{name}: same plans on every rank", float(row["plans_equal"]), 1.0, at_least=True)
            yield Target(f"{name}: same buckets on every rank", float(row["buckets_equal"]), 1.0, at_least=True)
