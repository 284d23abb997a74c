"""Does GEKO train to the same quality in less time? All arms on all tasks, one row a run.

    python -m benchmarks.end_to_end --wordnet /usr/share/wordnet/data.noun
    python -m benchmarks.end_to_end.report
    python -m benchmarks.end_to_end --tasks R1-small R3-small --arms A H --out small.jsonl --done   # on a CPU

Runs that `--done` or `--out` holds are skipped, so a broken-off benchmark goes on where it stood. Deciding runs come
first: on each task H, A and B of seed 0, then of the other seeds, then the other arms. Several GPUs: one process each,
with its own CUDA_VISIBLE_DEVICES, `--part i/n` and `--out`. Times count only if a run had the GPU to itself; say
`--shared` if not.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.end_to_end.arms import ARMS, BUDGETED
from benchmarks.end_to_end.data import Data
from benchmarks.end_to_end.engine import Engine, load_network
from benchmarks.end_to_end.lengths import find_arm
from benchmarks.end_to_end.lora import add_lora
from benchmarks.end_to_end.run import run
from benchmarks.end_to_end.tasks import LARGE, TASKS, Task, best_lr, make_data
from benchmarks.results import RESULTS, append, environment, read

FILE = RESULTS / "end_to_end.jsonl.gz"
QUICK = {"smollm2": "tiny", "adder": "tiny adder", "small instructions": "tiny instructions"}

FROM_SCRATCH = ("adder", "small facts")  # networks that have learnt nothing


class Job(NamedTuple):
    task: str
    arm: str
    seed: int
    lr: float | None  # None: the best that the uniform arm was tried at


Rates = list[tuple[str, list[float]]]


def tuned(text: str) -> tuple[str, list[float]]:
    """ "R1=1e-4,3e-4" -> ("R1", [1e-4, 3e-4])."""
    name, _, rates = text.partition("=")
    if name not in TASKS:
        raise argparse.ArgumentTypeError(f"{name} is no task")
    return name, [float(rate) for rate in rates.split(",")]


def known_arm(name: str) -> str:
    try:
        find_arm(name)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def jobs(tasks: list[str], arms: list[str] | None, seeds: int | None, tune: Rates, tune_seeds: int) -> Iterator[Job]:
    """All runs in the order of their worth, those that tune the learning rate first."""
    yield from (Job(name, "A", s, rate) for s in range(tune_seeds) for name, rates in tune for rate in rates)
    most = max(TASKS[name].seeds for name in tasks) if seeds is None else seeds
    wanted = list(ARMS) if arms is None else arms
    for first, seed in itertools.product((True, False), range(most)):
        for name in tasks:
            deciding = TASKS[name].deciding
            group = [arm for arm in deciding if arm in wanted] if first else [a for a in wanted if a not in deciding]
            if seed < (TASKS[name].seeds if seeds is None else seeds):
                yield from (Job(name, arm, seed, None) for arm in group if arm != "oracle" or TASKS[name].noise)


class Bench:
    """Makes data and engines when they are first needed, and keeps the last engine of each shape."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.device = given, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.networks: dict[str, Any] = {}
        self.data: dict[str, Data] = {}
        self.engines: dict[tuple[Any, ...], Engine] = {}

    def task(self, name: str) -> Task:
        task = TASKS[name]
        if not self.given.quick:
            return task
        return replace(task, samples=96, test=min(task.test, 96), epochs=min(task.epochs, 3), batch=32)

    def ready(self, task: Task) -> tuple[Engine, Data]:
        kind = QUICK.get(task.network, task.network) if self.given.quick else task.network
        if kind not in self.networks:
            self.networks[kind] = load_network(kind)
            if self.given.lora:
                add_lora(self.networks[kind][0], self.given.lora)
        network, encode = self.networks[kind]
        if task.name not in self.data:
            made = make_data(task, encode, self.given.wordnet, self.given.texts, self.given.choosing)
            train = made.train.to(self.device)
            test = train if made.test is made.train else made.test.to(self.device)
            self.data[task.name] = made._replace(train=train, test=test)
        data = self.data[task.name]
        graphs = self.device.type == "cuda" and not self.given.plain
        key = (kind, task.batch, tuple(data.train.tokens.shape), tuple(data.train.labels.shape))
        if key not in self.engines:
            first = next((engine for (other, *_), engine in self.engines.items() if other == kind), None)
            if first is not None:
                network.load_state_dict(first.begin_weights)
            self.engines[key] = Engine(network, data.train, task.batch, task.sizes, self.device, graphs, task.per_token)
        engine = self.engines[key]
        engine.train = data.train
        return engine, data


