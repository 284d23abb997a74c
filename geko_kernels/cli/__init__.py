"""The command line: `python -m geko_kernels env | train | report RUN_DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from geko_kernels.cli.errors import UsageError
from geko_kernels.cli.options import add_options, read_options

_TRAIN_HELP = """\
data, one JSON object a line, or the same columns from a `datasets` directory or hub name (its "train" split):
  {"text": ...}                     language modelling; every token is trained on
  {"prompt": ..., "completion": ...}  language modelling; only the completion is trained on
  {"text": ..., "label": ...}       classification; labels are numbers or names

The report calls a sample by its position in the data, counted from 0.
In the YAML file, `geko:` takes GEKOConfig fields and `training_arguments:` takes GEKOTrainingArguments fields.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 after telling on stderr what is wrong with the input."""
    parsed = vars(_parser().parse_args(arguments))
    command = parsed.pop("command")
    try:
        if command == "env":
            from geko_kernels.cli.environment import describe

            print(describe())
        elif command == "report":
            from geko_kernels.cli.report import report

            print(report(parsed["run_dir"]))
        else:
            from geko_kernels.cli.train import train

            config = parsed.pop("config")
            train(read_options(parsed, config))
    except UsageError as error:
        print(f"geko_kernels {command}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("geko_kernels"):
            raise
        print(f"geko_kernels {command} needs {error.name}: pip install 'geko_kernels[train]'", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m geko_kernels", description="GEKO for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="env | train | report")
    commands.add_parser("env", help="versions, devices and backends, to paste into a bug report")
    train = commands.add_parser(
        "train",
        help="fine-tune a causal language model or a classifier",
        epilog=_TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(train)
    report = commands.add_parser("report", help="make report.html and its PNGs from the figures of a run")
    report.add_argument("run_dir", metavar="RUN_DIR", help="output directory of a GEKOTrainer run")
    return parser
