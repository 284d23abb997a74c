"""Reads a run's figures for its report: from `geko_report.json`, or from the newest checkpoint of an unfinished run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from geko_kernels._files import read_object
from geko_kernels.state import SampleState
from geko_kernels.training.checkpoint import STATE_NAME, last_complete, load_files
from geko_kernels.training.report.efficiency import REPORT_NAME, Efficiency
from geko_kernels.training.report.facts import checkpoint_facts
from geko_kernels.training.report.summary import run_summary

_VERSION = 1
_TRAINER_STATE = "trainer_state.json"  # Transformers' name; importing Transformers for it would take seconds
_NUMBER = (int, float)
_MEASURED = (int, float, type(None))  # None: not measured
_EPOCH = {
    **dict.fromkeys(("epoch", "samples", "probes", "steps", "seconds", "quarantined", "forgotten"), _NUMBER),
    **dict.fromkeys(("loss", "accuracy"), _MEASURED),
    "buckets": dict.fromkeys(("FREEZE", "LIGHT", "FOCUS", "HARD"), _MEASURED),
}
_EFFICIENCY = {
    **dict.fromkeys(("samples_standard", "samples_forward", "samples_backward", "samples_idle"), _NUMBER),
    **dict.fromkeys(("tokens_forward", "tokens_backward"), _MEASURED),
    "saved_compute": _NUMBER,
    "seconds": {
        **dict.fromkeys(("total", "steps", "probes", "selection"), _NUMBER),
        **dict.fromkeys(("evaluation", "checkpoints"), _MEASURED),
    },
    "epochs": [_EPOCH],
}
_SHAPE = {
    "num_samples": int,
    "config": dict,
    "efficiency": _EFFICIENCY,
    "log_history": [{"epoch": _NUMBER}],
    "most_forgotten": [{"id": int, "times": int, "loss": _NUMBER, "bucket": str}],
    "num_quarantined": int,
    "quarantined": [int],
}
_LABEL = {
    "samples": int,
    **dict.fromkeys(("left_out", "quarantined", "held_back", "visits"), _NUMBER),
    "right": _MEASURED,
}
_OPTIONAL = {  # older runs lack them
    "forecast": {"after_epoch": int, "text": str, "runs": [{"epochs": int, "saved": _NUMBER}]},
    "labels": {
        "num_labels": int,
        "all": _LABEL,
        "listed": [{"label": str, **_LABEL}],
        "warning": (str, type(None)),
    },
    "run": dict,
    "observed": bool,
}


def read_figures(run_dir: Path) -> tuple[dict[str, Any], str]:
    """The dict of `geko_report.json` (see `efficiency.py`), and the checkpoint's name if it comes from one, else "".

    Raises:
        FileNotFoundError: neither `geko_report.json` nor a whole checkpoint in `run_dir`.
        ValueError: that file or checkpoint is damaged or of another version.
    """
    path, last = run_dir / REPORT_NAME, last_complete(run_dir, _TRAINER_STATE)
    run = _read_report(path) if path.is_file() else None
    if run is None and last is None:
        raise FileNotFoundError(
            f"no {path.name} and no whole checkpoint in {run_dir}; give the output_dir of a finished GEKOTrainer "
            "run, or of one that has saved a checkpoint"
        )
    checkpoint = Path(last) if last else None
    if checkpoint and (run is None or _step(run["log_history"]) < int(checkpoint.name.partition("-")[2])):
        return _checkpoint_figures(checkpoint), checkpoint.name
    assert run is not None
    return run, ""


def _step(log_history: list[dict[str, Any]]) -> int:
    return max((row["step"] for row in log_history if isinstance(row.get("step"), int)), default=1 << 62)


def _read_report(path: Path) -> dict[str, Any]:
    run = read_object(path)
    version = run.get("version")
    if version != _VERSION:
        raise ValueError(f"{path} has version {version}, this geko_kernels reads {_VERSION}; update geko_kernels")
    missing = sorted(_SHAPE.keys() - run.keys())
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {missing}")
    _check_shape(run, _SHAPE, str(path), "")
    for name, shape in _OPTIONAL.items():
        if run.get(name) is not None:
            _check_shape(run[name], shape, str(path), name)
    return run


def _checkpoint_figures(checkpoint: Path) -> dict[str, Any]:
    """The figures that the run would have written if it had ended at the checkpoint."""
    trained = read_object(checkpoint / _TRAINER_STATE)
    state = SampleState.load(checkpoint / STATE_NAME, "cpu")
    efficiency = Efficiency(torch.device("cpu"))
    _, sampler, counts = load_files(checkpoint, len(state), efficiency.sums.device, efficiency.state_dict())
    _check_shape(trained, {"log_history": [{"epoch": _NUMBER}]}, str(checkpoint / _TRAINER_STATE), "")
    efficiency.load_state_dict(counts)
    told: Any = SimpleNamespace(forgotten=sampler["forgotten"], doubtful=sampler.get("doubtful", 0))
    skipped = sampler.get("data", {}).get("skipped_rows", ())
    summary = run_summary(state, told, efficiency.report(), trained["log_history"], skipped)
    return {**summary, "run": checkpoint_facts(sampler.get("run", {}))}


def _check_shape(value: Any, shape: Any, path: str, name: str) -> None:
    """Check `value`; `shape` is a type or types, a list of one shape for all items, or a dict of required keys."""
    kind = list if isinstance(shape, list) else dict if isinstance(shape, dict) else shape
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{path} is damaged: {name or 'the whole'} is {type(value).__name__}")
    if isinstance(shape, list):
        for index, item in enumerate(value):
            _check_shape(item, shape[0], path, f"{name}[{index}]")
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            if key not in value:
                raise ValueError(f"{path} is damaged: {name or 'it'} lacks {key}")
            _check_shape(value[key], inner, path, f"{name}.{key}".lstrip("."))
