"""WordNet glosses as tensors: given a short definition of a noun, name its class, one of 26."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from gloss_prompts import gloss_records
from smollm2 import Prefix, Tail, autocast
from torch import Tensor

BATCH = 64  # for passes without a gradient


class Glosses(NamedTuple):
    """One split, padded on the right; labels only on the class name."""

    tokens: Tensor  # (N, S) int64
    lengths: Tensor  # (N,) int64, on the CPU
    positions: Tensor  # (N, C) int64: where the logits predict the class name's tokens
    labels: Tensor  # (N, C) int64: those tokens, -100 where a name is shorter than the longest
    classes: Tensor  # (26,) int64: first token of each class name, all different

    def __len__(self) -> int:
        return len(self.tokens)


class Batch(NamedTuple):
    """Some samples of a split, cut to the longest of them; H is the model's width."""

    ids: Tensor  # (B,) int64: row numbers in the split
    hidden: Tensor  # (B, S, H)
    positions: Tensor  # (B, C)
    labels: Tensor  # (B, C)


def load_glosses(split: str, encode: Callable[[str], list[int]], device: torch.device, limit: int) -> Glosses:
    """The first `limit` glosses of the split "train" or "test"."""
    names = {record["completion"] for record in gloss_records("train", 10**6)}
    first_tokens = sorted({encode(name)[0] for name in names})
    if len(first_tokens) != len(names):
        raise ValueError("two class names begin with the same token, accuracy by first token would be wrong")
    records = gloss_records(split, limit)
    prompts = [encode(record["prompt"]) for record in records]
    answers = [encode(record["completion"]) for record in records]
    lengths = torch.tensor([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)])
    tokens = torch.zeros(len(records), int(lengths.max()), dtype=torch.long)
    positions = torch.zeros(len(records), max(map(len, answers)), dtype=torch.long)
    labels = torch.full_like(positions, -100)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens[i, : lengths[i]] = torch.tensor(prompt + answer)
        positions[i, : len(answer)] = torch.arange(len(answer)) + len(prompt) - 1
        labels[i, : len(answer)] = torch.tensor(answer)
    classes = torch.tensor(first_tokens)
    return Glosses(tokens.to(device), lengths, positions.to(device), labels.to(device), classes.to(device))


@torch.no_grad()
def frozen_states(prefix: Prefix, data: Glosses) -> Tensor:
    """What the frozen layers make of every sample, (N, S, H): computed once, since it never changes."""
    with autocast(data.tokens.device):
        return torch.cat([prefix(tokens) for tokens in data.tokens.split(BATCH)])


def batch(data: Glosses, hidden: Tensor, ids: Tensor) -> Batch:
    """The samples `ids`, a tensor on the CPU."""
    longest = int(data.lengths[ids].max())
    ids = ids.to(hidden.device)
    labels = data.labels[ids]
    width = int((labels != -100).sum(1).max())
    return Batch(ids, hidden[ids, :longest], data.positions[ids, :width], labels[:, :width])


def standard_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Plain cross-entropy, mean over the label tokens of each sample: (B, C, V), (B, C) -> (B,)."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return losses.sum(1) / (labels != -100).sum(1)


@torch.no_grad()
def evaluate(tail: Tail, data: Glosses, hidden: Tensor) -> tuple[float, float]:
    """Mean loss, and accuracy: how often the right class has the largest logit of the 26 at the first token."""
    loss = right = 0.0
    for ids in torch.arange(len(data)).split(BATCH):
        samples = batch(data, hidden, ids)
        with autocast(hidden.device):
            logits = tail(samples.hidden, samples.positions)
        loss += standard_losses(logits, samples.labels).sum().item()
        guess = data.classes[logits[:, 0, data.classes].argmax(1)]
        right += (guess == samples.labels[:, 0]).sum().item()
    return loss / len(data), right / len(data)
