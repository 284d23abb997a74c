"""A Trainer under `observe`, for its tests: `torchrun observe_run.py OUT`, or `python` for one process.

Writes OUT/<rank>.json of a run that is observed, with the weights and losses of the same run without it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training import arguments, curve, sentences, standard, tiny_llama, weights

import geko_kernels as gk
from geko_kernels.training.data import CausalCollator

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def train(out: Path, observed: bool) -> tuple[Any, Any]:
    several = {"ddp_backend": "gloo"} if WORLD > 1 else {}
    fields = {"per_device_train_batch_size": 4 // WORLD, "optim": "sgd", "learning_rate": 0.3, **several}
    data = sentences(29, ragged=True)  # so accelerate repeats samples in the last batch of two processes
    trainer = standard(tiny_llama(), arguments(out, **fields), data, data_collator=CausalCollator(0))
    observation = gk.observe(trainer) if observed else None
    trainer.train()
    return trainer, observation


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    plain, _ = train(out, False)
    trainer, observation = train(out, True)
    observation.write_report(out / "report")
    names = ("losses", "label_probabilities", "hits", "confidences", "margins")
    values = {
        "losses": [curve(plain), curve(trainer)],
        "weights": [weights(plain.model).tolist(), weights(trainer.model).tolist()],
        "records": [getattr(observation, name).tolist() for name in names],
        "state": {name: column.double().tolist() for name, column in observation.state.state_dict().items()},
        "epochs": [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in observation.counts.epochs],
    }
    (out / f"{RANK}.json").write_text(json.dumps(values))
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
