"""The position of a `GEKOLoader` in a checkpoint: its `state_dict` and `load_state_dict`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geko_kernels.training.fingerprint import changed_items
from geko_kernels.training.report.visits import is_whole
from geko_kernels.zero_share import NO_LOOK, ZeroShare

if TYPE_CHECKING:
    from geko_kernels.training.loader import GEKOLoader

_SAME = ("num_samples", "batch_size", "num_processes", "num_epochs", "seed")  # must be equal in both runs
_SAME_RUN = "go on with the loader's arguments and data of the first run, or start a new one without load_state_dict"
_KEYS = {*_SAME, "config", "items", "state", "upstream", "sampler", "due", "probed", "looked", "counts", "visits"}


def position_of(loader: GEKOLoader) -> dict[str, Any]:
    """`GEKOLoader.state_dict()`; all processes call it."""
    sampler, state = loader.sampler, loader.state
    state.sync()
    size, trained = loader._size_visited(), loader._trains_at_hand
    counts, visits = _counts(loader, size > 0)
    return {
        **_own(loader),
        "config": state.config.to_dict(),
        "items": loader._fingerprint(),
        "state": _copied(state.state_dict()),
        "upstream": state.upstream.clone(),
        "zero_share": state.zero_share.values(),
        "sampler": _copied(sampler.state_dict(loader._consumed + size * trained)),
        "due": None if loader._due is None else loader._due.clone(),
        "probed": loader._probed + size * (not trained),
        "looked": sampler.looked,
        "counts": counts,
        "visits": visits,
    }


def go_on_from(loader: GEKOLoader, values: Mapping[str, Any]) -> None:
    """`GEKOLoader.load_state_dict`; if it raises, nothing is changed."""
    if not isinstance(values, Mapping):
        raise TypeError(f"state_dict must be what GEKOLoader.state_dict() returned, got {type(values).__name__}")
    missing = sorted(_KEYS - values.keys())
    if missing:
        raise ValueError(f"state_dict lacks {missing}: is it what GEKOLoader.state_dict() returned?")
    _check_same_run(loader, values)
    _check_due(values["due"], values["probed"], len(loader.dataset))
    state, sampler = loader.state, loader.sampler
    if not isinstance(values["counts"], dict) or values["counts"].keys() != loader.counts.state_dict().keys():
        raise ValueError(f"state_dict['counts'] must hold {sorted(loader.counts.state_dict())}")
    if not is_whole(values["visits"]):
        raise ValueError("state_dict['visits'] is damaged: it must hold the columns of each visit")
    zero_share = ZeroShare(values.get("zero_share", NO_LOOK))  # an older one has none
    before = _copied(state.state_dict())
    state.load_state_dict(values["state"])
    try:
        sampler.load_state_dict(values["sampler"])
    except ValueError:
        state.load_state_dict(before)
        raise
    state.upstream.copy_(values["upstream"])
    state.zero_share = zero_share
    state.predictions.zero_()
    plan = sampler.plan
    finished = plan is not None and sampler.handed_out
    loader._consumed = len(plan.ids) if plan is not None and finished else sampler.position
    sampler.looked = values["looked"]
    loader._at_hand = None
    loader._due = None if values["due"] is None else values["due"].cpu().clone()
    loader._probed = values["probed"]
    loader.counts.load_state_dict(copy.deepcopy(values["counts"]))
    loader.counts.log.load_state_dict(values["visits"])
    if loader._due is not None:
        seen = state.times_seen.clone()
        seen[loader._due[: loader._probed].to(seen.device)] -= 1  # as they were when the round began
        sampler.probes.hand_out_(loader._due, seen)


def _own(loader: GEKOLoader) -> dict[str, int]:
    num = {"num_samples": len(loader.dataset), "num_processes": loader.world}
    return {name: num[name] if name in num else getattr(loader, name) for name in _SAME}


def _counts(loader: GEKOLoader, with_batch_at_hand: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The report's counts and visits, with or without the current batch; those of the run are unchanged."""
    counts = loader.counts
    counts.collect()
    counts.flush_visits()
    before, mark = copy.deepcopy(counts.state_dict()), counts.log.mark()
    if not with_batch_at_hand:
        return before, counts.log.state_dict()
    assert loader._at_hand is not None
    counts.add(loader._at_hand[0])
    counts.collect()
    counts.flush_visits()
    values = copy.deepcopy(counts.state_dict()), counts.log.state_dict()
    counts.load_state_dict(before)
    counts.log.rewind(mark)
    return values


def _check_same_run(loader: GEKOLoader, values: Mapping[str, Any]) -> None:
    for name, own in _own(loader).items():
        if values[name] != own:
            raise ValueError(
                f"state_dict[{name!r}] is {values[name]!r}, but this loader's {name} is {own!r}: {_SAME_RUN}"
            )
    config = loader.state.config.to_dict()
    for name in sorted({*config, *values["config"]}):
        if values["config"].get(name) != config.get(name):
            raise ValueError(
                f"state_dict['config'] has {name}={values['config'].get(name)!r}, but this loader's config has "
                f"{config.get(name)!r}: {_SAME_RUN}"
            )
    changed, compared = changed_items(values["items"], loader._fingerprint())
    if changed:
        raise ValueError(
            f"state_dict is of a run over other data: {changed} of {compared} items compared differ: {_SAME_RUN}"
        )


def _check_due(due: Any, probed: Any, num_samples: int) -> None:
    if due is not None and not (isinstance(due, Tensor) and due.dtype == torch.int64 and due.dim() == 1 and len(due)):
        raise ValueError(f"state_dict['due'] must be None or a tensor of int64 ids, got {due!r}")
    if due is not None and not 0 <= int(due.min()) <= int(due.max()) < num_samples:
        raise ValueError(
            f"state_dict['due'] must hold ids in [0, {num_samples}), got {int(due.min())}..{int(due.max())}"
        )
    if not isinstance(probed, int) or probed < 0 or (due is not None and probed > len(due)):
        raise ValueError(f"state_dict['probed'] must be an int from 0 to the number of due ids, got {probed!r}")


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}
