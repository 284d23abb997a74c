"""What `make demo` says of its ten seeds is what was measured, and what it was made to show."""

import sys
from pathlib import Path
from statistics import mean

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from demo import SPREAD

from benchmarks.results import RESULTS, read


def test_the_demo_tells_what_its_seeds_measured():
    rows = read(RESULTS / "demo_cpu_2026-11-27.jsonl.gz")
    wrong, clean = ([row for row in rows if row["wrong_share"] == share] for share in (0.3, 0.0))
    assert [row["seed"] for row in wrong] == [row["seed"] for row in clean] == list(range(10))
    uniform, geko = ([100 * row[arm]["accuracy"] for row in wrong] for arm in ("uniform", "geko"))
    gains = [ours - theirs for ours, theirs in zip(geko, uniform, strict=True)]
    assert min(gains) > 2
    named, right, errors = (sum(row[name] for row in wrong) for name in ("named", "named_wrong", "wrong"))
    assert right / named > 0.8
    time = mean(row["geko"]["cpu_seconds"] for row in wrong) / mean(row["uniform"]["cpu_seconds"] for row in wrong)
    best = mean(100 * row["uniform"]["best"] for row in wrong)
    told = (
        f"Over ten seeds (2026-11-27, on a CPU): GEKO {mean(geko):.1f} %, uniform training {mean(uniform):.1f} %, "
        f"{min(gains):.1f} to {max(gains):.1f} points less in each, and {best:.1f} % after its best epoch; of the "
        f"labels named {100 * right / named:.0f} % were wrong, and {100 * right / errors:.0f} % of the wrong ones were "
        f"named; {time:.2f} of the processor time. With --clean both had {_low(clean):.1f} to {_high(clean):.1f} %."
    )
    assert told == SPREAD


def _low(rows):
    return min(mean(100 * row[arm]["accuracy"] for row in rows) for arm in ("uniform", "geko"))


def _high(rows):
    return max(mean(100 * row[arm]["accuracy"] for row in rows) for arm in ("uniform", "geko"))
