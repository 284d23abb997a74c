"""Time against memory of the head and loss: `weighted_linear_loss` at several budgets, its peers by chunks.

    python -m benchmarks.kernels.linear_loss --frontier

appends to DIR/linear_frontier.jsonl, draws DIR/linear_frontier_{gpu,cpu}.png and ends with the targets. See README.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.kernels import linear_memory
from benchmarks.kernels.linear_cases import Case, Shape, make_case, truth
from benchmarks.kernels.linear_contenders import CONTENDERS, Contender, geko, liger
from benchmarks.kernels.linear_loss import attempt, bench_gemms, describe
from benchmarks.kernels.live_memory import step_mib
from benchmarks.kernels.targets import Target
from benchmarks.results import Row

FILE = "linear_frontier.jsonl"
SHAPES = {"cuda": linear_memory.SHAPES, "cpu": (Shape(1024, 64, 8192), Shape(512, 128, 16384))}
BUDGETS = {"cuda": (64, 96, 112, 128, 200, 256, 400, 512, 600, 1024), "cpu": (1, 4, 8)}
EXACT = 1.1  # a peer counts if its dW's error is at most this much of torch's
SLACK = 1.01  # of a peer's memory; lists of rows and statistics are under 1 % of ours


def contenders(device: str) -> list[Contender]:
    """The peers, Liger at several chunk counts, and ours by default and at each budget."""
    peers = [CONTENDERS[name] for name in ("torch", "compile", "liger-1", "liger-16", "liger-16-fp32", "cce-exact")]
    for chunk in (4, 8):
        make = partial(liger, chunk=chunk, wide=True)
        peers.append(Contender(f"liger-{chunk}-fp32", make, cpu=False, package="liger-kernel"))
    ours = [Contender("geko", partial(geko, chunk_mib=None), package="geko_kernels")]
    for mib in BUDGETS[device]:
        ours.append(Contender(f"geko-{mib}", partial(geko, chunk_mib=mib), package="geko_kernels"))
    return [contender for contender in peers if device == "cuda" or contender.cpu] + ours


def names() -> list[str]:
    return list(dict.fromkeys(contender.name for device in BUDGETS for contender in contenders(device)))


def run(
    shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], names: Sequence[str], device: torch.device
) -> Iterator[Row]:
    """A row of each contender at keep share 1 without masked tokens; `model_mib` is what our buffers add up to."""
    spent: dict[str, float] = {}
    for shape in shapes:
        case = make_case(shape, torch.bfloat16, 1.0, 0.0, device)
        exact = truth(case)
        common = {"bench": "linear_frontier", "model_mib": None}
        yield describe("gemms", case) | bench_gemms(case) | common
        for contender in contenders(device.type):
            if contender.name in names:
                yield measured(attempt(contender, case, exact, spent) | common, contender, case)
        del case, exact


def measured(row: Row, contender: Contender, case: Case) -> Row:
    """The row with the model's memory of ours, and on a CPU the memory of the tensors that a step makes."""
    if contender.name.startswith("geko"):
        budget = contender.name.removeprefix("geko").removeprefix("-")
        row["model_mib"] = linear_memory.predicted_mib(case.shape, float(budget) if budget else None)
    if case.device.type == "cpu" and row["ms"] is not None and contender.name != "compile":
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        loss_of = contender.make(case)
        row["peak_mib"] = step_mib(lambda: torch.autograd.grad(loss_of(hidden, weight), (hidden, weight)), case.device)
    return row


def frontier_targets(rows: list[Row]) -> Iterator[Target]:
    """For each shape: ours against each exact peer at no more than its memory; times by budget; the model."""
    measured = [row for row in rows if row["ms"] is not None]
    for shape in dict.fromkeys((row["T"], row["H"], row["V"]) for row in measured):
        group = {row["contender"]: row for row in measured if (row["T"], row["H"], row["V"]) == shape}
        name = " x ".join(map(str, shape))
        ours = {key: row for key, row in group.items() if key.startswith("geko")}
        if "geko" not in ours or "torch" not in group:
            continue
        yield from _peers(name, group, list(ours.values()))
        for mib, bar in ((512, 1.10), (256, 1.25)):
            if f"geko-{mib}" in ours:
                ratio = ours[f"geko-{mib}"]["ms"] / ours["geko"]["ms"]
                yield Target(f"{name}: time with {mib} MiB / by default", ratio, bar)
        if not group["geko"]["gpu"].startswith("cpu"):  # a CPU's GEMMs need tensors of their own
            off = max(row["peak_mib"] / row["model_mib"] for row in ours.values())
            yield Target(f"{name}: largest measured memory / the model's", off, 1.02)


def _peers(name: str, group: dict[str, Row], ours: list[Row]) -> Iterator[Target]:
    least = min(row["peak_mib"] or 0 for row in ours)
    for peer, row in group.items():
        if row in ours or not row["peak_mib"] or not row["weight_error"] or row["peak_mib"] < least:
            continue
        if row["weight_error"] <= EXACT * group["torch"]["weight_error"]:
            at_most = [own["ms"] for own in ours if own["peak_mib"] <= SLACK * row["peak_mib"]]
            ratio = min(at_most, default=float("inf")) / row["ms"]
            yield Target(f"{name}: geko at no more memory / {peer} ({row['peak_mib']:.0f} MiB)", ratio, 1.0)


def draw(rows: list[Row], directory: Path) -> None:
    """One panel a shape: memory against time; hollow peers have a larger error of dW than 1.1 times torch's."""
    shown = [row for row in rows if row["ms"] is not None and row["peak_mib"]]
    shapes = list(dict.fromkeys((row["T"], row["H"], row["V"]) for row in shown))
    if not shapes:
        return
    figure = Figure(figsize=(5.4 * len(shapes), 4.4), layout="constrained")
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        group = [row for row in shown if (row["T"], row["H"], row["V"]) == shape]
        torchs = next((row["weight_error"] for row in group if row["contender"] == "torch"), float("inf"))
        ours = sorted((row for row in group if row["contender"].startswith("geko")), key=lambda row: row["peak_mib"])
        axes.plot([row["peak_mib"] for row in ours], [row["ms"] for row in ours], "-o", color="#0b7a75", ms=4)
        for row in group:
            own, exact = row in ours, row["weight_error"] <= EXACT * torchs
            if not own:
                face = "#9aa5b1" if exact else "white"
                axes.plot(row["peak_mib"], row["ms"], "s", color="#9aa5b1", markerfacecolor=face, ms=6)
            label = row["contender"].removeprefix("geko-") if own else row["contender"]
            axes.annotate(label, (row["peak_mib"], row["ms"]), (4, 4), textcoords="offset points", fontsize=7)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("MiB beyond the inputs, dX and dW included")
        axes.set_ylabel("ms, forward + backward")
        axes.set_title(" x ".join(map(str, shape)), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{shown[0]['gpu']}, torch {shown[0]['torch']}, {shown[0]['date'][:10]}", fontsize=10)
    kind = "cpu" if shown[0]["gpu"].startswith("cpu") else "gpu"
    figure.savefig(directory / f"linear_frontier_{kind}.png", dpi=120)
