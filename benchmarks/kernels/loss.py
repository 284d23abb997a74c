"""`weighted_loss` against its peers: the same inputs, one run, each checked before it is timed.

    python -m benchmarks.kernels.loss [--device cpu] [--quick] [--contenders geko,liger] [--results DIR]

appends to DIR/loss.jsonl and ends with each target, its measured ratio, and whether it was hit. See README.md.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.contenders import CONTENDERS, Contender, LossOf
from benchmarks.kernels.loss_cases import QUICK_SHAPES, SHAPES, TOLERANCE, ZERO_SHARES, Case, Shape, errors, make_case
from benchmarks.kernels.loss_command import arguments, run_all
from benchmarks.kernels.targets import label, targets
from benchmarks.kernels.timing import Timing, host_us, launches, measure, peak_mib
from benchmarks.results import Row
from geko_kernels import ops
from geko_kernels.kernels.one_pass import hopper
from geko_kernels.zero_share import INTERVAL

FILE = "loss.jsonl"
BUDGET_S = {"cuda": 60.0, "cpu": 300.0}  # wall time a contender may take in all, compilation included
_ROTATED_BYTES = 2**28  # small inputs take turns up to this many bytes, so that no cache holds them all
_SMALL_STEPS = 20  # steps a measurement at small shapes
_MODES = ("forward", "full")


class _Output(torch.autograd.Function):
    """Logits as a model's output: an in-place gradient may be written over them, as over no leaf or view of one."""

    @staticmethod
    def forward(ctx: Any, memory: Tensor, weight: Tensor) -> Tensor:
        ctx.mark_dirty(memory)
        return memory


