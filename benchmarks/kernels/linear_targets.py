"""What the fused head and loss must reach, as ratios within one run."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.kernels.targets import Target
from benchmarks.results import Row

WIDE_PEERS = ("liger-16-fp32", "quack")  # those that sum dW in float32 over chunks


def linear_targets(rows: list[Row]) -> Iterator[Target]:
    """Every target whose contenders the rows of one run hold."""
    found = {
        (row["T"], row["H"], row["V"], row["dtype"], row["contender"], row["keep_share"], row["masked_share"]): row
        for row in rows
        if row["ms"] is not None
    }
    for shape in dict.fromkeys(key[:4] for key in found):
        name = f"{shape[0]} x {shape[1]} x {shape[2]}"
        case = {key[4:]: row for key, row in found.items() if key[:4] == shape}
        ours = case.get(("geko", 1.0, 0.0))
        if ours is None:
            continue
        yield from _floors(name, case)
        yield from _masked(name, case)
        peers = [row["ms"] for key, row in case.items() if key[0] in WIDE_PEERS]
        if peers:
            yield Target(f"{name}: geko / fastest peer that sums dW in fp32", ours["ms"] / min(peers), 1.0)
        yield from _accuracy(name, case)
        yield from _memory(name, case, ours)
        aligned = found.get((*shape[:2], -(-shape[2] // 64) * 64, shape[3], "geko", 1.0, 0.0))
        if shape[2] % 64 and aligned is not None:
            yield Target(f"{name}: geko / the same at V = {aligned['V']}", ours["ms"] / aligned["ms"], 1.1)


def _floors(name: str, case: dict[tuple, Row]) -> Iterator[Target]:
    """What a share p of kept rows needs at least: one GEMM, p of two more, all logits read, p of them written."""
    copy = case.get(("copy", 1.0, 0.0))
    if copy is None:
        return
    for (contender, _, masked_share), row in case.items():
        if contender == "geko" and not masked_share:
            kept = row["kept_rows"]
            floor = row["gemms_ms"] * (1 + 2 * kept) / 3 + copy["ms"] * (1 + kept) / 2
            yield Target(f"{name}: geko keeping {kept:.2f} / its floor", row["ms"] / floor, 1.05 if kept == 1 else 1.15)


def _masked(name: str, case: dict[tuple, Row]) -> Iterator[Target]:
    full = case["geko", 1.0, 0.0]["ms"]
    for (contender, keep_share, masked_share), row in case.items():
        if contender == "geko" and keep_share == 1 and masked_share:
            yield Target(
                f"{name}: geko, {masked_share} masked / its share of the time",
                row["ms"] / full / (1 - masked_share),
                1.1,
            )


def _accuracy(name: str, case: dict[tuple, Row]) -> Iterator[Target]:
    ours, torch = case["geko", 1.0, 0.0], case.get(("torch", 1.0, 0.0))
    for key in ("hidden_error", "weight_error"):
        if torch is not None and torch[key]:
            yield Target(f"{name}: {key} of geko / torch's", ours[key] / torch[key], 2.0)


def _memory(name: str, case: dict[tuple, Row], ours: Row) -> Iterator[Target]:
    """Beyond dX and dW, the latter as it is summed: in float32. Where all rows fit into 2 GiB they are held."""
    if ours["peak_mib"] is None or (ours["H"], ours["V"]) != (4096, 128256):
        return
    sums = (ours["T"] * ours["H"] * ours["itemsize"] + ours["V"] * ours["H"] * 4) / 2**20
    yield Target(f"{name}: MiB of geko beyond dX and the float32 sum of dW", ours["peak_mib"] - sums, 1024)
    tight = case.get(("geko-256", 1.0, 0.0))
    if tight is not None:
        yield Target(f"{name}: the same with chunk_mib=256", tight["peak_mib"] - sums, 256)
        yield Target(f"{name}: time with chunk_mib=256 / by default", tight["ms"] / ours["ms"], 1.25)
