"""The model and its steps: one CUDA graph a batch shape on a GPU, plain calls on a CPU. The same for every arm."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import geko_kernels as gk
from benchmarks.end_to_end.data import Encode, Split
from geko_kernels.state import rules_tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from smollm2 import Tail, load_smollm2, tiny_llama

_ADDER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_CLIP = 1.0


class Network(nn.Module):
    """tokens (B, S), positions (B, C) -> logits (B, C, V) at those positions; right padding needs no mask."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.embed = model.model.embed_tokens
        self.tail = Tail(model, 0)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.tail(self.embed(tokens), positions)["logits"]


def load_network(kind: str) -> tuple[Network, Encode | None]:
    """In float32 on the CPU, and the tokenizer: kind "smollm2", "adder" or a small one; "tiny ..." in tests."""
    if kind in ("small facts", "small instructions", "tiny instructions"):
        from benchmarks.end_to_end.small import small_network

        return small_network(kind)
    if kind.endswith("adder"):
        return Network(new_adder(0, tiny=kind.startswith("tiny"))), None
    model, encode_one = load_smollm2() if kind == "smollm2" else tiny_llama()
    return Network(model), lambda texts: [encode_one(text) for text in texts]


def new_adder(seed: int, tiny: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=16, **(_TINY if tiny else _ADDER), **heads, tie_word_embeddings=True)
    )


class Batch(NamedTuple):
    """Where a step reads its inputs and leaves what it saw of each visit; the memory stays in place."""

    tokens: Tensor  # (B, size) int64
    positions: Tensor  # (B, C) int64
    labels: Tensor  # (B, C) int64
    ids: Tensor  # (B,) int64, -1 for padding
    factor: Tensor  # (B,) float32: weight on top of the bucket's
    loss: Tensor  # (B,) float32
    confidence: Tensor  # (B,) float32
    hit: Tensor  # (B,) bool: every label predicted right


class Engine:
    """Trains and scores batches of one shape each; `reset` begins another run on the same memory and graphs."""

    def __init__(
        self,
        network: Network,
        train: Split,
        batch: int,
        sizes: tuple[int, ...],
        device: torch.device,
        graphs: bool,
        per_token: bool = False,
    ) -> None:
        self.network, self.train, self.size, self.device = network.to(device), train.to(device), batch, device
        self.sizes, self.graphs, self.on_gpu, self.per_token = sizes, graphs, device.type == "cuda", per_token
        if graphs:
            torch._dynamo.config.recompile_limit = 64
            for layer in network.tail.layers:
                layer.compile(dynamic=False)
        self.begin_weights = {name: value.clone() for name, value in network.state_dict().items()}
        self.state = gk.SampleState(len(train), gk.GEKOConfig.uniform(), device)
        self.lr = torch.zeros((), device=device)
        fast = {"fused": True, "capturable": True} if self.on_gpu else {"foreach": False}
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.01, **fast)
        self._pool: Any = None
        self._graphs: dict[tuple[str, int], tuple[Batch, torch.cuda.CUDAGraph | None]] = {}
        start = time.perf_counter()
        for size in self.sizes:
            for kind in ("train", "look", "evaluate"):
                self._graphs[kind, size] = self._capture(kind, size)
                if len(short := (self.train.lengths <= size).nonzero()[:batch, 0]):
                    self._run(kind, self.train, short, None)
        self.wait()  # first batches may be slower: not at the first run's expense
        self.prepare_seconds = time.perf_counter() - start

    def reset(self, config: gk.GEKOConfig, weights: dict[str, Tensor] | None = None) -> None:
        """Back to the first weights (or to these), an empty optimizer and an empty learning state under `config`."""
        self.network.load_state_dict(weights or self.begin_weights)
        for values in self.optimizer.state.values():
            for value in values.values():
                value.zero_()
        self.state.load_state_dict(gk.SampleState(len(self.train), config, self.device).state_dict())
        self.state.config = config
        self.state.rules.copy_(rules_tensor(config, self.device))

    def train_batch(self, ids: Tensor, factor: Tensor | None, lr: float) -> Batch:
        """One optimizer step on the samples `ids` (n <= B,), a tensor on the CPU."""
        self.lr.fill_(lr)
        return self._run("train", self.train, ids, factor)

    def look(self, ids: Tensor) -> Tensor:
        """The losses (n,) of the samples `ids`: the learning state sees them, the model learns nothing."""
        return self._forward("look", self.train, ids)[0]

    def evaluate(self, split: Split, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Plain loss and exact match of the samples `ids` of any split, (n,) each on the CPU, in the order of `ids`."""
        return self._forward("evaluate", split, ids)

    def _forward(self, kind: str, split: Split, ids: Tensor) -> tuple[Tensor, Tensor]:
        order, found = split.lengths[ids].argsort(), []
        for part in order.split(self.size):
            batch = self._run(kind, split, ids[part], None)
            found.append(torch.stack([batch.loss, batch.hit.float()])[:, : len(part)])
        values = torch.empty(2, len(ids))
        values[:, order] = torch.cat(found, 1).cpu() if found else values
        return values[0], values[1] > 0

    def wait(self) -> float:
        """The time once the device is idle, in seconds."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _run(self, kind: str, split: Split, ids: Tensor, factor: Tensor | None) -> Batch:
        longest = int(split.lengths[ids].max())
        size = next(size for size in self.sizes if size >= longest)
        batch, graph = self._graphs[kind, size]
        count = len(ids)
        rows = ids.to(self.device, non_blocking=True)
        batch.tokens[:count] = split.tokens[rows, :size]
        width = batch.labels.shape[1]
        batch.positions[:count] = split.positions[rows, :width]
        batch.labels[:count] = split.labels[rows, :width]
        batch.ids[:count] = rows
        if count < self.size:
            batch.ids[count:], batch.labels[count:] = -1, -100
        if factor is None:
            batch.factor.fill_(1.0)
        else:
            batch.factor[:count] = factor.to(self.device, non_blocking=True)
        if graph is None:
            self._step(kind, batch)
        else:
            graph.replay()
        return batch

    def _step(self, kind: str, batch: Batch) -> None:
        precision = torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu, cache_enabled=False)
        with torch.set_grad_enabled(kind == "train"), precision:
            logits = self.network(batch.tokens, batch.positions)  # (B, C, V)
        state = None if kind == "evaluate" else self.state
        losses, stats = gk.weighted_loss(logits, batch.labels, batch.ids, state, reduction="none", return_stats=True)
        if kind == "train":
            counts = stats.num_tokens if self.per_token else batch.ids >= 0
            loss = (losses * batch.factor * counts).sum() / counts.sum()
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), _CLIP, foreach=self.on_gpu)
            self.optimizer.step()
        batch.loss.copy_(stats.loss), batch.confidence.copy_(stats.confidence)
        batch.hit.copy_(stats.accuracy == 1)

    def _capture(self, kind: str, size: int) -> tuple[Batch, torch.cuda.CUDAGraph | None]:
        width = min(self.train.labels.shape[1], size)
        rows = torch.arange(self.size, device=self.device) % len(self.train)
        batch = Batch(
            self.train.tokens[rows, :size].long(),
            self.train.positions[rows, :width].long().clamp(max=size - 1),
            self.train.labels[rows, :width].long(),
            rows,
            *(torch.ones(self.size, device=self.device) for _ in range(3)),
            torch.zeros(self.size, dtype=torch.bool, device=self.device),
        )
        if not self.graphs:
            return batch, None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step(kind, batch)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._step(kind, batch)
        self._pool = self._pool or graph.pool()  # graphs run one after the other, and leave nothing but the batch
        return batch, graph
