"""The contenders of training_step.py, and the measurement of one of them at one point."""

from __future__ import annotations

import itertools
import tempfile
import time
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

import geko_kernels as gk
from benchmarks.training.models import MODELS
from benchmarks.training.training_step_data import (
    JOINED,
    PEAKS,
    Point,
    collator_of,
    flops_per_token,
    joined_packs,
    model_of,
    packs_of,
    rows_of,
    tokenizer,
)

CONTENDERS = (
    "trainer",
    "geko",
    "sft",
    "geko-sft",
    "loop",
    "geko-uniform",
    "geko-liger",
    "trainer-liger",
    "sft-liger",
    "geko-sft-liger",
)
WARMUP, STEPS = 8, 24


class Clock(TrainerCallback):
    """When the warm-up ended, when each later step was queued, and when the device had done the last one."""

    def __init__(self, deadline: float = float("inf"), profile: Path | None = None) -> None:
        self.ends: list[float] = []
        self.tokens: list[int] = []  # places of each batch
        self.deadline, self.profile, self.late = deadline, profile, False
        self._profiler: Any = None

    def tick(self) -> bool:
        """At a step's end; whether to stop."""
        step = len(self.ends) + 1
        if torch.cuda.is_available() and step in (WARMUP, STEPS):
            torch.cuda.synchronize()
        if torch.cuda.is_available() and step == WARMUP:
            torch.cuda.reset_peak_memory_stats()
        self.ends.append(time.perf_counter())
        if self._profiler is not None:
            self._write_profile()
        elif self.profile is not None and step == WARMUP:
            self._profiler = torch.profiler.profile().__enter__()
        self.late = step < STEPS and self.ends[-1] > self.deadline
        return self.late or step == STEPS

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        control.should_training_stop |= self.tick()

    def _write_profile(self) -> None:
        self._profiler.__exit__(None, None, None)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        table = self._profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=25)
        assert self.profile is not None
        self.profile.parent.mkdir(parents=True, exist_ok=True)
        self.profile.write_text(table)
        self._profiler = self.profile = None


def arguments(name: str, point: Point, batch: int, folder: str) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch,
        "max_steps": STEPS + 8,  # the clock stops sooner: GEKO may cut the last batch of a run
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch_fused" if cuda else "adamw_torch",
        "bf16": cuda,
        "use_cpu": not cuda,
        "torch_compile": point.compiled,
        "gradient_checkpointing": point.checkpointing,
        "use_liger_kernel": name.endswith("-liger"),
        "logging_steps": STEPS,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def trainer_of(name: str, point: Point, model: Any, rows: Any, tokens: int, clock: Clock, folder: str) -> Trainer:
    """A step has `tokens` places. Raises ImportError or PackageNotFoundError where a package is missing."""
    packed, batch = point.form == "packed", max(tokens // point.length, 1)
    if name.endswith("-liger"):
        version("liger-kernel")
    if "sft" in name:
        return _sft_of(name, point, model, rows, arguments(name, point, batch, folder), clock)
    common = arguments(name, point, 1 if packed else batch, folder)
    if name in ("trainer", "trainer-liger"):
        data, collator = (packs_of(rows, tokens), joined_packs) if packed else (rows, collator_of(point))
        common["remove_unused_columns"] = not packed
        return Trainer(model, TrainingArguments(**common), collator, data, callbacks=[clock])
    make = gk.GEKOConfig.uniform if name == "geko-uniform" else gk.GEKOConfig.recommended
    config = make(batch_tokens=tokens) if packed else make()
    args = gk.GEKOTrainingArguments(**common)
    return gk.GEKOTrainer(model, args, collator_of(point), rows, config=config, callbacks=[clock])


def _sft_of(name: str, point: Point, model: Any, rows: Any, common: dict[str, Any], clock: Clock) -> Trainer:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    packed = point.form == "packed"
    args = SFTConfig(
        **common,
        packing=packed,
        padding_free=point.joined,
        max_length=point.length if packed else None,
        dataset_kwargs={"skip_prepare_dataset": not packed},
    )
    named = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer(), "callbacks": [clock]}
    if name.startswith("geko-sft"):
        return gk.GEKOSFTTrainer(model, args, config=gk.GEKOConfig.recommended(), **named)
    return SFTTrainer(model, args, **named)


