"""Every tiny model of Transformers' auto mappings, two steps by `Trainer` beside two by `GEKOTrainer`; outside CI.

    PYTHONPATH=$PWD python tests/helpers/model_sweep.py /tmp/sweep.jsonl  # all, one line a model, then a table
    PYTHONPATH=$PWD python tests/helpers/model_sweep.py /tmp/some.jsonl --only GPT2    # classes whose name begins so
    PYTHONPATH=$PWD python tests/helpers/model_sweep.py /tmp/sweep.jsonl --jobs 2      # so many models at a time

Each class of the mappings for causal LM, sequence classification, token classification and seq2seq LM is built from a
small configuration (`tiny_configs.py`) in a process of its own, with a limit of time and memory. Both trainers start
from the same weights, seed, items and collator, with SGD at a constant rate and no dropout; `GEKOTrainer` has
`GEKOConfig.uniform()`. Verdicts:

    equal          logged losses, `evaluate()` and how far every parameter moved agree
    refused        `GEKOTrainer` raised a ValueError or TypeError of its own that says why
    different      it trained something else: the figures follow
    crash          it raised anything else, where Trainer trains
    trainer-fails  Trainer can't train the model either: it does not count
    not-built      no small model came of the configuration, and why

Exit code 1 if a model is different or crashes.
"""

from __future__ import annotations

import argparse
import collections
import copy
import inspect
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked child can't use its parent's threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tiny_configs import EOS, FIRST, LAST, tiny_config
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator
from transformers.models.auto import modeling_auto
from transformers.utils import logging

import geko_kernels as gk

SECONDS, MEMORY, PARAMETERS = 60, 16 << 30, 5_000_000
LOSS, MOVED = 2e-4, 2e-2  # how far losses, and moves of a parameter relative to its largest one, may be apart
TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "token": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
}
VERDICTS = ("equal", "refused", "different", "crash", "trainer-fails", "not-built")


class NotBuilt(Exception):
    """No small model came of a configuration."""


def classes() -> list[tuple[str, type, type]]:
    """(task, configuration class, model class), each model class once a task."""
    found: dict[tuple[str, str], tuple[str, type, type]] = {}
    for task, name in TASKS.items():
        for config, models in getattr(modeling_auto, name).items():
            for model in models if isinstance(models, tuple) else (models,):
                found.setdefault((task, model.__name__), (task, config, model))
    return list(found.values())


def items(task: str, count: int = 8, length: int = 11) -> list[dict[str, Any]]:
    """Rows of one length; labels of causal LMs are partly -100, those of seq2seq of another length."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        tokens = [FIRST + (5 * i + 2 * k + i * k) % (LAST - FIRST) for k in range(length)] + [EOS]
        row: dict[str, Any] = {"input_ids": tokens, "attention_mask": [1] * len(tokens)}
        if task == "causal":
            row["labels"] = [-100] * (i % 3) + tokens[i % 3 :]
        elif task == "sequence":
            row["labels"] = i % 2
        elif task == "token":
            row["labels"] = [-100] + [(i + token) % 3 for token in tokens[1:]]
        else:
            row["labels"] = [FIRST + (3 * i + k * k) % (LAST - FIRST) for k in range(7 - i % 2)] + [-100] * (i % 2)
        rows.append(row)
    return rows


def build(config_class: type, model_class: type, task: str) -> torch.nn.Module:
    """The model with random weights from a fixed seed."""
    labels = {"sequence": 2, "token": 3}.get(task)
    fields: dict[str, Any] = {} if labels is None else {"num_labels": labels}
    try:
        if "Decoder" in model_class.__name__ or task == "causal":
            fields["is_decoder"] = True
        config = tiny_config(model_class.config_class or config_class, **fields)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
        if size > PARAMETERS:
            raise NotBuilt(f"{size} parameters")
        torch.manual_seed(0)
        return model_class(config)
    except NotBuilt:
        raise
    except BaseException as error:
        raise NotBuilt(said(error)) from error


def said(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]} [{Path(last.filename).name}:{last.lineno}]"


def with_routers(rows: list) -> dict[str, Any]:
    """For mixtures of experts whose routers' losses are asked for by an argument and not in the configuration."""
    return {**default_data_collator(rows), "output_router_logits": True}


def trained(kind: type, arguments: type, model: torch.nn.Module, rows: list, **more: Any) -> dict[str, Any]:
    """Losses of two steps and of an evaluation, and how far each parameter moved."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            seed=1,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        flag = inspect.signature(model.forward).parameters.get("output_router_logits")
        by_flag = flag is not None and (flag.default is False or not hasattr(model.config, "output_router_logits"))
        collator = with_routers if by_flag else default_data_collator
        data = {"train_dataset": rows, "eval_dataset": rows, "data_collator": collator}
        trainer = kind(model, args, **data, **more)
        trainer.remove_callback(PrinterCallback)
        torch.manual_seed(args.seed)  # the order of Trainer's samples comes from it
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        torch.manual_seed(3)
        losses.append(trainer.evaluate()["eval_loss"])
    moved = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    return {"losses": losses, "moved": moved}


def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Empty if both trained alike, else what differs."""
    left, right = theirs["losses"], ours["losses"]
    if len(left) != len(right):
        return f"{len(right)} losses, Trainer {len(left)}"
    off = [abs(a - b) / (1 + abs(a)) for a, b in zip(left, right, strict=True)]
    shown = f"losses {[round(x, 4) for x in right]}, Trainer {[round(x, 4) for x in left]}"
    if not all(x <= LOSS for x in off):
        return shown
    worst = ("", 0.0)
    for name, move in theirs["moved"].items():
        size = float((move - ours["moved"][name]).abs().max()) if move.numel() else 0.0
        share = max(size - 1e-6, 0.0) / max(float(move.abs().max()), 1e-6) if move.numel() else 0.0
        worst = max(worst, (name, share), key=lambda pair: pair[1])
    return "" if worst[1] <= MOVED else f"{worst[0]} moved otherwise by {worst[1]:.3f} of Trainer's move; {shown}"