class Inputs:
    """The logits as `contender` takes them: autograd inputs that can be restored if it overwrites them."""

    def __init__(self, contender: Contender, case: Case) -> None:
        shape = case.shape.batch if contender.ours else case.logits.shape
        self.original = case.logits.view(shape)
        copies = 1 if case.shape.large or case.device.type == "cpu" else min(_ROTATED_BYTES // case.logits_bytes, 8)
        if contender.inplace:
            self.copies = [self.original.clone() for _ in range(copies)]
        else:
            self.copies = [self.original, *(self.original.clone() for _ in range(copies - 1))]
        weight = torch.zeros((), device=case.device, requires_grad=True)
        self.logits = [_Output.apply(copy.detach(), weight) for copy in self.copies]
        self.turn = itertools.cycle(self.logits)
        self.reset = self._restore if contender.inplace else None

    def _restore(self) -> None:
        for copy in self.copies:
            copy.copy_(self.original)


def backward(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


def check(loss_of: LossOf, inputs: Inputs, case: Case) -> Row:
    """Raise ValueError unless the loss and its gradient are right; also warms up and compiles."""
    logits, start = inputs.logits[0], time.perf_counter()
    loss = loss_of(logits)
    grad = backward(loss, logits)
    grad.flatten()[0].item()  # waits for the device
    first_call_s = time.perf_counter() - start
    loss_error, grad_error = errors(case, loss, grad)
    loss_limit, grad_limit = TOLERANCE[case.logits.dtype]
    if not (loss_error <= loss_limit and grad_error <= grad_limit):
        raise ValueError(f"wrong result: relative error of the loss {loss_error:.2e}, of its gradient {grad_error:.2e}")
    return {"loss_error": loss_error, "grad_error": grad_error, "first_call_s": first_call_s}


def bench(contender: Contender, case: Case) -> Iterator[Row]:
    """The rows of `contender` on `case`: time of the forward and of the full step, and what the full step takes."""
    loss_of, inputs = contender.make(case), Inputs(contender, case)
    found = check(loss_of, inputs, case)
    if contender.hit_rate is not None:
        found["backend"] = chosen_path(loss_of, inputs)
    if inputs.reset:
        inputs.reset()
    inner = 1 if case.shape.large or case.device.type == "cpu" else _SMALL_STEPS

    def forward() -> Tensor:
        return loss_of(next(inputs.turn))

    def full() -> Tensor:
        logits = next(inputs.turn)
        return backward(loss_of(logits), logits)

    yield {**found, "mode": "forward", **rates(measure(forward, case.device, inputs.reset, inner), 1, case)}
    passes = 3 - (case.zero_rows if contender.ours else 0)
    row = {**found, "mode": "full", **rates(measure(full, case.device, inputs.reset, inner), passes, case)}
    if case.device.type == "cuda" and not case.zero_share:
        try:
            row |= costs(loss_of, full, inputs.logits[0])
        except Exception as error:  # the times stand without it
            row["reason"] = describe_error(error)
    yield row


def chosen_path(loss_of: LossOf, inputs: Inputs) -> str:
    """Where the calls go once the share of zero weights is known: "hopper" (one pass) or "triton" (three)."""
    for _ in range(2 * INTERVAL):
        node: Any = loss_of(inputs.logits[0]).grad_fn
    return "triton" if node.predicted is None else "hopper"


def costs(loss_of: LossOf, full: Callable[[], Tensor], logits: Tensor) -> Row:
    """What a full step takes on the GPU beside time."""
    forward_us, backward_us = host_us(lambda: loss_of(logits), lambda loss: backward(loss, logits))
    one = torch.ones_like(loss_of(logits), requires_grad=False)
    try:
        _, nodes_us = host_us(lambda: loss_of(logits), lambda loss: backward_here(loss, logits, one))
    except Exception:  # compiled code runs under the engine only
        nodes_us = None
    row = {"host_forward_us": forward_us, "host_backward_us": backward_us, "host_nodes_us": nodes_us}
    row |= {"peak_mib": peak_mib(full), "gradient_mib": peak_mib(lambda: torch.empty_like(logits))}
    return row | {"launches": launches(full)}


def backward_here(loss: Tensor, logits: Tensor, grad: Tensor) -> Tensor:
    """`backward` without autograd's engine and its thread: the nodes between loss and logits, a chain, one by one."""
    node: Any = loss.grad_fn
    end = logits.grad_fn  # asked for now: an overwritten view gets another
    with torch.no_grad():
        while node is not end:
            grads = node.apply(grad) if hasattr(node, "apply") else node(grad)
            grad = grads if isinstance(grads, Tensor) else next(each for each in grads if each is not None)
            node = next(before for before, _ in node.next_functions if before is not None)
    return grad


def describe_error(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def bench_copy(case: Case) -> Row:
    """The bandwidth ceiling: `logits` copied to another buffer, bytes read and written."""
    other = torch.empty_like(case.logits)
    return {"mode": "full", **rates(measure(lambda: other.copy_(case.logits), case.device), 2, case)}


def rates(timing: Timing, passes: float, case: Case) -> Row:
    """Times, and the speed if a step moved the logits' bytes `passes` times and nothing else."""
    tbps = passes * case.logits_bytes / timing.median / 1e9
    return {"ms": timing.median, "ms_p20": timing.p20, "ms_p80": timing.p80, "tbps": tbps}


def describe(name: str, case: Case) -> Row:
    """The keys that say what was run, with nothing measured yet."""
    return {
        **{"bench": "loss", "contender": name, "T": case.shape.tokens, "V": case.shape.vocab},
        **{"dtype": str(case.logits.dtype).removeprefix("torch."), "itemsize": case.logits.element_size()},
        **{"zero_share": round(case.zero_share, 4), "zero_rows": round(case.zero_rows, 4)},
        **{
            "hit_rate": None,
            "packed": case.shape.packed,
            "size": "large" if case.shape.large else "small",
            "mode": None,
        },
        **{"ms": None, "ms_p20": None, "ms_p80": None, "tbps": None, "peak_mib": None, "launches": None},
        **{"host_forward_us": None, "host_backward_us": None, "host_nodes_us": None},
        **{"gradient_mib": None, "first_call_s": None},
        **{"loss_error": None, "grad_error": None},
        **{"backend": None, "version": None, "reason": None},
    }


def attempt(contender: Contender, case: Case, spent: dict[str, float]) -> Iterator[Row]:
    """`bench` with every failure turned into rows without times and with a `reason`."""
    base = describe(contender.name, case) | {"version": contender.package_version()}
    chosen = ops._override
    if case.device.type == "cuda":
        ops._override = contender.backend
    if contender.ours:
        base["backend"] = ops.backend_name(case.device, case.logits.dtype)
    if contender.hit_rate is not None:
        base |= {"contender": "geko-hopper", "hit_rate": contender.hit_rate, "backend": "hopper"}
    missing = list(_MODES)
    start = time.perf_counter()
    try:
        if spent.get(contender.name, 0.0) > BUDGET_S[case.device.type]:
            raise TimeoutError(f"took {spent[contender.name]:.0f} s in this run already")
        for row in bench(contender, case):
            missing.remove(row["mode"])
            yield base | row | ({} if contender.hit_rate is None else {"launches": None})  # a profiler turns it off
    except Exception as error:  # a peer may fail in any way; the run goes on
        yield from (base | {"mode": mode, "reason": describe_error(error)} for mode in missing)
    ops._override = chosen
    spent[contender.name] = spent.get(contender.name, 0.0) + time.perf_counter() - start
    torch.compiler.reset()
    if case.device.type == "cuda":
        torch.cuda.empty_cache()


def run(
    shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], names: Sequence[str], device: torch.device
) -> Iterator[Row]:
    """All rows of a run: every contender at zero share 0, ours at the other shares where the shape is large."""
    spent: dict[str, float] = {}
    contenders = [CONTENDERS[name] for name in names if device.type == "cuda" or CONTENDERS[name].cpu]
    if hopper.missing(device):
        contenders = [contender for contender in contenders if contender.hit_rate is None]
    for shape, dtype in itertools.product(shapes, dtypes):
        case = make_case(shape, dtype, 0.0, device)
        yield describe("copy", case) | bench_copy(case)
        for contender in contenders:
            if shape.large or contender.hit_rate is None:  # small ones take the Triton path anyway
                yield from attempt(contender, case, spent)
        del case
        for zero_share in ZERO_SHARES[1:] if shape.large or device.type == "cpu" else ():
            case = make_case(shape, dtype, zero_share, device)
            for contender in contenders:
                if contender.ours and contender.hit_rate in (None, 1.0):
                    yield from attempt(contender, case, spent)
            del case


def show(row: Row) -> str:
    where = f"{label(row):32} zero {row['zero_share']:.2f}  {row['contender']:13} {row['mode']:8}"
    if row["ms"] is None:
        return f"{where} -- {row['reason']}"
    more = "" if row["peak_mib"] is None else f"  peak {row['peak_mib']:8.1f} MiB  {row['launches']} launches"
    return f"{where} {row['ms']:9.3f} ms [{row['ms_p20']:.3f}, {row['ms_p80']:.3f}]  {row['tbps']:8.4f} TB/s{more}"


def main() -> int:
    options = arguments(__doc__, FILE, CONTENDERS)
    return run_all(options, FILE, QUICK_SHAPES if options.quick else SHAPES, run, show, targets)


if __name__ == "__main__":
    sys.exit(main())
