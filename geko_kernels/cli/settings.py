"""The options as a `GEKOConfig` and as `GEKOTrainingArguments`."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

import torch
from transformers.integrations import get_available_reporting_integrations

from geko_kernels.cli.errors import UsageError
from geko_kernels.cli.options import KINDS, TrainOptions
from geko_kernels.config import GEKOConfig
from geko_kernels.training.arguments import GEKOTrainingArguments

_SET_HERE = {"label_names": "`train` makes the labels itself: leave it out", "resume_from_checkpoint": "use --resume"}
_METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second")  # that every evaluation measures


def make_config(options: TrainOptions) -> GEKOConfig:
    """The preset, overridden by the `geko:` fields."""
    if options.loss == "standard":
        if options.geko or options.preset != "recommended":
            raise UsageError("`geko` settings and --preset need --loss geko; the standard loss does not use them")
        return GEKOConfig.uniform(auto_stop=options.auto)
    known = getattr(GEKOConfig, options.preset)().to_dict()
    if options.auto:
        known["auto_stop"] = True
    unknown = sorted(str(name) for name in options.geko if name not in known)
    if unknown:
        raise UsageError(f"geko: unknown {', '.join(unknown)}; GEKOConfig has {', '.join(known)}")
    try:
        return GEKOConfig.from_dict({**known, **options.geko})
    except (TypeError, ValueError) as error:
        fitting = options.auto and options.preset != "recommended"
        hint = "; --auto sets auto_stop, for which the default --preset recommended is made" if fitting else ""
        raise UsageError(f"geko: {error}{hint}") from error


def make_arguments(options: TrainOptions) -> GEKOTrainingArguments:
    """The options and the `training_arguments:` fields, on top of `train`'s defaults."""
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
        "use_cpu": not torch.accelerator.is_available(),  # otherwise processes on CPUs do not communicate
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    hints = typing.get_type_hints(GEKOTrainingArguments)
    known = {field.name for field in dataclasses.fields(GEKOTrainingArguments) if field.init}
    for name, value in options.training_arguments.items():
        if name in from_options:
            raise UsageError(f"training_arguments: {name} has its own option; see `train --help`")
        if name in _SET_HERE:
            raise UsageError(f"training_arguments: {name} cannot be set here; {_SET_HERE[name]}")
        if name not in known:
            raise UsageError(
                f"training_arguments: GEKOTrainingArguments has no {name!r}; see transformers.TrainingArguments"
            )
        _check_kind(name, value, hints[name])
    try:
        arguments = GEKOTrainingArguments(**{**defaults, **options.training_arguments, **from_options})
        arguments.get_process_log_level()
    except Exception as error:  # none of our code runs here, and wrong values raise errors of many types
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise UsageError(f"training_arguments: Transformers refuses these settings: {reason}") from error
    _check_report_to(arguments)
    return arguments


def check_best_metric(arguments: GEKOTrainingArguments, is_classification: bool) -> None:
    """Refuse a metric that no evaluation measures; Transformers would fail after the first evaluation."""
    metrics = _METRICS + (("accuracy",) if is_classification else ())
    wanted = (arguments.metric_for_best_model or "loss").removeprefix("eval_")
    if arguments.load_best_model_at_end and wanted not in metrics:
        raise UsageError(
            f"training_arguments: metric_for_best_model must be one of {', '.join(metrics)}, got {wanted!r}"
        )


def _check_kind(name: str, value: Any, hint: Any) -> None:
    """Check a field's type, as Transformers does for only a few; fields that YAML cannot express cannot be set."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = [typing.get_origin(kind) or kind for kind in (typing.get_args(hint) if union else (hint,))]
    kinds = [bool if kind is typing.Literal else kind for kind in kinds]  # the only such field is False
    plain = [kind for kind in kinds if kind in KINDS]
    if type(value) not in plain and not (float in plain and type(value) is int):
        allowed = " or ".join(KINDS[kind] for kind in plain)
        raise UsageError(f"training_arguments: {name} must be {allowed}, got {value!r}")


def _check_report_to(arguments: GEKOTrainingArguments) -> None:
    wanted = [arguments.report_to] if isinstance(arguments.report_to, str) else arguments.report_to or []
    missing = sorted(set(map(str, wanted)) - {"flyte", *get_available_reporting_integrations()})
    if missing:
        raise UsageError(
            f"training_arguments: report_to names {', '.join(missing)}, whose package is not installed or which "
            "Transformers does not know: install it with pip, or set report_to: none"
        )
