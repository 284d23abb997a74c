"""`compute_loss`: GEKO's loss in training; in evaluation the model's own, without all logits if they are not needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from geko_kernels.losses.results import SampleStats
from geko_kernels.training.data import label_of
from geko_kernels.training.model_loss.found_loss import computes_loss
from geko_kernels.training.model_loss.own_loss import find_loss
from geko_kernels.training.model_loss.untouched import untouched
from geko_kernels.training.training_loss import LossMixin


class EvaluationMixin(LossMixin):
    """`Trainer`'s evaluation. If it needs only the loss, which training fuses with the head, so does evaluation."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        trains = "sample_ids" in inputs
        inputs = {name: value for name, value in inputs.items() if name != "skip_logits"}  # is for Liger's fused loss
        if not trains and isinstance(self._base(), PreTrainedModel):
            if self._only_loss and self._evaluates_in_head(model, inputs):
                return self._loss_in_head(model, inputs, return_outputs, num_items_in_batch)
            return self._own_loss(model, inputs, return_outputs, num_items_in_batch)
        if not trains and self._returns_loss(model, inputs):
            return self._own_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, terms, outputs, stats, _ = self._forward_loss(model, inputs, num_items_in_batch)
        loss = loss if trains else _nan_without_labels(loss, stats, num_items_in_batch)
        factor = 1.0
        if trains and self.args.average_tokens_across_devices and num_items_in_batch is not None:
            factor = self.accelerator.num_processes  # DDP and FSDP average the gradients
        loss = loss * factor
        if terms is not None:
            loss = loss + terms.to(loss.device) * self._share_of_terms(factor, num_items_in_batch)
        outputs = {"logits": outputs} if isinstance(outputs, Tensor) else outputs
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As `Trainer.prediction_step`."""
        self._only_loss = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._only_loss = False

    def _evaluates_in_head(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        if label_of(inputs, self.label_names) is None:
            return False
        if self._found is None and self.train_dataset is not None:  # evaluated before it is trained
            try:
                self._find_loss(model, inputs)
            except ValueError:  # training raises it again
                return False
        return self._found is not None and self._found.head is not None

    def _loss_in_head(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items: Tensor | int | None
    ) -> Any:
        """`_own_loss` up to rounding; the outputs have no logits."""
        num_items = num_items if self._takes_num_items else None
        loss, terms, outputs, stats, _ = self._forward_loss(model, inputs, num_items)
        loss = _nan_without_labels(loss, stats, num_items)
        if terms is not None:
            loss = loss + terms.to(loss.device)
        if self.args.average_tokens_across_devices and num_items is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _returns_loss(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Whether a module from outside Transformers computes a loss; tested at its first evaluation."""
        if self._evaluates_itself is None:
            name = label_of(inputs, self.label_names)
            takes = name is not None and computes_loss(self._base(), name)
            with untouched(model, self.args.device):
                self._evaluates_itself = takes and find_loss(model(**inputs)) is not None
        return self._evaluates_itself

    def _own_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items: Tensor | int | None
    ) -> Any:
        """The loss that the model computes for an evaluation batch, as in Trainer."""
        ours = self.model_accepts_loss_kwargs
        self.model_accepts_loss_kwargs = self._takes_num_items
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items)
        finally:
            self.model_accepts_loss_kwargs = ours


def _nan_without_labels(loss: Tensor, stats: SampleStats, num_items: Tensor | int | None) -> Tensor:
    """() the loss, NaN if no label counts: the mean of none, as in Trainer; 0 would lower the mean of the batches."""
    counted = stats.num_tokens.sum() if num_items is None else torch.as_tensor(num_items, device=loss.device)
    return loss.masked_fill(counted == 0, float("nan"))
