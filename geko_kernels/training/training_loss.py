"""A trainer's loss: `weighted_loss`, in the form of the model's own loss; probes use it forward-only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import unwrap_peft_model

from geko_kernels.losses.results import SampleStats
from geko_kernels.training.data import LABEL_KEYS, CausalCollator, label_of
from geko_kernels.training.model_loss.found_loss import (
    FoundLoss,
    check_labels,
    computes_loss,
    find_loss_of,
    trainer_counts,
)
from geko_kernels.training.model_loss.loss_call import ModelLoss, forward_loss
from geko_kernels.training.model_loss.own_loss import (
    Route,
    in_one_graph,
    is_compiled,
    module_to_call,
    running,
    unwrap_compiled,
)
from geko_kernels.training.planning.orders import PaddedIds
from geko_kernels.training.planning.packing import PackedIds
from geko_kernels.training.processes import check_alike
from geko_kernels.training.report.efficiency import count_tokens
from geko_kernels.training.training_data import DataMixin
from geko_kernels.training.weights import columns_beside


class LossMixin(DataMixin):
    """`transformers.Trainer` that weights the model's loss by sample, and updates the learning state."""

    model_accepts_loss_kwargs: bool
    _loss_shifts_labels: bool
    _found: FoundLoss | None
    _evaluates_itself: bool | None  # whether a module from outside Transformers computes a loss
    _takes_num_items: bool
    _weighed: list[str] | None  # the weight columns of the training batches, known from the first
    _entropy = False  # whether training needs the entropy
    _only_loss = False  # set during an evaluation that needs no logits

    def _base(self) -> nn.Module:
        """The model without any wrapper."""
        return unwrap_peft_model(unwrap_compiled(self.model))

    def _find_loss(self, model: nn.Module, inputs: dict[str, Any]) -> FoundLoss:
        """How the model's loss is computed; determined at the first training batch, and again for a new model."""
        if self._found is None:
            self._found = find_loss_of(
                module_to_call(model),
                self._base(),
                inputs,
                label_of(inputs, self.label_names) or "labels",
                shift=getattr(self.args, "shift_labels", None),
                takes_num_items=self._takes_num_items,
                routes=self._routes(model),
                fuse=not (self.is_deepspeed_enabled or in_one_graph(model, self._base())),
            )
            self._check_labels_given(self._found)
        return self._found

    def _routes(self, model: nn.Module) -> tuple[Route, ...]:
        if is_compiled(model):
            return Route.LOSS_FUNCTION, Route.UNUSED
        return Route.LOSS_FUNCTION, Route.CROSS_ENTROPY, Route.UNUSED

    def _forget_model(self) -> None:
        """Forget what is known about the model, which may have been replaced."""
        self._found, self._evaluates_itself, self._weighed = None, None, None
        self._takes_num_items, self._counts_shifted = trainer_counts(self._base())
        self._weight_columns = columns_beside(self._base())

    def _check_labels_given(self, found: FoundLoss) -> None:
        if found.form.shift or not isinstance(self.data_collator, CausalCollator):
            return
        if not any(key in self.train_dataset[0] for key in LABEL_KEYS):
            raise ValueError(
                f"{type(self._base()).__name__} does not shift its labels, and train_dataset has no labels: with a "
                "copy of input_ids the model would learn to repeat its input. Give the items `labels`"
            )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        self._audit.saw("_get_num_items_in_batch")
        if not batch_samples or not self.model_accepts_loss_kwargs:
            return super()._get_num_items_in_batch(batch_samples, device)
        name = label_of(batch_samples[0], self.label_names)
        self._loss_shifts_labels = self._counts_shifted
        if "sample_ids" in batch_samples[0] or (name and not computes_loss(self._base(), name)):
            first = {key: value for key, value in batch_samples[0].items() if key not in self._weight_columns}
            form = self._find_loss(self.model_wrapped, self._prepare_inputs(first)).form
            if not form.counts:
                self._loss_shifts_labels = form.shift
                if name and form.masks:
                    batch_samples = [
                        {**batch, name: form.counted(batch[name], batch.get("attention_mask"))}
                        for batch in batch_samples
                    ]
        if name is not None and name != "labels":
            batch_samples = [{**batch, "labels": batch[name]} for batch in batch_samples]
        if "sample_ids" in batch_samples[0] and "token_weights" in self._weights_of(batch_samples):
            return self._sum_of_weights(batch_samples, device)
        return super()._get_num_items_in_batch(batch_samples, device)

    def _weights_of(self, batches: list) -> list[str]:
        """The weight columns of the training batches.

        Raises:
            ValueError: they are not the same in all batches of all processes.
        """
        found = [[name for name in self._weight_columns if name in batch] for batch in batches]
        if self._weighed is None:
            self._weighed = found[0]
            check_alike(
                {"the weight columns of train_dataset's items (all must have them, or none)": found[0]},
                self.args.device,
            )
        other = next((names for names in found if names != self._weighed), None)
        if other is not None:
            raise ValueError(
                f"the items of train_dataset must have the same weight columns: those of one batch have {other}, "
                f"those of the first have {self._weighed}"
            )
        return self._weighed

    def _sum_of_weights(self, batches: list, device: torch.device) -> Tensor:
        """The sum of the token weights of the labels that `_get_num_items_in_batch` counts."""
        behind = int(self._loss_shifts_labels)
        pairs = [(batch["labels"][..., behind:], batch["token_weights"][..., behind:]) for batch in batches]
        total = torch.stack([torch.where(labels != -100, weights, 0).sum() for labels, weights in pairs]).sum()
        total = total.to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return total

    def _share_of_terms(self, factor: float, num_items: Tensor | int | None) -> float:
        """Trainer's factor on the terms that a model adds to its cross-entropy."""
        return factor if self._takes_num_items else 1 / self.current_gradient_accumulation_steps

    def _forward_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items: Tensor | int | None,
        probe: bool = False,
        update: bool = True,
    ) -> ModelLoss:
        inputs = dict(inputs)
        name = label_of(inputs, self.label_names) or "labels"
        weights = {}
        if "sample_ids" in inputs:
            weights = {column: inputs.pop(column) for column in self._weight_columns if column in inputs}
            if not probe and self.sampler is not None:
                weights = self._answering(weights, inputs["sample_ids"])
        found = self._find_loss(model, inputs)
        sample_ids, labels = inputs.pop("sample_ids", None), inputs.pop(name)
        check_labels(labels)
        labels = found.form.counted(labels, inputs.get("attention_mask"))
        shifted = inputs.pop("shift_labels", None)  # from collators that have shifted them
        outcome = forward_loss(
            model,
            running(model, self._base()),
            found.form,
            found.head if sample_ids is not None or self._only_loss else None,
            inputs,
            labels,
            sample_ids,
            self.sample_state if sample_ids is not None and update else None,
            label_name=name,
            shifted=shifted,
            num_items=num_items,
            weights=weights,
            forward_only=probe,
            entropy=self._entropy and sample_ids is not None and not probe,
        )
        if sample_ids is not None:
            self.efficiency.count(outcome.stats, count_tokens(inputs, sample_ids), probe)
        return outcome

    def _answering(self, weights: dict[str, Tensor], sample_ids: Tensor) -> dict[str, Tensor]:
        """`weights`, multiplied for samples that answer for resting ones."""
        assert self.sampler is not None
        answering = self.sampler.sample_weights(sample_ids)
        if answering is None:
            return weights
        given = weights.get("sample_weights")
        return {**weights, "sample_weights": answering if given is None else answering * given}

    def _probe(self, model: nn.Module, ids: Tensor) -> None:
        """Run `ids` forward-only: the state is updated, the model is not."""
        for _ in self._forwards(model, ids, self.train_dataset):
            pass

    def _forwards(self, model: nn.Module, ids: Tensor, dataset: Any, update: bool = True) -> Iterator[SampleStats]:
        """The results of forward-only batches of the items `ids` of `dataset`; the state counts them if `update`."""
        batch = self.config.probe_batch_size or getattr(self.args, "probe_batch_size", None)
        batch, packer = batch or 4 * self._train_batch_size, self._planned().packer
        sampler: Any = PaddedIds(ids, batch * self.args.world_size)
        if packer is not None and dataset is self.train_dataset:  # else the lengths are unknown
            wider = packer._replace(tokens=packer.tokens * (4 if self.config.batch_tokens else batch))
            batch, sampler = 1, PackedIds(*wider.pack(ids), self.args.world_size)
        loader = self._id_dataloader(batch, lambda _: sampler, dataset)
        model.eval()
        for inputs in loader:
            with self.compute_loss_context_manager():
                outcome = self._forward_loss(model, self._prepare_inputs(inputs), None, probe=True, update=update)
            yield outcome.stats
        self.accelerator._dataloaders.remove(loader)
