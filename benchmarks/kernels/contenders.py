"""Who takes part in the loss benchmark: how each turns a `Case` into a loss of the logits.

A `make` imports its peer when called, and whatever it or the loss raises becomes the reason in the results. To add a
contender, write its `make` and name it in `CONTENDERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor

import geko_kernels as gk
from benchmarks.kernels.loss_cases import Case
from benchmarks.kernels.torch_geko import geko_step

LossOf = Callable[[Tensor], Tensor]
# HARD, FOCUS, LIGHT: samples that are wrong weigh 1, so that without learnt samples the loss is F.cross_entropy
_WEIGHTS = (1.0, 1.0, 0.0)


@dataclass(frozen=True)
class Contender:
    """`make(case)` gives a function from logits to the loss ().

    ours: takes the logits in the shape of a model's output, and runs at every share of zero-weight rows.
    inplace: overwrites its logits, so it gets a copy that is restored before each timed call.
    package: the distribution whose version goes into the results.
    """

    name: str
    make: Callable[[Case], LossOf]
    ours: bool = False
    inplace: bool = False
    cpu: bool = True
    package: str = "torch"
    backend: str = ""  # GEKO_BACKEND for its calls; empty: the device's own choice
    hit_rate: float | None = None  # share of the samples whose gradient is predicted right, where one is

    def package_version(self) -> str | None:
        try:
            return f"{self.package} {version(self.package)}"
        except PackageNotFoundError:
            return None


def _state(case: Case) -> gk.SampleState:
    return gk.SampleState(case.shape.samples, gk.GEKOConfig(bucket_weights=_WEIGHTS), case.device)


def _geko(case: Case, inplace: bool) -> LossOf:
    labels, state = case.labels.view(case.shape.batch[:-1]), _state(case)

    def loss_of(logits: Tensor) -> Tensor:
        loss = gk.weighted_loss(logits, labels, case.sample_ids, state, inplace=inplace)
        assert isinstance(loss, Tensor)
        return loss

    return loss_of


def _geko_hopper(case: Case, hit_rate: float) -> LossOf:
    """As `_geko`, each call with the state as it was when `hit_rate` of the samples were where this call puts them."""
    labels, state = case.labels.view(case.shape.batch[:-1]), _state(case)
    gk.weighted_loss(case.logits.view(case.shape.batch), labels, case.sample_ids, state)
    order = torch.randperm(case.shape.samples, generator=torch.Generator().manual_seed(1)).to(case.device)
    other = torch.where(state.bucket <= gk.Bucket.LIGHT, gk.Bucket.HARD, gk.Bucket.FREEZE)
    before = torch.where(order < round(hit_rate * case.shape.samples), state.bucket, other.to(torch.uint8))

    def loss_of(logits: Tensor) -> Tensor:
        state.bucket.copy_(before)
        return gk.weighted_loss(logits, labels, case.sample_ids, state)

    return loss_of


def _torch_geko(case: Case, compiled: bool) -> LossOf:
    step = torch.compile(geko_step, fullgraph=True, dynamic=False) if compiled else geko_step
    ids, length, state = case.sample_ids.flatten(), case.shape.length, _state(case)
    if case.shape.packed:
        ids = ids[::length].contiguous()
    return lambda logits: step(logits, case.labels, ids, length, state)[0]


def _torch(case: Case, upcast: bool) -> LossOf:
    if upcast:
        return lambda logits: F.cross_entropy(logits.float(), case.labels)
    return lambda logits: F.cross_entropy(logits, case.labels)


def _compile(case: Case) -> LossOf:
    loss = torch.compile(F.cross_entropy, fullgraph=True, dynamic=False)
    return lambda logits: loss(logits, case.labels)


def _liger(case: Case) -> LossOf:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction  # type: ignore[import-not-found]

    arguments = (case.labels, None, -100, 0.0, 0.0, "mean", None, False, False, False)
    return lambda logits: LigerCrossEntropyFunction.apply(logits, *arguments)[0]


def _quack(case: Case) -> LossOf:
    from quack.cross_entropy import cross_entropy  # type: ignore[import-not-found]

    return lambda logits: cross_entropy(logits, case.labels)


def _flash_attn(case: Case) -> LossOf:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss  # type: ignore[import-not-found]

    return lambda logits: cross_entropy_loss(logits, case.labels)[0].mean()


_ours = partial(Contender, ours=True, package="geko_kernels")

CONTENDERS = {
    contender.name: contender
    for contender in (
        _ours("geko", partial(_geko, inplace=False), backend="triton"),
        _ours("geko-inplace", partial(_geko, inplace=True), backend="triton", inplace=True),
        _ours("geko-hopper", partial(_geko_hopper, hit_rate=1.0), cpu=False, hit_rate=1.0),
        *(
            _ours(f"geko-hopper-{rate}", partial(_geko_hopper, hit_rate=rate), cpu=False, hit_rate=rate)
            for rate in (0.9, 0.5, 0.0)
        ),
        Contender("torch", partial(_torch, upcast=False)),
        Contender("torch-fp32", partial(_torch, upcast=True)),
        Contender("compile", _compile),
        Contender("torch-geko", partial(_torch_geko, compiled=False)),
        Contender("compile-geko", partial(_torch_geko, compiled=True)),
        Contender("liger", _liger, inplace=True, cpu=False, package="liger-kernel"),
        Contender("flash-attn", _flash_attn, cpu=False, package="flash-attn"),
        Contender("quack", _quack, cpu=False, package="quack-kernels"),
    )
}
