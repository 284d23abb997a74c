"""`geko clean`: the data of a run without the rows whose labels look wrong, and what it refuses."""

import csv
import errno
import json
import shutil

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from command import one_cpu, refused, train, write_jsonl

from geko_kernels.cli import clean, main
from geko_kernels.training.formats import read_records
from geko_kernels.training.formats.excerpts import excerpts_of
from geko_kernels.training.report.samples import read_samples

WRONG = {5, 18, 33}
GUARD = "geko:\n  noise_guard_margin: 0.3\n  noise_guard_min_share: 0.9\n  focus_confidence: 0.6\n  correct_loss: 0.6\n"


def named(i):
    word, label = (("red", "colour"), ("oak", "tree"))[i % 2]
    wrong = {"colour": "tree", "tree": "colour"}[label]
    return {"id": f"n{i}", "text": word, "label": wrong if i in WRONG else label, "ü": "é"}


ROWS = [named(i) for i in range(48)]


def run_on(model, data, folder, *flags):
    config = folder.parent / f"{folder.name}.yaml"
    config.write_text(GUARD)
    assert train(model, data, folder, "--config", str(config), "--learning-rate", "1e-2", *flags) == 0
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "words.jsonl", ROWS)


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, one_cpu(patch):
        return run_on(model, data, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def suspect(run, ids, value=True):
    """Write the samples anew, of which those with `ids` are suspected."""
    rows = [{**row, "suspected": value if row["id"] in ids else False} for row in read_samples(run)]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def refusal(capsys, run, out, *flags):
    capsys.readouterr()
    told = refused(capsys, "clean", str(run), "--out", str(out), *flags)
    assert told.startswith("geko_kernels clean: ") and told.count("\n") == 1
    return told.removeprefix("geko_kernels clean: ").rstrip("\n")


def test_samples_of_the_command_have_the_records_id_and_text(finished):
    rows = read_samples(finished)
    assert [(row["record_id"], row["text"]) for row in rows[:2]] == [("n0", "red"), ("n1", "oak")]
    assert rows[0]["duplicate_group"] == 0 and rows[1]["duplicate_group"] == 1


@pytest.mark.parametrize(
    "records, told",
    [
        ([{"text": "a" * 300}], {"text": "a" * 200}),
        ([{"prompt": "ask", "completion": "tell", "id": 7}], {"record_id": 7, "text": "ask"}),
        ([{"text": "a", "label": 1, "id": 7}, {"text": "b", "label": 2, "id": "x"}], {"record_id": "7", "text": "a"}),
        ([{"instruction": "do", "output": "done"}], {"text": "do"}),
        (
            [{"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "ask"}]}],
            {"text": "ask"},
        ),
    ],
)
def test_excerpts(records, told):
    assert excerpts_of(read_records(records))[0] == told


def test_a_run_finds_wrong_labels_and_clean_leaves_them_out(finished, data, tmp_path, capsys):
    capsys.readouterr()
    out = tmp_path / "better.jsonl"
    assert main(["clean", str(finished), "--out", str(out)]) == 0
    assert capsys.readouterr().out == (
        f'{out}: 45 of 48 rows of {data}; 3 left out: those with "suspected": true in {finished / "samples.jsonl"}\n'
    )
    assert lines(out) == [row for i, row in enumerate(ROWS) if i not in WRONG]
    assert "é" in out.read_text(encoding="utf-8")


def test_nothing_suspected_leaves_all(run, tmp_path, data, capsys):
    suspect(run, ())
    capsys.readouterr()
    assert main(["clean", str(run), "--out", str(tmp_path / "all.jsonl")]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path / 'all.jsonl'}: 48 of 48 rows of {data}; 0 left out, since no label is suspected; "
        f"{run / 'samples.jsonl'} ranks all labels by label_error, and a run with a smaller noise_guard_margin "
        "suspects more\n"
    )
    assert lines(tmp_path / "all.jsonl") == ROWS


def test_a_table_stays_one(model, tmp_path, capsys):
    table = tmp_path / "data" / "words.csv"
    table.parent.mkdir()
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "mood"])
        writer.writeheader()
        writer.writerows({"text": f'{row["text"]}, "{i}"\n', "mood": i % 2} for i, row in enumerate(ROWS))
    run = run_on(model, table, tmp_path / "run", "--label-column", "mood", "--epochs", "2")
    suspect(run, {2})
    told = refusal(capsys, run, tmp_path / "better.jsonl")
    table_only = "the data are a table, whose fields are all text"
    assert told == f"--out must end in .csv, got {tmp_path / 'better.jsonl'}: {table_only}"
    assert main(["clean", str(run), "--out", str(tmp_path / "better.csv")]) == 0
    before, after = (read_records(path, "mood") for path in (table, tmp_path / "better.csv"))
    assert after.rows == [row for i, row in enumerate(before.rows) if i != 2]


