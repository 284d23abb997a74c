"""What demo.py prints and draws at its end."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from demo_training import Arm
from glosses import CLASSES, Glosses
from rich.console import Console
from rich.table import Table
from torch import Tensor

import geko_kernels as gk
from geko_kernels.training.report.samples import read_samples

plt.switch_backend("Agg")
COLORS = {"FREEZE": "#9ecae1", "LIGHT": "#a1d99b", "FOCUS": "#fdae6b", "HARD": "#de6561"}
SHOWN = 10  # label errors


def print_result(console: Console, uniform: Arm, geko: Arm) -> None:
    """Both arms side by side, and what the best length of uniform training would have given."""
    table = Table(title="Uniform training beside GEKO")
    table.add_column("")
    for arm in (uniform, geko):
        table.add_column(arm.name, justify="right")
    ends = [uniform.epochs[-1], geko.epochs[-1]]
    table.add_row("held-out accuracy", *(f"{end.accuracy:.1%}" for end in ends))
    table.add_row("seconds of training", *(f"{end.seconds:.1f}" for end in ends))
    table.add_row("samples forwarded", *(f"{end.forwarded}" for end in ends))
    table.add_row("samples backpropagated", *(f"{end.backpropagated}" for end in ends))
    console.print(table)
    best = max(range(len(uniform.epochs)), key=lambda i: uniform.epochs[i].accuracy)
    console.print(
        f"Uniform training was at its best after epoch {best + 1}: {uniform.epochs[best].accuracy:.1%}. Only held-out "
        "data whose labels are right tell when to stop.\n"
    )


def print_progression(console: Console, geko: Arm) -> None:
    """GEKO's buckets and savings by epoch."""
    table = Table(title="Training progression with GEKO")
    for name in ("Epoch", *(bucket.name for bucket in gk.Bucket), "Compute saved", "Held-out accuracy"):
        table.add_column(name, justify="right")
    work = [0, *(compute(epoch.forwarded, epoch.backpropagated) for epoch in geko.epochs)]
    full = compute(*2 * (sum(geko.epochs[0].buckets.values()),))
    for i, epoch in enumerate(geko.epochs):
        shares = (f"{count / sum(epoch.buckets.values()):.0%}" for count in epoch.buckets.values())
        saved = 1 - (work[i + 1] - work[i]) / full
        table.add_row(str(i + 1), *shares, f"{saved:z.0%}", f"{epoch.accuracy:.1%}")
    table.add_section()
    table.add_row("all", "", "", "", "", f"{1 - work[-1] / (full * len(geko.epochs)):.0%}", "")
    console.print(table)
    console.print(
        "FREEZE: predicted right, surely and steadily; LIGHT: right; FOCUS: wrong and unsure; HARD: wrong and sure, "
        "which where labels are wrong may be the label's fault."
    )
    console.print(
        "Compute saved: share of uniform training's work that was not done, re-checks counted; a backward counts as "
        "two forwards.\n"
    )


def compute(forwarded: int, backpropagated: int) -> int:
    """Work in forwards of one sample."""
    return forwarded + 2 * backpropagated


class Found:
    """The labels that a run suspects, likeliest first, against the truth, which only a demo knows."""

    def __init__(self, folder: Path, right: Tensor, given: Tensor) -> None:
        rows: list[dict[str, Any]] = read_samples(folder) or []
        suspected = sorted((row for row in rows if row["suspected"]), key=lambda row: -row["label_error"])
        wrong = (given != right).tolist()
        self.named = [row["id"] for row in suspected]
        self.true = [i for i in self.named if wrong[i]]
        self.wrong = sum(wrong)


def print_label_errors(console: Console, folder: Path, glosses: Glosses, given: Tensor) -> None:
    found = Found(folder, glosses.labels, given)
    if not found.wrong:
        console.print(f"Label errors: all labels are right, and GEKO suspects {len(found.named)} of {len(given)}.\n")
        return
    if not found.named:
        console.print(f"Label errors: GEKO names none of the {found.wrong} wrong labels.\n")
        return
    precision, recall = len(found.true) / len(found.named), len(found.true) / found.wrong
    console.print(
        f"Label errors found: GEKO names {len(found.named)} labels. {precision:.0%} of them are wrong (precision); "
        f"they are {recall:.0%} of the {found.wrong} wrong ones (recall)."
    )
    table = Table(title="The likeliest of them")
    for name in ("Definition", "Label in the data", "Right label"):
        table.add_column(name)
    for i in found.named[:SHOWN]:
        mark = "" if i in found.true else "  named by mistake"
        table.add_row(glosses.texts[i], CLASSES[given[i]], CLASSES[glosses.labels[i]] + mark)
    console.print(table, "")


def draw(path: Path, uniform: Arm, geko: Arm) -> None:
    """Buckets per epoch on the left, held-out accuracy over training time on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    epochs = range(1, len(geko.epochs) + 1)
    base = [0.0] * len(geko.epochs)
    for bucket in gk.Bucket:
        shares = [100 * epoch.buckets[bucket.name] / sum(epoch.buckets.values()) for epoch in geko.epochs]
        left.bar(epochs, shares, bottom=base, width=0.8, color=COLORS[bucket.name], label=bucket.name)
        for x, low, share in zip(epochs, base, shares, strict=True):
            if share >= 5:
                left.text(x, low + share / 2, f"{share:.0f}", ha="center", va="center", fontsize=9)
        base = [low + share for low, share in zip(base, shares, strict=True)]
    left.set(title="Where the samples are (GEKO)", xlabel="epoch", ylabel="% of the training set", ylim=(0, 100))
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4, frameon=False)

    for arm, color in ((uniform, "#636363"), (geko, "#d94801")):
        last = arm.epochs[-1]
        label = f"{arm.name}: {last.accuracy:.1%} right after {last.backpropagated} samples trained on"
        seconds = [epoch.seconds for epoch in arm.epochs]
        right.plot(seconds, [100 * epoch.accuracy for epoch in arm.epochs], "o-", color=color, label=label)
    right.set(title="Held-out accuracy, one dot an epoch", xlabel="seconds of training", ylabel="%")
    right.set_xlim(left=0)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
