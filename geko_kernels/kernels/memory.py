"""Room for the outputs and the scratch of a sample update, and how parts share a piece of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from geko_kernels.kernels.sample_update.prepare import scratch_words

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # the returns of `reference.sample_update_`


def room_apart(labels: Tensor, packed: bool, reduction: int) -> tuple[Outputs, Tensor]:
    """(outputs, scratch), each in memory of its own, as an op has to return them."""
    count, device = labels.numel(), labels.device
    entries = count if packed else labels.shape[0]
    outputs = (
        torch.empty(() if reduction else (entries,), dtype=torch.float32, device=device),
        torch.empty((), dtype=torch.float32, device=device),
        torch.empty(count, dtype=torch.float32, device=device),
        torch.empty(count if packed else 0, dtype=torch.int32, device=device),
        torch.empty((6, entries), dtype=torch.float32, device=device),
        torch.empty((2, entries), dtype=torch.int64, device=device),
        torch.empty((2, entries), dtype=torch.uint8, device=device),
    )
    return outputs, torch.empty(scratch_words(labels, packed), dtype=torch.int32, device=device)


def room_in_two(labels: Tensor, packed: bool, reduction: int) -> tuple[Outputs, Tensor]:
    """`room_apart` in two pieces of memory and one for the loss: on an H200's host each piece took 10 us.

    As in a `Plan`: what a backward keeps and what `SampleStats` keeps are apart, so neither holds the other's memory.
    """
    count, device = labels.numel(), labels.device
    entries = count if packed else labels.shape[0]
    coeff, token_visit, words = starts(1, count, count if packed else 0)
    kept = torch.empty(words, dtype=torch.float32, device=device)
    floats, flags, scratch, words = starts(4 * entries, 6 * entries, -(-entries // 2), scratch_words(labels, packed))
    visits = torch.empty(words, dtype=torch.float32, device=device)
    outputs = (
        torch.empty(() if reduction else (entries,), dtype=torch.float32, device=device),
        kept[0],
        kept[coeff : coeff + count],
        kept[token_visit:][: count if packed else 0].view(torch.int32),
        visits[floats : floats + 6 * entries].view(6, entries),
        visits[: 4 * entries].view(torch.int64).view(2, entries),
        visits[flags:scratch].view(torch.uint8)[: 2 * entries].view(2, entries),
    )
    return outputs, visits[scratch:].view(torch.int32)


def starts(*words: int) -> list[int]:
    """Where each part but the first starts, and where the last ends: in words of 4 bytes, at multiples of 16 bytes."""
    ends, end = [], 0
    for size in words:
        end += (size + 3) // 4 * 4
        ends.append(end)
    return ends
