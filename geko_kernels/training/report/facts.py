"""The facts at the head of a run's report: model, data, settings, device, date and versions."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import geko_kernels

Facts = dict[str, str]


def trainer_facts(trainer: Any) -> Facts:
    """Facts of a transformers.Trainer, as the page shows them."""
    args, model = trainer.args, trainer.model
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    size = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    kinds = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else " and ".join(sorted(kinds))
    steps = args.gradient_accumulation_steps
    batch = f"{args.per_device_train_batch_size} samples a device"
    batch += f", {steps} batches a step" if steps > 1 else ""
    batch += f", {args.world_size} processes" if args.world_size > 1 else ""
    tokens = getattr(getattr(trainer, "config", None), "batch_tokens", None)
    scheduler = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    return {
        "model": f"{type(model).__name__}{f' ({name})' if name else ''}, {size:,} parameters"
        + (f", {trained:,} of them trained" if trained < size else ""),
        "data": _data(trainer.train_dataset)
        + (f"; evaluation: {_data(trainer.eval_dataset)}" if trainer.eval_dataset is not None else ""),
        "length": f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
        "learning rate": f"{args.learning_rate:g}, {scheduler}",
        "batch": f"up to {tokens:,} tokens a device" if tokens else batch,
        "seed": str(args.seed),
        "device": f"{_device(args.device)}, {precision}",
        **_when_and_what("transformers", "accelerate"),
    }


def loader_facts(loader: Any) -> Facts:
    """Facts of a GEKOLoader, which knows neither model nor optimizer."""
    batch = f"{loader.batch_size} samples a device" + (f", {loader.world} processes" if loader.world > 1 else "")
    return {
        "data": _data(loader.dataset),
        "length": f"{loader.num_epochs} epochs",
        "batch": batch,
        "seed": str(loader.seed),
        "device": _device(loader.device),
        **_when_and_what(),
    }


def checkpoint_facts(settings: dict[str, Any]) -> Facts:
    """Facts of a checkpoint, which `run_settings` has stored."""
    names = {"num_train_epochs": "length", "samples in a batch of all processes": "batch", "seed of the order": "seed"}
    units = {"length": " epochs", "batch": " samples", "seed": ""}
    known = {names[key]: value for key, value in settings.items() if key in names and value is not None}
    if settings.get("max_steps", -1) > 0:
        known["length"], units["length"] = settings["max_steps"], " steps"
    return {name: f"{value:g}{units[name]}" for name, value in known.items()}


def _data(dataset: Any) -> str:
    if isinstance(dataset, Mapping) and 0 not in dataset:  # splits by name
        return ", ".join(f"{name}: {_data(part)}" for name, part in dataset.items())
    count = f"{len(dataset):,} samples" if hasattr(dataset, "__len__") else "samples"
    return f"{count} ({type(dataset).__name__})"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else str(device)


def _when_and_what(*packages: str) -> Facts:
    versions = [f"geko_kernels {geko_kernels.__version__}", f"torch {torch.__version__}"]
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # imported from a folder, not installed
            continue
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"date": date, "versions": ", ".join([*versions, f"Python {platform.python_version()}"])}
