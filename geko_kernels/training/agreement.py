"""What the processes of a run must have alike, as each plans the epochs for itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers.trainer_utils import has_length

from geko_kernels.training.fingerprint import named_items
from geko_kernels.training.processes import check_alike, check_same, rank_and_world
from geko_kernels.training.report.visits import VISITS_NAME

# training arguments: of the plans, of the steps, and of what the processes do together, such as the number of forwards
_ARGUMENTS = """
    num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size
    dataloader_drop_last train_sampling_strategy length_column_name probe_batch_size average_tokens_across_devices
    optim learning_rate weight_decay max_grad_norm lr_scheduler_type warmup_steps
    logging_strategy logging_steps eval_strategy eval_steps eval_delay save_strategy save_steps save_only_model
    per_device_eval_batch_size shift_labels label_names torch_compile
""".split()


def check_processes(trainer: Any, checkpoint: str | os.PathLike[str] | bool | None) -> None:
    """Raise `ValueError` in all processes if they differ in data, config, settings or checkpoint; names one difference.

    The data are compared by their length and the fingerprint's rows. All processes call it.
    """
    if rank_and_world()[1] == 1:
        return
    args = trainer.args
    values = {
        "len(train_dataset)": len(trainer.train_dataset),
        **{f"config.{name}": value for name, value in trainer.config.to_dict().items()},
        **{f"args.{name}": getattr(args, name) for name in _ARGUMENTS if hasattr(args, name)},
        "the seed of the order (args.data_seed, or args.seed)": args.seed if args.data_seed is None else args.data_seed,
        "args.seed": args.seed if trainer.config.auto_stop else None,  # of what the looks compare
        "tokens in a packed row": trainer._row_tokens,
        "len(eval_dataset)": _lengths(trainer.eval_dataset),
        "the checkpoint to resume from": Path(checkpoint).name if isinstance(checkpoint, str | os.PathLike) else None,
        **named_items(trainer._data(), "train_dataset"),
    }
    check_alike(values, args.device)


def check_loaded(trainer: Any, position: int) -> None:
    """Raise `ValueError` in all processes if their copies of the checkpoint differ in GEKO's files."""
    device, visits = trainer.args.device, trainer.efficiency.visits
    there = {
        "the position in the checkpoint": position,
        f"the epochs in the checkpoint's {VISITS_NAME}": visits and visits.mark(),
    }
    check_alike(there, device)
    check_same("the learning state in the checkpoint", trainer.sample_state.loss_history, device)


def _lengths(dataset: Any) -> Any:
    if isinstance(dataset, dict):
        return {str(name): _lengths(part) for name, part in dataset.items()}
    return len(dataset) if has_length(dataset) else None
