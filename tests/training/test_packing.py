"""How documents fill packs: against plain loops, and within what is known of best-fit decreasing."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

import geko_kernels as gk
from geko_kernels.training.planning.packing import Fill, PackedIds, Packer, best_fit

CASES = [np.random.default_rng(seed) for seed in range(200)]


def lengths_of(rng):
    room = int(rng.integers(1, 60))
    return rng.integers(1, room + 1, int(rng.integers(0, 80))), room


def best_fit_decreasing(lengths, room):
    left = []
    for length in sorted(lengths, reverse=True):
        space = min((space for space in left if space >= length), default=None)
        if space is None:
            left.append(room - length)
        else:
            left[left.index(space)] -= length
    return sorted(left)


def first_fit_decreasing(lengths, room):
    left = []
    for length in sorted(lengths, reverse=True):
        at = next((i for i, space in enumerate(left) if space >= length), None)
        if at is None:
            left.append(room - length)
        else:
            left[at] -= length
    return len(left)


@pytest.mark.parametrize("rng", CASES[::4])
def test_best_fit_is_best_fit_decreasing(rng):
    lengths, room = lengths_of(rng)
    packs = best_fit(lengths, room)
    used = np.bincount(packs, weights=lengths).astype(int)
    assert sorted(room - used) == best_fit_decreasing(lengths.tolist(), room)
    assert len(used) <= first_fit_decreasing(lengths.tolist(), room)  # as it is for all but contrived lengths
    optimum = -(-int(lengths.sum()) // room)
    assert optimum <= len(used) <= max(11 / 9 * optimum + 1, 2 * optimum)


def test_trl_makes_as_many_rows():
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    lengths = np.random.default_rng(0).integers(1, 65, 500)
    table = datasets.Dataset.from_dict({"input_ids": [[1] * length for length in lengths.tolist()]})
    rows = trl.pack_dataset(table, 64, "bfd")
    assert len(rows) == int(best_fit(lengths, 64).max()) + 1


@pytest.mark.parametrize("fill", list(Fill))
@pytest.mark.parametrize("multiple", [1, 8])
def test_packs_hold_every_document_once_and_not_too_much(fill, multiple):
    rng = np.random.default_rng(1)
    lengths = torch.from_numpy(rng.integers(0, 49, 300))
    ids = torch.randperm(300, dtype=torch.int32)[:250]
    packer = Packer(lengths, 50 if multiple == 1 else 55, fill, multiple)
    order, ends = packer.pack(ids)
    assert order.dtype == torch.int32 and sorted(order.tolist()) == sorted(ids.tolist())
    assert ends[-1] == 250 and ends.diff().min() > 0
    place = {sample: i for i, sample in enumerate(ids.tolist())}
    for pack in order.tensor_split(ends[:-1]):
        rows = lengths[pack.long()]
        tokens = int(rows.sum()) if fill is not Fill.PADDED else int(-(-rows.max() // multiple) * multiple * len(rows))
        assert -(-tokens // multiple) * multiple <= packer.tokens
        places = [place[sample] for sample in pack.tolist()]
        assert places == sorted(places)
    if fill is not Fill.BEST_FIT:
        assert torch.equal(order, ids)
    again = packer.pack(ids)
    assert torch.equal(again[0], order) and torch.equal(again[1], ends)


def test_packs_stand_in_the_order_of_their_longest_documents():
    """Long packs are neither first nor last: the order stays that of a permutation."""
    lengths = torch.tensor([5, 10, 3, 10, 7, 2])
    order, ends = Packer(lengths, 10, Fill.BEST_FIT).pack(torch.tensor([2, 0, 4, 1, 5, 3], dtype=torch.int32))
    assert [pack.tolist() for pack in order.tensor_split(ends[:-1])] == [[0, 5], [2, 4], [1], [3]]


def test_a_million_documents_take_seconds():
    lengths = np.random.default_rng(0).lognormal(5, 1, 10**6).clip(1, 4096).astype(np.int64)
    ids, start = torch.randperm(10**6, dtype=torch.int32), time.perf_counter()
    _, ends = Packer(torch.from_numpy(lengths), 4096, Fill.BEST_FIT).pack(ids)
    assert time.perf_counter() - start < 20  # 0.4 s on a quiet core
    assert len(ends) <= lengths.sum() / 4096 * 1.001


def test_no_packs_and_repeats():
    packer = Packer(torch.tensor([3, 4]), 4, Fill.BEST_FIT)
    none = packer.pack(torch.empty(0, dtype=torch.int32))
    assert list(PackedIds(*none, 2)) == []
    packed = packer.pack(torch.tensor([1, 0], dtype=torch.int32))
    assert list(PackedIds(*packed, 4)) == [[1], [0], [~1], [~0]]


def test_a_sampler_goes_on_behind_the_packs_it_has_handed_out():
    def sampler():
        state = gk.SampleState(40, gk.GEKOConfig.uniform())
        return gk.GEKOSampler(state, 2, packer=Packer(torch.arange(40) % 9 + 1, 12, Fill.BEST_FIT))

    first, again = sampler(), sampler()
    packs = list(first)
    assert sorted(sum(packs, [])) == list(range(40)) and len(first) == len(packs) == first.plan.units
    first = sampler()
    handed = iter(first)
    for _ in range(5):
        next(handed)
    done = first.plan.samples(5)
    again.load_state_dict(first.state_dict(done))
    assert list(again) == packs[5:]
    damaged = {**first.state_dict(done), "packs": torch.tensor([3, 2, 40])}
    with pytest.raises(ValueError, match=r"state_dict\['packs'\] must ascend to the 40 samples of the plan"):
        sampler().load_state_dict(damaged)
    with pytest.raises(ValueError, match="planned in packs, but this run plans single samples"):
        gk.GEKOSampler(gk.SampleState(40), 2).load_state_dict(first.state_dict(done))
