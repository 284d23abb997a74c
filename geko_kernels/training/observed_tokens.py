"""Each sample's statistics in a forward pass, from the logits or from TRL's fused head, which computes none."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from geko_kernels.losses.logits import weighted_loss
from geko_kernels.training.data import IGNORED

QUANTITIES = ("losses", "label_probabilities", "hits", "confidences", "margins")
OF_LOGITS = QUANTITIES[3:]
_CHUNK = 1024  # tokens with logits in float32 at a time
_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative; 0.02 if the model may have rounded its loss


class ObservedVisits(NamedTuple):
    """Means over the labelled tokens of each sample in a batch; NaN without any, or if unknown."""

    ids: Tensor  # (M,) int64
    num_tokens: Tensor  # (M,) int64
    means: Tensor  # (5, M) float32, in the order of QUANTITIES


def of_logits(logits: Tensor, labels: Tensor, ids: Tensor, shift: bool) -> ObservedVisits:
    """logits (B, V) or (B, S, V); labels (B,) or (B, S); ids (B,), or (B, S) one a token."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
        ids = ids[:, 1:] if ids.dim() == 2 else ids
    if logits.dim() == 2:
        logits, rows = logits[None], labels[None]
    else:
        rows = labels
    found = []
    for row, targets in zip(logits, rows, strict=True):
        for part, target in zip(row.split(_CHUNK), targets.split(_CHUNK), strict=True):
            valid = target != IGNORED
            found.append(_of_rows(part[valid].float(), target[valid]))
    return _means(torch.cat(found, 1), labels != IGNORED, ids)


def of_fused_head(outputs: Any, ids: Tensor) -> ObservedVisits:
    """From `trl.trainer.utils.FusedCausalLMOutput`: log_probs, is_top1 and label_mask (B, S - 1), already shifted."""
    mask = outputs.label_mask
    if ids.dim() == 2 and ids[:, 1:].shape != mask.shape:
        raise ValueError(
            f"observe: the model's outputs have shape {tuple(mask.shape)}, and the batch's tokens {tuple(ids.shape)}: "
            "a model that adds tokens (prompt learning) cannot be observed on packed rows; set packing=False"
        )
    logs = outputs.log_probs.detach()[mask].float()
    unknown = torch.full_like(logs, torch.nan)
    hits = unknown if outputs.is_top1 is None else outputs.is_top1[mask].float()
    return _means(torch.stack([-logs, logs.exp(), hits, unknown, unknown]), mask, ids[:, 1:] if ids.dim() == 2 else ids)


def _of_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """(T, V) float32, (T,) -> (5, T)."""
    most, second = logits.topk(2).values.unbind(1)
    chosen = logits.gather(1, labels[:, None]).squeeze(1)
    spread = (logits - most[:, None]).exp().sum(1).log()  # -log of the largest probability
    loss = spread - (chosen - most)
    hit = chosen == most
    return torch.stack([loss, (-loss).exp(), hit.float(), (-spread).exp(), chosen - torch.where(hit, second, most)])


def _means(values: Tensor, valid: Tensor, ids: Tensor) -> ObservedVisits:
    """values (5, T) of the `valid` tokens, in their order; valid (B,) or (B, S); ids (B,) or (B, S)."""
    if ids.dim() == 1:
        visits = ids
        visit = (
            torch.arange(len(ids), device=ids.device).view(-1, *(1 for _ in valid.shape[1:])).expand_as(valid)[valid]
        )
    else:
        visits = ids[ids >= 0].unique()
        own = ids[valid]
        values, own = values[:, own >= 0], own[own >= 0]
        visit = torch.searchsorted(visits, own)
    sums = torch.zeros(len(values), len(visits), dtype=torch.float64, device=values.device)
    sums.index_add_(1, visit, values.double())
    counts = torch.bincount(visit, minlength=len(visits))
    return ObservedVisits(visits, counts, (sums / counts).float())


def find_shift(logits: Tensor, labels: Tensor, loss: Tensor, num_items: Any, processes: int = 1) -> tuple[bool, bool]:
    """(whether the trainer's loss is the cross-entropy of shifted labels, whether only one of both fits this batch)"""
    found = {}
    for shift in (False, True) if logits.dim() == 3 else (False,):
        means = [float(weighted_loss(logits, labels, reduction="token_mean", shift=shift))]
        if num_items is not None:
            total = float(weighted_loss(logits, labels, reduction="token_mean", shift=shift, num_items=num_items))
            means += [total, processes * total]
        found[shift] = min(abs(mean - float(loss)) for mean in means)
    best = min(found, key=lambda shift: found[shift])
    allowed = _CLOSE.get(logits.dtype, 0.02) * abs(float(loss)) + 1e-6
    _check_distance(found[best], allowed, loss)
    return best, sum(distance <= allowed for distance in found.values()) == 1


def check_fused_loss(outputs: Any, loss: Tensor, num_items: Any, processes: int) -> None:
    """Raise `ValueError` unless the loss is the cross-entropy from the fused head."""
    total = -float(outputs.log_probs.detach().double().sum())
    scales = [1 / max(int(outputs.label_mask.sum()), 1)]
    if num_items is not None:
        scales += [1 / int(num_items), processes / int(num_items)]
    allowed = _CLOSE.get(outputs.log_probs.dtype, 0.02) * abs(float(loss)) + 1e-6
    _check_distance(min(abs(total * scale - float(loss)) for scale in scales), allowed, loss)


def _check_distance(distance: float, allowed: float, loss: Tensor) -> None:
    if not distance <= allowed:
        raise ValueError(
            f"observe needs a loss that is the cross-entropy of the logits: the trainer's is {float(loss):.6g}, and "
            f"the nearest cross-entropy is {distance:.6g} away"
        )
