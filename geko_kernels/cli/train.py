"""`python -m geko_kernels train`: fine-tune a causal language model or a classifier."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import DataCollatorWithPadding, EvalPrediction, TrainerCallback

from geko_kernels.cli.clean import note_data
from geko_kernels.cli.environment import check_variables
from geko_kernels.cli.errors import UsageError
from geko_kernels.cli.model import load_config, load_model, load_tokenizer, most_tokens
from geko_kernels.cli.options import TrainOptions
from geko_kernels.cli.run_folder import check_checkpoint, check_loss, check_output, find_checkpoint, newest_checkpoint
from geko_kernels.cli.settings import check_best_metric, make_arguments, make_config
from geko_kernels.training.formats import EncodedDataset, Records, encode_records, find_classes, read_records
from geko_kernels.training.report.efficiency import REPORT_NAME
from geko_kernels.training.report.report import write_report
from geko_kernels.training.resumed import ResumeError
from geko_kernels.training.trainer import GEKOTrainer

_DENIED = (errno.EROFS, errno.EACCES, errno.EPERM)
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, *_DENIED)


class _Task(NamedTuple):
    """The model, the data, and lines that say how the data were read."""

    model: Any
    tokenizer: Any
    records: Records
    train: EncodedDataset
    evaluation: EncodedDataset | None
    is_classification: bool
    notes: list[str]


class _Begun(TrainerCallback):
    """Whether the first step has begun; settings are refused before it."""

    yes = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.yes = True


def train(options: TrainOptions) -> None:
    """Train as `options` say; leaves checkpoints, the model, its tokenizer and the report in `output_dir`.

    Raises:
        UsageError, DataError: the run is not possible; raised before anything is trained, except for a full disk.
        KeyboardInterrupt: says how to resume.
    """
    check_variables()
    check_output(options)
    checkpoint = find_checkpoint(options)
    config, arguments = make_config(options), make_arguments(options)
    begun = _Begun()
    if checkpoint:
        check_loss(checkpoint, options.loss)
    with _interrupt_told(options):
        task = _make_task(options)
        check_best_metric(arguments, task.is_classification)
        if checkpoint:
            check_checkpoint(checkpoint, task.model)
    with _interrupt_told(options), _refusals_told(options, begun):
        trainer = GEKOTrainer(
            model=task.model,
            args=arguments,
            config=config,
            train_dataset=task.train,
            eval_dataset=task.evaluation,
            processing_class=task.tokenizer,
            data_collator=DataCollatorWithPadding(task.tokenizer) if task.is_classification else None,
            compute_metrics=_accuracy if task.is_classification else None,
            callbacks=[begun],
        )
        if trainer.is_world_process_zero():
            print("\n".join(task.notes))
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        if trainer.is_world_process_zero():
            note_data(options.output_dir, task.records, options.label_column)
            _print_summary(trainer.get_efficiency_report(), write_report(options.output_dir))


@contextmanager
def _interrupt_told(options: TrainOptions) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"interrupted; {_how_to_go_on(options)}") from stop


@contextmanager
def _refusals_told(options: TrainOptions, begun: _Begun) -> Iterator[None]:
    """Turn errors that the user can fix into one line: settings refused before the first step, a full disk or GPU."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"the GPU's memory is full ({error}): lower --batch-size (and raise --gradient-accumulation-steps by the "
            f"same factor) or --max-length; {_how_to_go_on(options)}"
        ) from error
    except (OSError, SafetensorError, RuntimeError, ValueError, ImportError) as error:
        if _cannot_write(error):
            denied = getattr(error, "errno", None) in _DENIED
            mend = "give another --output-dir, or allow writing there" if denied else "free some space"
            raise UsageError(
                f"cannot write to {options.output_dir} ({error}): {mend}; {_how_to_go_on(options)}"
            ) from error
        if begun.yes or isinstance(error, (RuntimeError, ModuleNotFoundError, BrokenPipeError)):
            raise
        raise UsageError(f"--resume: {error}" if isinstance(error, ResumeError) else str(error)) from error


def _cannot_write(error: Exception) -> bool:
    if isinstance(error, RuntimeError):  # what torch.save raises
        return "inline_container" in str(error)
    return isinstance(error, SafetensorError) or getattr(error, "errno", None) in _CANNOT_WRITE


def _how_to_go_on(options: TrainOptions) -> str:
    last = newest_checkpoint(options)
    if last:
        return f"the same command with --resume continues from {last}"
    if (Path(options.output_dir) / REPORT_NAME).exists():
        return "the training had ended, but there is no checkpoint of it: start again with another --output-dir"
    if options.resume:
        return f"no checkpoint has been written since; the same command continues from {options.resume} again"
    return "no checkpoint has been written, so the same command starts from the beginning"


def _make_task(options: TrainOptions) -> _Task:
    records = read_records(options.data, options.label_column)
    held_out = read_records(options.eval_data, options.label_column) if options.eval_data else None
    if held_out is not None and held_out.fields != records.fields:
        raise UsageError(
            f"{held_out.source} has the fields {', '.join(held_out.fields)}, but {records.source} has "
            f"{', '.join(records.fields)}: --eval-data must have the same fields as --data"
        )
    notes = [f"{options.data}: {len(records.rows)} samples with {', '.join(records.fields)}"]
    config, tokenizer = load_config(options), load_tokenizer(options)
    classes = find_classes(records, config.id2label) if records.is_classification else None
    if classes and classes.note:
        notes.append(classes.note)
    numbers = [classes.numbers(part) if classes and part else None for part in (records, held_out)]
    model = load_model(options, classes.names if classes else None, tokenizer)
    limit = most_tokens(model, tokenizer) or options.max_length
    length, where = limit, f"the {limit} tokens that the model can read"
    if options.max_length <= limit:
        length, where = options.max_length, f"--max-length {options.max_length}"
    train, evaluation = (
        encode_records(part, tokenizer, length, labels, where) if part else None
        for part, labels in zip((records, held_out), numbers, strict=True)
    )
    assert train is not None
    train.class_names = classes.names if classes else []  # the report names labels by them
    notes += [*train.notes, *(evaluation.notes if evaluation else ())]
    return _Task(model, tokenizer, records, train, evaluation, classes is not None, notes)


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, -1) == prediction.label_ids))}


def _print_summary(figures: dict[str, Any], page: Path) -> None:
    print(
        f"trained {figures['samples_backward']:,} samples of the standard run's {figures['samples_standard']:,} "
        f"({figures['saved_compute']:.1%} of its work not done) in {figures['seconds']['total']:.1f} s\nreport: {page}"
    )
