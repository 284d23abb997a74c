"""Task D1's rows from a miniature of Debian's lists, of made-up packages."""

from __future__ import annotations

import gzip
import json
import sys

import numpy as np
import pytest

from benchmarks.end_to_end import packages

TEXT = "A thing that does one job, and does it well enough to be described at some length."


@pytest.fixture
def lists(tmp_path):
    """12 packages of 6 sources, two a source; a package without a description, and one that is described twice."""
    listed, described = [], []
    for i in range(12):
        listed.append(
            f"Package: tool{i}\nSource: source{i // 2} (1.{i})\nVersion: 1\nTag: a::b,\n c::d\nSection: utils\n"
            f"Description: tool number {i}\nDescription-md5: md5{i}"
        )
        described.append(
            f"Package: tool{i}\nDescription-md5: md5{i}\nDescription-en: tool number {i}\n {TEXT}\n It is of\n source"
            f" {i}.\n .\n It has:\n  * one part\n  * another"
        )
    listed += ["Package: bare\nDescription-md5: none", listed[0]]
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "x_binary-amd64_Packages").write_text("\n\n".join(listed) + "\n")
    (folder / "x_i18n_Translation-en.gz").write_bytes(gzip.compress("\n\n".join(described).encode()))
    return folder


def test_a_row(lists):
    rows = packages.read_lists(lists)
    assert [row.name for row in rows] == sorted(f"tool{i}" for i in range(12))
    assert rows[0].row() == {
        "prompt": "Package: tool0\nSection: utils\nSummary: tool number 0\nDescription:",
        "completion": f" {TEXT} It is of source 0.\nIt has:\n* one part\n* another",
        "name": "tool0",
        "section": "utils",
        "source": "source0",
    }


def test_no_source_is_in_two_parts(lists):
    rows = packages.read_lists(lists)
    parts = packages.deal(rows, {"test": 3, "choose": 2, "train": 4})
    assert [len(part) for part in parts.values()] == [3, 2, 4]
    sources = [{row.source for row in part} for part in parts.values()]
    assert len(set.union(*sources)) == sum(map(len, sources))
    assert (
        packages.deal(rows[::-1], {"test": 3})["test"] != []
        and packages.deal(rows, {"test": 3})["test"] == parts["test"]
    )
    with pytest.raises(ValueError, match="12 packages are too few for"):
        packages.deal(rows, {"train": 13})


def test_the_keys_give_the_same_rows_from_lists_of_another_day(lists, tmp_path, monkeypatch, capsys):
    sizes = {"test": 2, "choose": 2, "train": 6}
    monkeypatch.setattr(packages, "SIZES", sizes)
    monkeypatch.setattr(packages, "KEYS", tmp_path / "keys.npz")
    monkeypatch.setattr(sys, "argv", ["packages", str(lists), "--out", str(tmp_path / "a"), "--deal"])
    packages.main()
    path = lists / "x_binary-amd64_Packages"
    path.write_text("Package: aaa\nSection: new\nDescription-md5: md50\n\n" + path.read_text())
    monkeypatch.setattr(sys, "argv", ["packages", str(lists), "--out", str(tmp_path / "b")])
    packages.main()
    for name, size in sizes.items():
        rows = (tmp_path / "a" / f"{name}.jsonl").read_text()
        assert rows == (tmp_path / "b" / f"{name}.jsonl").read_text() and len(rows.splitlines()) == size
    gone = json.loads((tmp_path / "a" / "train.jsonl").read_text().splitlines()[0])["name"]
    path.write_text(path.read_text().replace(f"Package: {gone}\n", f"Package: {gone}-2\n"))
    capsys.readouterr()
    with pytest.raises(SystemExit, match="more than 1 % of a part's rows are missing"):
        packages.main()
    assert "train: 5 of 6 rows" in capsys.readouterr().out


def test_the_keys_in_the_repo_are_of_as_many_rows():
    keys = np.load(packages.Path(packages.__file__).with_name("packages_keys.npz"))
    assert {name: len(keys[name]) for name in keys} == {"test": 2_000, "choose": 1_000, "train": 40_000}
    everything = np.concatenate([keys[name] for name in keys])
    assert len(np.unique(everything)) >= len(everything) - 3  # 32 bits of a hash


def test_an_empty_folder_says_what_fills_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file \*_Packages\*: `apt-get -o Acquire::Languages=en"):
        packages.read_lists(tmp_path)