def judge(task: str, config_class: type, model_class: type) -> dict[str, str]:
    """The verdict on one class, in this process."""
    try:
        model = build(config_class, model_class, task)
    except NotBuilt as reason:
        return {"verdict": "not-built", "text": str(reason)}
    if task == "seq2seq" and not model.config.is_encoder_decoder:
        task = "causal"  # speech models with a decoder only, on their text
    rows = items(task)
    if model_class.__name__ == "FSMTForConditionalGeneration":  # decodes its inputs
        rows = [{**row, "labels": row["input_ids"]} for row in rows]
    if "bbox" in inspect.signature(model.forward).parameters:
        boxes = [[k, k, k + 5, k + 9] for k in range(len(rows[0]["input_ids"]))]
        rows = [{**row, "bbox": boxes} for row in rows]
    ours = copy.deepcopy(model)
    try:
        left = trained(Trainer, TrainingArguments, model, rows)
        if not all(abs(loss) < float("inf") for loss in left["losses"]):
            return {"verdict": "trainer-fails", "text": f"losses {left['losses']}"}
    except Exception as error:
        return {"verdict": "trainer-fails", "text": said(error)}
    try:
        right = trained(gk.GEKOTrainer, gk.GEKOTrainingArguments, ours, rows, config=gk.GEKOConfig.uniform())
    except Exception as error:
        own = "geko_kernels" in traceback.extract_tb(error.__traceback__)[-1].filename
        refused = own and isinstance(error, (ValueError, TypeError)) and len(str(error)) > 30
        return {"verdict": "refused" if refused else "crash", "text": said(error)}
    wrong = compare(left, right)
    return {"verdict": "different" if wrong else "equal", "text": wrong}


class Child:
    """`judge` in a process of its own, whose crash or hang ends nothing else."""

    def __init__(self, task: str, config_class: type, model_class: type) -> None:
        self.name, self.task, self.start = model_class.__name__, task, time.monotonic()
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.reader)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            try:
                result = judge(task, config_class, model_class)
            except BaseException as error:
                result = {"verdict": "crash", "text": "sweep: " + said(error)}
            os.write(writer, json.dumps(result).encode()[:60000])
            os._exit(0)
        os.close(writer)

    def result(self) -> dict[str, Any] | None:
        """None while it runs."""
        done, status = os.waitpid(self.pid, os.WNOHANG)
        if not done and time.monotonic() - self.start < SECONDS:
            return None
        if not done:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        with os.fdopen(self.reader, "rb") as pipe:
            text = pipe.read()
        lost = f"killed after {SECONDS} s" if not done else f"process ended with status {status}"
        found = json.loads(text) if text else {"verdict": "not-built", "text": lost}
        seconds = round(time.monotonic() - self.start, 1)
        return {"task": self.task, "model": self.name, **found, "seconds": seconds}


def sweep(chosen: list[tuple[str, type, type]], path: Path, jobs: int) -> collections.Counter:
    """One line a model on the terminal and in the file, and how many got which verdict in which task."""
    counts: collections.Counter = collections.Counter()
    waiting, running = list(reversed(chosen)), []
    with path.open("w") as file:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(Child(*waiting.pop()))
            time.sleep(0.05)
            for child in list(running):
                result = child.result()
                if result is None:
                    continue
                running.remove(child)
                counts[result["task"], result["verdict"]] += 1
                file.write(json.dumps(result) + "\n")
                file.flush()
                print(f"{result['verdict']:13} {result['task']:8} {result['model']} {result['text'][:300]}", flush=True)
    return counts


def table(counts: collections.Counter) -> str:
    lines = [f"{'':10}" + "".join(f"{verdict:>15}" for verdict in VERDICTS)]
    for task in (*TASKS, "all"):
        row = [sum(counts[t, v] for t in TASKS if task in ("all", t)) for v in VERDICTS]
        lines.append(f"{task:10}" + "".join(f"{count:15}" for count in row))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="JSON lines, one a model")
    parser.add_argument("--only", default="", help="classes whose name begins so")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(f"transformers {transformers.__version__}, geko_kernels {Path(gk.__file__).parent}")
    chosen = [entry for entry in classes() if entry[2].__name__.startswith(options.only)]
    counts = sweep(chosen, options.path, options.jobs)
    print(table(counts))
    return int(any(counts[task, verdict] for task in TASKS for verdict in ("different", "crash")))


if __name__ == "__main__":
    sys.exit(main())