def loop(point: Point, model: Any, rows: Any, tokens: int, clock: Clock) -> float:
    """The mean loss of PyTorch's own loop over Trainer's batches, with its gradient clipping."""
    data, collator, batch = rows, collator_of(point), max(tokens // point.length, 1)
    if point.form == "packed":
        data, collator, batch = packs_of(rows, tokens), joined_packs, 1
    device, cuda = next(model.parameters()).device, torch.cuda.is_available()
    if point.checkpointing:
        model.gradient_checkpointing_enable()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=cuda)
    forward = torch.compile(model) if point.compiled else model
    model.train()
    total = torch.zeros((), device=device)
    for inputs in DataLoader(data, batch, collate_fn=collator, pin_memory=cuda):
        clock.tokens.append(inputs["input_ids"].numel())
        inputs = {key: value.to(device, non_blocking=True) for key, value in inputs.items()}
        with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
            loss = forward(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
        if clock.tick():
            break
    return float(total) / len(clock.ends)


def _count_tokens(trainer: Trainer, clock: Clock) -> None:
    step = trainer.training_step

    def counted(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        clock.tokens.append(inputs["input_ids"].numel())
        return step(model, inputs, *rest, **named)

    trainer.training_step = counted  # type: ignore[method-assign]


def measure(
    name: str,
    point: Point,
    tokens: int,
    device: torch.device,
    deadline: float = float("inf"),
    profile: Path | None = None,
) -> dict[str, Any]:
    """The figures of one contender at one point; an error is a figure too. `deadline` is a time.perf_counter()."""
    if point.joined and point.attention.startswith("sdpa"):
        tokens = max(min(tokens, JOINED), point.length)
    batch = max(tokens // point.length, 1)
    count = batch * (STEPS + 8) * (2 if point.form == "packed" else 1)  # no contender begins a second epoch
    rows, clock = rows_of(point, MODELS[point.model]["vocab_size"], count), Clock(deadline, profile)
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = model_of(point, device)
            weights = sum(p.numel() for p in model.parameters())
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            if name == "loop":
                loss = loop(point, model, rows, tokens, clock)
            else:
                trainer = trainer_of(name, point, model, rows, tokens, clock, folder)
                _count_tokens(trainer, clock)
                trainer.train()
                loss = next((entry["loss"] for entry in trainer.state.log_history if "loss" in entry), None)
    except (ImportError, PackageNotFoundError) as error:
        return {"tokens": tokens, "left_out": str(error)[:200]}
    except torch.cuda.OutOfMemoryError as error:
        return {"tokens": tokens, "error": f"out of memory: {error}"[:300]}
    except Exception as error:  # whatever a contender cannot do
        return {"tokens": tokens, "error": f"{type(error).__name__}: {error}"[:300]}
    if clock.late:
        return {"tokens": tokens, "left_out": "not reached: the budget ended while it ran"}
    if profile is not None:
        return {"tokens": tokens, "profile": str(profile)}
    lengths = [len(row["input_ids"]) for row in rows]
    own = sum(lengths[batch * WARMUP : batch * STEPS]) if not point.joined else sum(clock.tokens[WARMUP:])
    flops = flops_per_token(point, weights, trained, sum(n * n for n in lengths) / sum(lengths))
    return {"tokens": tokens, **figures(clock, own, flops, device), "loss": loss}


def figures(clock: Clock, own: int, flops: float, device: torch.device) -> dict[str, Any]:
    """`own` tokens, without padding, in the steps after the warm-up."""
    gaps = [b - a for a, b in itertools.pairwise(clock.ends[WARMUP - 1 :])]
    seconds = clock.ends[STEPS - 1] - clock.ends[WARMUP - 1]
    cuda = device.type == "cuda"
    card = torch.cuda.get_device_name() if cuda else ""
    peak = PEAKS.get(card)
    return {
        "ms": 1000 * seconds / (STEPS - WARMUP),
        "slowest_ms": 1000 * max(gaps),  # as the host sees it
        "tokens_per_second": own / seconds,
        "places_per_second": sum(clock.tokens[WARMUP:]) / seconds,  # padding included
        "peak_share": None if peak is None else own * flops / seconds / peak,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    }
