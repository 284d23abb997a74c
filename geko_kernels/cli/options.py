"""The options of `train`: one dataclass, filled from flags and a YAML file."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import types
from dataclasses import dataclass
from typing import Any

from geko_kernels.cli.errors import UsageError

PRESETS = ("recommended", "original", "aggressive", "balanced", "conservative", "gekolib")
LAST_CHECKPOINT = "last"
_MOST = 2**31 - 1
_WHOLE = {
    "batch_size": (1, _MOST),
    "gradient_accumulation_steps": (1, _MOST),
    "max_length": (2, _MOST),
    "seed": (0, 2**32 - 1),  # NumPy's limit
}
KINDS = {  # of values in YAML
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    list: "a list",
    types.NoneType: "null",
}
_METAVARS = {"label_column": "NAME", "str": "PATH", "int": "N", "float": "X"}
_POSITIVE = {"epochs": 1_000_000, "learning_rate": 1_000_000}


def _option(default: Any, text: str, kind: type = str, choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "kind": kind, "choices": choices})


def _mapping() -> Any:
    return dataclasses.field(default_factory=dict, metadata={"kind": dict})


@dataclass(frozen=True)
class TrainOptions:
    """The options of `train`; `geko` and `training_arguments` can only be set in the YAML file.

    geko: fields of `GEKOConfig`, which override the preset's.
    training_arguments: fields of `GEKOTrainingArguments` that have no option here.
    """

    model: str = _option("", "model to fine-tune: a directory or a hub name (required)")
    data: str = _option("", "training data: a file, a folder or a hub name; see below (required)")
    eval_data: str = _option("", "held-out data in the same form, evaluated after each epoch")
    label_column: str = _option("", "column beside `text` with the label of a classification, if it is not `label`")
    output_dir: str = _option("", "directory for checkpoints, the model and the report (required)")
    loss: str = _option("geko", "standard: every sample weighs 1 and none is left out", choices=("geko", "standard"))
    preset: str = _option("recommended", "GEKOConfig preset for --loss geko", choices=PRESETS)
    auto: bool = _option(False, "stop where held-back samples are best; --epochs is then the most", bool)
    epochs: float = _option(3.0, "length of the run, in epochs of the standard run", float)
    batch_size: int = _option(8, "samples per device and forward pass", int)
    gradient_accumulation_steps: int = _option(1, "forward passes per optimizer step", int)
    learning_rate: float = _option(5e-5, "peak learning rate", float)
    max_length: int = _option(1024, "tokens kept of a sample", int)
    precision: str = _option("fp32", "autocast to bf16 or fp16; weights stay fp32", choices=("fp32", "bf16", "fp16"))
    seed: int = _option(42, "seed of the data order, dropout and new layers", int)
    trust_remote_code: bool = _option(False, "run the Python code that comes with the model", bool)
    resume: str = _option("", "continue from a checkpoint; without a value, from the last one in --output-dir")
    geko: dict[str, Any] = _mapping()
    training_arguments: dict[str, Any] = _mapping()


_FIELDS = {field.name: field for field in dataclasses.fields(TrainOptions)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """One flag for each option, plus `--config`; flags that are not given are absent from the result."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with these options by name; flags win over it")
    for field in _FIELDS.values():
        kind, choices = field.metadata["kind"], field.metadata.get("choices")
        if kind is dict:
            continue
        flag: dict[str, Any] = {"action": "store_true"}
        if kind is not bool:
            metavar = None if choices else _METAVARS.get(field.name) or _METAVARS[kind.__name__]
            flag = {"type": kind, "choices": choices or None, "metavar": metavar}
        if field.name == "resume":
            flag |= {"nargs": "?", "const": LAST_CHECKPOINT}
        default = f" (default: {field.default})" if field.default not in ("", False) else ""
        told = field.metadata["help"] + default
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=told, **flag)


def read_options(flags: dict[str, Any], config: str | None) -> TrainOptions:
    """The options from the YAML file `config`, if any, overridden by `flags`.

    Raises:
        UsageError: a missing file, an unknown option, a value of the wrong kind, or a required option left out.
    """
    values = {**(_from_file(config) if config else {}), **flags}
    for name in ("model", "data", "output_dir"):
        if not values.get(name):
            raise UsageError(f"--{name.replace('_', '-')} is required, as a flag or as `{name}:` in the --config file")
    for name, (least, most) in _WHOLE.items():
        if not least <= values.get(name, least) <= most:
            raise UsageError(f"{name} must be at least {least} and at most {most:,}, got {values[name]}")
    for name, largest in _POSITIVE.items():
        value = values.get(name, 1.0)
        if not (math.isfinite(value) and 0 < value <= largest):
            raise UsageError(f"{name} must be above 0 and at most {largest:,}, got {value}")
    return TrainOptions(**values)


def _from_file(path: str) -> dict[str, Any]:
    from geko_kernels.cli.yaml_file import read_yaml  # `env` and `report` need no PyYAML

    return {name: _checked(path, name, value) for name, value in read_yaml(path).items()}


def _checked(path: str, name: str, value: Any) -> Any:
    if name not in _FIELDS:
        near = difflib.get_close_matches(str(name), _FIELDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known options: {', '.join(_FIELDS)}."
        raise UsageError(
            f"--config {path}: unknown option {name!r}; {hint} Other trainer settings go under `training_arguments:`, "
            "GEKOConfig fields under `geko:`"
        )
    kind, choices = _FIELDS[name].metadata["kind"], _FIELDS[name].metadata.get("choices")
    if name == "resume" and isinstance(value, bool):
        return LAST_CHECKPOINT if value else ""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"--config {path}: {name} must be {KINDS[kind]}, got {value!r}")
    if choices and value not in choices:
        raise UsageError(f"--config {path}: {name} must be one of {', '.join(choices)}, got {value!r}")
    return value
