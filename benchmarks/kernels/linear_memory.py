"""What `weighted_linear_loss` should take by its buffers: MiB at the peak, and milliseconds by GEMMs and traffic.

    python -m benchmarks.kernels.linear_memory

prints a line for each shape and budget; nothing is measured. `docs/kernels.md` has the model in words.
"""

from __future__ import annotations

import torch

from benchmarks.kernels.linear_cases import Shape
from geko_kernels.losses.linear_gradients import HIDDEN_BYTES
from geko_kernels.losses.linear_head import Budget, Head

SHAPES = (Shape(8192, 4096, 32000), Shape(8192, 2048, 151936), Shape(16384, 576, 49152))
BUDGETS = (64, 96, 128, 256, 512, 1024, None)
_FLOPS, _BYTES = 7e11, 4e9  # a millisecond, of an H200
_WIDE = 4  # bytes of an element of a float32 sum
_TOKEN = 80  # bytes a token: lists of rows, statistics, coefficients
_WAIT = 0.05  # ms a fill: the host learns how many rows are kept


def plan_of(
    shape: Shape, chunk_mib: float | None, itemsize: int, scored: int, kept_share: float = 1.0
) -> tuple[int, int]:
    """(rows, columns) that a call holds on a GPU; columns are 0 where it holds rows."""
    like = torch.empty(0, dtype={2: torch.bfloat16, 4: torch.float32}[itemsize], device="meta")
    vocab = shape.vocab if shape.vocab % 8 == 0 else shape.aligned_vocab
    head = Head(like.new_empty(shape.tokens, shape.hidden), like.new_empty(vocab, shape.hidden), None, shape.vocab)
    budget = Budget(head, chunk_mib, itemsize == 2, True, True)
    if budget.by_blocks(scored):
        return budget.score_rows(scored), min(budget.columns(round(kept_share * scored)), shape.vocab)
    return budget.rows(scored), 0


def predicted_mib(
    shape: Shape, chunk_mib: float | None, itemsize: int = 2, scored: int | None = None, kept_share: float = 1.0
) -> float:
    """MiB at the peak of forward and backward beyond inputs, of which `scored` tokens have a label (default: all)."""
    scored = shape.tokens if scored is None else scored
    rows, columns = plan_of(shape, chunk_mib, itemsize, scored, kept_share)
    vocab = shape.vocab if shape.vocab % 8 == 0 else shape.aligned_vocab
    width = shape.hidden * itemsize
    dx, dw, padded = shape.tokens * width, vocab * width, 0 if vocab == shape.vocab else vocab * width
    kept = round(kept_share * scored)
    if columns:
        operands = kept * width * (1 if kept == shape.tokens else 2)  # a copy of the kept rows, unless they are all
        total = kept * shape.hidden * _WIDE
        tile = kept * (columns + 16) * itemsize
        peak = max(rows * vocab * itemsize, dw + total + max(operands + tile, dx))
    else:
        fills = max(1, -(-scored // rows))
        flushed = min(kept, -(-scored // fills))
        sums = vocab * shape.hidden * (_WIDE - itemsize) if fills > 1 else 0
        inside = fills == 1 and 2 * vocab >= 4 * shape.hidden * _WIDE // itemsize  # the product of dX in the buffer
        piece = 0 if inside else min(flushed * shape.hidden * _WIDE, HIDDEN_BYTES)
        for_dw = flushed * width + (dx if fills > 1 else 0)
        peak = rows * vocab * itemsize + dw + sums + max(for_dw, dx + piece)
    return (peak + padded + shape.tokens * _TOKEN) / 2**20


def expected_ms(shape: Shape, chunk_mib: float | None, itemsize: int = 2) -> float:
    """Milliseconds at keep share 1 without masked tokens, if GEMMs and traffic reach 700 TFLOP/s and 4 TB/s."""
    tokens, hidden, vocab = shape.tokens, shape.hidden, shape.vocab
    rows, columns = plan_of(shape, chunk_mib, itemsize, tokens)
    logits, weight = tokens * vocab * itemsize, vocab * hidden
    gemm = 2.0 * tokens * weight / _FLOPS
    if columns:
        blocks = -(-vocab // columns)
        sums = blocks * 2 * tokens * hidden * _WIDE
        return 4 * gemm + (logits + 2 * logits + sums) / _BYTES + 5 * 0.005 * blocks
    fills = -(-tokens // rows)
    sums = (fills - 1) * 2 * weight * _WIDE + (weight * (_WIDE + itemsize) if fills > 1 else 0)
    return 3 * gemm + (3 * logits + sums) / _BYTES + _WAIT * fills


def main() -> None:
    for shape in SHAPES:
        for budget in BUDGETS:
            rows, columns = plan_of(shape, budget, 2, shape.tokens)
            held = f"{columns} columns" if columns else f"{rows} rows"
            print(
                f"{shape.tokens} x {shape.hidden} x {shape.vocab} budget {budget or 'default':>7}: {held:>13}"
                f" {predicted_mib(shape, budget):6.0f} MiB {expected_ms(shape, budget):6.1f} ms expected"
            )


if __name__ == "__main__":
    main()
