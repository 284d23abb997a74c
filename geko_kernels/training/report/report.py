"""`report.html` and its PNGs, made from the figures that a run leaves in its output directory."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from geko_kernels._files import write_whole
from geko_kernels.training.planning.guard import few_samples_factor
from geko_kernels.training.report.charts import (
    BUCKET_COLOURS,
    bucket_chart,
    curve_chart,
    data_map,
    duration,
    time_chart,
    work_chart,
)
from geko_kernels.training.report.figures import read_figures
from geko_kernels.training.report.sample_lists import SampleLists, read_sample_lists

_DOUBTFUL = 0.1  # share of doubtful samples from which on the page says what to do about them
_FIRST = 10  # samples of a list that are shown unfolded
_LENGTHS = (2, 3, 5, 10, 20)  # epochs of the runs whose forecast is shown
Curve = list[tuple[float, float]]


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write `report.html`, which needs no other file, and `report_*.png` into `run_dir`; returns the page's path.

    For a run that has not ended the page shows the figures of its newest whole checkpoint, and says so.

    Raises:
        FileNotFoundError: neither `geko_report.json` nor a whole checkpoint in `run_dir`.
        ValueError: that file or checkpoint is damaged or of another version.
    """
    run_dir = Path(run_dir)
    run, checkpoint = read_figures(run_dir)
    lists = None if checkpoint else read_sample_lists(run_dir, run)  # only a run that has ended has them
    images = {}
    for name, draw in _charts(run, lists).items():
        wide, narrow = draw(), draw(narrow=True)
        picture = _png(wide)
        write_whole(run_dir / f"report_{name}.png", partial(Path.write_bytes, data=picture))
        images[name] = {"title": wide.axes[0].get_title("left"), "wide": _text(picture), "narrow": _text(_png(narrow))}
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["duration"] = duration
    template = environment.get_template("report.html.j2")
    page = run_dir / "report.html"
    doubtful, total = run.get("num_doubtful", 0), run["num_samples"]  # older runs lack it
    values = {
        "checkpoint": checkpoint,
        "name": run_dir.resolve().name,
        "colours": BUCKET_COLOURS,
        "doubtful": doubtful if doubtful > _DOUBTFUL * few_samples_factor(total) * total else 0,
        "lists": lists or SampleLists(),
        "first": _FIRST,
        "lengths": _LENGTHS,
    }
    text = template.render(run=run, images=images, **values)
    write_whole(page, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return page


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _text(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def _charts(run: Mapping[str, Any], lists: SampleLists | None) -> dict[str, Callable[..., Figure]]:
    """By name, the function that draws each chart, `narrow` or not."""
    efficiency = run["efficiency"]
    loss, accuracy = _curves(run, "loss"), _curves(run, "accuracy")
    charts: dict[str, Callable[..., Figure]] = {
        "work": partial(work_chart, _work(efficiency)),
        "time": partial(time_chart, efficiency["seconds"]),
    }
    buckets = [epoch["buckets"] for epoch in efficiency["epochs"]]
    if buckets and None not in buckets[-1].values():
        charts["buckets"] = partial(bucket_chart, buckets)
    if loss:
        charts["loss"] = partial(curve_chart, "Loss, before weighting", "nats per token", loss, False)
    if accuracy:
        charts["accuracy"] = partial(curve_chart, "Accuracy", "labels predicted right", accuracy, True)
    if lists is not None and lists.points:
        charts["map"] = partial(data_map, lists.points)
    return charts


def _work(efficiency: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Passes by unit, without the tokens if they were not measured.

    The standard run's tokens are estimated from its samples and the mean length of the trained ones.
    """
    standard, trained = efficiency["samples_standard"], efficiency["samples_backward"]
    counts = {
        unit: {part: efficiency[f"{unit}_{part}"] for part in ("forward", "backward")} for unit in ("samples", "tokens")
    }
    counts["samples"]["standard"] = standard
    if efficiency["tokens_backward"] is None:
        del counts["tokens"]
    else:
        counts["tokens"]["standard"] = round(efficiency["tokens_backward"] / max(trained, 1) * standard)
    return counts


def _curves(run: Mapping[str, Any], quantity: str) -> dict[str, Curve]:
    """Points (epoch, value) of `quantity` on the training and the evaluation data, where they were logged."""
    keys = {"training": f"geko/{quantity}", "evaluation": f"eval_{quantity}"}
    logged = {
        name: [(row["epoch"], row[key]) for row in run["log_history"] if row.get(key) is not None]
        for name, key in keys.items()
    }
    if len(logged["training"]) < 2:
        epochs = run["efficiency"]["epochs"]
        known = [row for row in epochs if row[quantity] is not None]
        logged["training"] = [(row.get("end", row["epoch"] + 1), row[quantity]) for row in known]  # older runs lack it
    return {name: points for name, points in logged.items() if points}
