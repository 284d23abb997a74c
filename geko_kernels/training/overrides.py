"""All that geko_kernels overrides, calls or reads of `transformers.Trainer` and `trl.SFTTrainer`.

`tests/training/test_overrides.py` compares the table with the installed releases and with the classes of this package.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable
from typing import NamedTuple

import transformers

MORE = "..."  # others may follow


class Method(NamedTuple):
    """A method of the trainer below."""

    parameters: tuple[str, ...]  # after self, in order
    why: str
    advice: str = ""  # what a subclass that replaces it has to do


REPLACED = {
    "__init__": Method(("model", "args", "data_collator", "train_dataset", MORE), "takes config and tokenizer too"),
    "train": Method(
        ("resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
        "begins and ends the learning state, the plans and the report",
        "has to call super().train()",
    ),
    "_inner_training_loop": Method(
        ("batch_size", "args", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
        "restarts with a smaller batch",
        "has to call super()._inner_training_loop()",
    ),
    "get_train_dataloader": Method(
        (),
        "gives the items their ids",
        "has to hand on the batches of super().get_train_dataloader(), 'sample_ids' included",
    ),
    "_get_train_sampler": Method(
        ("train_dataset",), "draws the plans", "has to return the sampler of super()._get_train_sampler()"
    ),
    "_get_collator_with_removed_columns": Method(
        ("data_collator", "description"),
        "puts the ids into the batch",
        "has to call super()._get_collator_with_removed_columns()",
    ),
    "set_initial_training_values": Method(
        ("args", "dataloader"), "settles the run's length", "has to call super().set_initial_training_values()"
    ),
    "_init_training_state": Method(
        ("max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"),
        "resumes from a checkpoint",
        "has to call super()._init_training_state()",
    ),
    "create_scheduler": Method(
        ("num_training_steps", "optimizer"),
        "makes the learning rate follow the plans",
        "has to call super().create_scheduler(), which keeps a self.lr_scheduler that is set",
    ),
    "_run_epoch": Method(
        (
            *("model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
            *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained"),
            "steps_trained_in_current_epoch",
        ),
        "plans the epoch",
        "has to call super()._run_epoch()",
    ),
    "get_batch_samples": Method(
        ("epoch_iterator", "num_batches", "device"),
        "moves the plan on",
        "has to call super().get_batch_samples()",
    ),
    "_get_num_items_in_batch": Method(
        ("batch_samples", "device"),
        "counts the labels that the loss counts",
        "has to call super()._get_num_items_in_batch()",
    ),
    "training_step": Method(
        ("model", "inputs", "num_items_in_batch"),
        "explains the error of a model that was given ids",
        "has to call super().training_step()",
    ),
    "compute_loss": Method(
        ("model", "inputs", "return_outputs", "num_items_in_batch"),
        "weights the samples and counts their visits",
        "has to call super().compute_loss(model, inputs, ...) with the batch as it came, and may add to it",
    ),
    "prediction_step": Method(
        ("model", "inputs", "prediction_loss_only", "ignore_keys"), "evaluates without all logits if none are needed"
    ),
    "_evaluate": Method(("trial", "ignore_keys_for_eval", "skip_scheduler"), "times it, and keeps its random numbers"),
    "log": Method(("logs", "start_time"), "adds GEKO's figures", "has to call super().log()"),
    "_save_checkpoint": Method(
        ("model", "trial"), "saves the learning state", "has to call super()._save_checkpoint()"
    ),
    "_save_rng_state": Method(("output_dir",), "waits until every process has written its own"),
    "_prepare_for_training": Method(
        ("max_steps", "train_dataloader", "resume_from_checkpoint"), "begins the average of the weights"
    ),
    "_maybe_log_save_evaluate": Method(
        (
            *("tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval", "start_time"),
            "learning_rate",
        ),
        "evaluates held-back samples, puts figures into the log, and logs, saves and evaluates after an empty epoch",
        "has to call super()._maybe_log_save_evaluate()",
    ),
    "_finalize_training": Method(("trial", "num_train_samples", "start_time"), "ends with the kept weights"),
    "_load_from_checkpoint": Method(("resume_from_checkpoint", "model"), "knows which checkpoint is loaded"),
    "_issue_warnings_after_load": Method(("load_result",), "loads weights that were saved under other names"),
    "evaluate": Method(("eval_dataset", "ignore_keys", "metric_key_prefix"), "evaluates the averaged weights"),
    "predict": Method(("test_dataset", "ignore_keys", "metric_key_prefix"), "predicts by the averaged weights"),
    "save_model": Method(("output_dir", "_internal_call"), "saves the averaged weights"),
    "_save_optimizer_and_scheduler": Method(("output_dir",), "saves the raw weights beside them"),
}
CALLED = {
    "_get_dataloader": Method(
        ("dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"),
        "makes the loaders of training and of probes",
        "has to call super()._get_dataloader()",
    ),
    "_remove_unused_columns": Method(("dataset", "description"), "drops the columns that are not read"),
    "_set_signature_columns_if_needed": Method((), "learns which columns the model reads"),
    "_prepare_inputs": Method(("inputs",), "puts a batch on the device", "has to leave 'sample_ids' in the batch"),
    "_load_rng_state": Method(("checkpoint",), "sets the random numbers before the probes of a resumed epoch"),
    "_get_output_dir": Method(("trial",), "finds the folder of checkpoints and report"),
    "_move_model_to_device": Method(("model", "device"), "moves a model that was set later"),
}
READ = {  # attributes that Trainer's own methods set or read
    "_train_batch_size": "samples in one process's batch",
    "_tr_loss": "the loss since the last log step",
    "_signature_columns": "the columns that the model reads",
    "_created_lr_scheduler": "whether Trainer made the scheduler itself",
    "_trial": "the trial of a hyperparameter search",
    "_loss_shifts_labels": "set by us: whether Trainer counts labels without the first of each row",
}
SFT_REPLACED = {
    "_prepare_dataset": Method(
        ("dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"),
        "keeps the rows as they were given",
        "has to call super()._prepare_dataset()",
    ),
    "compute_loss": REPLACED["compute_loss"],
}
SFT_READ = {
    "_metrics": "SFT's figures since the last log step",
    "_total_train_tokens": "tokens trained so far",
    "_is_vision_dataset": "whether the collator prepares the rows, which have images",
}
ELSEWHERE = {  # attributes of objects that a trainer holds
    "_dataloaders": "of accelerate's Accelerator: the loaders it has prepared, that of a probe to be taken out",
    "_remove_columns": "of RemoveColumnsCollator: what it does to one item",
}
METHODS = {**SFT_REPLACED, **REPLACED, **CALLED}


def missing_methods(trainer: type, methods: Iterable[str]) -> list[str]:
    """Those of `methods` that `trainer`, a class without GEKO, does not have."""
    return [name for name in methods if not callable(getattr(trainer, name, None))]


def check_trainer(trainer: type = transformers.Trainer) -> None:
    """Raise if Transformers has dropped or renamed a method in the table, since its loop would run without GEKO.

    Raises:
        RuntimeError: names each such method and its purpose.
    """
    gone = missing_methods(trainer, (*REPLACED, *CALLED))
    if gone:
        said = "; ".join(f"{name}, with which GEKO {METHODS[name].why}" for name in gone)
        raise RuntimeError(
            f"GEKOTrainer: the Trainer of Transformers {transformers.__version__} has no {said}. Install a release of "
            "Transformers that geko_kernels was tested with"
        )


def changes(trainer: type, methods: dict[str, Method], read: dict[str, str]) -> list[str]:
    """One sentence for each difference between the table and the installed `trainer`."""
    found = []
    names = names_in(trainer)
    for name, method in methods.items():
        if name in missing_methods(trainer, methods):
            found.append(f"{trainer.__name__} no longer has a method {name}, with which GEKO {method.why}")
            continue
        have = tuple(inspect.signature(getattr(trainer, name)).parameters)[1:]
        fits = have == method.parameters
        if method.parameters[-1:] == (MORE,):
            fits = have[: len(method.parameters) - 1] == method.parameters[:-1]
        if not fits:
            found.append(
                f"{trainer.__name__}.{name} takes ({', '.join(have)}) now, and GEKO, which {method.why}, expects "
                f"({', '.join(method.parameters)})"
            )
        elif name not in names and not name.startswith("__") and name not in ("train", "predict"):  # called by users
            found.append(f"no method of {trainer.__name__} calls {name} any longer, with which GEKO {method.why}")
    found += [
        f"{trainer.__name__} no longer has an attribute {name}, from which GEKO reads {why}"
        for name, why in read.items()
        if name not in names
    ]
    return found


def names_in(trainer: type) -> set[str]:
    """The names of all attributes that the methods of `trainer` itself, not of its bases, use."""
    functions = [inspect.unwrap(value) for value in vars(trainer).values() if callable(value)]
    return {name for each in functions if isinstance(each, types.FunctionType) for name in each.__code__.co_names}
