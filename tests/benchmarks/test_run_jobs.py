"""benchmarks.run_jobs: each job once, its log and its end, and what a deadline leaves for the next time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import run_jobs

LIST = Path(run_jobs.__file__).with_name("jobs.txt")


def run(monkeypatch, tmp_path, lines, *options):
    path = tmp_path / "jobs.txt"
    path.write_text("\n".join(lines))
    monkeypatch.setattr(sys, "argv", ["run_jobs", str(path), "--out", str(tmp_path / "out"), *options])
    run_jobs.main()
    return tmp_path / "out"


def test_a_job_that_ended_well_is_not_run_again(monkeypatch, tmp_path, capsys):
    lines = ["# first", "", "good: echo said >> $OUT/good.txt; pwd", "bad: echo no; exit 3"]
    for _ in range(2):
        out = run(monkeypatch, tmp_path, lines)
    assert (out / "good.txt").read_text() == "said\n"
    assert (out / "good.log").read_text().strip() == str(run_jobs.ROOT)
    assert (out / "good.done").exists() and not (out / "bad.done").exists()
    assert capsys.readouterr().out.count("bad: exit status 3 after 0 s") == 2


def test_the_deadline_ends_a_job_with_its_children(monkeypatch, tmp_path, capsys):
    out = run(monkeypatch, tmp_path, ["long: sleep 60 & sleep 60", "later: echo"], "--seconds", "0.5")
    assert "long: ended at the deadline" in capsys.readouterr().out
    assert not (out / "long.done").exists() and not (out / "later.log").exists()


@pytest.mark.parametrize("line", ["no colon", "two words: x", "good: 1\ngood: 2"])
def test_a_list_that_says_nothing_clear_is_refused(tmp_path, line):
    path = tmp_path / "jobs.txt"
    path.write_text(line)
    with pytest.raises(ValueError, match="a line is `name: command`"):
        run_jobs.read_jobs(path)


def test_the_list_names_modules_that_there_are():
    for command in run_jobs.read_jobs(LIST).values():
        module = command.split(" -m ")[1].split()[0]
        path = run_jobs.ROOT.joinpath(*module.split("."))
        assert module == "pytest" or path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
