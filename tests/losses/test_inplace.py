"""`inplace=True` overwrites nothing but logits that are a model's own."""

from __future__ import annotations

import pytest
import torch
from test_errors import IDS, LABELS, LOGITS, call

import geko_kernels as gk


def test_inplace_needs_memory_of_its_own():
    with pytest.raises(ValueError, match="inplace=True would write the gradient over a leaf"):
        call(logits=LOGITS.clone().requires_grad_(), inplace=True)
    with pytest.raises(ValueError, match="inplace=True cannot write over expanded logits"):
        call(logits=LOGITS[:1].expand(2, 3, 5), inplace=True)
    with pytest.raises(TypeError, match="inplace must be True or False, got 1"):
        call(inplace=1)


@pytest.mark.parametrize("view", [lambda p: p[:2], lambda p: p.view(2, 3, 5)[:], lambda p: p.view(-1).view(2, 3, 5)])
def test_inplace_spares_a_parameter_behind_a_view(view):
    parameter = torch.nn.Parameter(torch.randn(2, 3, 5))
    before = parameter.detach().clone()
    with pytest.raises(ValueError, match="over the leaf tensor that the logits are a view of; pass the output"):
        call(logits=view(parameter), inplace=True)
    call(logits=view(parameter * 1), inplace=True).backward()  # of what a model returned it may be one
    assert parameter.equal(before) and parameter.grad.any()


@pytest.mark.parametrize("size", [(2, 3, 5), (2, 1, 5), (1, 3, 5)])
def test_inplace_refuses_overlapping_logits(size):
    memory = torch.randn(40, requires_grad=True) * 1
    batch = {"labels": LABELS[: size[0], : size[1]], "sample_ids": IDS[: size[0]]}
    for strides in ((5, 5, 1), (3, 3, 1), (1, 2, 3)):
        logits = memory.as_strided(size, strides)
        overlaps = logits.numel() > len(set((torch.arange(40).as_strided(size, strides)).flatten().tolist()))
        if overlaps:
            with pytest.raises(ValueError, match=r"over logits that overlap in memory, got shape .*logits.contiguous"):
                call(logits=logits, **batch, inplace=True)
        call(logits=logits.contiguous(), **batch, inplace=True).backward(retain_graph=True)
    unfolded = memory[:11].unfold(0, 5, 3)
    with pytest.raises(ValueError, match="overlap in memory"):
        gk.weighted_loss(unfolded, torch.zeros(3, dtype=torch.long), inplace=True)
