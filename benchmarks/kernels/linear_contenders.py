"""Who takes part in the linear benchmark: how each turns a `Case` into a loss of hidden and weight.

To add a contender, write its `make` and name it in `CONTENDERS`.
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
from benchmarks.kernels.linear_cases import LENGTH, Case

LossOf = Callable[[Tensor, Tensor], Tensor]
_WEIGHTS = (1.0, 1.0, 0.0)  # HARD, FOCUS, LIGHT: without learnt samples the loss is the plain one


@dataclass(frozen=True)
class Contender:
    """`make(case)` gives a function from hidden (T, H) and weight (V, H) to the loss ().

    ours: runs at every keep share.  package: the distribution whose version goes into the results.
    """

    name: str
    make: Callable[[Case], LossOf]
    ours: bool = False
    cpu: bool = True
    package: str = "torch"

    def package_version(self) -> str | None:
        try:
            return f"{self.package} {version(self.package)}"
        except PackageNotFoundError:
            return None


def geko(case: Case, chunk_mib: int | None) -> LossOf:
    state = gk.SampleState(case.shape.samples, gk.GEKOConfig(bucket_weights=_WEIGHTS), case.device)
    labels = case.labels.view(-1, LENGTH)

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        hidden = hidden.view(-1, LENGTH, hidden.shape[1])
        loss = gk.weighted_linear_loss(hidden, weight, labels, case.sample_ids, state, chunk_mib=chunk_mib)
        assert isinstance(loss, Tensor)
        return loss

    return loss_of


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels)


def _torch(case: Case) -> LossOf:
    return lambda hidden, weight: _plain(hidden, weight, case.labels)


def _compile(case: Case) -> LossOf:
    loss = torch.compile(_plain, fullgraph=True, dynamic=False)
    return lambda hidden, weight: loss(hidden, weight, case.labels)


def _torch_linear(case: Case) -> LossOf:
    loss = F.linear_cross_entropy  # torch 2.13
    return lambda hidden, weight: loss(hidden, weight, case.labels, ignore_index=-100)


def liger(case: Case, chunk: int, wide: bool) -> LossOf:
    from liger_kernel.ops.fused_linear_cross_entropy import (  # type: ignore[import-not-found]
        LigerFusedLinearCrossEntropyFunction,
    )

    dtype = torch.float32 if wide else None
    options = (None, None, -100, 0.0, 0.0, "mean", None, False, dtype, False, False, False, None, None, chunk)
    return lambda hidden, weight: LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, case.labels, *options)[0]


def _cce(case: Case, exact: bool) -> LossOf:
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    options = {"filter_eps": None} if exact else {}
    return lambda hidden, weight: linear_cross_entropy(hidden, weight, case.labels, **options)


def _quack(case: Case) -> LossOf:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # type: ignore[import-not-found]

    return lambda hidden, weight: chunked_linear_cross_entropy(hidden, weight, case.labels)


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("geko", partial(geko, chunk_mib=None), ours=True, package="geko_kernels"),
        Contender("geko-256", partial(geko, chunk_mib=256), package="geko_kernels"),
        Contender("torch", _torch),
        Contender("compile", _compile),
        Contender("torch-linear", _torch_linear),
        Contender("liger-1", partial(liger, chunk=1, wide=False), cpu=False, package="liger-kernel"),
        Contender("liger-16", partial(liger, chunk=16, wide=False), cpu=False, package="liger-kernel"),
        Contender("liger-16-fp32", partial(liger, chunk=16, wide=True), cpu=False, package="liger-kernel"),
        Contender("cce", partial(_cce, exact=False), cpu=False, package="cut-cross-entropy"),
        Contender("cce-exact", partial(_cce, exact=True), cpu=False, package="cut-cross-entropy"),
        Contender("quack", _quack, cpu=False, package="quack-kernels"),
    )
}
