"""Which token belongs to which visit, in plain PyTorch: labels and sample ids, packed or not, bad values flagged."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Which token belongs to which visit, and what it predicts."""

    target: Tensor  # (T,) int64, 0 where not valid
    scored: Tensor  # (T,) bool: has a label inside the vocabulary to predict
    valid: Tensor  # (T,) bool: scored, and its visit is not left out
    visit: Tensor  # (T,) int64: entry of its visit, -1 for padding
    ids: Tensor  # (M,) int64: sample id of the visit, -1 unused
    left_out: Tensor  # (M,) bool: the visit holds a bad value
    error: Tensor  # () int64: smallest error key, or int64 max


def error_key(position: Tensor, is_label: int, value: Tensor) -> Tensor:
    """position << 33 | is_label << 32 | the value's low 32 bits (saturated): the minimum is the first offender."""
    low = value.clamp(-(2**31), 2**31 - 1) & 0xFFFFFFFF
    return (position.clamp(max=2**30 - 1) << 33) | (is_label << 32) | low


def layout(
    labels: Tensor, sample_ids: Tensor | None, num_samples: int, vocab: int, ignore_index: int, shift: bool
) -> Layout:
    """Split (B, S) labels into visits; `num_samples` < 0 means no table, so any id but -1 counts."""
    batch, length = labels.shape
    device = labels.device
    each_row = torch.arange(batch, device=device)
    ids = each_row if sample_ids is None else sample_ids
    packed = ids.dim() == 2
    token_ids = ids if packed else ids[:, None].expand(batch, length)  # (B, S)
    target = labels
    if shift:
        target = torch.full_like(labels, ignore_index)
        target[:, :-1] = labels[:, 1:]
        follows = token_ids[:, :-1] == token_ids[:, 1:]
        target[:, :-1] = torch.where(follows, target[:, :-1], ignore_index)
    if packed:
        start = torch.ones_like(token_ids, dtype=torch.bool)
        start[:, 1:] = token_ids[:, 1:] != token_ids[:, :-1]
        start &= token_ids != -1
        visit = (start.flatten().cumsum(0) - 1).view(batch, length)
        entries = batch * length
        visit_ids = torch.full((entries + 1,), -1, dtype=torch.int64, device=device)
        visit_ids[torch.where(start, visit, entries).flatten()] = token_ids.flatten()
        visit_ids = visit_ids[:-1]
    else:
        visit = each_row[:, None].expand(batch, length)
        entries, visit_ids = batch, ids
    visit = torch.where(token_ids == -1, -1, visit).flatten()
    target, token_ids = target.flatten(), token_ids.flatten()
    asked = (target != ignore_index) & (visit >= 0)
    bad_label = asked & ((target < 0) | (target >= vocab))
    bad_id = (token_ids < -1) | (token_ids >= num_samples) if num_samples >= 0 else torch.zeros_like(asked)
    position = torch.arange(batch * length, device=device)
    none = torch.iinfo(torch.int64).max
    keys = torch.where(bad_label, error_key(position, 1, target), none)
    keys = torch.minimum(keys, torch.where(bad_id, error_key(position, 0, token_ids), none))
    left_out = torch.zeros(entries + 1, dtype=torch.bool, device=device)
    left_out.index_put_((torch.where(bad_label | bad_id, visit, entries),), torch.tensor(True, device=device))
    left_out[-1] = False
    scored = asked & ~bad_label
    valid = scored & ~left_out[visit]  # visit -1 reads the spare entry
    error = keys.min() if keys.numel() else torch.full((), none, device=device)
    return Layout(torch.where(scored, target, 0), scored, valid, visit, visit_ids, left_out[:-1], error)
