"""`GEKOTrainer`: `transformers.Trainer` that trains what still has something to teach."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length, unwrap_peft_model
from transformers.utils import logging

from geko_kernels.config import GEKOConfig
from geko_kernels.state import SampleState
from geko_kernels.training.arguments import GEKOTrainingArguments
from geko_kernels.training.callbacks import BucketBar
from geko_kernels.training.data import CausalCollator, IdCollator, IdDataset
from geko_kernels.training.efficiency import REPORT_NAME, count_tokens, mean_loss, write_json
from geko_kernels.training.head import check_head, find_head
from geko_kernels.training.loss_call import auxiliary_loss, forward_loss
from geko_kernels.training.orders import PaddedIds
from geko_kernels.training.planned import PlannedTrainer
from geko_kernels.training.sampler import GEKOSampler
from geko_kernels.training.summary import run_summary

logger = logging.get_logger(__name__)
_TRAINING = "Training"  # what Trainer calls its training dataloader


class GEKOTrainer(PlannedTrainer):
    """`transformers.Trainer` whose epochs are planned by `GEKOSampler` and whose loss is `weighted_loss`.

    What is Trainer's stays as it is: accelerate, DDP, FSDP2, PEFT, mixed precision, compile, loggers, callbacks,
    evaluation (plain loss, the learning state untouched). What changes:

    - `num_train_epochs` counts planned epochs: each leaves out what has nothing to teach, so it is as long as its
      plan. `max_steps` is kept to exactly, with more and shorter epochs; there the `epoch` that is logged counts, as in
      Trainer, passes over the data that these steps could have made. A run stops sooner, with a warning, where no batch
      can be made of what is not quarantined. With `dataloader_drop_last` a plan below a batch's size is filled up.
    - the learning rate follows the finished share of the run, so that it has fallen at the run's end, unless you bring
      a scheduler of your own. Where the last of `num_train_epochs` would be empty and the rate has not fallen, that
      epoch trains samples drawn from all but the quarantined, with weight 1 and as many as the epochs had on average.
    - a checkpoint carries the learning state, the plan, the counts and a fingerprint of the data; resuming is exact.
      `resume_from_checkpoint=True` takes the newest whole checkpoint. Other data are refused; other settings are named
      in a warning, with what they change.
    - `train()` called again goes on with the model and the learning state, see there; nothing of `args` is written to.
    - `geko_report.json` in `output_dir` at the end, see `efficiency.py`.

    A subclass may replace hooks of Trainer where it calls them by `super()`; a hook that passes GEKO by is a
    `RuntimeError` at the first step that says which, and what it has to do.

    Args: those of Trainer, and
        config: a GEKOConfig (default: `recommended()`); `GEKOConfig.uniform()` trains as Trainer does.
        tokenizer: another name of `processing_class`.

    Attributes:
        sample_state: the SampleState, one row per item of `train_dataset`, by its index.
        sampler: the GEKOSampler of the run (from `train` on).

    Raises:
        ValueError, TypeError: what GEKO can't combine with (label smoothing, a loss function of your own, a dataset
            without length, DataParallel, sequence or tensor parallelism), by name.
        RuntimeError: by `train`, see above.
    """

    model_accepts_loss_kwargs: bool
    label_names: list[str]

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *rest: Any,
        config: GEKOConfig | None = None,
        tokenizer: Any = None,
        **named: Any,
    ) -> None:
        if config is not None and not isinstance(config, GEKOConfig):
            raise TypeError(f"config must be a GEKOConfig, got {type(config).__name__}")
        if tokenizer is not None:
            if len(rest) > 1 or named.get("processing_class") is not None:
                raise TypeError("tokenizer is another name of processing_class: give one of them")
            named["processing_class"] = tokenizer
        args = args or GEKOTrainingArguments(output_dir="tmp_trainer")
        super().__init__(model, args, data_collator, train_dataset, *rest, **named)
        self.config = config or GEKOConfig.recommended()
        self._check_arguments()
        causal = self._loss_shifts_labels
        if data_collator is None and causal:
            ends = (getattr(self.processing_class, name, None) for name in ("pad_token_id", "eos_token_id"))
            self.data_collator = CausalCollator(next((token for token in ends if token is not None), 0))
        self._shifts_by_class = causal if isinstance(unwrap_peft_model(self.model), PreTrainedModel) else None
        self._computes_loss = _computes_loss(self.model)
        if not self.label_names and args.label_names is None:  # the model's forward takes none: they are ours
            self.label_names = ["labels"]
        self._takes_num_items = self.model_accepts_loss_kwargs
        self.model_accepts_loss_kwargs = True  # our loss is divided by num_items_in_batch, whatever the model takes
        if any(type(callback) is ProgressCallback for callback in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.add_callback(BucketBar)
        self.sample_state: SampleState | None = self._new_state()
        self.sampler: GEKOSampler | None = None
        self.efficiency = self._new_efficiency()
        self._remember_model()
        self._forget_model()

    def _forget_model(self) -> None:
        self._head: nn.Linear | None = None
        self._head_sought = False

    def _check_arguments(self) -> None:
        if self.compute_loss_func is not None:
            raise ValueError("GEKOTrainer computes the loss itself: compute_loss_func cannot be used with it")
        if self.label_smoother is not None:
            raise ValueError("GEKOTrainer does not combine with label_smoothing_factor: set it to 0")
        if self.args.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "GEKOTrainer plans its epochs itself: train_sampling_strategy='batch_rebalance' is not for it"
            )
        if isinstance(self.train_dataset, IterableDataset) or not (
            self.train_dataset is None or has_length(self.train_dataset)
        ):
            raise ValueError("GEKOTrainer needs a train_dataset with a length and items by index, not an iterable one")
        parallel = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
        if self.args.n_gpu > 1 or parallel > 1:
            raise ValueError(
                "GEKOTrainer runs on one GPU a process, with DDP or FSDP: start it with torchrun or accelerate launch, "
                "without DataParallel, tensor, context or sequence parallelism"
            )

    # Data

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise ValueError("GEKOTrainer: training needs a train_dataset")
        return self._id_dataloader(self._train_batch_size, self._get_train_sampler)

    def _id_dataloader(self, batch_size: int, sampler_fn: Any) -> DataLoader:
        dataset = self.train_dataset
        if hasattr(dataset, "remove_columns"):  # a datasets.Dataset: columns that nobody reads are not decoded
            dataset = self._remove_unused_columns(dataset, description="training")
        return self._get_dataloader(IdDataset(dataset), _TRAINING, batch_size, sampler_fn, is_training=True)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        remover = super()._get_collator_with_removed_columns(data_collator, description)
        return (
            IdCollator(data_collator, getattr(remover, "_remove_columns", None))
            if description == _TRAINING
            else remover
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> GEKOSampler:
        args, state = self.args, self.sample_state
        assert state is not None
        lengths = None
        if args.train_sampling_strategy == "group_by_length":
            lengths = torch.tensor(super()._get_train_sampler(self.train_dataset).lengths)
        step = self.get_total_train_batch_size(args)
        split = args.accelerator_config.split_batches
        self._micro_batch = self._train_batch_size if split else step // args.gradient_accumulation_steps
        even = args.world_size > 1 and not args.dataloader_drop_last
        sampler = GEKOSampler(
            state,
            1.0 if args.max_steps > 0 else args.num_train_epochs,  # a run sets its exact length
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.train_sampling_strategy != "sequential",
            pad_to=self._micro_batch if even else 1,
            lengths=lengths,
            window=50 * step,
        )
        if self.sampler is None:  # who asks for another loader in a run leaves the run's sampler alone
            self.sampler = sampler
        return sampler

    # Loss

    def _shifts(self, labels: Tensor) -> bool:
        asked = getattr(self.args, "shift_labels", None)
        by_class = self._shifts_by_class if asked is None else asked
        return labels.dim() > 1 if by_class is None else by_class

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        if batch_samples and isinstance(batch_samples[0].get("labels"), Tensor):
            self._loss_shifts_labels = self._shifts(batch_samples[0]["labels"])
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        trains = "sample_ids" in inputs
        if not trains and self._computes_loss:
            num_items_in_batch = num_items_in_batch if self._takes_num_items else None
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = self._forward_loss(model, inputs, num_items_in_batch)
        if trains and self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP and FSDP average the gradients
        outputs = {"logits": outputs} if isinstance(outputs, Tensor) else outputs
        return (loss, outputs) if return_outputs else loss

    def _forward_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None, probe: bool = False
    ) -> tuple[Tensor, Any]:
        inputs = dict(inputs)
        sample_ids, labels = inputs.pop("sample_ids", None), inputs.pop("labels")
        shifted = inputs.pop("shift_labels", None)  # of collators that have done it already
        base = unwrap_peft_model(self.model)
        if getattr(getattr(base, "config", None), "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
        loss, outputs, stats = forward_loss(
            model,
            inputs,
            labels if shifted is None else shifted,
            sample_ids,
            None if sample_ids is None else self.sample_state,
            shift=shifted is None and self._shifts(labels),
            num_items=num_items,
            forward_only=probe,
            head=self._find_head(model, inputs) if sample_ids is not None else None,
        )
        if sample_ids is not None:
            self.efficiency.count(stats, count_tokens(inputs, sample_ids), probe)
        balance = auxiliary_loss(outputs, self.model)
        return loss if balance is None else loss + balance.to(loss.device), outputs

    def _find_head(self, model: nn.Module, inputs: dict[str, Any]) -> nn.Linear | None:
        """The head to compute together with the loss, sought at the first batch; None where the model has none."""
        if not self._head_sought:
            self._head_sought = True
            try:
                if self.is_deepspeed_enabled or hasattr(model, "_orig_mod"):
                    raise ValueError("it is compiled or run by DeepSpeed")
                head = find_head(self.model)
                check_head(model, head, inputs)
                self._head = head
            except ValueError as reason:
                logger.info(f"GEKOTrainer computes the loss from all logits of the model: {reason}")
        return self._head

    def _probe(self, model: nn.Module, ids: Tensor) -> None:
        """Look at `ids` forward-only: the state learns how they stand, the model learns nothing."""
        batch = getattr(self.args, "probe_batch_size", None) or 4 * self._train_batch_size
        loader = self._id_dataloader(batch, lambda _: PaddedIds(ids, batch * self.args.world_size))
        model.eval()
        for inputs in loader:
            with self.compute_loss_context_manager():
                self._forward_loss(model, self._prepare_inputs(inputs), None, probe=True)
        self.accelerator._dataloaders.remove(loader)

    # Figures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; the entries of training steps also get the keys that `efficiency.py` lists."""
        if self.is_in_train and "loss" in logs and self.sampler is not None:
            logs.update(self._measures())
        super().log(logs, start_time)

    def _measures(self) -> dict[str, float]:
        sampler, state = self._planned(), self._planned().state
        state.check()
        new = self.efficiency.collect()
        counts = state.bucket_counts()
        if self.efficiency.reduce is not None:  # each process knows its own rows' moves since the last sync
            moved = counts - self._counts_at_sync
            self.efficiency.reduce(moved)
            counts = self._counts_at_sync + moved
        shares = [count / len(state) for count in counts.tolist()]
        weights = sampler.weights(self._consumed())
        measures = {
            "geko_progress": self._progress(),
            **{f"geko_{name}": share for name, share in zip(("freeze", "light", "focus", "hard"), shares, strict=True)},
            "geko_quarantined": int(state.quarantined.count_nonzero()) / len(state),
            **{f"geko_phase_{name}": w for name, w in zip(("hard", "focus", "light"), weights, strict=False)},
        }
        loss = mean_loss(new)
        if loss is not None:
            measures["geko_loss"] = loss
            measures["geko_accuracy"] = new["hits"] / new["labels"]
        if new["nonfinite"]:
            measures["geko_nonfinite"] = new["nonfinite"]
        return measures

    def get_efficiency_report(self) -> dict[str, Any]:
        """What was truly forwarded and backpropagated so far, beside what a standard run would have; see efficiency.py.

        With several processes the figures are those of the last log step, checkpoint or epoch.
        """
        if self.efficiency.reduce is None and self.is_in_train:
            self.efficiency.collect()
            self.efficiency.samples_standard = self._samples_standard()
        return self.efficiency.report()

    def _write_report(self) -> None:
        sampler = self._planned()
        summary = run_summary(sampler.state, sampler, self.get_efficiency_report(), self.state.log_history)
        folder = self._get_output_dir(trial=self._trial)
        os.makedirs(folder, exist_ok=True)
        write_json(Path(folder) / REPORT_NAME, summary)


def _computes_loss(model: nn.Module) -> bool:
    base = unwrap_peft_model(model)
    return isinstance(base, PreTrainedModel) or "labels" in inspect.signature(base.forward).parameters
