"""docs/architecture.md says which files a logit passes on the host before a Triton kernel starts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import geko_kernels as gk
from geko_kernels import ops

pytest.importorskip("triton")
from geko_kernels.kernels.launch import Launch

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "geko_kernels"


def callers() -> list[str]:
    """The package's files on the stack, the outermost first."""
    files, frame = [], sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            files.append(str(file.relative_to(ROOT)))
        frame = frame.f_back
    return list(dict.fromkeys(reversed(files)))


def test_a_logit_passes_the_five_host_files_that_the_document_names(monkeypatch):
    monkeypatch.setattr(ops, "_override", "triton")
    seen, start = [], Launch.__call__

    def launch(self, *pointers):
        seen.append([*callers(), "geko_kernels/kernels/launch.py"])
        start(self, *pointers)

    monkeypatch.setattr(Launch, "__call__", launch)
    logits = torch.randn(4, 3, 11, requires_grad=True)
    gk.weighted_loss(logits, torch.zeros(4, 3, dtype=torch.int64), torch.arange(4), gk.SampleState(4)).backward()

    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    steps = text.split("**Eager, on a GPU.**")[1].split("\n\n")[1]
    named = re.findall(r"^\d\. `(geko_kernels/[\w/]+\.py)`", steps, re.MULTILINE)
    assert len(seen) == 3, "two launches in the forward, one in the backward"
    backward = ["geko_kernels/losses/logits_autograd.py", *named[1:]]
    assert len(named) == 5 and f"(in the backward `{backward[0]}`" in steps
    for files, expected in zip(seen, (named, named, backward), strict=True):
        assert [file for file in expected if file in files] == expected and len(set(files)) == 5
