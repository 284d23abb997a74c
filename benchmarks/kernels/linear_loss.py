"""`weighted_linear_loss` against its peers: the same inputs, one run, each checked before it is timed.

    python -m benchmarks.kernels.linear_loss [--device cpu] [--quick] [--contenders geko,liger-16] [--results DIR]
    python -m benchmarks.kernels.linear_loss --frontier  # time against memory, see linear_frontier.py

appends to DIR/linear_loss.jsonl and ends with each target, its measured ratio, and whether it was hit. See README.md.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.kernels.linear_cases import (
    KEEP_SHARES,
    MASKED_SHARES,
    QUICK_SHAPES,
    SHAPES,
    Case,
    Shape,
    Truth,
    errors,
    make_case,
    truth,
)
from benchmarks.kernels.linear_contenders import CONTENDERS, Contender
from benchmarks.kernels.linear_targets import linear_targets
from benchmarks.kernels.loss_command import arguments, run_all
from benchmarks.kernels.timing import Timing, launches, measure, peak_mib
from benchmarks.results import Row
from geko_kernels import ops

FILE = "linear_loss.jsonl"
BUDGET_S = {"cuda": 150.0, "cpu": 300.0}  # wall time a contender may take in all, compilation included
HEAT_S = 0.5  # of GEMMs before each contender
LIMIT = 0.05  # relative error of loss or gradient from which on a result counts as wrong


def bench(contender: Contender, case: Case, exact: Truth) -> Row:
    """Check and time of forward + backward, what it takes beyond that."""
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    loss_of = contender.make(case)

    def full() -> tuple[Tensor, ...]:
        loss = loss_of(hidden, weight)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    start = time.perf_counter()
    found = errors(full(), exact)
    row = dict(zip(("loss_error", "hidden_error", "weight_error"), found, strict=True))
    row["first_call_s"] = time.perf_counter() - start
    if not all(error <= LIMIT for error in found):
        raise ValueError(f"wrong result: relative errors of loss, dX, dW {found}")
    heat(case)
    full()  # a second call may take other kernels than the first
    before = gemms_ms(case) if contender.ours else None
    row |= rates(measure(full, case.device), case)
    if case.device.type == "cuda":
        row |= {"peak_mib": peak_mib(full), "launches": launches(full)}
    if before is not None:
        row["gemms_ms"] = (before + gemms_ms(case)) / 2
    return row


def heat(case: Case) -> None:
    """Put the GPU into one state, whatever ran before: no memory is cached, the clock is that of a GEMM's load."""
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
        gemms, start = gemms_of(case), time.perf_counter()
        while time.perf_counter() - start < HEAT_S:
            gemms()
            torch.cuda.synchronize()


def bench_gemms(case: Case) -> Row:
    """The three GEMMs alone, all tokens at once, at the next aligned vocabulary."""
    heat(case)
    return rates(measure(gemms_of(case), case.device), case)


def gemms_ms(case: Case) -> float:
    """The same, for right before and right after a contender: the GPU's clock changes within a run."""
    return measure(gemms_of(case), case.device).median


def bench_copy(case: Case) -> Row:
    """One read and one write of all logits, at the next aligned vocabulary."""
    logits = torch.zeros(case.shape.tokens, case.shape.aligned_vocab, dtype=case.hidden.dtype, device=case.device)
    other = torch.empty_like(logits)
    return {**rates(measure(lambda: other.copy_(logits), case.device), case), "tflops": 0.0}


def gemms_of(case: Case) -> Callable[[], None]:
    hidden = case.hidden
    vocab, dtype = case.shape.aligned_vocab, hidden.dtype
    weight = torch.zeros(vocab, case.shape.hidden, dtype=dtype, device=case.device)
    weight[: case.shape.vocab] = case.weight

    def gemms() -> None:
        logits = hidden @ weight.t()
        _ = logits @ weight, logits.t() @ hidden

    return gemms


