"""Low-rank adapters on a network's linear layers, trained in place of its own weights (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.end_to_end.engine import Network

_ALPHA = 32  # the adapter's output is scaled by alpha / rank


class LoRALinear(nn.Module):
    """`linear(x) + alpha / rank * (x @ down.T) @ up.T`, which begins as `linear(x)`: `up` is zero at first."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.linear, self.scale = linear, _ALPHA / rank
        self.down = nn.Parameter(torch.empty(rank, linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.down, math.sqrt(5), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.down), self.up)


def add_lora(network: Network, rank: int) -> None:
    """Adapters for every linear layer of the blocks; all else, embeddings and head included, is frozen."""
    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for module in list(network.tail.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, LoRALinear(child, rank, generator))
