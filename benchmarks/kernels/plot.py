"""Pictures of the last GPU run and the last CPU run in DIR/loss.jsonl, one a question.

python -m benchmarks.kernels.plot [DIR]

writes DIR/loss_{time,zero_share,bandwidth,memory}_{gpu,cpu}.png: how long does a step take against the peers? what
do zero-weight rows save? how close is that to the memory's limit? how much memory does a step take?
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.kernels.targets import label
from benchmarks.results import RESULTS, Row, runs

_OURS, _PEER, _GEKO, _LIMIT = "#0b7a75", "#9aa5b1", "#c9a66b", "#b23a48"


def draw(directory: Path) -> None:
    """Write every picture that `directory`/loss.jsonl has rows for."""
    latest = {("cpu" if run[0]["gpu"].startswith("cpu") else "gpu"): run for run in runs(directory / "loss.jsonl")}
    for machine, rows in latest.items():
        figures = {"time": times(rows), "zero_share": zero_shares(rows), "bandwidth": bandwidth(rows)}
        if any(row["peak_mib"] is not None for row in rows):
            figures["memory"] = memory(rows)
        for question, figure in figures.items():
            path = directory / f"loss_{question}_{machine}.png"
            figure.savefig(path, dpi=120)
            print(path)


def times(rows: list[Row]) -> Figure:
    """One panel a shape: the forward + backward of every contender, its forward as the darker part."""
    figure, panels = _panels(rows, "Cross-entropy, forward + backward (darker: forward alone)", width=5.2, height=3.4)
    for axes, group in panels:
        full, forward = _by_contender(group, "full"), _by_contender(group, "forward")
        shown = [row for row in full if row["contender"] != "copy"]
        ahead = {_name(row): row["ms"] for row in forward}
        _bars(axes, shown, [row["ms"] for row in shown], "ms", [row["ms_p80"] for row in shown])
        for position, row in enumerate(shown):
            axes.barh(position, ahead[_name(row)], height=0.7, color="black", alpha=0.25)
        for position, row in enumerate(shown):
            axes.plot([row["ms_p20"], row["ms_p80"]], [position, position], color="black", linewidth=1)
    return figure


def zero_shares(rows: list[Row]) -> Figure:
    """One panel a shape: our time over the share of rows at weight zero, against the fastest plain loss."""
    rows = [row for row in rows if row["size"] == "large" or row["gpu"].startswith("cpu")]
    figure, panels = _panels(rows, "What zero-weight rows save, forward + backward", width=4.6, height=3.2)
    for axes, group in panels:
        for name, style in (("geko", "-o"), ("geko-inplace", "--s"), ("geko-hopper, hit rate 1", ":^")):
            ours = [row for row in group if _name(row) == name and row["mode"] == "full" and row["ms"]]
            if not ours:
                continue
            ours.sort(key=lambda row: row["zero_rows"])
            axes.plot([r["zero_rows"] for r in ours], [r["ms"] for r in ours], style, color=_OURS, label=name, ms=4)
        peers = [row for row in _by_contender(group, "full") if _color(row) == _PEER]
        if peers:
            fastest = min(peers, key=lambda row: row["ms"])
            axes.axhline(fastest["ms"], color=_PEER, label=f"fastest plain loss: {fastest['contender']}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("share of rows at weight 0")
        axes.set_ylabel("ms")
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def bandwidth(rows: list[Row]) -> Figure:
    """One panel a shape: three passes over the logits, divided by the time, against a plain copy's speed."""
    rows = [row for row in rows if row["size"] == "large" or row["gpu"].startswith("cpu")]
    title = "Effective bandwidth: logits read twice, gradient written once"
    figure, panels = _panels(rows, title, width=5.2, height=3.4)
    scale, unit = (1e3, "GB/s") if rows[0]["gpu"].startswith("cpu") else (1.0, "TB/s")
    for axes, group in panels:
        full = _by_contender(group, "full")
        shown = [row for row in full if row["contender"] != "copy"]
        _bars(axes, shown, [row["tbps"] * scale for row in shown], unit)
        for row in full:
            if row["contender"] == "copy":
                axes.axvline(row["tbps"] * scale, color=_LIMIT, label="copy")
                axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def memory(rows: list[Row]) -> Figure:
    """One panel a shape: memory a step takes on top of the logits, in units of the logits' size."""
    rows = [row for row in rows if row["size"] == "large"]
    title = "Extra memory of a step, in sizes of the logits"
    figure, panels = _panels(rows, title, width=5.2, height=3.4)
    for axes, group in panels:
        shown = [row for row in _by_contender(group, "full") if row["peak_mib"] is not None]
        sizes = [row["peak_mib"] * 2**20 / (row["T"] * row["V"] * row["itemsize"]) for row in shown]
        _bars(axes, shown, sizes, "x logits")
    return figure


def _panels(rows: list[Row], title: str, width: float, height: float) -> tuple[Figure, list[tuple[Axes, list[Row]]]]:
    """A grid of axes, one for each shape and dtype, with the rows it shows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    columns = min(3, len(groups)) if len(groups) != 4 else 2
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(width * columns, height * lines + 0.6), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    figure.suptitle(f"{title}\n{rows[0]['gpu']}, torch {rows[0]['torch']}, {rows[0]['date'][:10]}", fontsize=11)
    flat = grid.flatten().tolist()
    for axes in flat[len(groups) :]:
        axes.set_visible(False)
    for axes, name in zip(flat, groups, strict=False):
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(zip(flat, groups.values(), strict=False))


def _bars(axes: Axes, shown: list[Row], values: list[float], unit: str, ends: list[float] | None = None) -> None:
    """A bar a row, its value written beyond the bar, or beyond `ends` where a whisker reaches further."""
    axes.barh([_name(row) for row in shown], values, height=0.7, color=[_color(row) for row in shown])
    for position, (value, end) in enumerate(zip(values, ends or values, strict=True)):
        text = f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
        axes.annotate(text, (end, position), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.margins(x=0.14)
    axes.invert_yaxis()
    axes.set_xlabel(unit)


def _by_contender(group: list[Row], mode: str) -> list[Row]:
    """The measured rows of `mode` without zero-weight rows, in the order they ran."""
    return [row for row in group if row["mode"] == mode and row["zero_share"] == 0 and row["ms"] is not None]


def _name(row: Row) -> str:
    """The contender, and the hit rate where it predicts."""
    rate = row.get("hit_rate")  # older rows lack it
    return row["contender"] if rate is None else f"{row['contender']}, hit rate {rate:g}"


def _color(row: Row) -> str:
    name = row["contender"]
    if name.startswith("geko"):
        return _OURS
    return _GEKO if name.endswith("geko") else (_LIMIT if name == "copy" else _PEER)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
