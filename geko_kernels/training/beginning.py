"""The start of a run: which model it trains, and the restart with a smaller batch by `auto_find_batch_size`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers.utils import logging

from geko_kernels.state import SampleState
from geko_kernels.training.loading import LoadingMixin
from geko_kernels.training.model_loss.own_loss import is_ddp
from geko_kernels.training.random_numbers import RandomNumbers
from geko_kernels.training.report.efficiency import Efficiency
from geko_kernels.training.report.visits import VisitLog

logger = logging.get_logger(__name__)


class BeginningMixin(LoadingMixin):
    """`transformers.Trainer` whose learning state belongs to the model that it trains."""

    model_wrapped: Any
    sample_state: SampleState | None
    _snapshot: Snapshot | None  # at the start of a run that may have to restart with a smaller batch
    _saved: Path | None  # the checkpoint of the run's current step
    _until_patched: ExitStack  # ends when Trainer has put Liger's kernels into the model

    def _forget_model(self) -> None:
        """Forget what is known about the model's layers."""

    def _follow_model(self) -> None:
        """Reset the learning state if `trainer.model` is another model than before, and train that one."""
        whole, wrapped = (
            extract_model_from_parallel(m, keep_torch_compile=False) for m in (self.model, self.model_wrapped)
        )
        if self.model_init is None and whole is not wrapped:
            logger.warning(
                "trainer.model is another model than before: it starts with a new optimizer and a new learning state."
            )
            self.model_wrapped, self.optimizer, self.lr_scheduler = self.model, None, None
            if self.place_model_on_device:
                self._move_model_to_device(self.model, self.args.device)
        self._forget_evaluation()
        model, state = self._known
        if self.model_init is not None or (model is not whole and state is self.sample_state):
            self.sample_state = self._new_state()
        self._remember_model()

    def _forget_evaluation(self) -> None:
        """Let `train` wrap a model for DDP that was evaluated before.

        accelerate (1.15) takes it for a model that is ready to be trained, and each process would train for itself.
        """
        shards = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.args.world_size == 1 or shards or is_ddp(self.model_wrapped):
            return
        self.model_wrapped = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.model.__dict__.pop("_is_accelerate_prepared", None)

    def _remember_model(self) -> None:
        """Remember which model the learning state belongs to."""
        kept = self.model_init is None  # else a new model is made, and the old one has to be freed
        model = extract_model_from_parallel(self.model, keep_torch_compile=False) if kept else None
        self._known: tuple[nn.Module | None, SampleState | None] = model, self.sample_state

    def _inner_training_loop(self, *args: Any, **named: Any) -> Any:
        self._audit.need("train", "the run did not begin with it")
        self._until_patched.close()
        assert self.sample_state is not None
        if self.args.auto_find_batch_size:  # called again after running out of memory
            if self._snapshot is None:
                self._snapshot = Snapshot(self.sample_state, self.efficiency)
            else:
                self._snapshot.restore_(self.sample_state, self.efficiency)
                self.current_flos, self._saved = 0, None
                self._forget_model()
        self._begin_run()
        self._audit.saw("train", "_inner_training_loop")
        return super()._inner_training_loop(*args, **named)

    def _new_state(self) -> SampleState | None:
        if self.train_dataset is None:
            return None
        return SampleState(len(self.train_dataset), self.config, self.args.device)

    def _new_efficiency(self) -> Efficiency:
        several = dist.is_available() and dist.is_initialized() and self.args.world_size > 1
        visits = None
        if self.sample_state is not None:
            reduce_max = partial(dist.all_reduce, op=dist.ReduceOp.MAX) if several else None
            visits = VisitLog(len(self.sample_state), self.args.device, reduce_max)
        return Efficiency(self.args.device, dist.all_reduce if several else None, visits)


@contextmanager
def liger_layers_alone(args: Any) -> Iterator[None]:
    """Inside the context Liger's fused loss, which hides the logits, is off: GEKO's takes its place."""
    given = args.liger_kernel_config
    if args.use_liger_kernel:
        args.liger_kernel_config = {**(given or {}), "fused_linear_cross_entropy": False}
    try:
        yield
    finally:
        args.liger_kernel_config = given


class Snapshot:
    """Copies of the learning state, the counts and the states of the random number generators.

    As in Trainer, the model keeps the training of a failed attempt.
    """

    def __init__(self, state: SampleState, counts: Efficiency) -> None:
        self._columns = {name: column.clone() for name, column in state.state_dict().items()}
        self._upstream = state.upstream.clone()
        self._zero_share = copy.copy(state.zero_share)
        self._counts = copy.deepcopy(counts.state_dict())
        self._visits = 0 if counts.visits is None else counts.visits.mark()
        self._random = RandomNumbers()

    def restore_(self, state: SampleState, counts: Efficiency) -> None:
        """Undo an attempt that ran out of memory; its wall time is counted as "other"."""
        state.load_state_dict(self._columns)
        state.upstream.copy_(self._upstream)
        state.zero_share = copy.copy(self._zero_share)
        state.predictions.zero_()
        spent = sum(counts.state_dict()["spent"].values())
        counts.load_state_dict(copy.deepcopy(self._counts))
        counts.spent["other"] += spent - sum(counts.spent.values())
        if counts.visits is not None:
            counts.visits.rewind(self._visits)
        self._random.restore()
