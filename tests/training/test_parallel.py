"""Parallelism in which processes share samples is refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from training import arguments, sentences, standard, tiny_llama, trainer_of

import geko_kernels as gk
from geko_kernels.training.parallel import check_parallel


def parallelism(**sizes):
    return SimpleNamespace(**{"tp_size": 1, "cp_size": 1, "sp_size": 1, **sizes})


@pytest.mark.parametrize("kind, size", [("tensor", "tp_size"), ("context", "cp_size"), ("sequence", "sp_size")])
def test_accelerates_parallelism_config(tmp_path, monkeypatch, kind, size):
    trainers = trainer_of(tmp_path), standard(tiny_llama(), arguments(tmp_path), sentences(4))
    for trainer in trainers:
        monkeypatch.setitem(trainer.accelerator.state.__dict__, "parallelism_config", parallelism(**{size: 2}))
    said = rf"does not combine with {kind} parallelism over 2 processes: "
    with pytest.raises(ValueError, match=f"^GEKOTrainer {said}"):
        check_parallel(trainers[0], "GEKOTrainer")
    with pytest.raises(ValueError, match=f"^observe {said}"):
        gk.observe(trainers[1])


@pytest.mark.parametrize(
    "kind, loaded",
    [
        ("tensor", {"_tp_size": 4}),
        ("pipeline", {"_device_mesh": "a mesh"}),
    ],
)
def test_models_that_were_loaded_in_parts(tmp_path, kind, loaded):
    """As `from_pretrained(tp_plan="auto")` and `from_pretrained(distributed_config={"pp_size": 4})` leave them."""
    trainer = trainer_of(tmp_path)
    trainer.model.config.distributed_config = SimpleNamespace(pp_size=4)
    check_parallel(trainer, "GEKOTrainer")  # a whole model that was saved by one in parts
    for name, value in loaded.items():
        setattr(trainer.model, name, value)
    kinds = "tensor parallelism over 4" if kind == "tensor" else "pipeline parallelism over 4"
    with pytest.raises(ValueError, match=f"does not combine with {kinds} processes: start the script with torchrun"):
        check_parallel(trainer, "GEKOTrainer")


def test_several_kinds_are_named_together(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    monkeypatch.setitem(trainer.accelerator.state.__dict__, "parallelism_config", parallelism(tp_size=2, cp_size=4))
    trainer.args._n_gpu = 2
    named = "tensor parallelism over 2 processes and context parallelism over 4 processes and DataParallel: "
    with pytest.raises(ValueError, match=named):
        check_parallel(trainer, "GEKOTrainer")


def test_data_parallel_groups_are_allowed(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    only_data = parallelism(dp_replicate_size=2, dp_shard_size=2)
    monkeypatch.setitem(trainer.accelerator.state.__dict__, "parallelism_config", only_data)
    check_parallel(trainer, "GEKOTrainer")
