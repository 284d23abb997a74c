"""Visits are counted many at once, with the result of one forward at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from geko_kernels.training.report import pending
from geko_kernels.training.report.efficiency import Efficiency
from geko_kernels.training.report.visits import VisitLog

CPU, SAMPLES = torch.device("cpu"), 12


def forward(generator, entries):
    """Some samples twice, some entries unused, some without a label, some losses not finite."""
    loss = torch.rand(entries, generator=generator)
    loss[torch.rand(entries, generator=generator) < 0.1] = float("nan")
    return SimpleNamespace(
        sample_ids=torch.randint(-1, SAMPLES, (entries,), generator=generator),
        num_tokens=torch.randint(0, 4, (entries,), generator=generator),
        loss=loss,
        accuracy=torch.rand(entries, generator=generator),
        weight=torch.randint(0, 3, (entries,), generator=generator).float(),
    )


def expected(calls):
    sums = {"train": dict.fromkeys(("samples", "tokens", "idle", "labels", "loss", "hits", "nonfinite"), 0.0)}
    sums["probe"], last = dict(sums["train"]), {}
    for stats, tokens, probe in calls:
        part = sums["probe" if probe else "train"]
        part["tokens"] += tokens
        columns = (stats.sample_ids, stats.num_tokens, stats.loss, stats.accuracy, stats.weight)
        for i, n, loss, hit, weight in zip(*(column.tolist() for column in columns), strict=True):
            finite = loss == loss
            part["samples"] += i >= 0
            part["idle"] += i >= 0 and (weight == 0 or n == 0)
            part["labels"] += n
            part["loss"] += loss * n if finite else 0.0
            part["hits"] += hit * n
            part["nonfinite"] += n > 0 and not finite
            if i >= 0 and n and finite:
                last[i] = loss, hit
    return sums, last


@pytest.mark.parametrize("room", [1, 7, 64, 2**16])
def test_as_one_forward_at_a_time(monkeypatch, room):
    """Of a sample's visits the last one is kept, and memory that a step uses again is not read later."""
    monkeypatch.setattr(pending, "ENTRIES", room)
    generator = torch.Generator().manual_seed(0)
    counts = Efficiency(CPU, visits=VisitLog(SAMPLES, CPU))
    counts.begin_epoch(0, 0)
    calls = []
    for entries, probe in zip(
        [3, 5, 7, 1, 40, 6, 6, 2], [False, True, True, False, False, False, True, False], strict=True
    ):
        stats = forward(generator, entries)
        calls.append((SimpleNamespace(**{k: v.clone() for k, v in vars(stats).items()}), 10 * entries, probe))
        counts.count(stats, torch.tensor(10 * entries), probe)
        for column in vars(stats).values():
            column.fill_(1)
    counts.flush_visits()
    counts.collect()
    sums, last = expected(calls)
    for name, part in sums.items():
        found = getattr(counts, name)
        assert {key: found[key] for key in part} == pytest.approx(part, rel=1e-6), name
    visits = counts.visits.visits()
    found = zip(visits.sample.tolist(), visits.loss.tolist(), visits.hit.tolist(), strict=True)
    wanted = {i: (pytest.approx(loss, rel=1e-6), pytest.approx(hit, abs=1e-3)) for i, (loss, hit) in last.items()}
    assert {i: (loss, hit) for i, loss, hit in found} == wanted


def test_what_was_not_counted_yet_is_dropped_with_the_rest():
    counts = Efficiency(CPU)
    before = counts.state_dict()
    counts.count(forward(torch.Generator().manual_seed(0), 4), torch.tensor(1))
    counts.load_state_dict(before)
    assert not any(counts.collect().values())


def test_the_first_forward_may_be_a_probe_in_inference_mode():
    counts, generator = Efficiency(CPU, visits=VisitLog(SAMPLES, CPU)), torch.Generator().manual_seed(0)
    with torch.inference_mode():
        counts.count(forward(generator, 4), torch.tensor(4), probe=True)
    counts.count(forward(generator, 3), torch.tensor(3))
    counts.collect()
    assert counts.probe["tokens"] == 4 and counts.train["tokens"] == 3


def test_a_block_s_visits_may_be_counted_and_not_recorded():
    counts, generator = Efficiency(CPU, visits=VisitLog(SAMPLES, CPU)), torch.Generator().manual_seed(0)
    counts.begin_epoch(0, 0)
    before = forward(generator, 4)
    counts.count(before, torch.tensor(4), probe=True)
    with counts.unrecorded():
        counts.count(forward(generator, 40), torch.tensor(40), probe=True)
    with pytest.raises(KeyboardInterrupt), counts.unrecorded():
        counts.count(forward(generator, 40), torch.tensor(40), probe=True)
        raise KeyboardInterrupt
    counts.flush_visits()
    counts.collect()
    assert counts.probe["tokens"] == 84
    assert set(counts.visits.visits().sample.tolist()) <= set(before.sample_ids.tolist())
