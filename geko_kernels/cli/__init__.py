"""The command line: `geko env | train | report RUN_DIR | clean RUN_DIR`, the same as `python -m geko_kernels`."""

from __future__ import annotations

import argparse
import gc
import io
import os
import select
import sys
from collections.abc import Sequence
from typing import Any

from geko_kernels import __version__
from geko_kernels.cli.errors import UsageError
from geko_kernels.cli.options import add_options, read_options
from geko_kernels.extras import TRAINING
from geko_kernels.training.formats.errors import DataError

_TRAINING_MODULES = ("transformers", "accelerate", "tqdm", "rich", "matplotlib", "jinja2", "yaml")
_TRAIN_HELP = """\
data: a .jsonl, .ndjson, .json (lines or an array), .csv, .tsv or .parquet file, all but the last also with .gz added;
a folder of such files, read in sorted order (if there are several splits, the training split); a directory written by
`Dataset.save_to_disk`; or a dataset on the hub, owner/name (its "train" split). Other paths are not looked up there.

columns, taken from the first record:
  messages: [{"role": ..., "content": ...}, ...]         a chat; every assistant turn is trained on
  conversations: [{"from": ..., "value": ...}, ...]      the same in ShareGPT format: human, gpt, system, tool
  prompt, completion                                     texts, or lists of turns; only the completion is trained on
  instruction, output, and input if there is any         only the output is trained on
  text, label                                            classification; labels are numbers, names, or true and false;
                                                         unless they are 0, 1, ... without a gap, they are numbered in
                                                         sorted order
  text                                                   every token is trained on
Chats go through the tokenizer's chat template, and so do instructions if it has one.

The report names a sample by its position in the data, counted from 0. Records that are cut to --max-length, or skipped
because no token of them would be trained, are counted; skipped records keep their positions. See docs/data.md.
In the YAML file, `geko:` takes GEKOConfig fields and `training_arguments:` takes GEKOTrainingArguments fields.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0; 2 after one line on stderr that says what is wrong with the input; 130 after Ctrl-C; 141 if the output's reader
    has closed the pipe (`| head`).
    """
    parsed = vars(_parser().parse_args(arguments))
    command = parsed.pop("command")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the terminal's encoding lacks are escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        _run(command, parsed)
        return 0
    except (UsageError, DataError) as error:
        message, status = str(error), 2
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _TRAINING_MODULES:
            raise
        message, status = f"needs {error.name}: {TRAINING}", 2
    except KeyboardInterrupt as stop:
        early = "interrupted" + ("; nothing had begun, so give the same command again" if command == "train" else "")
        message, status = str(stop) or early, 130
    except OSError as error:
        gone = isinstance(error, BrokenPipeError) and _reader_gone()
        if command == "train" and not gone:
            raise
        _drop_output()
        if gone and command != "train":
            return 141
        message, status = f"cannot write the output ({error.strerror})", 2
        if gone:
            message, status = "nothing reads the output any more, so the run has stopped; continue with --resume", 141
    gc.collect()  # closes the progress bars of the stopped run, which would write below the message
    print(f"geko_kernels {command}: {' '.join(message.split())}", file=sys.stderr)
    return status


def _reader_gone() -> bool:
    """Whether stdout is a pipe that nobody reads."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _drop_output() -> None:
    """Drop the buffered output: writing it at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(command: str, parsed: dict[str, Any]) -> None:
    if command == "env":
        from geko_kernels.cli.environment import describe

        print(describe(), flush=True)
    elif command == "report":
        from geko_kernels.cli.report import report

        print(report(parsed["run_dir"]), flush=True)
    elif command == "clean":
        from geko_kernels.cli.clean import clean

        print(clean(**parsed), flush=True)
    else:
        options = read_options(parsed, parsed.pop("config"))
        from geko_kernels.cli.train import train

        train(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m geko_kernels", description="GEKO for PyTorch.")
    parser.add_argument("--version", action="version", version=f"geko_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="env | train | report | clean")
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
    clean = commands.add_parser("clean", help="write the data of a run without the rows whose labels look wrong")
    clean.add_argument("run_dir", metavar="RUN_DIR", help="output directory of a `train` run that has ended")
    clean.add_argument("--out", required=True, metavar="FILE", help="a .jsonl or .csv file, with the same columns")
    clean.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    return parser
