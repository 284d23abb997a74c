"""Tasks D2, V1 and G1: rows from miniatures of their sources, and a run of each on a tiny random model."""

from __future__ import annotations

import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.end_to_end import __main__ as end_to_end
from benchmarks.end_to_end import sections, texts
from benchmarks.end_to_end.packages import Package
from benchmarks.end_to_end.run import by_class
from benchmarks.end_to_end.tasks import MADE_BY, TASKS, best_lr, make_data

smollm2 = pytest.importorskip("smollm2")  # on the path since the engine was imported
NAMES = ("admin", "games", "libdevel", "libs")


@pytest.fixture
def tiny(monkeypatch):
    """The tokenizer of the tiny model in place of SmolLM2's."""
    monkeypatch.setattr(smollm2, "load_smollm2", smollm2.tiny_llama)


def run_quickly(monkeypatch, tmp_path, rows, *arguments):
    out = tmp_path / "rows.jsonl"
    command = ["end_to_end", "--quick", "--texts", str(rows), "--out", str(out), "--done", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    end_to_end.main()
    return [json.loads(line) for line in out.read_text().splitlines()]


def packages():
    """A long tail: sections of 64, 32, 16 and 8 packages, a source of two packages each, and one section too rare."""
    made = []
    for number, name in enumerate((*NAMES[::-1], "zope")):
        for i in range((64, 32, 16, 8, 2)[number]):
            text = f"It does {name} things number {i} and is described at length."
            made.append(Package(f"{name}{i}", name, f"{name}-{i // 2}", f"the {i}th thing", text))
    return made


@pytest.fixture
def small_sections(monkeypatch, tmp_path):
    monkeypatch.setattr(sections, "LEAST", 8)
    monkeypatch.setattr(sections, "HELD", {"test": (2, 15), "choose": (1, 8)})
    monkeypatch.setattr(sections, "KEYS", tmp_path / "keys.npz")
    monkeypatch.setattr(sections, "read_lists", lambda folder: packages())


def test_sections_are_dealt_by_source_and_each_part_has_every_class(small_sections):
    parts = sections.deal(packages())
    assert sections.classes(packages()) == sorted(NAMES)
    for name, most in (("test", 8), ("choose", 4)):
        of = Counter(package.section for package in parts[name])
        assert of == {"libs": most, "libdevel": most // 2, "games": most // 4, "admin": max(most // 8, 2 * most // 8)}
    sources = [{package.source for package in part} for part in parts.values()]
    assert len(set.union(*sources)) == sum(map(len, sources))
    assert sections.deal(packages()[::-1]).keys() == parts.keys() and len(parts["train"]) > 60
    with pytest.raises(ValueError, match=r"120 packages are too few for the part 'test', which lacks \{'admin'"):
        sections.HELD["test"] = (20, 15)
        sections.deal(packages()[:120])


def test_of_one_source_few_rows_are_held_out(small_sections):
    many = [Package(f"lib{i}", "libs", "one", f"the {i}th", "Of the same source.") for i in range(40)]
    others = [package for package in packages() if package.section != "libs"]
    parts = sections.deal(others + many + [Package("lib", "libs", f"s{i}", "a", "b") for i in range(20)])
    held = Counter(package.source for name in ("test", "choose") for package in parts[name])
    assert held.get("one", 0) <= sections.ALIKE


def test_d2_is_built_from_its_keys_and_runs(small_sections, tiny, monkeypatch, tmp_path):
    out = tmp_path / "d2.npz"
    monkeypatch.setattr(sys, "argv", ["sections", "lists", "--out", str(out), "--deal"])
    sections.main()
    found = texts.load(out)
    monkeypatch.setattr(sys, "argv", ["sections", "lists", "--out", str(tmp_path / "again.npz")])
    sections.main()
    assert (texts.load(tmp_path / "again.npz").tokens == found.tokens).all()
    names = sorted(NAMES)
    answers = smollm2.tiny_llama()[1](" ".join(names))
    for i in range(len(found.prompts)):
        end = found.offsets[i] + found.prompts[i]
        assert found.tokens[end : found.offsets[i + 1]].tolist() == [answers[found.beside["groups"][i]]]
    arms = ["auto", "H", "A", "B", "B-auto", "B:budget=0.5"]
    rows = run_quickly(monkeypatch, tmp_path, out, "--tasks", "D2", "--arms", *arms)
    assert [row["arm"] for row in rows] == arms
    by_arm = {row["arm"]: row for row in rows}
    assert by_arm["B-auto"]["budget"] == by_arm["auto"]["cost"] and by_arm["B"]["budget"] == by_arm["H"]["cost"]
    for row in rows:
        final = row["final"]
        assert 0 <= final["test_worst_tenth_accuracy"] <= final["test_macro_accuracy"] <= 1
    monkeypatch.setattr(sections, "read_lists", lambda folder: packages()[10:])
    monkeypatch.setattr(sys, "argv", ["sections", "lists", "--out", str(out)])
    with pytest.raises(SystemExit, match="more than 1 % of a part's rows are missing"):
        sections.main()


def test_a_class_whose_tokens_begin_another_s_is_refused(tmp_path):
    def encode(given):
        return [[ord(letter) for letter in text] for text in given]

    parts = {"test": [Package("a", name, "s", "t", "u") for name in ("lib", "libs")]}
    with pytest.raises(ValueError, match="the tokens of libs begin with all those of lib: no answer may"):
        sections.build(parts, encode, tmp_path / "x.npz")


def test_the_keys_in_the_repo_are_of_as_many_rows():
    keys = np.load(sections.Path(sections.__file__).with_name("sections_keys.npz"))
    assert {name: len(keys[name]) for name in keys} == {"test": 2338, "choose": 1166, "train": 20_000}
    everything = np.concatenate([keys[name] for name in keys])
    assert len(np.unique(everything)) >= len(everything) - 3


def test_macro_accuracy_counts_each_class_once_and_the_worst_tenth_is_rounded_up():
    groups = torch.tensor([0] * 8 + [1] * 2 + [3])
    hit = torch.tensor([True] * 8 + [True, False] + [False])
    assert by_class(hit, groups) == {"macro_accuracy": pytest.approx(0.5), "worst_tenth_accuracy": 0.0}
    many = torch.arange(41).repeat(4)  # classes 0 to 40, of which the first 5 have shares 0, 0, 0.25, 0.25, 0.5
    shares = torch.ones(41)
    shares[:5] = torch.tensor([0, 0, 0.25, 0.25, 0.5])
    hit = torch.arange(4).repeat_interleave(41) < 4 * shares[many]
    assert by_class(hit, many)["worst_tenth_accuracy"] == pytest.approx(0.2)


def test_rates_of_a_task_whose_measure_is_no_loss_are_compared_by_the_highest():
    rows = [{"arm": "A", "lr": lr, "seed": 0, "final": {"test_macro_accuracy": lr}} for lr in (1e-4, 3e-4)]
    assert best_lr(TASKS["D2"], rows) == 3e-4


def test_a_task_without_its_file_of_rows_says_what_makes_it(tmp_path):
    for name, module in MADE_BY.items():
        with pytest.raises(
            ValueError, match=f"{name} needs --texts, the file that benchmarks.end_to_end.{module} makes"
        ):
            make_data(TASKS[name], None, tmp_path)
    with pytest.raises(ValueError, match="R3 has no samples to choose by; R2's tasks, D1, D2"):
        make_data(TASKS["R3"], None, tmp_path, choosing=True)
