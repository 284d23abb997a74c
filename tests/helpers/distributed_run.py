"""What test_distributed.py runs on each process: `torchrun distributed_run.py OUT`, or `python` for one process.

Writes OUT/<scenario>-<rank>.json; each scenario trains the same global batch on any number of processes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState
from resume_run import learnable
from torch.distributed.tensor import DTensor
from training import arguments, curve, sentences, standard, tiny_llama, weights
from transformers import DataCollatorWithFlattening

import geko_kernels as gk
from geko_kernels import ops
from geko_kernels.training.data import CausalCollator

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
ADAM_OFF = {"optim": "sgd", "learning_rate": 0.3}  # Adam would blow up the rounding of gradients near 0


def options(**fields: Any) -> dict[str, Any]:
    several = {"ddp_backend": "gloo"} if WORLD > 1 else {}
    return {"per_device_train_batch_size": 4 // WORLD, **ADAM_OFF, **several, **fields}


def result(trainer: Any) -> dict[str, Any]:
    return {
        "loss": curve(trainer),
        "rate": curve(trainer, "learning_rate"),
        "weights": weights(trainer.model).tolist(),
        "steps": trainer.state.global_step,
    }


def geko_result(trainer: gk.GEKOTrainer) -> dict[str, Any]:
    report, state = trainer.get_efficiency_report(), trainer.sample_state
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    shares = [[step[f"geko/{bucket}"] for bucket in ("freeze", "light", "focus", "hard")] for step in steps]
    return {
        **result(trainer),
        "plan": trainer.sampler.plan.ids.tolist(),
        "state": {name: column.double().tolist() for name, column in state.state_dict().items()},
        "epochs": [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in report["epochs"]],
        "counts": {name: report[name] for name in report if name not in ("seconds", "epochs")},
        "shares": shares,
        "log": [[step["geko/loss"], step["geko/accuracy"]] for step in steps],
        "changed": int(state.changed.sum()),
        "visits": [column.tolist() for column in trainer.efficiency.visits.visits()],
    }


def selection(out: Path) -> dict[str, Any]:
    """29 ragged samples in global batches of 4: the last one is short, so repeats fill it on several processes."""
    args = arguments(out / "selection", **options(num_train_epochs=8))
    trainer = gk.GEKOTrainer(tiny_llama(), args, train_dataset=sentences(29, ragged=True), config=learnable())
    trainer.train()
    return geko_result(trainer)


def accumulation(out: Path) -> dict[str, Any]:
    """Each process has half of each of two micro-batches."""
    fields = options(num_train_epochs=3, gradient_accumulation_steps=2, per_device_train_batch_size=2 // WORLD)
    args = arguments(out / "accumulation", **fields)
    trainer = gk.GEKOTrainer(tiny_llama(), args, train_dataset=sentences(27, ragged=True), config=learnable())
    trainer.train()
    return geko_result(trainer)


def weighed(out: Path) -> dict[str, Any]:
    """`accumulation` with token and sample weights: one divisor for all micro-batches of all processes."""
    data = sentences(27, ragged=True)
    for i, item in enumerate(data):
        item["token_weights"] = [0.5 * ((i + k) % 4) for k in range(len(item["labels"]))]
        item["sample_weights"] = 0.5 + i % 3
    fields = options(num_train_epochs=3, gradient_accumulation_steps=2, per_device_train_batch_size=2 // WORLD)
    args = arguments(out / "weighed", **fields)
    trainer = gk.GEKOTrainer(tiny_llama(), args, train_dataset=data, config=learnable())
    trainer.train()
    return geko_result(trainer)


def resumed(out: Path) -> dict[str, Any]:
    """`selection`, saved in the middle of an epoch and gone on with from there."""
    fields = options(num_train_epochs=8, save_strategy="steps", save_steps=11)
    data = sentences(29, ragged=True)
    for checkpoint in (None, str(out / "resumed" / "checkpoint-11")):
        args = arguments(out / "resumed", **fields)
        trainer = gk.GEKOTrainer(tiny_llama(), args, train_dataset=data, config=learnable())
        trainer.train(resume_from_checkpoint=checkpoint)
    return geko_result(trainer)


def fsdp2(out: Path) -> dict[str, Any]:
    """`selection` with the parameters sharded over the processes."""
    wrap = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    shard = {"fsdp": True, "fsdp_config": {**wrap, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    AcceleratorState._reset_state(True)  # accelerate takes a process to be of one kind,
    args = arguments(out / "fsdp2", **options(num_train_epochs=8, **(shard if WORLD > 1 else {})))
    if WORLD > 1:
        _ = args.device
        PartialState().distributed_type = DistributedType.MULTI_GPU  # and CPUs to be for DDP only
    trainer = gk.GEKOTrainer(tiny_llama(), args, train_dataset=sentences(29, ragged=True), config=learnable())
    trainer.train()
    sharded = all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    return {**geko_result(trainer), "sharded": sharded}


def packed(out: Path) -> dict[str, Any]:
    """Batches of up to 24 tokens without padding: an optimizer step is two of them on one process, one each on two.

    Saved in the middle of an epoch and gone on with; an odd number of batches is filled up by a repeat.
    """
    fields = options(num_train_epochs=8, gradient_accumulation_steps=2 // WORLD, save_strategy="steps", save_steps=11)
    data, low, results = sentences(29, ragged=True), {"light_interval": 2, "batch_tokens": 24}, []
    for checkpoint in (None, str(out / "packed" / "checkpoint-11")):
        args = arguments(out / "packed", **fields)
        trainer = gk.GEKOTrainer(
            tiny_llama(), args, DataCollatorWithFlattening(), data, config=learnable(**low, use_curriculum=False)
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        results.append(geko_result(trainer))
    return {**results[1], "whole": results[0]}


class RowTrainer(gk.GEKOTrainer):
    """Packs by best fit, as GEKOSFTTrainer does with `packing=True`."""

    _row_tokens = 20


def packed_rows(out: Path) -> dict[str, Any]:
    """Batches of four packed rows; probes are packed as well."""
    args, data = arguments(out / "packed_rows", **options(num_train_epochs=8)), sentences(45, ragged=True)
    trainer = RowTrainer(tiny_llama(), args, DataCollatorWithFlattening(), data, config=learnable())
    trainer.train()
    return geko_result(trainer)


def uniform(out: Path) -> dict[str, Any]:
    args, data = arguments(out / "uniform", **options(gradient_accumulation_steps=2)), sentences(32, ragged=True)
    trainer = gk.GEKOTrainer(tiny_llama(), args, train_dataset=data, config=gk.GEKOConfig.uniform())
    trainer.train()
    reference = standard(tiny_llama(), args, data, data_collator=trainer.data_collator)
    reference.train()
    return {"ours": result(trainer), "theirs": result(reference)}


class Described:
    """The default collator, with what is no tensor: the batch's width, and something that cannot be pickled."""

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        batch = CausalCollator(0)(items)
        return {**batch, "width": [batch["input_ids"].shape[1]], "unlike": lambda: RANK}


