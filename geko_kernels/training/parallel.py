"""Which kinds of parallelism a trainer may have: those that give each process samples of its own."""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def check_parallel(trainer: Any, name: str) -> None:
    """Raise `ValueError` if processes share samples: tensor, context, sequence or pipeline parallelism."""
    sizes = {
        "tensor": max(trainer.get_tp_size() or 1, _configured(trainer, "tp_size")),
        "context": max(trainer.get_cp_size(), _configured(trainer, "cp_size")),
        "sequence": max(trainer.get_sp_size(), _configured(trainer, "sp_size")),
        "pipeline": _loaded_with(trainer, "pp_size"),
    }
    got = [f"{kind} parallelism over {size} processes" for kind, size in sizes.items() if size > 1]
    if trainer.args.n_gpu > 1:
        got.append("DataParallel")
    if not got and _is_sharded_otherwise(trainer):
        got.append("a model whose parameters were made DTensors beforehand")
    if got:
        raise ValueError(
            f"{name} does not combine with {' and '.join(got)}: start the script with torchrun or accelerate launch, "
            "one process a GPU, each with samples of its own (DDP, FSDP or DeepSpeed ZeRO). Load the model whole, "
            "without tp_plan and distributed_config, and leave out parallelism_config"
        )


def _configured(trainer: Any, size: str) -> int:
    """Of accelerate's ParallelismConfig."""
    return getattr(getattr(trainer.accelerator, "parallelism_config", None), size, 1) or 1


def _loaded_with(trainer: Any, size: str) -> int:
    """Of the `distributed_config` that a model was loaded with."""
    if getattr(trainer.model, "_device_mesh", None) is None:
        return 1
    return getattr(getattr(trainer.model.config, "distributed_config", None), size, 1) or 1


def _is_sharded_otherwise(trainer: Any) -> bool:
    """Are there parameters sharded over several processes, and not by this trainer's FSDP?"""
    if trainer.args.world_size == 1 or trainer.model is None:
        return False
    if trainer.is_fsdp_enabled and any(isinstance(module, FSDPModule) for module in trainer.model.modules()):
        return False
    return any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
