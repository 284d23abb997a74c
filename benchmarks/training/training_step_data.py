"""The samples and batches of training_step.py: random, the same for all contenders."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import DataCollatorWithFlattening

from benchmarks.training.models import MODELS, new_model

TOKENS = {"135m": 32768, "1b": 8192, "8b-lora": 4096, "tiny": 64, "tiny-lora": 64}  # a step's, where none are given
WITHOUT_CUDNN = "sdpa-without-cudnn"  # of PyTorch's kernels for SDPA all but cuDNN's
JOINED = 8192  # at most, of samples in one row under SDPA, whose mask is (tokens, tokens)
PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}  # dense bf16 of the SXM cards, by their data sheets


class Point(NamedTuple):
    model: str
    length: int
    form: str  # "padded", "padding-free", "packed": rows of length / 4 to length; "full": rows of the same length
    compiled: bool
    checkpointing: bool
    attention: str = "sdpa"

    @property
    def joined(self) -> bool:
        return self.form in ("padding-free", "packed")


def rows_of(point: Point, vocab: int, count: int) -> list[dict[str, list[int]]]:
    """Random samples; a quarter of each is a prompt without labels, so that all contenders drop the same tokens."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        shortest = point.length if point.form == "full" else max(point.length // 4, 4)
        size = int(torch.randint(shortest, point.length + 1, (), generator=draw))
        tokens = torch.randint(3, vocab, (size,), generator=draw).tolist()
        rows.append({"input_ids": tokens, "labels": [-100] * (size // 4) + tokens[size // 4 :]})
    return rows


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Padded on the right to the longest row."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def joined_packs(packs: list[list[dict[str, list[int]]]]) -> dict[str, torch.Tensor]:
    """The samples of the packs in one row."""
    return DataCollatorWithFlattening()([row for pack in packs for row in pack])


def packs_of(rows: list[dict[str, list[int]]], tokens: int) -> list[list[dict[str, list[int]]]]:
    """The rows in their order, up to `tokens` tokens a pack: the batches of GEKOConfig(batch_tokens=tokens)."""
    packs: list[list[dict[str, list[int]]]] = [[]]
    filled = 0
    for row in rows:
        if filled + len(row["input_ids"]) > tokens:
            packs.append([])
            filled = 0
        packs[-1].append(row)
        filled += len(row["input_ids"])
    return packs


def model_of(point: Point, device: torch.device) -> Any:
    torch.backends.cuda.enable_cudnn_sdp(point.attention != WITHOUT_CUDNN)
    return new_model(point.model, device, max(point.length, 2048), point.attention.removesuffix("-without-cudnn"))


def collator_of(point: Point) -> Any:
    return DataCollatorWithFlattening() if point.joined else collate


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def flops_per_token(point: Point, weights: int, trained: int, span: float) -> float:
    """PaLM's count: 6 a weight, 4 where it is frozen, and 12 * layers * hidden * `span` for attention.

    `span` is the length of the sample that a token is in, on average; that attention is causal is not deducted.
    """
    sizes = MODELS[point.model]
    return 4 * weights + 2 * trained + 12 * sizes["num_hidden_layers"] * sizes["hidden_size"] * span
