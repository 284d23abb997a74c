"""Runs that find their own length, for test_auto*.py: `torchrun auto_run.py OUT` trains on several processes."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.tensor import DTensor
from training import arguments, tiny_llama, trainer_of, weights
from transformers import TrainerCallback

import geko_kernels as gk
from geko_kernels import ops
from geko_kernels.training.stopping import looked_at, rule
from geko_kernels.training.stopping.rule import Look, StopRule

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def few_samples(held: int = 40):
    """`held` samples of any training set of at least 100 are held back, where 2,000 would be needed."""
    before = looked_at.FEWEST, looked_at.how_many
    looked_at.FEWEST, looked_at.how_many = 100, lambda _: held
    try:
        yield
    finally:
        looked_at.FEWEST, looked_at.how_many = before


def noisy(count: int, noise: float = 0.3, seed: int = 0) -> list[dict[str, Any]]:
    """The answer follows from the first of four tokens, but for the share `noise`, whose answer is random."""
    generator, items = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        first = int(torch.randint(1, 9, (), generator=generator))
        asked = [first, *torch.randint(1, 20, (3,), generator=generator).tolist()]
        answer = 24 + asked[0] % 4
        if torch.rand((), generator=generator) < noise:
            answer = 24 + int(torch.randint(0, 4, (), generator=generator))
        items.append({"input_ids": [*asked, answer], "labels": [-100] * 4 + [answer]})
    return items


def facts(count: int) -> list[dict[str, Any]]:
    """Each token of 1 to `count` has a random answer of eight: nothing but learning by heart helps."""
    answers = torch.randint(220, 228, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": [1 + i, a], "labels": [-100, a]} for i, a in enumerate(answers)]


def auto_trainer(folder: Any, data: Any = None, model: Any = None, config: Any = None, **fields: Any) -> gk.GEKOTrainer:
    """Learns the rule of `noisy` in two epochs, and then its noise."""
    data = noisy(400) if data is None else data
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    options = {"per_device_train_batch_size": 10, "num_train_epochs": 12, "learning_rate": 1e-2}
    quiet = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}
    model = tiny_llama(**sizes, attention_dropout=0.1) if model is None else model
    config = gk.GEKOConfig.uniform(auto_stop=True) if config is None else config
    return trainer_of(folder, data, config, model, **{**options, **quiet, **fields})


class RawWeights(TrainerCallback):
    """The trained parameters after each step, and what `step(trainer, number)` says then."""

    def __init__(self, trainer: gk.GEKOTrainer) -> None:
        self.model, self.steps = trainer.model, [weights(trainer.model)]
        trainer.add_callback(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append(weights(self.model).clone())

    def averaged(self, step: int) -> torch.Tensor:
        """`lerp(min(1, 5 / t))` over the steps up to `step`, in float64."""
        average = self.steps[0].double()
        for number, raw in enumerate(self.steps[1 : step + 1], 1):
            average = average.lerp(raw.double(), min(1.0, 5 / number))
        return average


def report_of(trainer: gk.GEKOTrainer) -> dict[str, Any]:
    return json.loads(Path(trainer.args.output_dir, "geko_report.json").read_text())


def train_and_tell(out: Path, name: str, shard: bool = False, resume: str | None = None, **fields: Any) -> None:
    """Train on noisy samples with plain SGD, whose rounding stays small, and write what has come of it."""
    options = {"optim": "sgd", "learning_rate": 1.0, "per_device_train_batch_size": 10 // WORLD, "max_steps": 45}
    options |= {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}
    several = {"ddp_backend": "gloo"} if WORLD > 1 else {}
    if shard and WORLD > 1:
        wrap = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        several |= {"fsdp": True, "fsdp_config": {**wrap, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
        AcceleratorState._reset_state(True)
    args = arguments(out / name, **{**options, **several, **fields})
    if shard and WORLD > 1:  # as in distributed_run.py
        _ = args.device
        PartialState().distributed_type = DistributedType.MULTI_GPU
    looks: list[list[float]] = []
    add = StopRule.add

    def remembered(own: StopRule, look: Look, mislabelled: float = 0.0) -> bool:
        parts = (look.held, look.held_swapped, look.seen, look.seen_swapped)
        looks.append([float(part.nanmean()) for part in parts])
        return add(own, look, mislabelled)

    StopRule.add = remembered  # type: ignore[method-assign]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = gk.GEKOConfig.uniform(auto_stop=True)
    trainer = gk.GEKOTrainer(tiny_llama(**sizes), args, train_dataset=noisy(400), config=config)
    trainer.train(resume_from_checkpoint=resume)
    StopRule.add = add  # type: ignore[method-assign]
    run = trainer._stopping
    assert run is not None
    values = {
        "looks": looks,
        "curve": run.rule.curve,
        "kept": run.rule.kept,
        "ended": run.ended,
        "held": run.held.tolist(),
        "steps": trainer.state.global_step,
        "sharded": all(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "weights": weights(trainer.model).tolist(),
        "evaluated": trainer.evaluate(noisy(40, seed=1))["eval_loss"],
        "files": sorted(path.name for path in (out / name).glob("geko_kept*")),
    }
    (out / f"{name}-{RANK}.json").write_text(json.dumps(values))


def main() -> None:
    torch.set_num_threads(1)
    ops._override = "reference"
    with few_samples():
        train_and_tell(Path(sys.argv[1]), "swaps")
        looked_at._FEW_PAIRS, rule.EARLIEST, rule.PATIENCE = 1000, 0.5, 0.25  # no swap test, and hardly any patience
        train_and_tell(Path(sys.argv[1]), "stops", learning_rate=2.0)
        train_and_tell(Path(sys.argv[1]), "fsdp2", shard=True, learning_rate=2.0)
        saved = {"optim": "adamw_torch", "learning_rate": 2e-2, "save_strategy": "steps", "save_steps": 23}
        checkpoint = str(Path(sys.argv[1], "saved", "checkpoint-23"))
        train_and_tell(Path(sys.argv[1]), "saved", shard=True, **saved)
        train_and_tell(Path(sys.argv[1]), "resumed", shard=True, resume=checkpoint, **saved)
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
