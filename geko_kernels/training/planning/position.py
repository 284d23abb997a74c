"""The position of a `GEKOSampler` in a checkpoint: its `state_dict`, its `load_state_dict` and their checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geko_kernels.training.planning.epoch_plan import EpochPlan
from geko_kernels.training.planning.probes import MAX_INTERVAL

if TYPE_CHECKING:
    from geko_kernels.training.planning.sampler import GEKOSampler

_MOST = torch.iinfo(torch.int32).max
# tensors with one row a sample: name -> dtype, which values are allowed, the same in words
PER_SAMPLE: dict[str, tuple[torch.dtype, Callable[[Tensor], Tensor], str]] = {
    "interval": (torch.uint8, lambda column: column <= MAX_INTERVAL, f"from 0 to {MAX_INTERVAL}"),
    "next_probe": (torch.int32, lambda column: column >= 0, "an epoch"),
    "was_correct": (torch.bool, lambda column: column.view(torch.uint8) <= 1, "0 or 1"),
    "forgotten": (torch.uint8, lambda column: column >= 0, "a count"),
}
# name -> smallest, largest value
_INTEGERS = {
    "lost": (0, 2**62),
    "doubtful": (0, _MOST),
    "epoch": (0, _MOST),
    "position": (0, _MOST),
    "hurried": (-1, _MOST),
}
_REST = ("plan", "spans", "finished", "guarded", "num_epochs")


def position_of(sampler: GEKOSampler, consumed: int) -> dict[str, Any]:
    """`GEKOSampler.state_dict(consumed)`."""
    if isinstance(consumed, bool) or not isinstance(consumed, int):
        raise TypeError(f"consumed must be an int, the samples of the plan trained so far, got {consumed!r}")
    if consumed < 0:
        raise ValueError(f"consumed must be at least 0, got {consumed}")
    plan = sampler.plan
    size = 0 if plan is None else len(plan.ids)
    return {
        **{name: _column(sampler, name) for name in PER_SAMPLE},
        "plan": None if plan is None else plan.ids,
        **({} if plan is None or plan.packs is None else {"packs": plan.packs}),
        **({} if plan is None or sampler.answering is None else {"answering": sampler.answering}),
        "spans": None if plan is None else list(plan[1:5]),
        "lost": int(sampler.lost),
        "doubtful": sampler.doubtful,
        "epoch": sampler.epoch,
        "position": min(consumed, size),
        "finished": plan is not None and consumed >= size,
        "guarded": sampler.guard_on,
        "hurried": sampler.hurried,
        "num_epochs": sampler.num_epochs,
    }


def go_on_from(sampler: GEKOSampler, values: Mapping[str, Any]) -> None:
    """`GEKOSampler.load_state_dict(values)`; if it raises, nothing is changed."""
    check_position(values, len(sampler.state))
    _check_kind_of_plan(sampler, values)
    for name in PER_SAMPLE:
        _column(sampler, name).copy_(values[name])
    sampler.answering = values["answering"].to(sampler.state.device) if "answering" in values else None
    sampler.lost.fill_(values["lost"])
    sampler.doubtful = values["doubtful"]
    packs = values["packs"].cpu() if "packs" in values else None
    sampler.plan = None
    if values["plan"] is not None:
        sampler.plan = EpochPlan(values["plan"].cpu(), *values["spans"])._replace(packs=packs)
    sampler.epoch, sampler.handed_out = values["epoch"], values["finished"]
    sampler.position = 0 if sampler.handed_out or sampler.plan is None else sampler.plan.units_of(values["position"])
    sampler.guard_on, sampler.hurried = values["guarded"], values["hurried"]
    sampler.forget_weights_()
    if values["num_epochs"] != sampler.num_epochs:
        sampler.relocate_()


def _column(sampler: GEKOSampler, name: str) -> Tensor:
    column: Tensor = getattr(sampler.probes if name in ("interval", "next_probe") else sampler, name)
    return column


def _check_kind_of_plan(sampler: GEKOSampler, values: Mapping[str, Any]) -> None:
    packed, packs = "packs" in values, sampler.packer is not None
    if values["plan"] is not None and packed != packs:
        had, has = ("packs", "single samples") if packed else ("single samples", "packs")
        raise ValueError(
            f"the current epoch is planned in {had}, but this run plans {has}: resume with the same packing and "
            "batch_tokens as the run was started with"
        )


def check_position(values: Mapping[str, Any], num_samples: int) -> None:
    """Check every value of a sampler's `state_dict()`.

    Raises:
        ValueError: a value is missing, unknown, of the wrong kind or from another run; names it.
    """
    known = {*PER_SAMPLE, *_INTEGERS, *_REST}
    missing, unknown = sorted(known - values.keys()), sorted(values.keys() - known - {"packs", "answering"})
    if missing or unknown:
        raise ValueError(f"state_dict does not fit: missing {missing}, unknown {unknown}")
    for name, (dtype, allows, words) in PER_SAMPLE.items():
        _check_column(name, values[name], dtype, num_samples)
        fits = allows(values[name])
        if not bool(fits.all()):
            row = int(fits.logical_not().nonzero()[0])
            raise ValueError(f"state_dict[{name!r}][{row}] must be {words}")
    if "answering" in values:
        _check_column("answering", values["answering"], torch.bool, num_samples)
    for name, (least, most) in _INTEGERS.items():
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"state_dict[{name!r}] must be an integer from {least} to {most}, got {value!r}")
    if not isinstance(values["finished"], bool):
        raise ValueError(f"state_dict['finished'] must be True or False, got {values['finished']!r}")
    if not (values["guarded"] is None or isinstance(values["guarded"], bool)):
        raise ValueError(f"state_dict['guarded'] must be True, False or None, got {values['guarded']!r}")
    passes = values["num_epochs"]
    if type(passes) is not float or not 0 < passes < math.inf:
        raise ValueError(f"state_dict['num_epochs'] must be a number above 0, got {passes!r}")
    _check_plan(values, num_samples)


def _check_column(name: str, column: Any, dtype: torch.dtype, num_samples: int) -> None:
    if not isinstance(column, Tensor) or column.dtype != dtype or column.dim() != 1:
        got = f"{tuple(column.shape)} {column.dtype}" if isinstance(column, Tensor) else type(column).__name__
        raise ValueError(f"state_dict[{name!r}] must be ({num_samples},) {dtype}, got {got}")
    if len(column) != num_samples:
        raise ValueError(f"state_dict is of a sampler over {len(column)} samples, this one has {num_samples}")


def _check_plan(values: Mapping[str, Any], num_samples: int) -> None:
    plan, spans, position = values["plan"], values["spans"], values["position"]
    if plan is None:
        if spans is not None or "packs" in values or "answering" in values or position or values["finished"]:
            raise ValueError("state_dict has no plan, but a position in one")
        return
    if not isinstance(plan, Tensor) or plan.dtype != torch.int32 or plan.dim() != 1:
        got = f"{tuple(plan.shape)} {plan.dtype}" if isinstance(plan, Tensor) else type(plan).__name__
        raise ValueError(f"state_dict['plan'] must be (n,) torch.int32, got {got}")
    outside = (plan < 0) | (plan >= num_samples)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(f"state_dict['plan'][{at}] must be a sample from 0 to {num_samples - 1}, got {int(plan[at])}")
    drawn = torch.zeros(num_samples, dtype=torch.bool, device=plan.device)
    drawn[plan.long()] = True
    if int(drawn.count_nonzero()) != len(plan):
        raise ValueError(f"state_dict['plan'] draws samples twice: {len(plan)} ids of {int(drawn.count_nonzero())}")
    if position > len(plan) or values["finished"] != (position == len(plan)):
        raise ValueError(f"state_dict['position'] is {position} of {len(plan)}, 'finished' {values['finished']}")
    if "packs" in values:
        _check_packs(values["packs"], len(plan))
    if not isinstance(spans, list) or len(spans) != 4 or not _are_spans(spans, len(plan)):
        raise ValueError(
            f"state_dict['spans'] must be [head, start, turn, end] with head from 0 to {len(plan)} and "
            f"start, turn and end in [0, 1], got {spans!r}"
        )


def _check_packs(packs: Any, size: int) -> None:
    if not isinstance(packs, Tensor) or packs.dtype != torch.int64 or packs.dim() != 1:
        got = f"{tuple(packs.shape)} {packs.dtype}" if isinstance(packs, Tensor) else type(packs).__name__
        raise ValueError(f"state_dict['packs'] must be (p,) torch.int64, got {got}")
    ends = [0, *packs.tolist()]
    if ends[-1] != size or any(end <= before for before, end in pairwise(ends)):
        raise ValueError(f"state_dict['packs'] must ascend to the {size} samples of the plan, got {packs.tolist()[:8]}")


def _are_spans(spans: list[Any], size: int) -> bool:
    selected, *points = spans
    if (
        type(selected) is not int
        or not 0 <= selected <= size
        or any(type(point) not in (int, float) for point in points)
    ):
        return False
    start, turn, end = points
    return 0 <= start <= min(turn, end) and max(turn, end) <= 1
