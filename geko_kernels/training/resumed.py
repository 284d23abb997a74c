"""Resuming with other settings than those of the checkpoint: an error, or a warning that names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from geko_kernels.training.fingerprint import changed_items


class ResumeError(ValueError):
    """The checkpoint cannot be resumed by this run."""


_LENGTH = "the learning rate continues from the run's position in its new length"
_BATCH = "samples of the current epoch that do not fill a step of the new size are trained again"
_EFFECTS = {
    "num_train_epochs": _LENGTH,
    "max_steps": _LENGTH,
    "samples in a batch of all processes": _BATCH,
    "tokens in a packed row": "the rest of the current epoch keeps its packs",
    "gradient_accumulation_steps": _BATCH,
    "processes": "each has other random numbers",
    "seed of the order": "later epochs are drawn in another order",
    "GEKOConfig": "the rest of the current epoch keeps its plan, all else follows the new config",
}


def run_settings(trainer: Any) -> dict[str, Any]:
    """The settings that a checkpoint records, plain values by name."""
    args = trainer.args
    return {
        "counted in": "steps" if trainer.counts_steps else "epochs",
        "num_train_epochs": args.num_train_epochs,
        "max_steps": args.max_steps,
        "samples in a batch of all processes": trainer._micro_batch,
        "tokens in a packed row": trainer._row_tokens,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "processes": args.world_size,
        "seed of the order": args.seed if args.data_seed is None else args.data_seed,
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each setting that has changed, with its effect on the run.

    Raises:
        ResumeError: one run is counted in steps, the other in epochs.
    """
    if before.get("counted in", now["counted in"]) != now["counted in"]:
        raise ResumeError(
            f"the checkpoint's run was counted in {before['counted in']}, this one is in {now['counted in']}: resume "
            "with the same max_steps (or config.spend_saved) as the run was started with. To count differently, load "
            "the model from the checkpoint and start a new run"
        )
    ignored = {"counted in", "num_train_epochs" if now["max_steps"] > 0 else "max_steps"}
    lines = []
    for name, effect in _EFFECTS.items():
        if name in ignored or name not in before or _plain(before[name]) == _plain(now[name]):
            continue
        lines.append(f"{_shown(name, before[name], now[name])}: {effect}")
    return lines


def _plain(value: Any) -> Any:
    return (
        {name: _plain(item) for name, item in value.items()}
        if isinstance(value, dict)
        else (list(value) if isinstance(value, tuple) else value)
    )


def _shown(name: str, before: Any, now: Any) -> str:
    if not isinstance(before, dict):
        return f"{name} was {before}, is {now}"
    before, now = _plain(before), _plain(now)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return f"{name} " + ", ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in changed)


def check_data(checkpoint: str, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Refuse a training set other than that of the checkpoint's learning state.

    Raises:
        ResumeError: items differ; says how many, and how to train on the new data.
    """
    if before is None or len(before["items"]) != len(
        now["items"]
    ):  # an older checkpoint; another length is refused earlier
        return
    changed, compared = changed_items(before, now)
    if changed:
        raise ResumeError(
            f"{checkpoint} was written with another train_dataset: of {compared} items compared, {changed} have "
            "changed, and the learning state is kept by position. Resume with the dataset that the run was started "
            "with, in the same order. To train on this one, load the model from the checkpoint and start a new run, "
            "without resume_from_checkpoint"
        )


def holds_only_the_model(checkpoint: str) -> bool:
    """Whether it was written with `save_only_model=True`."""
    return not any(Path(checkpoint).glob("rng_state*.pth"))
