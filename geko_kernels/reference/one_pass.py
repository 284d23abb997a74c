"""The predicted gradient in plain PyTorch: what the kernels of `kernels.one_pass` are tested against.

Shapes as in `reference`. The factor of each token's gradient, `coeff * scale * upstream`, is predicted before the
logits are read, so that they are read only once; afterwards, rows with a wrong prediction are corrected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geko_kernels.reference.layout import layout
from geko_kernels.reference.ops import Reduction


def predict(
    labels: Tensor,
    sample_ids: Tensor | None,
    weights: Tensor,
    bucket: Tensor | None,
    quarantined: Tensor | None,
    vocab: int,
    reduction: int,
    ignore_index: int,
    shift: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `sample_update_` will compute if each sample stays in its bucket.

    Returns: target (T,) int32, -1 where a token predicts nothing; coeff (T,); count (): what divides the loss.
    """
    num_samples = -1 if bucket is None else bucket.shape[0]
    where = layout(labels, sample_ids, num_samples, vocab, ignore_index, shift)
    entries = where.ids.shape[0]
    slot = torch.where(where.visit < 0, entries, where.visit)
    count = torch.zeros(entries + 1, dtype=torch.int64, device=labels.device)
    count = count.index_add_(0, slot, where.valid.long())[:-1]
    weight = torch.ones(entries, dtype=torch.float32, device=labels.device)
    if bucket is not None and quarantined is not None:
        row = where.ids.clamp(0, num_samples - 1)
        shut_out = quarantined.view(torch.uint8)[row] != 0
        weight = torch.where(shut_out, 0, weights[bucket[row].long().clamp(max=3)])
    by_token = reduction == Reduction.TOKEN_MEAN
    coeff = weight if by_token else weight / count.clamp(min=1)
    coeff = torch.where(where.valid, coeff[where.visit], 0)
    target = torch.where(where.scored, where.target, -1).int()
    return target, coeff, count.sum() if by_token else (count > 0).sum()


def predicted_rows_(
    logits: Tensor, grad: Tensor, target: Tensor, coeff: Tensor, divisor: Tensor | None, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """Token statistics, and the gradient of those rows whose predicted factor is not 0; other rows stay as they are.

    Args: logits, grad (B, S, V), may be one tensor; divisor () of the loss, None for a sum; upstream ().
    Returns: statistics (5, T), see `reference.token_stats`; factor (T,): `coeff / divisor * upstream`.
    """
    vocab = logits.shape[-1]
    scored = target >= 0
    z = logits.reshape(-1, vocab)[scored].float()
    y = target[scored, None].long()
    top = z.amax(-1)
    total = (z - top[:, None]).exp().sum(-1)
    at_target = z.gather(1, y)[:, 0]
    loss = total.log() - (at_target - top)
    hit = (at_target == top) & ~loss.isnan()
    statistics = torch.zeros(5, target.numel(), dtype=torch.float32, device=logits.device)
    statistics[:, scored] = torch.stack([loss, top, total.log(), 1 / total, hit.float()])
    scale = 1 if divisor is None else torch.where(divisor > 0, 1 / divisor.float(), 0)
    factor = torch.where(scored & (coeff != 0), coeff * scale * upstream, 0)
    written = factor != 0
    kept = written[scored]
    softmax = (z[kept] - top[kept, None]).exp() / total[kept, None]
    softmax.scatter_add_(1, y[kept], -torch.ones_like(softmax[:, :1]))
    length = grad.shape[1]
    at = written.nonzero()[:, 0]
    grad[at // length, at % length] = (softmax * factor[at, None]).to(grad.dtype)
    return statistics, factor


def correct_rows_(
    grad: Tensor,
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    coeff: Tensor,
    scale: Tensor,
    factor: Tensor,
    upstream: Tensor,
    counts: Tensor,
) -> None:
    """Make `grad` the gradient, `g * (softmax(logits) - onehot(target))` with `g = coeff * scale * grad_output`.

    Rows with `factor == g`, not 0, are right already. Where grad is the logits themselves, a row that was written is
    multiplied by `g / factor`. Then upstream becomes grad_output () unless that is 0 or not finite, and counts (2,)
    grow by the rows that were right (and are not zero) and by those that were not.
    """
    true = torch.where(coeff != 0, coeff * scale * grad_output, 0)
    inplace = grad.data_ptr() == logits.data_ptr()
    length, vocab = grad.shape[1:]
    for t in ((factor != true) | (true == 0)).nonzero()[:, 0].tolist():
        row, source = grad[t // length, t % length], logits[t // length, t % length]
        if true[t] == 0:
            row.zero_()
        elif inplace and factor[t] != 0:
            row.copy_(row.float() * (true[t] / factor[t]))
        else:
            softmax = (source.float() - statistics[1, t] - statistics[2, t]).exp()
            softmax[target[t]] -= 1
            row.copy_(softmax * true[t])
    counts += torch.stack([((factor == true) & (true != 0)).sum(), (factor != true).sum()])
    if grad_output != 0 and grad_output.isfinite():
        upstream.copy_(grad_output)
