"""`GEKOTrainer`: `transformers.Trainer` on the samples that still have something to teach; `GEKOMixin` for others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length, unwrap_peft_model
from transformers.utils import logging

from geko_kernels.config import GEKOConfig
from geko_kernels.losses.logits import SampleStats
from geko_kernels.state import SampleState
from geko_kernels.training.arguments import GEKOTrainingArguments
from geko_kernels.training.bases import arguments_of, check_bases, trainer_below
from geko_kernels.training.callbacks import BucketBar, NotebookBarEnd
from geko_kernels.training.data import LABEL_KEYS, CausalCollator, IdCollator, IdDataset, label_of
from geko_kernels.training.evaluation import EvaluationMixin
from geko_kernels.training.figures import FiguresMixin
from geko_kernels.training.model_loss.found_loss import FoundLoss, computes_loss, find_loss_of, trainer_counts
from geko_kernels.training.model_loss.loss_call import ModelLoss, forward_loss
from geko_kernels.training.model_loss.own_loss import Route, in_one_graph, is_compiled, unwrap_compiled
from geko_kernels.training.planning.orders import PaddedIds
from geko_kernels.training.planning.packing import PackedIds, Packer
from geko_kernels.training.planning.sampler import GEKOSampler
from geko_kernels.training.report.efficiency import count_tokens
from geko_kernels.training.token_batches import check_token_batches, packer_of, sample_lengths
from geko_kernels.training.weights import columns_beside, drawable

logger = logging.get_logger(__name__)
_TRAINING = "Training"  # Trainer's name for its training dataloader


class GEKOMixin(FiguresMixin, EvaluationMixin):
    """All that GEKO adds to a trainer: `class MyTrainer(GEKOMixin, AnySubclassOfTrainer)`; see `GEKOTrainer`.

    The mixin comes before the trainer, whose arguments and methods are kept. `config` and `tokenizer` are keywords.

    Raises:
        TypeError: when the class is created, if the trainer comes before the mixin, or has its own loss or training
            batches, which GEKO would replace.
    """

    _loss_shifts_labels: bool
    _signature_columns: list[str]
    _weight_columns: tuple[str, ...]  # of the training data
    label_names: list[str]
    _entropy = False  # asked of the loss in training
    _replaces: type | None = None  # the trainer whose loss and default collator GEKO replaces
    _row_tokens: int | None = None  # a plan is packed into rows of at most this many tokens
    _present: Tensor | None = None  # (P,) int32 ids of train_dataset that can be drawn; None: all
    _drawn_from: tuple[Any, Tensor | None] | None = None  # the dataset, and those of `_present` that weigh anything
    _lengths: tuple[Any, Tensor] | None = None  # the dataset, and how many tokens each of its items has

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        check_bases(cls, GEKOMixin)

    def __init__(self, *args: Any, config: GEKOConfig | None = None, tokenizer: Any = None, **named: Any) -> None:
        if config is not None and not isinstance(config, GEKOConfig):
            raise TypeError(f"config must be a GEKOConfig, got {type(config).__name__}")
        given = arguments_of(trainer_below(type(self), GEKOMixin), args, named)
        if tokenizer is not None:
            if given.get("processing_class") is not None:
                raise TypeError("tokenizer is another name of processing_class: give one of them")
            given["processing_class"] = tokenizer
        super().__init__(**given)
        self.config = config or GEKOConfig.recommended()
        self._check_arguments()
        if self._replaces is None and given.get("data_collator") is None and _is_causal(self._base()):
            ends = (getattr(self.processing_class, name, None) for name in ("pad_token_id", "eos_token_id"))
            self.data_collator = CausalCollator(next((token for token in ends if token is not None), 0))
        if not self.label_names and self.args.label_names is None:  # its forward takes none: they are for our loss
            self.label_names = ["labels"]
        self.model_accepts_loss_kwargs = True  # our loss divides by it, whether the model does or not
        if any(type(callback) is ProgressCallback for callback in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.add_callback(BucketBar)
        for bar in [each for each in self.callback_handler.callbacks if hasattr(each, "training_tracker")]:
            self.add_callback(NotebookBarEnd(bar))
        self.sample_state: SampleState | None = self._new_state()
        self.sampler: GEKOSampler | None = None
        self.efficiency = self._new_efficiency()
        self._remember_model()
        self._forget_model()

    def _check_arguments(self) -> None:
        self._check_stopping()
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
        if isinstance(self.train_dataset, Mapping) and 0 not in self.train_dataset:  # a DatasetDict too
            raise ValueError(
                f"train_dataset must give its items by index, got a {type(self.train_dataset).__name__} with the keys "
                f"{sorted(self.train_dataset)}: of several splits give one; of columns make a dataset, as by "
                "datasets.Dataset.from_dict"
            )
        if self.train_dataset is not None and len(self.train_dataset) == 0:
            raise ValueError("train_dataset has no items")
        if self.config.batch_tokens is not None or self._row_tokens is not None:
            check_token_batches(self.args, self.config.batch_tokens)
        parallel = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
        if self.args.n_gpu > 1 or parallel > 1:
            raise ValueError(
                "GEKOTrainer runs on one GPU a process, with DDP or FSDP: start it with torchrun or accelerate launch, "
                "without DataParallel, tensor, context or sequence parallelism"
            )

    # Data

    def get_train_dataloader(self) -> DataLoader:
        self._audit.saw("get_train_dataloader")
        if self.train_dataset is None:
            raise ValueError("GEKOTrainer: training needs a train_dataset")
        batch_size = 1 if self.config.batch_tokens else self._train_batch_size  # a pack is a batch
        return self._id_dataloader(batch_size, self._get_train_sampler, self.train_dataset)

    def _id_dataloader(self, batch_size: int, sampler_fn: Any, dataset: Any) -> DataLoader:
        if hasattr(dataset, "remove_columns"):  # a datasets.Dataset: columns that nobody reads are not decoded
            dataset = self._without_unused_columns(dataset)
        return self._get_dataloader(IdDataset(dataset), _TRAINING, batch_size, sampler_fn, is_training=True)

    def _without_unused_columns(self, dataset: Any) -> Any:
        self._set_signature_columns_if_needed()
        before = self._signature_columns
        self._signature_columns = [*before, *(name for name in self._weight_columns if name in dataset.column_names)]
        try:
            return self._remove_unused_columns(dataset, description="training")
        finally:
            self._signature_columns = before

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        if description == _TRAINING:
            self._audit.saw("_get_collator_with_removed_columns")
        remover = super()._get_collator_with_removed_columns(data_collator, description)
        return (
            IdCollator(data_collator, getattr(remover, "_remove_columns", None), self.label_names, self._weight_columns)
            if description == _TRAINING
            else remover
        )

    def _drawable(self) -> Tensor | None:
        data = self.train_dataset
        if self._drawn_from is None or self._drawn_from[0] is not data:
            self._drawn_from = data, drawable(data, self._weight_columns, self._present)
        return self._drawn_from[1]

    def _packer(self) -> Packer | None:
        if not (self.config.batch_tokens or self._row_tokens):
            return None
        data = self.train_dataset
        if self._lengths is None or self._lengths[0] is not data:
            self._lengths = data, sample_lengths(data, self.args.length_column_name)
        return packer_of(self._lengths[1], self.data_collator, self.config.batch_tokens, self._row_tokens)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> GEKOSampler:
        args, state = self.args, self.sample_state
        assert state is not None
        if args.max_steps <= 0 and args.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs must be above 0, got {args.num_train_epochs}")
        lengths = None
        if args.train_sampling_strategy == "group_by_length":
            lengths = torch.tensor(super()._get_train_sampler(self.train_dataset).lengths)
        step = self.get_total_train_batch_size(args)
        split = args.accelerator_config.split_batches
        self._micro_batch = self._train_batch_size if split else step // args.gradient_accumulation_steps
        if self.config.batch_tokens is not None:
            self._micro_batch = args.world_size
        even = args.world_size > 1 and not args.dataloader_drop_last
        sampler = GEKOSampler(
            state,
            1.0 if args.max_steps > 0 else args.num_train_epochs,  # a run sets its exact length
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.train_sampling_strategy != "sequential",
            pad_to=self._micro_batch if even else 1,
            lengths=lengths,
            window=step * max(1, min(len(state) // (4 * step), 50)),  # as Trainer's
            present=self._drawable(),
            packer=self._packer(),
        )
        if self.sampler is None:  # another loader during a run does not replace the run's sampler
            self.sampler = sampler
        return sampler

    # Loss

    def _base(self) -> nn.Module:
        """The model without any wrapper."""
        return unwrap_peft_model(unwrap_compiled(self.model))

    def _find_loss(self, model: nn.Module, inputs: dict[str, Any]) -> FoundLoss:
        """How the model's loss is computed; found at the first training batch, and again for a new model."""
        if self._found is None:
            self._found = find_loss_of(
                unwrap_compiled(model),
                self._base(),
                inputs,
                label_of(inputs, self.label_names) or "labels",
                shift=getattr(self.args, "shift_labels", None),
                takes_num_items=self._takes_num_items,
                routes=self._routes(model),
                fuse=not (self.is_deepspeed_enabled or in_one_graph(model)),
                processes=self.args.world_size,
            )
            self._check_labels_given(self._found)
        return self._found

    def _routes(self, model: nn.Module) -> tuple[Route, ...]:
        if self.args.use_liger_kernel:  # with labels, its models compute the loss without logits
            return (Route.APART,)
        if is_compiled(model):
            return Route.LOSS_FUNCTION, Route.UNUSED
        return Route.LOSS_FUNCTION, Route.CROSS_ENTROPY, Route.UNUSED

    def _forget_model(self) -> None:
        """Forget what was found out about the model, which may have been replaced."""
        self._found, self._evaluates_itself = None, None
        self._takes_num_items, self._counts_shifted = trainer_counts(self._base())
        self._weight_columns = columns_beside(self._base())

    def _check_labels_given(self, found: FoundLoss) -> None:
        if found.form.shift or not isinstance(self.data_collator, CausalCollator):
            return
        if not any(key in self.train_dataset[0] for key in LABEL_KEYS):
            raise ValueError(
                f"{type(self._base()).__name__} does not shift its labels, and train_dataset has none: a copy of "
                "input_ids would teach it to repeat its input. Give the items `labels`"
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
        weighed = "token_weights" in self._weight_columns and "token_weights" in batch_samples[0]
        if weighed and "sample_ids" in batch_samples[0]:
            return self._sum_of_weights(batch_samples, device)
        return super()._get_num_items_in_batch(batch_samples, device)

    def _sum_of_weights(self, batches: list, device: torch.device) -> Tensor:
        """What `_get_num_items_in_batch` counts, each label by its token weight."""
        behind = int(self._loss_shifts_labels)
        pairs = [(batch["labels"][..., behind:], batch["token_weights"][..., behind:]) for batch in batches]
        total = torch.stack([torch.where(labels != -100, weights, 0).sum() for labels, weights in pairs]).sum()
        total = total.to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        trains = "sample_ids" in inputs
        if not trains and isinstance(self._base(), PreTrainedModel):
            if self._only_loss and self._evaluates_in_head(model, inputs):
                return self._loss_in_head(model, inputs, return_outputs, num_items_in_batch)
            return self._own_loss(model, inputs, return_outputs, num_items_in_batch)
        if not trains and self._returns_loss(model, inputs):
            return self._own_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, terms, outputs, *_ = self._forward_loss(model, inputs, num_items_in_batch)
        factor = 1.0
        if trains and self.args.average_tokens_across_devices and num_items_in_batch is not None:
            factor = self.accelerator.num_processes  # DDP and FSDP average the gradients
        loss = loss * factor
        if terms is not None:
            loss = loss + terms.to(loss.device) * self._share_of_terms(factor, num_items_in_batch)
        outputs = {"logits": outputs} if isinstance(outputs, Tensor) else outputs
        return (loss, outputs) if return_outputs else loss

    def _share_of_terms(self, factor: float, num_items: Tensor | int | None) -> float:
        """As Trainer scales what a model adds to its cross-entropy: the loss of a model that counts stays as it is."""
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
        labels = found.form.counted(labels, inputs.get("attention_mask"))
        shifted = inputs.pop("shift_labels", None)  # from collators that have shifted them
        outcome = forward_loss(
            model,
            self._base(),
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
        """`weights` with those of samples that answer for resting ones."""
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


def _is_causal(base: nn.Module) -> bool:
    """Is it a language model that predicts its own inputs, with labels of the same length?"""
    encodes = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return isinstance(base, PreTrainedModel) and base.can_generate() and not encodes


class GEKOTrainer(GEKOMixin, Trainer):
    """`transformers.Trainer` whose epochs are planned by `GEKOSampler` and whose loss is `weighted_loss`.

    With every weight 1 the loss is the model's own. At the first training batch the model computes its loss for test
    labels and for a few rows' own labels, in eval and in training mode, and the cross-entropy of its logits has to
    equal it, with or without shifted labels and labels under the attention mask. Other terms of the model's loss
    (auxiliary losses of mixtures, a z-loss) are kept. `GEKOTrainingArguments(shift_labels=...)` skips the test and
    trains the cross-entropy of the logits alone.

    Everything else is Trainer's: accelerate, DDP, FSDP2, PEFT, mixed precision, compile, loggers, callbacks, evaluation
    (plain loss, the learning state untouched). What changes:

    - `num_train_epochs` counts planned epochs, which leave out samples with nothing to teach and so get shorter.
      `max_steps` is kept exactly, with more and shorter epochs; the logged `epoch` then counts, as in Trainer, the
      passes over the data that these steps could have made. A run stops early, with a warning, if the samples that are
      not quarantined do not make a batch. With `dataloader_drop_last` a plan smaller than a batch is filled up.
    - with gradient accumulation or several processes the loss is that of one big batch, even if the model ignores
      `num_items_in_batch`. Trainer (5.17) adds up the means of its micro-batches, over processes too, or averages them,
      depending on the signature of the model's forward.
    - the columns `token_weights` (a list of floats as long as the labels) and `sample_weights` (a float) of the data
      are taken out of the items before the data collator, and weight the loss as in `weighted_loss`. The divisor is the
      sum of the token weights of the labels that count. A sample of weight 0 is never drawn from a
      datasets.Dataset or a list; from another dataset it is trained without effect.
      Evaluation is unweighted. A column that the model's forward takes is passed to it, as by Trainer.
    - the learning rate follows the finished share of the run, so that it has fallen by its end, unless you pass a
      scheduler. If the last of `num_train_epochs` would be empty before the rate has fallen, that epoch trains samples
      drawn from all but the quarantined, with weight 1, as many as the epochs had on average.
    - a checkpoint has the learning state, the plan, the counts and a fingerprint of the data; resuming is exact.
      `resume_from_checkpoint=True` takes the newest complete checkpoint. Other data are refused; other settings are
      named in a warning, with their effect.
    - `train()` called again continues with the model and the learning state, see there; `args` is never written to.
    - `GEKOConfig(batch_tokens=...)` fills batches by tokens, with whole samples, so the number of batches in an epoch
      varies. `DataCollatorWithFlattening` joins them without padding, and each token keeps its sample's id.
    - `train_sampling_strategy="group_by_length"` sorts windows as long as Trainer's, in another random order.
    - `GEKOConfig.auto()`: the run finds its own length and ends with averaged weights, see docs/length.md.
    - at the end `output_dir` has `geko_report.json`, see `efficiency.py`, and `samples.jsonl`, see `write_samples`.

    A subclass may override hooks of Trainer if it calls `super()`. A hook that bypasses GEKO raises `RuntimeError` at
    the first step, which names the hook and what it has to do.

    Args: those of Trainer, and
        config: a GEKOConfig (default: `recommended()`); `GEKOConfig.uniform()` trains as Trainer does.
        tokenizer: another name of `processing_class`.

    Attributes:
        sample_state: the SampleState, one row per item of `train_dataset`, by its index.
        sampler: the GEKOSampler of the run (from `train` on).

    Raises:
        ValueError, TypeError: a setting that GEKO does not support (label smoothing, your own loss function, a dataset
            without length, DataParallel, sequence or tensor parallelism); token weights with one label a row, prompt
            tuning, or a collator that cuts, shifts or packs the labels itself; at the first training batch, a model
            whose own loss is not a plain cross-entropy of its logits (class weights, a second head).
        RuntimeError: from `train`, see above.
    """

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
        args = args or GEKOTrainingArguments(output_dir="tmp_trainer")
        super().__init__(model, args, data_collator, train_dataset, *rest, config=config, tokenizer=tokenizer, **named)
