"""Tasks D2, V1 and G1: rows from miniatures of their sources, and a run of each on a tiny random model."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.end_to_end import __main__ as end_to_end
from benchmarks.end_to_end import raters, row_hashes, sections, sums, texts
from benchmarks.end_to_end.data import Data, Ratings, Split
from benchmarks.end_to_end.measures import by_class, expected_ratings, spearman
from benchmarks.end_to_end.packages import Package
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
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [*command, *arguments])
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
    with pytest.raises(ValueError, match="R4 has no samples to choose by; R1, R2, R3, D1, D2, V1, G1 have"):
        make_data(TASKS["R4"], None, tmp_path, choosing=True)


def packed(files, name):
    """A gzipped archive of texts by path, as bytes."""
    content = io.BytesIO()
    with tarfile.open(name, "w:gz", fileobj=content) as archive:
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """40 texts of 20 documents of each kind; one whose mean is another text's, and one that is there twice."""
    files = {}
    for number, kind in enumerate(raters.KINDS):
        ratings, told = [], []
        for i in range(40):
            given = [(i + number) % 9 - 4, 0, (i * 3) % 9 - 4]
            mean = sum(given) / 3
            ratings.append(f"{i // 2}_{i % 2}\t{mean}\t0.1\t{given}")
            told.append(f"{i // 2}_{i % 2}\t{2.5 if i == 7 else mean}\tA {kind} of {i if i != 9 else 8} words")
        for what, lines in (("anonDataRatings", ratings), ("GroundTruth", told)):
            files[f"x/{kind}_{what}.txt"] = ("\ufeff" + "\r\n".join(lines)).encode()
    path = tmp_path / "vader.tar.gz"
    inner = packed(files, "inner")
    path.write_bytes(packed({"v/additional_resources/hutto_ICWSM_2014.tar.gz": inner}, "outer"))
    monkeypatch.setattr(raters, "SIZES", {"test": 20, "choose": 10})
    monkeypatch.setattr(row_hashes, "FILE", tmp_path / "hashes.json")
    return path


def test_texts_with_a_rating_of_one_of_their_raters(archive):
    rows = raters.read(archive)
    assert len(rows) == 4 * 38 and {row.kind for row in rows} == {0, 1, 2, 3}
    for row in rows:
        i = int(row.text.split()[3])
        given = [(i + row.kind) % 9 - 4, 0, (i * 3) % 9 - 4]
        assert row.rating in given and row.mean == pytest.approx(sum(given) / 3)
        assert row.document == f"{raters.KINDS[row.kind]} {i // 2}"
    assert 20 < sum(row.rating == 0 for row in rows) < 90
    parts = raters.deal(rows)
    documents = [{row.document for row in part} for part in parts.values()]
    assert len(set.union(*documents)) == sum(map(len, documents)) and len(parts["test"]) in (20, 21)
    with pytest.raises(ValueError, match="152 texts are too few for"):
        raters.SIZES["test"] = 200
        raters.deal(rows)


def test_v1_is_built_and_runs_and_other_rows_are_refused(archive, tiny, monkeypatch, tmp_path):
    out = tmp_path / "v1.npz"
    command = ["raters", str(archive), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--deal"])
    raters.main()
    monkeypatch.setattr(sys, "argv", command)
    raters.main()
    made = make_data(TASKS["V1"], None, tmp_path, out)
    rows = raters.deal(raters.read(archive))
    assert made.ratings.means.tolist() == [round(row.mean * 10_000) for row in rows["test"]]
    assert made.train.labels[:, 0].tolist() == [made.ratings.tokens[row.rating + 4] for row in rows["train"]]
    chosen = make_data(TASKS["V1"], None, tmp_path, out, choosing=True)
    assert chosen.ratings.means.tolist() == [round(row.mean * 10_000) for row in rows["choose"]]
    arms = ["H", "A"]
    found = run_quickly(monkeypatch, tmp_path, out, "--tasks", "V1", "--arms", *arms)
    assert [row["arm"] for row in found] == arms and all(-1 <= row["final"]["test_spearman"] <= 1 for row in found)
    assert "test_spearman" in found[0]["history"][0]
    changed = rows["test"] + rows["choose"] + rows["train"][:-1] + [rows["train"][-1]._replace(rating=4)]
    monkeypatch.setattr(raters, "read", lambda path: changed)
    with pytest.raises(ValueError, match=r"V1's part 'train' has 1\d\d rows of SHA-256 .* that vaderSentiment 3.3.2's"):
        raters.main()


def test_spearman_is_scipy_s():
    first, second = torch.tensor([1.0, 2, 2, 4, 5, 5, 5, 8]), torch.tensor([3.0, 1, 4, 4, 2, 9, 9, 7])
    assert spearman(first, second) == pytest.approx(0.56531554109761, abs=1e-12)
    assert spearman(first, -first) == pytest.approx(-1) and spearman(first, first**3) == pytest.approx(1)


def test_spearman_is_scipy_s_on_random_ranks():
    stats = pytest.importorskip("scipy.stats")
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        one, other = torch.randn(50, generator=draw), torch.randint(0, 9, (50,), generator=draw)
        assert spearman(one, other) == pytest.approx(stats.spearmanr(one, other).statistic, abs=1e-12)


def test_the_expected_rating_is_the_mean_under_the_values_softmax():
    class Known:
        def evaluate(self, split, ids):
            return split.labels[:, 0].float() * torch.tensor([0.0, 1.0]), ids

    split = Split(*(torch.zeros(2, 1, dtype=torch.int64) for _ in range(6)))
    ratings = Ratings([1, 2, 3], torch.zeros(2))
    weights = torch.tensor([-1.0, -2, -3]).softmax(0)
    expected = [1.0, float((weights * torch.arange(3)).sum())]
    assert expected_ratings(Known(), Data(split, split, [], ratings)).tolist() == pytest.approx(expected)


def drawn(count=130):
    """Problems in reasoning-gym's form, two of them alike."""
    for i in range(count):
        terms = [i + 1, 2 * i, 7][: 2 + i % 2] + [5]
        signs = ["+", "-", "+"] if i % 3 else ["-", "-", "-"]
        expression = " ".join([str(terms[0]), *(f"{s} {t}" for s, t in zip(signs, terms[1:], strict=False))])
        about = {"expression": expression, "num_terms": len(terms), "num_digits": 1 + i % 3}
        entry = {"question": f"What is {expression} =", "answer": str(eval(expression)), "metadata": about}
        yield entry
        if i == 3:
            yield entry


@pytest.fixture
def small_sums(tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "problems", drawn)
    monkeypatch.setattr(sums, "SIZES", {"test": 20, "choose": 10, "train": 100})
    monkeypatch.setattr(row_hashes, "FILE", tmp_path / "hashes.json")


def test_the_steps_of_a_sum_end_with_its_result():
    assert sums.worked("9 + 21 - 8") == "9+21=30, 30-8=22"
    assert sums.worked("1 - 5 - 2 + 10") == "1-5=-4, -4-2=-6, -6+10=4"
    for row in sums.read(drawn()):
        for step in row.steps.split(", "):
            left, _, right = step.partition("=")
            assert eval(left) == int(right)
        assert row.question.removeprefix("What is ").replace(" ", "").startswith(row.steps.partition("=")[0])
    with pytest.raises(ValueError, match="has the answer 31, and its steps are 9\\+21=30"):
        about = {"expression": "9 + 21", "num_terms": 2, "num_digits": 1}
        sums.read([{"question": "9 + 21 =", "answer": "31", "metadata": about}])


def test_g1_is_built_and_runs(small_sums, tiny, monkeypatch, tmp_path):
    out = tmp_path / "g1.npz"
    monkeypatch.setattr(sys, "argv", ["sums", "--out", str(out), "--deal"])
    sums.main()
    monkeypatch.setattr(sys, "argv", ["sums", "--out", str(out)])
    sums.main()
    parts = sums.deal(sums.read(drawn()))
    assert [len(part) for part in parts.values()] == [20, 10, 100]
    assert len({row.question for part in parts.values() for row in part}) == 130
    made = make_data(TASKS["G1"], None, tmp_path, out)
    for split, part in ((made.train, parts["train"]), (made.test, parts["test"])):
        for labels, row in zip(split.labels, part, strict=True):
            assert labels[labels >= 0].tolist() == [*smollm2.tiny_llama()[1](row.steps), sums.END]
        assert split.groups.tolist() == [row.group for row in part]
    arms = ["A", "H-probes", "B:budget=0.25"]
    rows = run_quickly(monkeypatch, tmp_path, out, "--tasks", "G1", "--arms", *arms, "--ends")
    assert [row["arm"] for row in rows] == arms and rows[2]["cost"] == pytest.approx(0.25, abs=0.01)
    assert rows[1]["config"]["probes"] is False and len(rows[0]["final"]["test_groups"]) == 6
    monkeypatch.setattr(sums, "LONGEST_ANSWER", 3)
    with pytest.raises(ValueError, match=r"take \d+ and 4 tokens: an answer may have 3, both 96"):
        sums.main()


def test_too_few_problems_and_no_reasoning_gym_are_said(monkeypatch):
    with pytest.raises(ValueError, match="130 problems are too few for"):
        sums.deal(sums.read(drawn()))
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(SystemExit, match=r"reasoning-gym is missing: pip install reasoning-gym==0.1.25"):
        sums.problems()


def test_the_hashes_in_the_repo_are_of_as_many_rows():
    known = json.loads(row_hashes.FILE.read_text())
    rows = {task: {part: each["rows"] for part, each in parts.items()} for task, parts in known.items()}
    assert rows == {
        "V1": {"test": 3003, "choose": 1500, "train": 18916},
        "G1": {"test": 1000, "choose": 500, "train": 2000},
    }
