"""`python -m geko_kernels train`: fine-tune a causal language model or a classifier."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
)
from transformers.trainer import TRAINER_STATE_NAME

from geko_kernels.cli.data import Records, encode, label_names, read_records
from geko_kernels.cli.errors import UsageError
from geko_kernels.cli.options import LAST_CHECKPOINT, TrainOptions
from geko_kernels.config import GEKOConfig
from geko_kernels.state import SampleState
from geko_kernels.training.arguments import GEKOTrainingArguments
from geko_kernels.training.checkpoint import STATE_NAME, last_complete
from geko_kernels.training.efficiency import REPORT_NAME
from geko_kernels.training.report import write_report
from geko_kernels.training.resumed import ResumeError
from geko_kernels.training.trainer import GEKOTrainer


class _Data(NamedTuple):
    train: list[dict[str, Any]]
    evaluation: list[dict[str, Any]] | None
    names: list[str]  # classes; empty for language modelling


def train(options: TrainOptions) -> None:
    """Train as `options` say; leaves checkpoints, the model, its tokenizer and the report in `output_dir`.

    Raises:
        UsageError: what is asked for cannot be done; says why before anything is trained.
    """
    checkpoint = _checkpoint(options)
    config, arguments = _config(options), _arguments(options)
    if checkpoint is not None:
        _check_loss(checkpoint, options.loss)
    records = read_records(options.data)
    held_out = read_records(options.eval_data) if options.eval_data else None
    tokenizer = _tokenizer(options.model)
    data = _encode(records, held_out, tokenizer, options.max_length)
    trainer = GEKOTrainer(
        model=_model(options.model, data.names, tokenizer),
        args=arguments,
        config=config,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer) if data.names else None,
        compute_metrics=_accuracy if data.names else None,
    )
    if trainer.is_world_process_zero():
        print(f"{options.data}: {len(data.train)} samples with {', '.join(records.fields)}")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except ResumeError as error:
        raise UsageError(f"--resume: {error}") from error
    trainer.save_model()
    if trainer.is_world_process_zero():
        _print_summary(trainer.get_efficiency_report(), write_report(options.output_dir))


def _checkpoint(options: TrainOptions) -> str | None:
    """The checkpoint to go on from; refuses to write over a run that is there."""
    folder = Path(options.output_dir)
    last = last_complete(options.output_dir, TRAINER_STATE_NAME) if folder.is_dir() else None
    if not options.resume:
        if last or (folder / REPORT_NAME).exists():
            raise UsageError(f"{folder} already holds a run: go on with --resume, or give another --output-dir")
        return None
    if options.resume == LAST_CHECKPOINT:
        if last is None:
            raise UsageError(f"--resume: {folder} holds no checkpoint; leave --resume out to start the run")
        return last
    if not Path(options.resume).is_dir():
        raise UsageError(f"--resume: there is no directory {options.resume}; give a checkpoint-N directory")
    return options.resume


def _check_loss(checkpoint: str, loss: str) -> None:
    """A run begun with one loss and ended with the other would be neither."""
    state = Path(checkpoint) / STATE_NAME
    if not state.is_file():
        return  # the trainer says what is missing
    before = "standard" if SampleState.load(state).config == GEKOConfig.uniform() else "geko"
    if before != loss:
        raise UsageError(
            f"--resume: {checkpoint} was written with --loss {before}, and --loss {loss} would go on with a run that "
            f"is neither. Give --loss {before}, or start a run of its own with another --output-dir (from the weights "
            f"trained so far with --model {checkpoint})"
        )


def _config(options: TrainOptions) -> GEKOConfig:
    if options.loss == "standard":
        if options.geko or options.preset != "recommended":
            raise UsageError("`geko` settings and --preset need --loss geko; the standard loss has no use for them")
        return GEKOConfig.uniform()
    preset = getattr(GEKOConfig, options.preset)()
    known = preset.to_dict()
    unknown = sorted(set(options.geko) - set(known))
    if unknown:
        raise UsageError(f"geko: unknown {', '.join(unknown)}; GEKOConfig has {', '.join(known)}")
    try:
        return GEKOConfig.from_dict({**known, **options.geko})
    except (TypeError, ValueError) as error:
        raise UsageError(f"geko: {error}") from error


def _arguments(options: TrainOptions) -> GEKOTrainingArguments:
    from_options = {
        "output_dir": options.output_dir,
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "learning_rate": options.learning_rate,
        "bf16": options.precision == "bf16",
        "fp16": options.precision == "fp16",
        "seed": options.seed,
    }
    defaults = {
        "per_device_eval_batch_size": options.batch_size,
        "eval_strategy": "epoch" if options.eval_data else "no",
        "save_strategy": "epoch",
        "logging_steps": 10,
        "report_to": "none",
        "use_cpu": not torch.accelerator.is_available(),  # else processes on CPUs know nothing of each other
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    known = {field.name for field in dataclasses.fields(GEKOTrainingArguments) if field.init}
    for name in options.training_arguments:
        if name in from_options:
            raise UsageError(f"training_arguments: {name} has an option of its own; see `train --help`")
        if name not in known:
            raise UsageError(
                f"training_arguments: GEKOTrainingArguments has no {name!r}; see transformers.TrainingArguments"
            )
    try:
        return GEKOTrainingArguments(**{**defaults, **options.training_arguments, **from_options})
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(f"Transformers refuses these settings: {error}") from error


def _tokenizer(model: str) -> Any:
    tokenizer = _load(AutoTokenizer, model)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(
                f"the tokenizer of {model} has neither a padding nor an end token; add one and save it again"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _model(path: str, names: list[str], tokenizer: Any) -> Any:
    """In float32, which --precision autocasts from; with a new head where its classes are not `names`."""
    if not names:
        return _load(AutoModelForCausalLM, path, dtype=torch.float32)
    classes = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = _load(
        AutoModelForSequenceClassification, path, dtype=torch.float32, ignore_mismatched_sizes=True, **classes
    )
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders classify at the last token before the padding
    return model


def _load(kind: Any, path: str, **settings: Any) -> Any:
    try:
        return kind.from_pretrained(path, **settings)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot load --model {path} ({error}); give a directory that `save_pretrained` wrote, or a hub name"
        ) from error


def _encode(records: Records, held_out: Records | None, tokenizer: Any, max_length: int) -> _Data:
    if held_out is not None and held_out.fields != records.fields:
        raise UsageError(
            f"{held_out.source} has the fields {', '.join(held_out.fields)}, but {records.source} has "
            f"{', '.join(records.fields)}: --eval-data must have the same"
        )
    names = label_names(records) if records.is_classification else []
    evaluation = encode(held_out, tokenizer, max_length, names) if held_out is not None else None
    return _Data(encode(records, tokenizer, max_length, names), evaluation, names)


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, -1) == prediction.label_ids))}


def _print_summary(figures: dict[str, Any], page: Path) -> None:
    print(
        f"trained {figures['samples_backward']:,} samples of the standard run's {figures['samples_standard']:,} "
        f"({figures['saved_compute']:.1%} of its work not done) in {figures['seconds']['total']:.1f} s\nreport: {page}"
    )
