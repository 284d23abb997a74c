"""Held-out curves as a picture: a row a task and rate, loss and accuracy, by sample set, raw and averaged weights.

python -m benchmarks.end_to_end.curves_plot benchmarks/results/curves_2026-11-27.jsonl.gz --out curves.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.results import Row, read

_SETS = {
    "test": "#000000",
    "choose": "#8C8C8C",
    "cluster": "#0072B2",
    "source": "#009E73",
    "random": "#D55E00",
    "random, right labels": "#E69F00",
}
_STYLES = {"raw": ":", "5/t": "-"}


def draw(rows: list[Row], out: Path) -> None:
    """Loss on the left; on the right tokens right (texts) or samples right (classes).

    A ring marks the least loss of averaged weights, a star the end of a cosine run on the test set.
    """
    constant = [row for row in rows if row["schedule"] == "constant"]
    figure, axes = plt.subplots(
        len(constant), 2, figsize=(12, 3.2 * len(constant)), squeeze=False, layout="constrained"
    )
    for (left, right), row in zip(axes, constant, strict=True):
        share = 3 if row["task"] == "d1" else 2
        sets = [name for name in _SETS if name in row["looks"][0]["raw"]]
        for weights, style in _STYLES.items():
            for name in sets if weights != "raw" else ["test", "cluster"]:
                points = [(look["epoch"], look[weights][name]) for look in row["looks"]]
                epochs, values = zip(*points, strict=True)
                losses = [value[0] for value in values]
                label = f"{name}, {'raw' if weights == 'raw' else 'averaged'}"
                left.plot(epochs, losses, style, color=_SETS[name], label=label)
                right.plot(epochs, [value[share] for value in values], style, color=_SETS[name])
                if weights != "raw":
                    least = losses.index(min(losses))
                    left.plot(epochs[least], losses[least], "o", color=_SETS[name], fillstyle="none")
        for other in (other for other in rows if other["schedule"] == "cosine" and other["task"] == row["task"]):
            if other["rate"] == row["rate"]:
                end = other["looks"][-1]
                left.plot(end["epoch"], end["raw"]["test"][0], "k*", markersize=9)
                right.plot(end["epoch"], end["raw"]["test"][share], "k*", markersize=9)
        left.set(ylabel="loss, nats a token", title=f"{row['task']}, rate {row['rate']:g}", xlabel="epoch")
        right.set(ylabel="tokens right" if share == 3 else "samples right", xlabel="epoch", title=row["gpu"])
        left.legend(fontsize=7, ncols=2)
        top = sorted(look["raw"]["test"][0] for look in row["looks"])[-1]
        left.set_ylim(top=min(left.get_ylim()[1], 1.6 * top))
    figure.savefig(out, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    draw(read(given.rows), given.out)


if __name__ == "__main__":
    main()