def questions(out: Path) -> dict[str, Any]:
    """The logits of the first process's batch are all 0: whether the model shifts takes it another question.

    The batch of another process is narrower, and has a mask that the first one's lacks.
    """
    model, asked, widths = tiny_llama(), [], []
    with torch.no_grad():
        model.get_input_embeddings().weight[1:3] = 0.0

    def record(_: Any, args: Any, named: dict[str, Any]) -> Any:
        asked.append([named["input_ids"].tolist(), "attention_mask" in named])
        widths.append(named["width"])
        return args, {name: value for name, value in named.items() if name not in ("width", "unlike")}

    model.register_forward_pre_hook(record, with_kwargs=True)
    data = sentences(8)
    data[2] = {name: tokens[:6] for name, tokens in data[2].items()}
    data[3] = {name: tokens[:5] for name, tokens in data[3].items()}
    fields = options(max_steps=1, train_sampling_strategy="sequential", remove_unused_columns=False)
    gk.GEKOTrainer(model, arguments(out / "questions", **fields), Described(), data).train()
    return {"asked": asked[:-1], "trained": asked[-1], "widths": widths}


def evaluated(out: Path) -> dict[str, Any]:
    """`selection`, evaluated before: accelerate then takes the model for one that DDP has wrapped."""
    args, data = arguments(out / "evaluated", **options(num_train_epochs=8)), sentences(29, ragged=True)
    trainer = gk.GEKOTrainer(tiny_llama(), args, train_dataset=data, config=learnable())
    trainer.evaluate(data)
    trainer.train()
    return geko_result(trainer)


def sync(out: Path) -> dict[str, Any]:
    """Sample 1 is visited by rank 0 alone, 2 by the last rank, 3 by all, 4 twice by rank 0 and once by the others."""
    state = gk.SampleState(6)
    visits = {0: [[1], [3], [4], [4]], WORLD - 1: [[2], [3], [4]]}.get(RANK, [[3], [4]])
    for ids in visits:
        logits = torch.zeros(1, 5)
        logits[0, 0] = 1.0 + RANK
        gk.weighted_loss(logits, torch.tensor([0]), torch.tensor(ids), state)
    state.sync()
    state.sync()
    columns = {name: column.double().tolist() for name, column in state.state_dict().items()}
    told = ""
    try:
        gk.GEKOSampler(state, seed=RANK).set_epoch(0)
    except ValueError as error:
        told = str(error)
    return {"state": columns, "changed": int(state.changed.sum()), "claim": int(state.claim.abs().sum()), "told": told}


def main() -> None:
    torch.set_num_threads(1)
    ops._override = "reference"
    out = Path(sys.argv[1])
    for scenario in (
        selection,
        accumulation,
        weighed,
        resumed,
        packed,
        packed_rows,
        uniform,
        questions,
        evaluated,
        sync,
        fsdp2,
    ):
        values = scenario(out)
        (out / f"{scenario.__name__}-{RANK}.json").write_text(json.dumps(values))
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
