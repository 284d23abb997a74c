"""WordNet definitions of nouns, the class of each, and what SmolLM2's first layers make of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from gloss_prompts import gloss_records
from smollm2 import Prefix, autocast
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

CLASSES = "animal artifact body communication food location person plant substance time".split()
BATCH = 64


class Glosses(NamedTuple):
    texts: list[str]
    labels: Tensor  # (N,) int64, positions in CLASSES


def load_glosses(split: str, limit: int) -> Glosses:
    """The first `limit` definitions of the split "train" or "test"."""
    records = gloss_records(split, limit)
    texts = [record["prompt"].removesuffix("\nCategory:") for record in records]
    return Glosses(texts, torch.tensor([CLASSES.index(record["completion"].strip()) for record in records]))


def wrong_labels(labels: Tensor, share: float, seed: int) -> Tensor:
    """`labels` (N,), of which `share`, drawn at random, is replaced by another class, each as likely."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    other = torch.randint(1, len(CLASSES), (len(chosen),), generator=generator)
    given = labels.clone()
    given[chosen] = (labels[chosen] + other) % len(CLASSES)
    return given


@torch.no_grad()
def frozen_features(
    prefix: Prefix, encode: Callable[[str], list[int]], texts: list[str], done: Callable[[int], None] = lambda _: None
) -> Tensor:
    """(N, H) float32 on the CPU: the mean over a text's tokens of what the frozen layers put out.

    `done(n)` is called after each batch with the number of its texts.
    """
    tokens = [torch.tensor(encode(text)) for text in texts]
    shortest_first = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
    device = prefix.embed.weight.device
    features = torch.empty(len(texts), prefix.embed.embedding_dim)
    for start in range(0, len(texts), BATCH):
        rows = shortest_first[start : start + BATCH]
        batch = pad_sequence([tokens[i] for i in rows], batch_first=True).to(device)
        lengths = torch.tensor([len(tokens[i]) for i in rows], device=device).unsqueeze(1)
        real = torch.arange(batch.shape[1], device=device) < lengths  # (B, S)
        with autocast(device):
            hidden = prefix(batch)
        features[rows] = ((hidden.float() * real.unsqueeze(2)).sum(1) / lengths).cpu()
        done(len(rows))
    return features
