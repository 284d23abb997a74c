"""Loops over a `GEKOLoader` for its tests: `loader_run.py OUT` under torchrun or alone, and `kill`.

The script writes OUT/<rank>.json of the same global batches on any number of processes, resumed in their middle too.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import geko_kernels as gk

CLASSES, GLOBAL_BATCH = 3, 16


class Toy(torch.utils.data.Dataset):
    """Inputs that a linear model tells apart; their labels."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.arange(size) % CLASSES
        self.inputs = torch.eye(CLASSES)[self.labels] * 4 + torch.randn(size, CLASSES, generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index], self.labels[index]


class Loop:
    """Model, optimizer, schedule and loader; `GLOBAL_BATCH` over all processes."""

    def __init__(self, world: int, size: int = 93, num_workers: int = 0, num_epochs: int = 6) -> None:
        torch.manual_seed(0)
        linear = torch.nn.Linear(CLASSES, CLASSES)
        self.model: torch.nn.Module = linear if world == 1 else torch.nn.parallel.DistributedDataParallel(linear)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        batch = GLOBAL_BATCH // world
        self.loader = gk.GEKOLoader(Toy(size), batch, num_epochs, device="cpu", num_workers=num_workers)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1 - self.loader.progress)
        self.seen: list[Any] = []

    def step(self, batch: Any) -> None:
        self.seen.append([batch.epoch, batch.trains, batch.ids.tolist(), round(self.loader.progress, 9)])
        self.model.train(batch.trains)
        with torch.set_grad_enabled(batch.trains):
            inputs, labels = batch.data
            state = self.loader.state
            loss = gk.weighted_loss(self.model(inputs), labels, batch.ids, state, update=True, reduction="sum")
        if batch.trains:
            (loss / self.loader.batch_size).backward()  # DDP takes the mean of the processes
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        parts = {"loader": self.loader, "model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        for name, saved in values.items():
            getattr(self, name).load_state_dict(saved)

    def weights(self) -> list[float]:
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()]).tolist()

    def result(self) -> dict[str, Any]:
        report = self.loader.counts.report()
        return {
            "seen": self.seen,
            "weights": self.weights(),
            "state": {name: column.double().tolist() for name, column in self.loader.state.state_dict().items()},
            "epochs": [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in report["epochs"]],
            "visits": [column.tolist() for column in self.loader.counts.log.visits()],
            "counts": {name: report[name] for name in report if name not in ("seconds", "epochs")},
        }


def two(out: Path) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    results = {}
    whole = Loop(world)
    copies = []
    for number, batch in enumerate(whole.loader):
        whole.step(batch)
        if number in (8, 15):
            saved = out / f"{rank}-{number}.pt"
            torch.save(whole.state_dict(), saved)  # after the batch is trained
            copies.append((number, saved))
    whole.loader.write_report(out / "report")
    results["whole"] = whole.result()
    for number, saved in copies:
        resumed = Loop(world)
        resumed.load_state_dict(torch.load(saved))
        resumed.seen = whole.seen[: number + 1]
        for batch in resumed.loader:
            resumed.step(batch)
        results[f"resumed {number}"] = resumed.result()
    if world > 1:
        lone = Loop(world)
        if rank == 0:
            lone.load_state_dict(torch.load(copies[0][1]))
        try:
            next(iter(lone.loader))
        except ValueError as error:
            results["one loaded"] = str(error)
    for name, data, fields in (
        ("other seeds", Toy(20), {"seed": rank}),
        ("other config", Toy(20), {"config": gk.GEKOConfig.recommended(light_interval=2 + rank)}),
        ("other order", list(Toy(20))[:: -1 if rank else 1], {}),
    ):
        try:
            gk.GEKOLoader(data, 4, device="cpu", **fields)
        except ValueError as error:
            results[name] = str(error)
    (out / f"{rank}.json").write_text(json.dumps(results))


def kill(out: Path, kill_at: int) -> None:
    """Train with two workers, save OUT/checkpoint.pt after every third batch and go on from there if it is there.

    A SIGKILL comes in the middle of the `kill_at`-th batch. It ends with OUT/model.pt.
    """
    loop, checkpoint = Loop(1, num_workers=2), out / "checkpoint.pt"
    trained = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        trained = saved.pop("trained")
        loop.load_state_dict(saved)
    for batch in loop.loader:
        loop.step(batch)
        trained += 1
        if trained == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if trained % 3 == 0:
            torch.save({**loop.state_dict(), "trained": trained}, out / "new.pt")
            (out / "new.pt").rename(checkpoint)
    (out / "trained").write_text(str(trained))
    torch.save({"weights": loop.weights(), "state": loop.loader.state.state_dict()}, out / "model.pt")


def main() -> None:
    torch.set_num_threads(1)
    two(Path(sys.argv[1]))
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
