"""The end-to-end benchmark on a tiny random model: every arm runs, rows are whole, tables come out of them."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks.end_to_end import __main__ as end_to_end
from benchmarks.end_to_end import data, instructions, report, small
from benchmarks.end_to_end import rows as end_to_end_rows
from benchmarks.end_to_end.arms import ARMS, learning_rate
from benchmarks.end_to_end.lengths import find_arm
from benchmarks.end_to_end.run import batches
from benchmarks.end_to_end.targets import _better, targets
from benchmarks.end_to_end.tasks import TASKS, best_lr, make_data

GLOSS = '{:08d} {:02d} n 01 {} 0 000 @ 0000 n 0000 | {} of the {} kind; "an example"'


@pytest.fixture
def wordnet(tmp_path):
    words = "red blue tall small wide round bitter loud calm strange old new".split()
    lines = ["  1 This software is a notice"]
    lines += [GLOSS.format(i, 3 + i % 26, words[i % 12], f"something {i}", words[i % 7]) for i in range(500)]
    path = tmp_path / "data.noun"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(monkeypatch, tmp_path, wordnet, *arguments):
    out = tmp_path / "end_to_end.jsonl"
    command = ["end_to_end.py", "--quick", "--wordnet", str(wordnet), "--out", str(out), "--done", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    end_to_end.main()
    return out, [json.loads(line) for line in out.read_text().splitlines()]


def test_every_arm_runs_and_a_second_start_goes_on(monkeypatch, tmp_path, wordnet):
    pytest.importorskip("geko")
    arms = ["--tasks", "R2-30", "--arms", *(arm for arm in ARMS if arm != "G")]
    assert len(run(monkeypatch, tmp_path, wordnet, *arms)[1]) == len(ARMS) - 1
    out, rows = run(monkeypatch, tmp_path, wordnet, "--tasks", "R2-30")
    assert [row["arm"] for row in rows].count("H") == 1 and {row["arm"] for row in rows} == set(ARMS)
    for row in rows:
        assert row["rows_forward"] >= row["rows_trained"] > 0 and row["alone"] and row["history"]
        assert row["history"][-1]["progress"] == pytest.approx(1.0, abs=0.02)
    cost = {row["arm"]: row["cost"] for row in rows}
    assert cost["A"] == 1.0 and cost["B"] == pytest.approx(cost["H"], abs=0.05) and cost["D"] < 1.0


@pytest.mark.parametrize("task", ["R1", "R3", "R4", "R5", "R6", "R1-small", "R3-small"])
def test_the_other_tasks_run(monkeypatch, tmp_path, wordnet, task):
    _, rows = run(monkeypatch, tmp_path, wordnet, "--tasks", task, "--arms", "H", "A", "B")
    assert sorted(row["arm"] for row in rows) == ["A", "B", "H"]
    assert all(torch.isfinite(torch.tensor(row["final"]["test_loss"])) for row in rows)


def test_tables_targets_and_pictures_come_from_the_rows(monkeypatch, tmp_path, wordnet):
    out, rows = run(monkeypatch, tmp_path, wordnet, "--tasks", "R2-0", "R3", "--arms", "H", "A", "B")
    for row in rows:  # a second seed, 3 points better with GEKO, in half the time
        row["seed"], row["final"] = 1, {**row["final"], "test_accuracy": 0.53 if row["arm"] == "H" else 0.5}
        row["seconds"]["total"] = 1.0 if row["arm"] == "H" else 2.0
    with out.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    tasks = end_to_end_rows.load(out)
    text = "\n".join(report.table("R2-0", tasks["R2-0"]))
    assert "| H: GEKO | 2 |" in text and "| B: uniform at H's budget | 2 |" in text
    del tasks["R2-0"]["H"][0]
    found = {target.what: target for target in targets(tasks)}
    assert found["R2-0: time / A's at most 0.55"].hit and found["R2-0: no worse than A, margin 0.5 points"].hit
    monkeypatch.setattr(sys, "argv", ["end_to_end_report.py", str(out)])
    report.main()
    assert (tmp_path / "end_to_end.png").exists() and text in (tmp_path / "end_to_end.md").read_text()


def test_the_evidence_holds_the_tables_of_the_rows():
    text = report.EVIDENCE.read_text()
    assert report.fill(text, report.evidence_tables()) == text, "run benchmarks/end_to_end/report.py"
    with pytest.raises(ValueError, match="no <!-- table: other -->"):
        report.fill(text, {"other": []})
    with pytest.raises(ValueError, match="with its <!-- end -->"):
        report.fill(text.replace("<!-- end -->", "", 1), report.evidence_tables())


def test_an_arm_may_be_given_other_settings_and_a_budget_by_name(monkeypatch, tmp_path, wordnet):
    kind, budget = find_arm("H:freeze_confidence=0.95,bucket_weights=[2,2,1],spend_saved=true,budget=0.5")
    assert (kind.config.freeze_confidence, kind.config.bucket_weights, budget) == (0.95, (2, 2, 1), 0.5)
    assert find_arm("H") == (ARMS["H"], None) and find_arm("B:budget=0.5") == (ARMS["B"], 0.5)
    for name in ("Z", "A:probes=false", "H:probes", "H:freeze_confidence=2"):
        with pytest.raises(ValueError, match=r"an arm is one of|freeze_confidence must be in"):
            find_arm(name)
    arms = ["H:light_interval=1,budget=0.5", "B:budget=0.5"]
    _, rows = run(monkeypatch, tmp_path, wordnet, "--tasks", "R4", "--arms", *arms)
    assert [row["arm"] for row in rows] == arms and all(row["cost"] == pytest.approx(0.5, abs=0.05) for row in rows)


def test_times_of_other_gpus_are_not_compared():
    def row(seconds, gpu, accuracies):
        history = [{"seconds": seconds * (i + 1) / 3, "test_accuracy": a} for i, a in enumerate(accuracies)]
        return {"task": "R4", "seconds": {"total": seconds}, "gpu": gpu, "alone": True, "history": history}

    uniform = {0: row(9.0, "one", [0.5, 0.6, 0.8]), 1: row(9.0, "other", [0.5, 0.6, 0.8])}
    rows = {"A": uniform, "H": {seed: row(6.0, "one", [0.5, 0.7, 0.9]) for seed in (0, 1)}}
    assert end_to_end_rows.time_ratios(rows, "H") == [pytest.approx(2 / 3)]
    assert end_to_end_rows.time_to(rows, "H", 1.0) == [pytest.approx(5 / 9)]  # 0.8 between the second and third epoch


def test_better_at_all_takes_an_interval_above_zero_and_so_many_points_the_mean():
    def rows(accuracies):
        return {seed: {"final": {"test_accuracy": accuracy}} for seed, accuracy in enumerate(accuracies)}

    tasks = {"R1": {"H": rows([0.9, 0.9, 0.9]), "B": rows([0.5, 0.8, 0.96])}}
    (unsure,), (points,) = (list(_better("", tasks, "R1", "B", least)) for least in (0.0, 10.0))
    assert unsure.measured == points.measured and not unsure.hit and points.hit
    tasks["R1"]["B"] = rows([0.5, 0.8, 0.85])
    assert next(_better("", tasks, "R1", "B", 0.0)).hit


def test_the_rate_at_which_uniform_ends_best_is_everybody_s(monkeypatch, tmp_path, wordnet):
    _, rows = run(monkeypatch, tmp_path, wordnet, "--tasks", "R3", "--arms", "H", "A", "--tune", "R3=1e-4,1e-2")
    ends = {row["lr"]: row["final"]["test_loss"] for row in rows if row["arm"] == "A"}
    assert len(ends) == 2 and [row["lr"] for row in rows if row["arm"] == "H"] == [min(ends, key=ends.get)]


def test_the_oracle_runs_where_labels_are_wrong():
    tasks = {job.task for job in end_to_end.jobs(["R2-0", "R2-10", "R4"], None, 1, [], 1) if job.arm == "oracle"}
    assert tasks == {"R2-10"}


def test_rates_are_compared_on_the_seeds_that_all_of_them_had():
    rows = [
        {"arm": "A", "lr": lr, "seed": seed, "final": {"test_accuracy": accuracy}}
        for lr, seed, accuracy in [(1e-4, 0, 0.5), (1e-4, 1, 0.6), (1e-4, 2, 0.1), (2e-4, 0, 0.6), (2e-4, 1, 0.4)]
    ]
    assert best_lr(TASKS["R4"], rows) == 1e-4
    assert best_lr(TASKS["R4"], rows[:3]) == TASKS["R4"].lr


def test_lists_of_symbols_are_answered_and_unseen():
    made = small.list_operations(400, 120)
    seen = []
    for split in made[:2]:
        asked = set()
        for tokens, labels, group in zip(
            split.tokens.tolist(), split.labels.tolist(), split.groups.tolist(), strict=True
        ):
            end = tokens.index(small._ANSWER)
            symbols, answer = [t - 1 for t in tokens[2:end]], labels[: labels.index(small._END)]
            assert [a - 1 for a in answer] == list(small.LEARNT[group](symbols))
            asked.add((group, *sorted(symbols)))
        seen.append(asked)
    assert not seen[0] & seen[1] and len(made.test) == 120 and made.test.groups.bincount().tolist() == [10] * 12


def test_wrong_labels_are_as_many_as_asked(wordnet):
    encode = lambda texts: [[len(word) for word in text.split()] for text in texts]  # noqa: E731
    for name in ("R2-10", "R2-30", "R2-pairs"):
        made = make_data(replace(TASKS[name], samples=200, test=100), encode, wordnet)
        assert (len(made.train), len(made.test)) == (200, 100)
        share = made.train.wrong.float().mean().item()
        assert share == pytest.approx(TASKS[name].noise) and not made.test.wrong.any()


def is_right(name, words, task, answer):
    """Whether `answer` is what the operation `name` asks of `words`, told otherwise than the benchmark does."""
    places = [words.index(word) for word in answer if word in words]
    letter = next(iter(re.findall(r"\b[a-z]\b", task)), "")
    ordinals = "first second third fourth fifth sixth seventh".split()
    asked = [place for place, ordinal in enumerate(ordinals) if ordinal in task]
    same = Counter(answer) == Counter(words)
    return {
        "sort": lambda: same and all(a <= b for a, b in pairwise(answer)),
        "reverse": lambda: [words[-1 - i] for i in range(len(words))] == answer,
        "sort by length": lambda: same and all((len(words[i]), i) < (len(words[j]), j) for i, j in pairwise(places)),
        "first letters": lambda: all(w.startswith(a) for w, a in zip(words, answer, strict=True)) and not places,
        "drop repeats": lambda: (
            set(answer) == set(words) and places == sorted(places) and len(words) > len(answer) == len(set(answer))
        ),
        "starting with": lambda: (
            all((word[0] == letter) == (word in answer) for word in words) and places == sorted(places) and answer
        ),
        "k-th": lambda: places == asked and len(answer) == 1,
        "count": lambda: answer[0] == ["three", "four", "five", "six", "seven"][sum(1 for _ in words) - 3],
        "every second": lambda: answer == [word for i, word in enumerate(words, 1) if i % 2 == 0],
        "rotate": lambda: [answer[-1], *answer[:-1]] == words,
        "first and last": lambda: answer == [words.copy().pop(0), words.copy().pop()],
        "swap": lambda: (answer[1], answer[0], answer[2:]) == (words[0], words[1], words[2:]),
    }[name]()


def made_up_words():
    return [a + b + c for a in ("ba", "cru", "do", "fle", "gi") for b in "mnrst" for c in ("a", "el", "in", "o", "")]


def test_answers_to_instructions_are_right():
    test, train = instructions.samples(made_up_words(), 1000, 600)
    for sample in test + train:
        task, _, rest = sample.prompt.partition(": ")
        words, equals = rest.split(" ")[:-1], rest.split(" ")[-1]
        name = instructions.OPERATIONS[sample.operation].name
        assert words == list(sample.words) and equals == "=" and sample.answer.endswith("\n")
        assert is_right(name, words, task, sample.answer.split()), sample


def test_instructions_have_near_duplicates_a_long_tail_and_unseen_lists():
    test, train = instructions.samples(made_up_words(), 20_000, 3000)
    asked = defaultdict(set)
    for sample in train:
        asked[sample.operation, sample.words].add(sample.prompt)
    assert Counter(len(prompts) for prompts in asked.values()) == {10: 1200, 1: 8000}
    lists = [{frozenset(sample.words) for sample in part} for part in (test, train)]
    assert len(lists[0]) == 3000 and len(lists[1]) == len(asked) and not lists[0] & lists[1]
    assert set(Counter(sample.operation for sample in test).values()) == {250}
    counts = Counter(sample.operation for sample in train)
    law = [(rank + 1) ** -1.5 for rank in range(12)]
    for rank, value in enumerate(law):
        assert counts[rank] / 20_000 == pytest.approx(value / sum(law), rel=0.15, abs=0.01)


def test_labels_of_instructions_are_the_tokens_that_follow(wordnet):
    ids = defaultdict(lambda: len(ids) + 1)
    encode = lambda texts: [[ids[piece] for piece in re.findall(r" ?\w+|\W", text)] for text in texts]  # noqa: E731
    made = make_data(replace(TASKS["R3"], samples=100, test=48), encode, wordnet)
    for split in made[:2]:
        there = split.labels >= 0
        following = split.tokens.gather(1, split.positions.long() + 1)
        assert (following == split.labels)[there].all() and there.any(1).all()
        assert split.labels[torch.arange(len(split)), there.sum(1) - 1].eq(ids["\n"]).all()
    assert made.test.groups.bincount().tolist() == [4] * 12


def test_additions_add_up_and_the_test_set_is_unseen():
    made = data.additions(300, 300)
    code = {i + 1: c for i, c in enumerate("0123456789+=;")}
    seen = []
    for split in made[:2]:
        texts = ["".join(code[t] for t in row[:n]) for row, n in zip(split.tokens.tolist(), split.lengths, strict=True)]
        for text in texts:
            a, b, c = (part[::-1] for part in text.rstrip(";").replace("=", "+").split("+"))
            assert int(a) + int(b) == int(c)
        seen.append(set(texts))
    assert not seen[0] & seen[1]


def test_batches_hold_each_sample_once_and_like_lengths():
    lengths = torch.randint(5, 40, (500,))
    ids = torch.randperm(500)[:333]
    found = batches(ids, lengths, 16, seed=0)
    assert sorted(torch.cat(found).tolist()) == list(range(333))
    spread = [int(lengths[ids[part]].max() - lengths[ids[part]].min()) for part in found]
    assert sum(spread) / len(spread) < 6


def test_the_learning_rate_decays_to_zero():
    assert learning_rate(2.0, 0.0) == 0 and learning_rate(2.0, 0.03) == 2.0
    assert learning_rate(2.0, 1.0) == pytest.approx(0, abs=1e-9)
