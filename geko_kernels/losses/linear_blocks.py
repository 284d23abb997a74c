"""The head's gradients by blocks of the vocabulary, from logits that are computed twice: for small budgets.

Once every row is scored, all weights are known. Then the logits of all kept rows are computed again, some columns at a
time, and turned into gradients. Each block of dW is one product, so no float32 sum of dW is needed; dX is summed in
float32. That costs a fourth GEMM of the kept rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geko_kernels import ops
from geko_kernels.losses.linear_gradients import HIDDEN_BYTES, HeadGradients, multiply_
from geko_kernels.losses.linear_head import EDGE, Head, LabelBatch


def add_blocks(
    head: Head,
    batch: LabelBatch,
    gradients: HeadGradients,
    statistics: Tensor,
    positions: Tensor,
    coeff: Tensor,
    columns: int,
) -> None:
    """Make `gradients` those of the tokens `positions` (n,), `columns` of the vocabulary at a time.

    Args: statistics (5, T) and coeff (T,): of all tokens; positions: in order if they are all tokens.
    """
    count = len(positions)
    if not count:
        return
    hidden = head.hidden if count == len(head.hidden) else head.hidden.index_select(0, positions)
    scaled = None if gradients.weight_grad is None else gradients.scale(positions, coeff, count)
    by_row = coeff.index_select(0, positions)
    total: Tensor | None = None  # of dX, unscaled
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    memory = hidden.new_empty(count * (min(columns, head.vocab) + 2 * EDGE))
    for start in range(0, head.vocab, columns):
        width = min(columns, head.vocab - start)
        stop, stride = start + width, -(-width // EDGE) * EDGE + EDGE
        tile = memory[: count * stride].view(count, stride)
        block, weight = tile[:, :width], head.weight[start:stop]
        _logits(hidden, weight, None if head.bias is None else head.bias[start:stop], block)
        labels = (batch.labels - start).clamp_(-1, width).remainder_(stride)  # outside of the block: beyond it
        where = (positions, None, None, labels, statistics, 0, count, count)
        ops.direct.gradient_rows_(tile, *where, stride, batch.shift, batch.softcap)
        tile[:, width:] = 0  # a GEMM on a CPU may read it
        if gradients.weight_grad is not None and scaled is not None:
            gradients.weight_grad.write(block, scaled, start)
        if gradients.bias_grad is not None:
            gradients.bias_grad.add(tile, by_row, width, start)
        if gradients.hidden_needed:
            first = total is None
            total = hidden.new_empty(hidden.shape, dtype=wide) if total is None else total
            multiply_(total, block, weight, add=not first)
    del memory, tile, block, scaled, hidden
    if total is not None:
        gradients.write_hidden(total, positions, coeff)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`F.linear(hidden, weight, bias)` to `out`, rounded once as there; the rows of `out` may lie apart.

    On a GPU, `addmm` to such rows rounds the product before the bias is added: then the gradients of bfloat16 were off
    by twice as much.
    """
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    elif not hidden.is_cuda or hidden.element_size() > 2:
        torch.addmm(bias, hidden, weight.t(), out=out)
    else:
        step = max(1, HIDDEN_BYTES // (4 * out.shape[1]))
        for start in range(0, len(out), step):
            rows = slice(start, start + step)
            out[rows] = torch.mm(hidden[rows], weight.t(), out_dtype=torch.float32).add_(bias)
