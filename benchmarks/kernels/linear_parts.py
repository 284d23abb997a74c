"""Where the time of `weighted_linear_loss` goes: GEMMs by rows and vocabulary, and the passes over the logits.

    python -m benchmarks.kernels.linear_parts [--quick]

prints one line a part: time and TFLOP/s of a GEMM, or TB/s of a pass. Needs a CUDA device; nothing is recorded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.timing import measure
from geko_kernels import ops
from geko_kernels.kernels.rows import score as score_rows

DEVICE = torch.device("cuda")
ROWS = (1024, 2048, 4096, 8192)
# elements and warps of a program, programs a multiprocessor, loads on their way; the last is the one in use
READS = ((8192, 16, 4, 2), (4096, 8, 6, 3), (4096, 8, 8, 2), (4096, 8, 8, 1))
FUSED = ((16384, 32, 1, 3), (8192, 16, 2, 5), (8192, 16, 2, 1), (4096, 8, 8, 1), (8192, 16, 4, 1))


def report(name: str, step: Callable[[], object], flops: float = 0.0, moved: float = 0.0) -> None:
    ms = measure(step, DEVICE).median
    speed = f"{flops / ms / 1e9:7.1f} TFLOP/s" if flops else f"{moved / ms / 1e9:7.3f} TB/s"
    print(f"{name:62} {ms:8.3f} ms {speed}", flush=True)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def gemms(columns: int, vocab: int, ld: int) -> None:
    """The GEMMs of a head at several row counts; logits and dW's operand have rows of `ld` numbers."""
    hidden, weight = random(max(ROWS), columns), random(vocab, columns)
    wide = torch.zeros(vocab, columns, device=DEVICE)
    half = vocab // 128 * 64
    for rows in ROWS:
        x, tile = hidden[:rows], random(rows, ld)[:, :vocab]
        flops, name = 2.0 * rows * columns * vocab, f"H {columns} V {vocab} ld {ld} rows {rows}"
        out, out_x = torch.empty(rows, ld, device=DEVICE, dtype=torch.bfloat16)[:, :vocab], torch.empty_like(x)
        narrow = torch.empty_like(weight)
        report(f"{name} logits", lambda x=x, out=out: torch.mm(x, weight.t(), out=out), flops)
        report(f"{name} dX", lambda tile=tile, out_x=out_x: torch.mm(tile, weight, out=out_x), flops)
        report(f"{name} dW bf16", lambda x=x, tile=tile, narrow=narrow: torch.mm(tile.t(), x, out=narrow), flops)

        def add(x: Tensor = x, tile: Tensor = tile) -> None:
            torch.addmm(wide, tile.t(), x, out_dtype=torch.float32, out=wide)

        def add_halves(x: Tensor = x, tile: Tensor = tile) -> None:
            for part in (slice(0, half), slice(half, vocab)):
                torch.addmm(wide[part], tile[:, part].t(), x, out_dtype=torch.float32, out=wide[part])

        report(f"{name} dW += fp32", add, flops)
        report(f"{name} dW += fp32 in two halves", add_halves, flops)


def passes(tokens: int, vocab: int) -> None:
    """Statistics, gradients, and both in one launch by shapes of its programs; bytes as each has to move them."""
    logits, targets = random(tokens, vocab), torch.randint(vocab, (tokens,), device=DEVICE)
    rows, stats = torch.arange(tokens, device=DEVICE), torch.zeros(5, tokens, device=DEVICE)
    size, name = logits.numel() * 2.0, f"{tokens} x {vocab}"
    other = torch.empty_like(logits)

    def score(fused: bool) -> None:
        ops.score_rows_(other, rows, targets, stats, fused, 0, 0, tokens, vocab, 0.0)

    report(f"{name} copy", lambda: other.copy_(logits), moved=2 * size)
    for score_rows.READ in READS:
        report(f"{name} score_rows_ {score_rows.READ}", lambda: score(False), moved=size)
    for score_rows.FUSED in FUSED:
        report(f"{name} score_rows_ with gradients {score_rows.FUSED}", lambda: score(True), moved=2 * size)
    for share, ready_from in ((1.0, tokens), (0.33, tokens), (0.0, tokens), (1.0, 0)):
        end = torch.tensor(int(share * tokens), dtype=torch.int32, device=DEVICE)
        where = (rows, rows, end, targets[:, None], stats, 0, tokens, ready_from, vocab, False, 0.0)
        step = f"{name} gradient_rows_ of {share}" + ("" if ready_from else ", all ready")
        report(step, lambda where=where: ops.gradient_rows_(other, *where), moved=2 * size * share)
    coeff, sources = torch.ones(tokens, device=DEVICE), rows.clone()
    keep = (coeff, rows, rows.clone(), sources, 0, 0, tokens)
    report(f"{name} kept_rows_", lambda: ops.kept_rows_(*keep), moved=tokens * 28)
    one = torch.ones((), device=DEVICE)
    report(f"{name} rescale_ by 1", lambda: ops.rescale_(other, one), moved=2 * size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    quick = parser.parse_args().quick
    for tokens, vocab in ((4096, 128256), (8192, 50304), (8192, 32000))[: 1 if quick else 3]:
        passes(tokens, vocab)
    heads = [
        (768, 50257, 50257),
        (768, 50257, 50304),
        (768, 50304, 50304),
        (4096, 128256, 128256),
        (2048, 151936, 151936),
    ]
    for columns, vocab, ld in heads[1:3] if quick else heads:
        gemms(columns, vocab, ld)


if __name__ == "__main__":
    main()
