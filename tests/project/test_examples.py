"""The plain loop and the demo run as a user runs them."""

import re

import pytest
from scripts import run_scripts


def test_plain_loop_learns_and_skips(tmp_path):
    (output,) = run_scripts(tmp_path, [["examples/plain_loop.py"]])
    trained = [int(n) for n in re.findall(r"trained on (\d+) samples", output)]
    assert trained[0] == 2000
    assert trained[-3] < 1000
    assert float(output.split()[-1]) > 0.95


def test_demo_prints_both_arms_and_draws(tmp_path):
    pytest.importorskip("transformers")
    folders, given = (tmp_path / "wrong", tmp_path / "clean"), ((), ("--clean",))
    commands = [["examples/demo.py", "--smoke", *more, "--out", out] for more, out in zip(given, folders, strict=True)]
    printed = run_scripts(tmp_path, commands)
    told = "none of the 77 wrong labels", "suspects 0 of 256"
    for output, named, folder in zip(printed, told, folders, strict=True):
        for row in ("held-out accuracy", "seconds of training", named):
            assert row in output
        assert re.search(r"samples backpropagated\W+2560\W+25\d\d\W", output)  # 10 epochs of 256 each
        assert (folder / "demo.png").read_bytes()[:4] == b"\x89PNG"
        assert "</html>" in (folder / "report.html").read_text()