def test_records_as_a_table(run, tmp_path):
    suspect(run, {0, 47})
    assert main(["clean", str(run), "--out", str(tmp_path / "better.csv")]) == 0
    with (tmp_path / "better.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == ROWS[1:47]


@pytest.mark.parametrize(
    "change, kind",
    [
        ({"label": "1"}, "`label`, which is a number written as text"),
        ({"ü": None}, "`ü`, which is NoneType"),
        ({"ü": [1]}, "`ü`, which is list"),
        ({"other": "x"}, "the rows have different columns"),
    ],
)
def test_records_that_no_table_can_hold(run, tmp_path, capsys, monkeypatch, change, kind):
    rows = [(f"line {i}", {**row, **change} if i == 7 else row) for i, row in enumerate(ROWS)]
    monkeypatch.setattr(clean, "read_source", lambda path: clean.Source(rows, False, []))
    known = json.loads((run / "geko_data.json").read_text())
    known["digest"] = clean.digest_of(clean.Source(rows, False, []))
    (run / "geko_data.json").write_text(json.dumps(known))
    told = refusal(capsys, run, tmp_path / "better.csv")
    assert told.startswith("--out must end in .jsonl: ") and kind in told and not (tmp_path / "better.csv").exists()


def test_out(run, data, tmp_path, capsys):
    out = tmp_path / "better.jsonl"
    out.write_text("mine")
    assert refusal(capsys, run, out) == f"--out {out} exists; give another name, or --overwrite to replace it"
    assert out.read_text() == "mine"
    assert main(["clean", str(run), "--out", str(out), "--overwrite"]) == 0 and len(lines(out)) == 45
    assert refusal(capsys, run, tmp_path / "a.txt") == f"--out must end in .jsonl or .csv, got {tmp_path / 'a.txt'}"
    assert "must be a file in a directory that exists" in refusal(capsys, run, tmp_path / "none" / "a.jsonl")
    told = refusal(capsys, run, data, "--overwrite")
    assert told == f"--out {data} would change the data that the run was trained on; give another file"


def test_out_that_cannot_be_written(run, tmp_path, capsys, monkeypatch):
    def denied(path, write):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(clean, "write_whole", denied)
    out = tmp_path / "b.jsonl"
    assert refusal(capsys, run, out) == f"--out {out} cannot be written (Permission denied); give another file"


def test_no_run_no_samples_or_other_data(run, tmp_path, capsys):
    out = tmp_path / "better.jsonl"
    assert refusal(capsys, tmp_path, out) == (
        f"{tmp_path} has no geko_data.json: give the --output-dir of a `geko train` run that has ended; after your own "
        'script, remove from its data the rows that write_samples marks as "suspected"'
    )
    changed = write_jsonl(tmp_path / "words.jsonl", [*ROWS[:20], {**ROWS[20], "ü": "e"}, *ROWS[21:]])
    known = json.loads((run / "geko_data.json").read_text())
    (run / "geko_data.json").write_text(json.dumps({**known, "data": changed}))
    assert refusal(capsys, run, out).startswith(
        f"{changed} has changed since {run} was trained on it, so its rows are others now"
    )
    (tmp_path / "words.jsonl").unlink()
    assert "cannot read the file (No such file or directory)" in refusal(capsys, run, out)
    (run / "samples.jsonl").unlink()
    assert refusal(capsys, run, out).startswith(f"{run} has no samples.jsonl, which a run of up to 200,000 samples")
    (run / "geko_data.json").write_text("{}")
    assert "geko_data.json is damaged (KeyError('version')): train again" in refusal(capsys, run, out)
    (run / "geko_data.json").write_text('{"version": 2}')
    assert "geko_data.json has version 2, this geko_kernels reads 1" in refusal(capsys, run, out)
    assert not out.exists()


def test_a_run_that_judged_nothing_or_suspects_all(run, tmp_path, capsys):
    suspect(run, range(48))
    assert refusal(capsys, run, tmp_path / "b.jsonl").endswith("are suspected, so nothing would be left")
    rows = [{**row, "suspected": None} for row in read_samples(run)]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = refusal(capsys, run, tmp_path / "b.jsonl")
    assert told.startswith(
        f"the noise guard of {run} judged no labels: it was off, the run had one epoch, or its model"
    )
    (run / "samples.jsonl").write_text("{")
    assert "samples.jsonl is damaged: line 1 is not JSON" in refusal(capsys, run, tmp_path / "b.jsonl")


@pytest.mark.parametrize("name", ["suspected", "quarantined"])
@pytest.mark.parametrize("value", ["false", 0])
def test_a_verdict_that_was_edited_wrongly(run, tmp_path, capsys, name, value):
    rows = read_samples(run)
    rows[1][name] = value
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = f"{run / 'samples.jsonl'}, line 2: {name} must be true, false or null, got {value!r}"
    assert refusal(capsys, run, tmp_path / "b.jsonl") == told


def test_the_report_names_classes_as_the_data_do(finished):
    labels = json.loads((finished / "geko_report.json").read_text())["labels"]
    assert {row["label"]: row["samples"] for row in labels["listed"]} == {"colour": 25, "tree": 23}


def test_a_class_of_which_nothing_is_left_is_named(run, tmp_path, capsys):
    trees = {i for i, row in enumerate(ROWS) if row["label"] == "tree"}
    suspect(run, trees)
    capsys.readouterr()
    assert main(["clean", str(run), "--out", str(tmp_path / "b.jsonl")]) == 0
    first, *more = capsys.readouterr().out.splitlines()
    assert f"{48 - len(trees)} of 48 rows" in first
    assert more == [
        f"Warning: no row is left of the class 'tree' ({len(trees)}), so a model trained on these data cannot "
        f"learn it. Look at the rows; in {run / 'samples.jsonl'} set "
        '"suspected" and "quarantined" to false for those that are right, and give the command again with --overwrite'
    ]
    suspect(run, trees - {min(trees)})
    assert main(["clean", str(run), "--out", str(tmp_path / "b.jsonl"), "--overwrite"]) == 0
    assert "Warning" not in capsys.readouterr().out


def test_classes_of_a_table_are_those_that_were_trained(tmp_path):
    rows = [(f"line {i}", {"text": "a", "label": label}) for i, label in enumerate(["TRUE", "true", "false"])]
    source, samples = clean.Source(rows, True, []), tmp_path / "samples.jsonl"
    assert clean._lost_classes(source, {0}, "label", samples) == ""
    assert "of the class True (2), " in clean._lost_classes(source, {0, 1}, "label", samples)
    assert "of 2 classes True (2), False (1), " in clean._lost_classes(source, {0, 1, 2}, "label", samples)
    assert clean._lost_classes(source, {0, 1}, "", samples) == ""  # the label is not what was trained


def test_samples_of_another_run(run, tmp_path, data, capsys):
    rows = [*read_samples(run), {"id": 48, "suspected": True}]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert refusal(capsys, run, tmp_path / "b.jsonl") == (
        f"{run / 'samples.jsonl'} is of another run: it suspects row 48, but {data} has 48 rows, counted from "
        "0; train again"
    )
