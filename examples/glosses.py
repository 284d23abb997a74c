"""WordNet glosses as tensors: given a short definition of a noun, name its class, one of 26."""

from collections.abc import Callable
from typing import Any

import torch
from gloss_prompts import gloss_records
from smollm2 import Prefix, autocast
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

BATCH = 64  # for passes without a gradient
Encode = Callable[[str], list[int]]
Item = dict[str, Tensor]


def class_tokens(encode: Encode) -> Tensor:
    """(26,) int64: the first token of each class name."""
    names = {record["completion"] for record in gloss_records("train", 10**6)}
    first = {encode(name)[0] for name in names}
    if len(first) != len(names):
        raise ValueError("two class names begin with the same token, accuracy by first token would be wrong")
    return torch.tensor(sorted(first))


def load_glosses(split: str, encode: Encode, limit: int) -> list[Item]:
    """The first `limit` glosses of the split "train" or "test", for C tokens of a class name:

    tokens (S,), positions (C,) where the logits predict the name's tokens, and those as labels (C,).
    """
    items = []
    for record in gloss_records(split, limit):
        prompt, name = encode(record["prompt"]), encode(record["completion"])
        positions = torch.arange(len(name)) + len(prompt) - 1
        items.append({"tokens": torch.tensor(prompt + name), "positions": positions, "labels": torch.tensor(name)})
    return items


@torch.no_grad()
def frozen_states(prefix: Prefix, items: list[Item], device: torch.device) -> list[Item]:
    """The items with what the frozen layers make of their tokens, hidden (S, H): computed once, it never changes."""
    states: list[Tensor] = []
    for start in range(0, len(items), BATCH):
        tokens = [item["tokens"] for item in items[start : start + BATCH]]
        with autocast(device):
            hidden = prefix(pad_sequence(tokens, batch_first=True).to(device)).cpu()
        states += [row[: len(t)].clone() for row, t in zip(hidden, tokens, strict=True)]
    kept = ("positions", "labels")
    return [
        {"hidden": hidden, **{name: item[name] for name in kept}} for item, hidden in zip(items, states, strict=True)
    ]


def collate(items: list[Item]) -> dict[str, Any]:
    """hidden (B, S, H), positions (B, C), labels (B, C) with -100 where a name is shorter than the longest."""
    fill = {"hidden": 0.0, "positions": 0, "labels": -100}
    return {
        name: pad_sequence([item[name] for item in items], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }
