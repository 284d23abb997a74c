"""The page's lists of samples, their texts and the data map, from `samples.jsonl` in the run folder."""

import json
import re

import pytest

pytest.importorskip("matplotlib")

from test_report import Page, run_figures, write

from geko_kernels.training.report.sample_lists import MOST_LISTED, read_sample_lists

SCRIPT = "<script>alert(1)</script><img src=x>"
HEBREW = "\u05d8\u05e7\u05e1\u05d8 (abc) 123"


def sample(index, **fields):
    losses = [2.0, 1.0, 0.1]
    usual = {"text": f"text {index}", "losses": losses, "bucket": "LIGHT", "quarantined": False, "label_error": 0.2}
    return {"id": index, **usual, "forgotten": 0, **fields}


def figures_of(num_samples=20, **fields):
    figures = run_figures(3, num_samples=num_samples)
    none = {"most_forgotten": [], "quarantined": [], "num_quarantined": 0}
    return figures | none | fields


def write_with(tmp_path, rows, painted=False, **fields):
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return write(tmp_path, figures_of(len(rows), **fields), painted).read_text(encoding="utf-8")


def order(text, *headings):
    places = [text.index(f"<h2>{heading}</h2>") for heading in headings]
    return places == sorted(places)


def test_likely_label_errors_come_first_with_their_text(tmp_path):
    rows = [sample(i) for i in range(20)]
    rows[3] |= {"label_error": 0.7}
    rows[5] |= {"label_error": 0.9, "quarantined": True}
    forgotten = [{"id": 7, "times": 3, "loss": 0.1, "bucket": "LIGHT"}]
    text = write_with(tmp_path, rows, quarantined=[5], num_quarantined=1, most_forgotten=forgotten)
    assert order(text, "What to do", "Likely wrong labels", "Quarantined samples", "Most forgotten samples", "Learning")
    assert "Check the labels of 1 quarantined sample</b> (5.0%)" in text
    errors = re.findall(r"<tr><td>(\d+)</td><td>(0\.\d\d)</td><td>0\.100</td><td>(yes|no)</td></tr>", text)
    assert errors == [("5", "0.90", "yes"), ("3", "0.70", "no")]
    for index in (3, 5, 7):
        assert f'dir="auto">text {index}</td>' in text
    assert "text 4" not in text


def test_never_learnt_samples_by_the_rule_of_the_run(tmp_path):
    rows = [sample(i) for i in range(20)]
    rows[2] |= {"losses": [2.0, 1.5], "bucket": "FOCUS"}
    rows[4] |= {"losses": [2.0, 0.6], "bucket": "HARD"}
    rows[6] |= {"losses": [2.0], "bucket": "HARD"}  # one visit tells nothing
    rows[8] |= {"losses": [9.0, 9.0], "quarantined": True, "label_error": 0.9}
    text = write_with(tmp_path, rows)
    assert "Look at 2 samples that were never right</b>" in text and "1 quarantined" not in text
    lists = read_sample_lists(tmp_path, figures_of())
    assert [found["id"] for found in lists.never_learnt] == [2, 4]
    by_accuracy = figures_of()
    by_accuracy["config"] |= {"correctness": "accuracy"}
    assert read_sample_lists(tmp_path, by_accuracy).never_learnt == []  # no hits in the file
    for row in rows:
        row["hits"] = [0.5, 0.9] if row["id"] == 9 else [0.5, 1.0]
    write_with(tmp_path, rows)
    assert [found["id"] for found in read_sample_lists(tmp_path, by_accuracy).never_learnt] == [9]


def test_texts_are_escaped_cut_and_keep_their_direction(tmp_path):
    rows = [sample(i, label_error=0.9) for i in range(20)]
    for row, words in zip(rows, (SCRIPT, HEBREW, "x" * 5000, "half \ud83d"), strict=False):
        row["text"] = words
    text = write_with(tmp_path, rows)
    assert "<script>" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "src=x>" not in text
    assert f'<td colspan="9" dir="auto">{HEBREW}</td>' in text
    assert "x" * 300 + "…</td>" in text and "x" * 301 not in text
    assert "half ?</td>" in text and Page(text).open == []


def test_long_lists_are_folded_and_cut(tmp_path):
    rows = [sample(i, label_error=0.6 + i / 1000) for i in range(130)]
    text = write_with(tmp_path, rows)
    assert "130 samples at which the model was sure of another answer" in text and "the first 100" in text
    assert "<summary>90 more</summary>" in text
    lists = read_sample_lists(tmp_path, figures_of(130))
    assert [found["id"] for found in lists.label_errors] == list(range(129, 129 - MOST_LISTED, -1))


def test_data_map_needs_two_visits(tmp_path):
    text = write_with(tmp_path, [sample(i) for i in range(20)], painted=True)
    assert "Chart: Data map" in text and (tmp_path / "report_map.png").exists()
    row = sample(0, label_probabilities=[0.2, None, 0.6])
    (tmp_path / "samples.jsonl").write_text(json.dumps(row))
    ((mean, spread, bucket),) = read_sample_lists(tmp_path, figures_of(1)).points
    assert (mean, spread, bucket) == (pytest.approx(0.4), pytest.approx(0.2), "LIGHT")
    assert "Data map" not in write_with(tmp_path, [sample(i, losses=[1.0]) for i in range(20)])


def test_rows_with_an_id_alone(tmp_path):
    text = write_with(tmp_path, [{"id": i} for i in range(20)], quarantined=[5], num_quarantined=1)
    assert "Likely wrong labels" not in text and "Never learnt" not in text and "Data map" not in text
    rows = [{"id": i, "text": 3, "losses": "a", "bucket": None, "label_error": "b"} for i in range(20)]
    assert "None: no sample went" in write_with(tmp_path, rows)


def test_quarantined_texts_without_scores(tmp_path):
    rows = [{"id": i, "text": f"text {i}"} for i in range(20)]
    text = write_with(tmp_path, rows, quarantined=[5, 6], num_quarantined=2)
    assert '<p class="quote" dir="auto"><b>5</b> text 5</p>' in text and "5, 6</div>" in text


def test_file_of_an_earlier_run_is_left_alone(tmp_path):
    write_with(tmp_path, [sample(i) for i in range(20)])
    assert read_sample_lists(tmp_path, figures_of(21)) is None
    assert read_sample_lists(tmp_path / "elsewhere", figures_of()) is None
    assert "Data map" not in write(tmp_path, figures_of(21), painted=False).read_text()


def test_damaged_file_is_named_with_its_line(tmp_path):
    for line, message in (
        ('{"id": 1', "line 2 is not JSON"),
        ("[]", "line 2 has no integer id"),
        ('{"id": "a"}', "line 2"),
    ):
        (tmp_path / "samples.jsonl").write_text(f'{{"id": 0}}\n{line}\n')
        with pytest.raises(ValueError, match=f"samples.jsonl is damaged: {message}"):
            write(tmp_path, figures_of(2))
