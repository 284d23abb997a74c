"""The report's charts, drawn with matplotlib from the figures that `efficiency` writes.

Each takes `narrow`, the layout for a phone's screen: half the width, with letters of the same size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Okabe and Ito's palette, which works with any colour vision
BLUE, GREEN, ORANGE, RED, GREY = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#8C8C8C"
BUCKET_COLOURS = {"FREEZE": BLUE, "LIGHT": GREEN, "FOCUS": ORANGE, "HARD": RED}
_PART_COLOURS = {"steps": BLUE, "probes": ORANGE, "selection": GREEN}


def bucket_chart(buckets: Sequence[Mapping[str, int]], narrow: bool = False) -> Figure:
    """Share of the samples in each bucket at the end of each epoch, as stacked areas; one mapping an epoch."""
    figure, axes = _axes("Samples by bucket" if narrow else "Samples by bucket at the end of each epoch", narrow)
    totals = [max(sum(counts.values()), 1) for counts in buckets]
    shares = [[counts[name] / n for counts, n in zip(buckets, totals, strict=True)] for name in BUCKET_COLOURS]
    epochs = list(range(1, len(buckets) + 1))
    if len(epochs) > 1:
        areas: Sequence[Any] = axes.stackplot(
            epochs, shares, colors=BUCKET_COLOURS.values(), edgecolor="white", linewidth=0.8
        )
        axes.set_xlim(1, len(epochs))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:  # a single point has no area
        bottoms = [sum(share[0] for share in shares[:i]) for i in range(len(shares))]
        areas = axes.bar([1] * 4, [s[0] for s in shares], 0.4, bottoms, color=BUCKET_COLOURS.values()).patches
        axes.set(xlim=(0, 2), xticks=[1])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel(f"share of {totals[-1]:,} samples")
    axes.set_xlabel("epoch")
    if not narrow:  # beside the chart, in the order of the areas
        areas, names = list(reversed(areas)), list(reversed(BUCKET_COLOURS))
    else:
        names = list(BUCKET_COLOURS)
    _legend(axes, list(areas), names, narrow)
    return figure


def curve_chart(
    title: str, unit: str, curves: Mapping[str, Sequence[tuple[float, float]]], share: bool, narrow: bool = False
) -> Figure:
    """`curves` are points (epoch, value) by name; `share` shows values in [0, 1] as percent."""
    figure, axes = _axes(title, narrow)
    styles = zip(curves.items(), (BLUE, RED), ("o-", "s--"), strict=False)
    for (name, points), colour, style in styles:
        marker_size = 4 if len(points) <= 40 else 0
        axes.plot(*zip(*points, strict=True), style, color=colour, label=name, linewidth=1.6, markersize=marker_size)
    if share:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel(unit)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(curves) > 1:
        _legend(axes, *axes.get_legend_handles_labels(), narrow)
    return figure


def time_chart(seconds: Mapping[str, Any], narrow: bool = False) -> Figure:
    """How the wall time of training was spent: one bar for each measured part, and "other" for the rest."""
    parts = {name: spent for name, spent in seconds.items() if name != "total" and spent is not None}
    parts["other"] = max(seconds["total"] - sum(parts.values()), 0.0)
    figure, axes = _axes("Wall time by part", narrow, height=2.8)
    bars = axes.barh(
        list(parts), list(parts.values()), color=[_PART_COLOURS.get(name, GREY) for name in parts], height=0.62
    )
    total = max(seconds["total"], 1e-9)
    axes.bar_label(bars, [f" {duration(s)}  ({s / total:.0%})" for s in parts.values()], fontsize=9)
    axes.set_xlim(0, max(parts.values()) * (1.9 if narrow else 1.25) or 1)
    axes.set_xlabel("seconds")
    axes.invert_yaxis()
    return figure


def work_chart(work: Mapping[str, Mapping[str, float]], narrow: bool = False) -> Figure:
    """Forward and backward passes against the standard run's; `work[unit]` has standard, forward and backward."""
    title = "Work, against the standard run's" if narrow else "Work done, against the same run with the standard loss"
    figure, axes = _axes(title, narrow, height=(1.5 if narrow else 0.9) + 0.75 * len(work))
    for row, (unit, counts) in enumerate(work.items()):
        standard = max(counts["standard"], 1)
        for part, offset, colour in (("forward", -0.18, BLUE), ("backward", 0.18, ORANGE)):
            (bar,) = axes.barh(
                row + offset, counts[part] / standard, 0.33, color=colour, label=part if row == 0 else None
            )
            text = f" {_short(counts[part])} of {_short(counts['standard'])}" + ("" if narrow else f" {unit}")
            axes.annotate(text, (max(bar.get_width(), 1), row + offset), va="center", fontsize=9)
    axes.axvline(1, color="#444444", linewidth=1, linestyle="--", label="standard run")
    axes.set_yticks(range(len(work)), list(work))
    axes.set_xlim(0, (0.85 if narrow else 0.45) + max(1, axes.dataLim.xmax))
    axes.set_xticks([0, 0.5, 1] if narrow else [0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("share of the standard run")
    axes.invert_yaxis()
    _legend(axes, *axes.get_legend_handles_labels(), narrow)
    return figure


def data_map(points: Sequence[tuple[float, float, str]], narrow: bool = False) -> Figure:
    """Samples by mean and standard deviation of p(label) over their visits; points (mean, deviation, bucket)."""
    figure, axes = _axes("Data map", narrow, height=4.2)
    shown: dict[str, Patch] = {}
    size, opacity = (14, 0.7) if len(points) < 1000 else (6, 0.4)
    for name, colour in [*BUCKET_COLOURS.items(), ("", GREY)]:
        placed = [(mean, spread) for mean, spread, bucket in points if bucket == name]
        if placed:
            means, spreads = zip(*placed, strict=True)
            axes.scatter(spreads, means, s=size, alpha=opacity, color=colour, linewidths=0)
            shown[name or "bucket unknown"] = Patch(color=colour)
    axes.set(xlim=(0, 0.52), ylim=(-0.02, 1.02), xlabel="its standard deviation over the visits")
    axes.set_ylabel("mean probability of the label")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(color="#DDDDDD", linewidth=0.8)
    _legend(axes, list(shown.values()), list(shown), narrow)
    return figure


def _axes(title: str, narrow: bool, height: float = 3.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.7, max(height, 2.4)) if narrow else (7.6, height), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    return figure, axes


def _legend(axes: Axes, handles: Sequence[Any], labels: Sequence[str], narrow: bool) -> None:
    """Beside the chart, or below a narrow one."""
    if narrow:
        axes.get_figure().legend(  # type: ignore[union-attr]
            handles, labels, loc="outside lower left", ncols=2, frameon=False, fontsize=9
        )
    else:
        axes.legend(handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _short(count: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {suffix}"
    return f"{count:.0f}"
