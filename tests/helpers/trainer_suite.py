"""Transformers' own Trainer tests with `GEKOTrainer` under `GEKOConfig.uniform()` in Trainer's place; outside CI.

    git clone --depth 1 --branch v5.17.0 https://github.com/huggingface/transformers /tmp/transformers
    PYTHONPATH=$PWD python tests/helpers/trainer_suite.py /tmp/transformers/tests   # tests/trainer/test_*.py
    PYTHONPATH=$PWD python tests/helpers/trainer_suite.py /tmp/transformers/tests -k resume   # what pytest takes

Most of those tests train a line through points by the mean squared error, which GEKO refuses. So each test runs four
times: as it is and with its regression made a choice between two classes, with Trainer and with GEKOTrainer each.

    passes          with GEKOTrainer, as it is or with classes
    differs         Trainer passes with classes, or as it is where it trains no regression, and GEKOTrainer does not
    does not apply  Trainer does not pass with classes, GEKOTrainer not as it is: asserts figures of a regression
    not run         skipped, or Trainer fails as it is: no GPU, no network, a package that is missing

Prints one line a test with GEKOTrainer's error, and the counts. Exit code 1 if a test differs.
"""

from __future__ import annotations

import collections
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RUNS = [(kind, form) for form in ("as it is", "classes") for kind in ("Trainer", "GEKOTrainer")]
HELPERS = "trainer.trainer_test_utils"


def put_geko_in_place() -> None:
    """`from transformers import Trainer` gives GEKOTrainer, its config `uniform()` where none is given."""
    import geko_kernels as gk

    class Trainer(gk.GEKOTrainer):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **{"config": gk.GEKOConfig.uniform(), **named})

    importlib.import_module("transformers").Trainer = Trainer  # the module as it is after that import


def make_classes(helpers: Any) -> None:
    """The regression's datasets, models and metrics in `helpers` become those of two classes, y above 3 or not."""
    import numpy as np
    import torch
    from torch.nn.functional import cross_entropy

    start = helpers.RegressionDataset.__init__

    def with_classes(self: Any, *args: Any, **named: Any) -> None:
        start(self, *args, **named)
        self.ys = [(y > 3).astype(np.int64) for y in self.ys]

    def two(line: Any) -> Any:
        """`forward` whose logits are 0 and what `forward` returned, and whose loss is their cross-entropy."""

        def forward(self: Any, input_x: torch.Tensor, labels: Any = None, **kwargs: Any) -> Any:
            out = line(self, input_x, **kwargs)
            y = (out["output"] if isinstance(out, dict) else out[0]).reshape(input_x.shape)
            logits = torch.stack([torch.zeros_like(y), y], dim=-1)
            loss = None if labels is None else cross_entropy(logits, labels)
            if isinstance(out, dict):
                return {"logits": logits} if loss is None else {"logits": logits, "loss": loss}
            return (logits,) * len(out) if loss is None else (loss, *(logits,) * len(out))

        return forward

    helpers.RegressionDataset.__init__ = with_classes
    for name, model in vars(helpers).items():
        if name.startswith("Regression") and isinstance(model, type) and issubclass(model, torch.nn.Module):
            if name == "RegressionPreTrainedModelWithGradientCheckpointing":
                model.forward = two(_over_features(model.forward))
            else:
                model.forward = two(model.forward)

    def accuracy(self: Any, prediction: Any) -> dict[str, float]:
        logits, labels = prediction
        return {"accuracy": float((np.asarray(logits).argmax(-1) == np.asarray(labels)).mean())}

    helpers.AlmostAccuracy.__call__ = accuracy


def _over_features(line: Any) -> Any:
    """Its layers take (..., features): one feature a sample."""
    return lambda self, input_x, **kwargs: line(self, input_x.unsqueeze(-1), **kwargs)


class Outcomes:
    """A plugin of pytest that keeps {test: (outcome, error)}."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome != "passed" or report.when == "call":
            crash = getattr(report.longrepr, "reprcrash", None)
            if report.nodeid not in self.of or report.outcome == "failed":
                self.of[report.nodeid] = (report.outcome, crash.message.splitlines()[0] if crash else "")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.of[report.nodeid] = ("failed", str(report.longrepr).strip().splitlines()[-1])


def run(folder: Path, kind: str, form: str, out: Path, options: list[str]) -> None:
    """The tests in this process; their outcomes go into `out`."""
    import pytest

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(folder.parent))
    if kind == "GEKOTrainer":
        put_geko_in_place()
    if form == "classes":
        make_classes(importlib.import_module(f"{folder.name}.{HELPERS}"))
    outcomes = Outcomes()
    files = sorted(str(path) for path in (folder / "trainer").glob("test_*.py"))
    common = ["-q", "--no-header", "-p", "no:cacheprovider", f"--rootdir={folder.parent}", "-c", os.devnull]
    pytest.main([*common, *files, *options], plugins=[outcomes])
    out.write_text(json.dumps(outcomes.of))


def verdict(found: dict[tuple[str, str], tuple[str, str]]) -> tuple[str, str]:
    """(verdict, GEKOTrainer's error) of one test's four runs."""
    passed = {key: outcome == "passed" for key, (outcome, _) in found.items()}
    if passed["GEKOTrainer", "as it is"] or passed["GEKOTrainer", "classes"]:
        other = found["GEKOTrainer", "as it is"][1]
        return "passes", "as it is" if passed["GEKOTrainer", "as it is"] else f"with classes; as it is: {other}"
    if not passed["Trainer", "as it is"]:
        return "not run", found["Trainer", "as it is"][1]
    if passed["Trainer", "classes"]:
        return "differs", found["GEKOTrainer", "classes"][1]
    return "does not apply", found["GEKOTrainer", "as it is"][1]


def main(folder: Path, options: list[str]) -> int:
    outcomes: dict[str, dict[tuple[str, str], tuple[str, str]]] = collections.defaultdict(dict)
    with tempfile.TemporaryDirectory() as scratch:
        for kind, form in RUNS:
            out = Path(scratch) / "outcomes.json"
            command = [sys.executable, __file__, str(folder), *options]
            env = {**os.environ, "TRAINER_SUITE": json.dumps([kind, form, str(out)])}
            subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
            for test, outcome in json.loads(out.read_text()).items():
                outcomes[test][kind, form] = outcome
            out.unlink()
    counts: collections.Counter = collections.Counter()
    for test, found in sorted(outcomes.items()):
        name, error = verdict({key: found.get(key, ("missing", "")) for key in RUNS})
        counts[name] += 1
        print(f"{name:15} {test.split('/')[-1]}  {error[:300]}")
    print(dict(counts))
    return int(counts["differs"] > 0)


if __name__ == "__main__":
    place, rest = Path(sys.argv[1]).resolve(), sys.argv[2:]
    if "TRAINER_SUITE" in os.environ:
        run_kind, run_form, target = json.loads(os.environ["TRAINER_SUITE"])
        run(place, run_kind, run_form, Path(target), rest)
    else:
        sys.exit(main(place, rest))
