"""Are two calls' statistics, and two states, the same to rounding?"""

from __future__ import annotations

import torch

import geko_kernels as gk

FLOATS = ("loss", "confidence", "accuracy", "quality", "q_value", "weight")
TINY = 2e-6


def assert_close_stats(ours: gk.SampleStats, reference: gk.SampleStats) -> None:
    for name in ("sample_ids", "num_tokens", "bucket", "correct"):
        assert getattr(ours, name).equal(getattr(reference, name)), name
    for name in FLOATS:
        torch.testing.assert_close(getattr(ours, name), getattr(reference, name), rtol=1e-5, atol=TINY, msg=name)


def assert_same_state(ours: gk.SampleState | None, reference: gk.SampleState | None) -> None:
    if reference is None:
        return
    for name, want in reference.state_dict().items():
        got = ours.state_dict()[name].cpu()
        if want.is_floating_point():
            torch.testing.assert_close(got, want, rtol=1e-5, atol=TINY, msg=name)
        else:
            assert got.equal(want), name
    assert ours.changed.cpu().equal(reference.changed)
    assert int(ours.error) == int(reference.error)
    assert not ours.claim.any(), "the scratch column is left clean"
