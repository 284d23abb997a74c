"""What the fused loss must reach, as ratios within one run.

`python -m benchmarks.kernels.targets [DIR]` prints them for the last run in DIR/loss.jsonl.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.results import RESULTS, Row, runs

PLAIN = ("torch", "torch-fp32", "compile", "liger", "flash-attn", "quack")


class Target(NamedTuple):
    """`measured` against `bar`; a hit is at or below it, or at or above it where `at_least`."""

    what: str
    measured: float
    bar: float
    at_least: bool = False

    @property
    def hit(self) -> bool:
        return self.measured >= self.bar if self.at_least else self.measured <= self.bar

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{'hit ' if self.hit else 'MISS'}  {self.measured:9.4g} {sign} {self.bar:<7.4g} {self.what}"


class _Group:
    """The rows of one shape and dtype."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.tokens, self.vocab = rows[0]["T"], rows[0]["V"]
        self.name = label(rows[0])
        self.large = rows[0]["size"] == "large"

    def value(
        self, contender: str, key: str = "ms", zero_share: float = 0.0, hit_rate: float | None = None
    ) -> float | None:
        """`key` of `contender`'s forward + backward, or None where it was not measured."""
        for row in self.rows:
            same = row["contender"] == contender and row["mode"] == "full" and row.get("hit_rate") == hit_rate
            if same and abs(row["zero_share"] - zero_share) < 1e-3:
                return row.get(key)  # older rows lack some
        return None


def label(row: Row) -> str:
    """The shape as readers know it: `8192 x 50257 bfloat16`, or `8 x 2048 packed x 128256 bfloat16`."""
    tokens = f"{row['packed']} x {row['T'] // row['packed']} packed" if row["packed"] else str(row["T"])
    return f"{tokens} x {row['V']} {row['dtype']}"


def targets(rows: list[Row]) -> Iterator[Target]:
    """Every target whose contenders the rows of one run hold."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    on_gpu = not rows[0]["gpu"].startswith("cpu")
    for group in map(_Group, groups.values()):
        if not on_gpu:
            yield from _faster_than(group, {"compile": 2.0, "torch-geko": 6.0})
        elif group.large:
            yield from _time(group)
            yield from _predicted(group)
            yield from _faster_than(group, {"compile-geko": 3.5, "torch-geko": 9.0})
            yield from _cost(group)
        else:
            yield from _small(group)


def _faster_than(group: _Group, bars: dict[str, float]) -> Iterator[Target]:
    ours = group.value("geko")
    for peer, bar in bars.items():
        theirs = group.value(peer)
        if ours and theirs:
            yield Target(f"{group.name}: time of {peer} / geko", theirs / ours, bar, at_least=True)


def _time(group: _Group) -> Iterator[Target]:
    ours, speed, copy = group.value("geko"), group.value("geko", "tbps"), group.value("copy", "tbps")
    peers = [(time, peer) for peer in PLAIN if (time := group.value(peer)) is not None]
    if ours and peers:
        fastest, peer = min(peers)
        yield Target(f"{group.name}: time of geko / fastest plain loss ({peer})", ours / fastest, 1.0)
    if speed and copy:
        yield Target(f"{group.name}: time of geko / three passes at copy speed", copy / speed, 1.15)
        if group.vocab % 2:
            yield Target(f"{group.name}: speed of geko / copy, odd V", speed / copy, 0.8, at_least=True)
    skipping = group.value("geko", zero_share=2 / 3)
    if ours and skipping:
        yield Target(f"{group.name}: time of geko at zero share 2/3 / at 0", skipping / ours, 0.75)


def _predicted(group: _Group) -> Iterator[Target]:
    """The forward that predicts its gradient, against the fastest plain loss."""
    fastest = min((time for peer in PLAIN if (time := group.value(peer)) is not None), default=None)
    if fastest is None or group.vocab not in (32000, 128256, 151936, 262144) or group.rows[0]["packed"]:
        return
    bars = [(1.0, 0.0, 0.8 if group.vocab == 32000 else 0.75), (0.9, 0.0, 0.85)]
    bars += [(1.0, 2 / 3, 0.68), (1.0, 0.9, 0.62)] if group.vocab == 128256 else [(1.0, 2 / 3, 0.55)]
    for hit_rate, zero_share, bar in bars:
        ours = group.value("geko-hopper", zero_share=zero_share, hit_rate=hit_rate)
        if ours:
            share = f", zero share {zero_share:.2f}" if zero_share else ""
            what = f"{group.name}: time of geko-hopper / fastest plain loss at hit rate {hit_rate}{share}"
            yield Target(what, ours / fastest, bar)


def _cost(group: _Group) -> Iterator[Target]:
    gradient = group.value("geko", "gradient_mib") or group.tokens * group.vocab * group.rows[0]["itemsize"] / 2**20
    for contender, bar in (("geko", 1.001), ("geko-inplace", 0.001)):
        peak = group.value(contender, "peak_mib")
        if peak is not None:
            yield Target(f"{group.name}: extra memory of {contender} / one gradient", peak / gradient, bar)
    parts = {"forward": ("host_forward_us", 60.0), "backward without autograd's engine": ("host_nodes_us", 40.0)}
    for part, (key, bar) in parts.items():
        time = group.value("geko", key)
        if time is not None:
            yield Target(f"{group.name}: host time of geko, {part} (us)", time, bar)


def _small(group: _Group) -> Iterator[Target]:
    ours, theirs = group.value("geko"), group.value("compile")
    if ours and theirs:
        yield Target(f"{group.name}: time of geko / compiled plain loss", ours / theirs, 1.0)


if __name__ == "__main__":
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    print(*targets(runs(directory / "loss.jsonl")[-1]), sep="\n")
