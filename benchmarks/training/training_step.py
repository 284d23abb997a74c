"""Tokens a second, share of the card's bf16 peak and peak memory of a whole training step.

    python -m benchmarks.training.training_step --models 135m 1b --lengths 256 2048 --minutes 8

`transformers.Trainer` and TRL's `SFTTrainer` (its fused head; left out where trl is missing), each with Liger's kernels
too where liger-kernel is installed, beside `GEKOTrainer` and `GEKOSFTTrainer` with `GEKOConfig.recommended()`. Every
contender trains the same random tokens through its own `train()`: as many tokens a step, AdamW (fused), bf16 autocast,
SDPA, a random model. A step is the median of the last two thirds. FLOPs are 6 a parameter and token, and
12 * layers * hidden * length a token for attention; padding counts as no token. Points run in the order of their worth,
and what no time was left for is a row too. Rows go to results/training_step.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import geko_kernels as gk
from benchmarks.results import RESULTS, append, environment
from benchmarks.training.epoch_time import SMOLLM2_135M, TINY

MODELS: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "135m": SMOLLM2_135M,
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
}
PEAKS = {"H100": 989e12, "H200": 989e12}  # dense bf16, NVIDIA's data sheets
CONTENDERS = ("trainer", "geko", "sft", "geko-sft", "trainer-liger", "sft-liger")
_STEPS = 24


class Point(NamedTuple):
    model: str
    length: int
    form: str  # "padded": rows of length / 4 to length; "full": rows of the same length; "packed", by the SFT trainers
    compiled: bool
    checkpointing: bool


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **named: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if len(self.ends) == _STEPS // 3 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()


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


def trainer_of(name: str, point: Point, model: LlamaForCausalLM, rows: Any, batch: int, clock: Clock) -> Trainer:
    """Raises ImportError where a package is missing."""
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch,
        "max_steps": _STEPS,
        "learning_rate": 1e-5,
        "optim": "adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
        "bf16": torch.cuda.is_available(),
        "torch_compile": point.compiled,
        "gradient_checkpointing": point.checkpointing,
        "use_liger_kernel": name.endswith("-liger"),
        "logging_steps": _STEPS,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if name.endswith("-liger"):
        version("liger-kernel")
    config = gk.GEKOConfig.recommended()
    if name in ("trainer", "trainer-liger"):
        return Trainer(model, TrainingArguments(**common), collate, rows, callbacks=[clock])
    if name == "geko":
        args = gk.GEKOTrainingArguments(**common)
        return gk.GEKOTrainer(model, args, collate, rows, config=config, callbacks=[clock])
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    packed = {"packing": True, "max_length": point.length} if point.form == "packed" else {"max_length": None}
    sft = SFTConfig(**common, **packed, dataset_kwargs={"skip_prepare_dataset": not packed.get("packing", False)})
    data = Dataset.from_list(rows)
    if name in ("sft", "sft-liger"):
        return SFTTrainer(model, sft, train_dataset=data, processing_class=_Tokenizer(), callbacks=[clock])
    return gk.GEKOSFTTrainer(
        model, sft, train_dataset=data, processing_class=_Tokenizer(), config=config, callbacks=[clock]
    )


def _Tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def measure(name: str, point: Point, tokens: int, device: torch.device) -> dict[str, Any]:
    """The figures of one contender at one point; an error is a figure too."""
    sizes = MODELS[point.model]
    batch = max(tokens // point.length, 1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    rows, clock = rows_of(point, sizes["vocab_size"], batch * _STEPS), Clock()
    own = sum(len(row["input_ids"]) for row in rows) / _STEPS  # tokens a step, padding left out
    try:
        trainer = trainer_of(name, point, model, rows, batch, clock)
        trainer.train()
    except (ImportError, PackageNotFoundError) as error:
        return {"left_out": str(error)[:200]}
    except Exception as error:  # whatever a contender cannot do
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    gaps = [b - a for a, b in itertools.pairwise(clock.ends[_STEPS // 3 :])]
    seconds = median(gaps)
    if point.form == "packed":
        own = batch * point.length * 0.98  # rows are nearly full, whatever packs them
    work = own * (6 * parameters + 12 * sizes["num_hidden_layers"] * sizes["hidden_size"] * point.length)
    card = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak = next((value for key, value in PEAKS.items() if key in card), None)
    return {
        "ms": 1000 * seconds,
        "slowest_ms": 1000 * max(gaps),
        "tokens_per_second": own / seconds,
        "peak_share": None if peak is None else work / seconds / peak,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "loss": next((entry["loss"] for entry in trainer.state.log_history if "loss" in entry), None),
    }


def points(models: list[str], lengths: list[int], forms: list[str]) -> list[Point]:
    """The most useful first: compiled and eager of each model and length, then packed, then checkpointing."""
    found = []
    for form in forms:
        for model, length in itertools.product(models, lengths):
            found += [Point(model, length, form, True, False), Point(model, length, form, False, False)]
    return found + [Point(model, lengths[-1], forms[0], False, True) for model in models]


def table(rows: list[dict[str, Any]]) -> str:
    """One line a point: each contender's tokens a second and memory, and GEKO's share of the best other's."""
    lines = []
    for point in dict.fromkeys(tuple(row["point"].values()) for row in rows):
        mine = {row["contender"]: row for row in rows if tuple(row["point"].values()) == point and "ms" in row}
        others = [row["tokens_per_second"] for name, row in mine.items() if not name.startswith("geko")]
        for name, row in mine.items():
            share = row["tokens_per_second"] / max(others) if others else float("nan")
            of_peak = "" if row["peak_share"] is None else f"{row['peak_share']:.1%} of the peak, "
            memory = "" if row["peak_gib"] is None else f"{row['peak_gib']:.2f} GiB, "
            lines.append(
                f"{point} {name}: {row['ms']:.1f} ms, {row['tokens_per_second']:,.0f} tokens/s, {of_peak}{memory}"
                f"{share:.2f} of the best other"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["135m", "1b"], choices=list(MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 2048])
    parser.add_argument("--forms", nargs="+", default=["full", "padded"], choices=["full", "padded", "packed"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--tokens", type=int, default=32768, help="a step, padding included")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no measurement later")
    parser.add_argument("--commit", help="where there is no git")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    begin, rows = time.perf_counter(), []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shared = {**environment(device, given.commit), "command": " ".join(sys.argv)}
    for package in ("transformers", "trl", "liger-kernel"):
        try:
            shared[package] = version(package)
        except PackageNotFoundError:
            shared[package] = None
    for point in points(given.models, given.lengths, given.forms):
        for name in given.contenders:
            if point.form == "packed" and "sft" not in name:
                continue
            late = time.perf_counter() - begin > 60 * given.minutes
            found = {"left_out": "not reached"} if late else measure(name, point, given.tokens, device)
            rows.append({"contender": name, "point": point._asdict(), "tokens": given.tokens, **found})
            append(given.results / "training_step.jsonl", {**rows[-1], **shared})
            gc.collect()
            torch._dynamo.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(table(rows))
    print(
        *(f"{row['contender']} {tuple(row['point'].values())}: {row['error']}" for row in rows if "error" in row),
        sep="\n",
    )


if __name__ == "__main__":
    main()