def read_rows(paths: list[Path]) -> list[dict[str, Any]]:
    return [row for path in paths if path.exists() for row in read(path)]


def rank(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"the rank is a whole number from 1, got {text}")
    return int(text)


def check_lora(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Adapters need a network that has learnt something, and rows of their own, which are not taken for full tuning."""
    scratch = [name for name in given.tasks if TASKS[name].network in FROM_SCRATCH]
    if given.lora and scratch:
        parser.error(f"--lora adapts a network that has been trained, and {', '.join(scratch)} begins from scratch")
    others = {row.get("lora", 0) for row in read_rows([given.out])} - {given.lora}
    if others:
        parser.error(
            f"{given.out} holds runs with --lora {min(others)} (0: without), these have {given.lora}: give them an "
            "--out of their own, since the reports compare what is in one file"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet/data.noun"))
    parser.add_argument("--texts", type=Path, help="rows of D1, D2, V1 or G1, see TASKS.md")
    parser.add_argument("--choosing", action="store_true", help="other samples, to choose rates and rules by")
    parser.add_argument("--ends", action="store_true", help="measure only at the end of each run, not after each epoch")
    parser.add_argument("--tasks", nargs="+", default=LARGE, choices=list(TASKS))
    parser.add_argument("--arms", nargs="+", type=known_arm, help="(default: all) A, H, H:freeze_confidence=0.95, ...")
    parser.add_argument("--seeds", type=int, help="(default: the task's)")
    parser.add_argument("--tune", nargs="+", type=tuned, default=[], help="first try A at rates: R1=1e-4,3e-4")
    parser.add_argument("--rates", nargs="+", type=float, default=[None], help="run every arm at each, not at the best")
    parser.add_argument("--tune-seeds", type=int, default=1, help="seeds to try each rate with")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run that would end later")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th seed of a task, from the i-th on")
    parser.add_argument("--shared", action="store_true", help="others use this GPU meanwhile: no times")
    parser.add_argument("--plain", action="store_true", help="on a GPU too: no torch.compile, no CUDA graphs")
    parser.add_argument("--lora", type=rank, default=0, metavar="RANK", help="train adapters (default: all weights)")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--done", nargs="*", type=Path, default=[FILE])
    parser.add_argument("--quick", action="store_true", help="tiny tasks and a tiny random model, in seconds")
    given = parser.parse_args()
    check_lora(parser, given)
    begin = time.perf_counter()
    part, parts = map(int, given.part.split("/"))
    bench = Bench(given)
    packages = {name: version(name) for name in ("transformers",)}
    shared = {
        **environment(bench.device),
        **packages,
        "command": " ".join(sys.argv),
        "alone": not given.shared,
        "plain": given.plain,
        "choosing": given.choosing,
        "lora": given.lora,
    }
    rows = [row for row in read_rows([*given.done, given.out]) if row.get("lora", 0) == given.lora]
    took: dict[str, float] = {}
    wanted = jobs(given.tasks, given.arms, given.seeds, given.tune, given.tune_seeds)
    for (name, arm, seed, tried), rate in itertools.product(wanted, given.rates):
        lr = tried or rate or best_lr(TASKS[name], [row for row in rows if row["task"] == name])
        done = {(row["arm"], row["seed"]): row for row in rows if (row["task"], row["lr"]) == (name, lr)}
        mine = (given.tasks.index(name) + seed) % parts == part
        if not mine or (arm, seed) in done or (arm in BUDGETED and (BUDGETED[arm], seed) not in done):
            continue
        now = time.perf_counter() - begin
        if now + took.get(name, max(took.values(), default=0.0)) > 60 * given.minutes:
            continue
        task = bench.task(name)
        engine, data = bench.ready(task)
        start = time.perf_counter()
        budget = done[BUDGETED[arm], seed]["cost"] if arm in BUDGETED else 1.0
        row = run(engine, task, data, arm, seed, lr, budget, given.ends)
        took[name] = max(took.get(name, 0.0), time.perf_counter() - start)
        rows.append({**row, **shared})
        append(given.out, rows[-1])
        final = {key: round(value, 4) for key, value in row["final"].items() if isinstance(value, float)}
        print(
            f"{time.perf_counter() - begin:6.1f}s {name} {arm} {seed} lr {lr:g}: "
            f"{row['seconds']['total']:.2f}s prepare {row['seconds']['prepare']:.1f}s "
            f"cost {row['cost']:.3f} quarantined {row['quarantined_share']:.3f} {final}",
            flush=True,
        )


if __name__ == "__main__":
    main()
