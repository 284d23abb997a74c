"""Damaged files: a bit flipped or the end cut off, in a state file (of the first layout too, which has no checksum)
and in every file of ours in a checkpoint.

    python tests/helpers/damage.py [--count 5000] [--seed 0]  # so many of each for each file; prints a count by outcome

Each damaged file has to be refused by a `ValueError` that names it, or to be harmless: it loads, and visits of every
sample afterwards, and for a sampler a plan, go on without a crash. A crash of the interpreter ends the script.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import geko_kernels as gk
from geko_kernels.training.checkpoint import EFFICIENCY_NAME, SAMPLER_NAME, STATE_NAME, load_files, save_files
from geko_kernels.training.report.efficiency import Efficiency
from geko_kernels.training.report.visits import VISITS_NAME, VisitLog

SAMPLES = 12
FILES = (STATE_NAME, SAMPLER_NAME, EFFICIENCY_NAME, VISITS_NAME)
FIRST_LAYOUT = Path(__file__).with_name("data") / "state_1.safetensors"


def visit_all(state: gk.SampleState, log: VisitLog | None = None) -> None:
    """A training step on every sample."""
    logits = torch.randn(len(state), 5, requires_grad=True)
    labels, ids = torch.zeros(len(state), dtype=torch.long), torch.arange(len(state))
    loss, stats = gk.weighted_loss(logits, labels, ids, state, return_stats=True)
    loss.backward()
    state.check()
    if log is not None:
        log.add(stats)


def write_checkpoint(folder: Path) -> None:
    """A run of some epochs, stopped in the middle of one."""
    state = gk.SampleState(SAMPLES, gk.GEKOConfig(correct_loss=2.0, focus_confidence=0.3))
    log = VisitLog(SAMPLES, state.device)
    sampler, efficiency = gk.GEKOSampler(state, num_epochs=4), Efficiency(state.device, visits=log)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        efficiency.begin_epoch(epoch, 2 * epoch)
        visit_all(state, log)
        efficiency.end_epoch(2 * epoch + 2, {"buckets": {}, "quarantined": 0, "forgotten": 0})
    save_files(folder, state, sampler.state_dict(consumed=3), efficiency.state_dict())
    log.save(folder)
    (folder / "trainer_state.json").write_text(
        json.dumps({"global_step": 7, "epoch": 2.5, "train_batch_size": 2, "log_history": []})
    )


def resume(folder: Path) -> None:
    """Load all files and go on with them."""
    efficiency, log = Efficiency(torch.device("cpu")), VisitLog(SAMPLES, torch.device("cpu"))
    assert log.load(folder)
    assert len(log.visits().sample) == 3 * SAMPLES
    state, position, counts = load_files(folder, SAMPLES, torch.device("cpu"), efficiency.state_dict())
    efficiency.load_state_dict(counts)
    sampler = gk.GEKOSampler(state, num_epochs=4)
    try:
        sampler.load_state_dict(position)
    except ValueError as error:  # the trainer puts the name before it as well
        raise ValueError(f"{folder / SAMPLER_NAME}: {error}") from error
    assert all(0 <= sample < SAMPLES for sample in sampler)
    visit_all(state)
    sampler.set_epoch(sampler.next_epoch)
    efficiency.report()


def flip(whole: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(whole))
    return whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :]


def cut(whole: bytes, draw: random.Random) -> bytes:
    return whole[: draw.randrange(len(whole))]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {"flip": flip, "cut": cut}


def use_state(path: Path) -> None:
    """Load a state file and train with it."""
    state = gk.SampleState.load(path)
    for _ in range(3):
        visit_all(state)
    gk.GEKOSampler(state, num_epochs=4).set_epoch(2)


def damaged(path: Path, use: Callable[[], None], damage: str, count: int, seed: int) -> Counter[str]:
    """Damage the file so many times; how often `use` refused it, and how often it was harmless."""
    draw, outcome = random.Random(f"{seed} {path.name} {damage}"), Counter[str]()
    whole = path.read_bytes()
    for _ in range(count):
        path.write_bytes(DAMAGES[damage](whole, draw))
        try:
            use()
            outcome["harmless"] += 1
        except ValueError as error:
            assert str(path) in str(error), f"the message does not name the file: {error}"
            outcome["refused"] += 1
    path.write_bytes(whole)
    return outcome


def files_of(folder: Path) -> list[tuple[str, Path, Callable[[], None]]]:
    """(name, file, what uses it) in a folder that `write_checkpoint` has filled."""
    first = folder / FIRST_LAYOUT.name
    shutil.copy(FIRST_LAYOUT, first)
    own = [(name, folder / name, lambda: resume(folder)) for name in FILES]
    return [*own, (first.name, first, lambda: use_state(first))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_checkpoint(folder)
        resume(folder)
        for name, path, use in files_of(folder):
            for damage in DAMAGES:
                print(name, damage, dict(damaged(path, use, damage, given.count, given.seed)), flush=True)


if __name__ == "__main__":
    main()
