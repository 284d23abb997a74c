"""What demo.py prints and draws at its end."""

from pathlib import Path

import matplotlib.pyplot as plt
from demo_training import Arm
from rich.console import Console
from rich.table import Table

import geko_kernels as gk

plt.switch_backend("Agg")
COLORS = {"FREEZE": "#9ecae1", "LIGHT": "#a1d99b", "FOCUS": "#fdae6b", "HARD": "#de6561"}


def print_report(console: Console, standard: Arm, geko: Arm) -> None:
    """Both arms side by side, then GEKO's buckets per epoch."""
    table = Table(title="Standard loss against GEKO")
    table.add_column("")
    for arm in (standard, geko):
        table.add_column(arm.name, justify="right")
    ends = [standard.epochs[-1], geko.epochs[-1]]
    table.add_row("held-out accuracy", *(f"{end.accuracy:.3f}" for end in ends))
    table.add_row("held-out loss", *(f"{end.loss:.3f}" for end in ends))
    table.add_row("seconds of training", *(f"{end.seconds:.1f}" for end in ends))
    table.add_row("samples forwarded", *(f"{end.forwarded}" for end in ends))
    table.add_row("samples backpropagated", *(f"{end.backpropagated}" for end in ends))
    console.print(table)

    table = Table(title="Training progression with GEKO")
    for name in ("Epoch", *(bucket.name for bucket in gk.Bucket), "Compute saved", "Held-out accuracy"):
        table.add_column(name, justify="right")
    work = [0, *(compute(epoch.forwarded, epoch.backpropagated) for epoch in geko.epochs)]
    full = compute(standard.epochs[0].forwarded, standard.epochs[0].backpropagated)
    for i, epoch in enumerate(geko.epochs):
        shares = (f"{count / sum(epoch.buckets.values()):.0%}" for count in epoch.buckets.values())
        saved = 1 - (work[i + 1] - work[i]) / full
        table.add_row(str(i + 1), *shares, f"{saved:z.0%}", f"{epoch.accuracy:.3f}")
    table.add_section()
    table.add_row("all", "", "", "", "", f"{1 - work[-1] / (full * len(geko.epochs)):.0%}", "")
    console.print(table)
    console.print(
        "Compute saved: share of the standard arm's work on the trained layers that was not done, re-checks counted; "
        "a backward counts as two forwards."
    )


def compute(forwarded: int, backpropagated: int) -> int:
    """Work in forwards of one sample."""
    return forwarded + 2 * backpropagated


def draw(path: Path, standard: Arm, geko: Arm) -> None:
    """Buckets per epoch on the left, held-out loss over training time on the right."""
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

    for arm, color in ((standard, "#636363"), (geko, "#d94801")):
        last = arm.epochs[-1]
        label = f"{arm.name}: {last.accuracy:.1%} right after {last.backpropagated} samples trained on"
        seconds = [epoch.seconds for epoch in arm.epochs]
        right.plot(seconds, [epoch.loss for epoch in arm.epochs], "o-", color=color, label=label)
    right.set(title="Held-out loss, one dot an epoch", xlabel="seconds of training", ylabel="nats per token")
    right.set_xlim(left=0)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