def rates(timing: Timing, case: Case) -> Row:
    """Times, and the speed if a step did the three GEMMs of all labelled tokens, those of the gradients if kept."""
    rows = case.shape.tokens * (1 - case.masked_share) * (1 + 2 * case.kept_rows)
    tflops = 2 * rows * case.shape.hidden * case.shape.vocab / timing.median / 1e9
    return {"ms": timing.median, "ms_p20": timing.p20, "ms_p80": timing.p80, "tflops": tflops}


def describe(name: str, case: Case) -> Row:
    """What a row says before anything was measured."""
    shape = case.shape
    return {
        **{"bench": "linear_loss", "contender": name, "T": shape.tokens, "H": shape.hidden, "V": shape.vocab},
        **{"dtype": str(case.hidden.dtype).removeprefix("torch."), "itemsize": case.hidden.element_size()},
        **{"keep_share": round(case.keep_share, 4), "kept_rows": round(case.kept_rows, 4)},
        **{"masked_share": case.masked_share, "mode": "full"},
        **{"ms": None, "ms_p20": None, "ms_p80": None, "tflops": None, "peak_mib": None, "launches": None},
        **{"loss_error": None, "hidden_error": None, "weight_error": None, "first_call_s": None, "gemms_ms": None},
        **{"backend": None, "version": None, "reason": None},
    }


def attempt(contender: Contender, case: Case, exact: Truth, spent: dict[str, float]) -> Row:
    """`bench` with every failure turned into a row without times and with a `reason`."""
    row = describe(contender.name, case) | {"version": contender.package_version()}
    if contender.name.startswith("geko"):
        row["backend"] = ops.backend_name(case.device, case.hidden.dtype)
    start = time.perf_counter()
    try:
        budget = BUDGET_S[case.device.type]
        if spent.get(contender.name, 0.0) > budget:
            raise TimeoutError(f"took more than {budget:.0f} s in this run already")
        row |= bench(contender, case, exact)
    except Exception as error:  # a peer may fail in any way; the run goes on
        row["reason"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    spent[contender.name] = spent.get(contender.name, 0.0) + time.perf_counter() - start
    torch.compiler.reset()
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def run(
    shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], names: Sequence[str], device: torch.device
) -> Iterator[Row]:
    """All rows of a run: every contender at keep share 1 without masked tokens, ours also at the others."""
    spent: dict[str, float] = {}
    contenders = [CONTENDERS[name] for name in names if device.type == "cuda" or CONTENDERS[name].cpu]
    for shape, dtype in itertools.product(shapes, dtypes):
        for masked_share, keep_share in itertools.product(MASKED_SHARES, KEEP_SHARES):
            case = make_case(shape, dtype, keep_share, masked_share, device)
            exact = truth(case)
            plain = keep_share == 1 and not masked_share
            if plain:
                yield describe("gemms", case) | bench_gemms(case)
                yield describe("copy", case) | bench_copy(case)
            for contender in contenders:
                if plain or contender.ours:
                    yield attempt(contender, case, exact, spent)
            del case, exact


def show(row: Row) -> str:
    where = f"{row['T']} x {row['H']} x {row['V']} {row['dtype']}"
    where = f"{where:32} keep {row['keep_share']:.2f} masked {row['masked_share']:.1f}  {row['contender']:14}"
    if row["ms"] is None:
        return f"{where} -- {row['reason']}"
    more = "" if row["peak_mib"] is None else f"  peak {row['peak_mib']:7.0f} MiB"
    if row["weight_error"] is not None:
        more += f"  errors {row['hidden_error']:.1e} {row['weight_error']:.1e}"
    return f"{where} {row['ms']:9.3f} ms [{row['ms_p20']:.3f}, {row['ms_p80']:.3f}] {row['tflops']:6.1f} TFLOP/s{more}"


def main() -> int:
    from benchmarks.kernels import linear_frontier  # it measures with this module

    options = arguments(__doc__, FILE, CONTENDERS, linear_frontier.names())
    if options.frontier:
        frontier = linear_frontier.FILE, linear_frontier.SHAPES, linear_frontier.run, show
        return run_all(options, *frontier, linear_frontier.frontier_targets, linear_frontier.draw)
    return run_all(options, FILE, QUICK_SHAPES if options.quick else SHAPES, run, show, linear_targets)


if __name__ == "__main__":
    sys.exit(main())
