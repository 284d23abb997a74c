"""The curves of a run of any length, on tiny texts."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks.end_to_end import curves, curves_plot, texts
from benchmarks.results import RESULTS, read


@pytest.fixture
def file(tmp_path):
    """100 training samples in 50 pairs that share a source, and 6 to test by."""
    prompts = [[5 + i % 20, 7, 9] for i in range(106)]
    answers = [[11 + i % 20] * (1 + i % 5) for i in range(106)]
    kinds = {"source": [i % 50 for i in range(100)], "random": list(range(100))}
    held = texts.hold_back(list(range(100)), kinds)
    texts.save(tmp_path / "toy.npz", prompts, answers, {**held, "test": range(100, 106)})
    return tmp_path / "toy.npz"


def test_whole_groups_are_held_back_and_no_sample_twice():
    groups = texts.groups_of([("a", "1"), ("b", "2"), ("c", "2"), ("a", "3"), ("d", "4"), ("e", "3")])
    assert len({groups[i] for i in (0, 3, 5)}) == 1 and groups[1] == groups[2] and len(set(groups)) == 3
    kinds = {"cluster": [i // 4 for i in range(400)], "random": list(range(400))}
    parts = texts.hold_back(list(range(400)), kinds)
    assert sorted(sum(parts.values(), [])) == list(range(400))
    assert [len(parts[name]) for name in kinds] == [8, 8]
    assert {i // 4 for i in parts["cluster"]}.isdisjoint(i // 4 for i in parts["train"])


def test_rows_are_prompt_and_answer_and_swapped_ones_have_anothers(file):
    made = texts.load(file)
    run = curves.Run(curves.Model(curves.tiny_llama()[0], False), made, torch.device("cpu"), 4, 1e-3)
    tokens, labels = run.rows(torch.tensor([1, 4]))
    assert tokens[0].tolist() == [6, 7, 9, 12, 12, 0, 0, 0] and labels[0].tolist() == [-100] * 3 + [12, 12] + [-100] * 3
    assert tokens[1].tolist() == [9, 7, 9, 15, 15, 15, 15, 15]
    tokens, labels = run.rows(torch.tensor([1]), torch.tensor([4]))
    assert tokens[0].tolist() == [6, 7, 9, 15, 15, 15, 15, 15] and labels[0, 3:].tolist() == [15] * 5


def test_a_swapped_set_gives_nobody_the_own_answer(file, monkeypatch):
    made = texts.load(file)
    run = curves.Run(curves.Model(curves.tiny_llama()[0], False), made, torch.device("cpu"), 2, 1e-3)
    pairs = []
    loss = run.loss
    monkeypatch.setattr(
        run, "loss", lambda a, b: (pairs.extend(zip(a.tolist(), b.tolist(), strict=True)), loss(a, b))[1]
    )
    run.measure(torch.tensor([3, 0, 9, 4, 7]), swapped=True)
    assert sorted(a for a, _ in pairs) == sorted(b for _, b in pairs) == [0, 3, 4, 7, 9]
    assert all(a != b for a, b in pairs)


@pytest.mark.parametrize("cosine", [False, True])
def test_a_run_looks_with_every_average(file, tmp_path, monkeypatch, cosine):
    out = tmp_path / "rows.jsonl"
    command = ["curves", str(file), "--tiny", "--batch", "16", "--epochs", "1", "--rate", "3e-3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command + ["--cosine"] * cosine)
    curves.main()
    row = json.loads(out.read_text())
    looks = [look for look in row["looks"] if "raw" in look]
    assert [look["epoch"] for look in looks][-1] == 1 and len(looks) == (1 if cosine else 4)
    last = looks[-1]
    assert set(last) == {"epoch", "step", "seconds", "raw", "5/t", "0.997", "swapped"}
    assert set(last["raw"]) == {"source", "random", "test", "seen"}
    assert last["raw"]["seen"][0] < 8.3  # log(4096), chance
    if not cosine:
        assert last["5/t"]["seen"] != last["raw"]["seen"]


def test_the_recorded_curves_can_be_drawn(tmp_path):
    curves_plot.draw(read(RESULTS / "curves_2026-11-27.jsonl.gz"), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
