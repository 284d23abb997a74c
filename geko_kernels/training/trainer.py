"""`GEKOTrainer`: `transformers.Trainer` on the samples that still have something to teach; `GEKOMixin` for others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length

from geko_kernels.config import GEKOConfig, check_config
from geko_kernels.state import SampleState
from geko_kernels.training.arguments import GEKOTrainingArguments
from geko_kernels.training.bases import arguments_of, check_bases, trainer_below
from geko_kernels.training.callbacks import BucketBar, NotebookBarEnd
from geko_kernels.training.data import CausalCollator
from geko_kernels.training.evaluation import EvaluationMixin
from geko_kernels.training.figures import FiguresMixin
from geko_kernels.training.parallel import check_parallel
from geko_kernels.training.planning.sampler import GEKOSampler
from geko_kernels.training.token_batches import check_token_batches


class GEKOMixin(FiguresMixin, EvaluationMixin):
    """All that GEKO adds to a trainer: `class MyTrainer(GEKOMixin, AnySubclassOfTrainer)`; see `GEKOTrainer`.

    The mixin comes before the trainer, whose arguments and methods are kept. `config` and `tokenizer` are keywords.

    Raises:
        TypeError: when the class is created, if the trainer comes before the mixin, or has its own loss or training
            batches, which GEKO would replace.
    """

    _replaces: type | None = None  # the trainer whose loss and default collator GEKO replaces

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        check_bases(cls, GEKOMixin)

    def __init__(self, *args: Any, config: GEKOConfig | None = None, tokenizer: Any = None, **named: Any) -> None:
        check_config(config)
        given = arguments_of(trainer_below(type(self), GEKOMixin), args, named)
        if tokenizer is not None:
            if given.get("processing_class") is not None:
                raise TypeError("tokenizer is another name of processing_class: give one of them")
            given["processing_class"] = tokenizer
        data = given.get("train_dataset")
        if isinstance(data, IterableDataset) or not (data is None or has_length(data)):  # Trainer asks for max_steps
            raise ValueError("GEKOTrainer needs a train_dataset with a length and items by index, not an iterable one")
        super().__init__(**given)
        self.config = config or GEKOConfig.recommended()
        self._check_arguments()
        if self._replaces is None and given.get("data_collator") is None and _is_causal(self._base()):
            ends = (getattr(self.processing_class, name, None) for name in ("pad_token_id", "eos_token_id"))
            self.data_collator = CausalCollator(next((token for token in ends if token is not None), 0))
        if not self.label_names and self.args.label_names is None:  # its forward takes no labels: they are for our loss
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
            raise ValueError("GEKOTrainer does not work with label_smoothing_factor: set it to 0")
        if self.args.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "GEKOTrainer plans its epochs itself, so it does not work with "
                "train_sampling_strategy='batch_rebalance': leave it out"
            )
        if isinstance(self.train_dataset, Mapping) and 0 not in self.train_dataset:  # a DatasetDict too
            raise ValueError(
                f"train_dataset must give its items by index, got a {type(self.train_dataset).__name__} with the keys "
                f"{sorted(self.train_dataset)}: if they are splits, give one of them; if they are columns, make a "
                "dataset of them, for example with datasets.Dataset.from_dict"
            )
        if self.train_dataset is not None and len(self.train_dataset) == 0:
            raise ValueError("train_dataset has no items")
        if self.config.batch_tokens is not None or self._row_tokens is not None:
            check_token_batches(self.args, self.config.batch_tokens)
        check_parallel(self, "GEKOTrainer")


def _is_causal(base: nn.Module) -> bool:
    """Whether it is a language model that predicts its own inputs, with labels of the same length."""
    encodes = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return isinstance(base, PreTrainedModel) and base.can_generate() and not encodes


class GEKOTrainer(GEKOMixin, Trainer):
    """`transformers.Trainer` whose epochs are planned by `GEKOSampler` and whose loss is `weighted_loss`.

    With every weight 1 the loss is the model's own. At the first training batch the model computes its loss for test
    labels and for a few rows' own labels, in eval and in training mode. The cross-entropy of its logits has to equal
    that loss, with or without a shift of the labels and with or without labels outside the attention mask. Other terms
    of the model's loss (auxiliary losses of mixtures, a z-loss) are kept. `GEKOTrainingArguments(shift_labels=...)`
    skips the test and trains the cross-entropy of the logits alone.

    Everything else is Trainer's: accelerate, DDP, FSDP2, PEFT, mixed precision, compile, loggers, callbacks, evaluation
    (plain loss, the learning state untouched). The differences:

    - `num_train_epochs` counts planned epochs, which leave out samples with nothing to teach and so get shorter.
      `max_steps` is kept exactly, with more and shorter epochs; the logged `epoch` then counts, as in Trainer, the
      passes over the data that these steps could have made. A run stops early, with a warning, if the samples that are
      not quarantined do not fill a batch. With `dataloader_drop_last` a plan smaller than a batch is filled up.
    - with gradient accumulation or several processes the loss is that of one big batch, even if the model ignores
      `num_items_in_batch`. Trainer (5.17) sums or averages the means of its micro-batches and processes, depending on
      the signature of the model's forward.
    - the columns `token_weights` (a list of floats as long as the labels) and `sample_weights` (a float) of the data
      are taken out of the items before the data collator, and weight the loss as in `weighted_loss`. The divisor is the
      sum of the token weights of the labels that count. A sample of weight 0 is never drawn from a datasets.Dataset or
      a list; from another dataset it is trained without effect. Evaluation is unweighted. A column that the model's
      forward takes is passed to the model, as in Trainer.
    - the learning rate follows the finished share of the run, so that it has fallen by the run's end, unless you pass a
      scheduler. If the last of `num_train_epochs` would be empty before the rate has fallen, that epoch trains as many
      samples as the epochs had on average, with weight 1, drawn from all but the quarantined ones.
    - a checkpoint has the learning state, the plan, the counts and a fingerprint of the data; resuming is exact.
      `resume_from_checkpoint=True` takes the newest complete checkpoint. Other data are refused; other settings are
      named in a warning, with their effect.
    - `train()` called again continues with the model and the learning state, see there; `args` is never changed.
    - `GEKOConfig(batch_tokens=...)` fills batches by tokens, with whole samples, so the number of batches in an epoch
      varies. `DataCollatorWithFlattening` joins them without padding, and each token keeps its sample's id.
    - `train_sampling_strategy="group_by_length"` sorts windows of the same size as Trainer's, in another random order.
    - `GEKOConfig.auto()`: the run finds its own length and ends with averaged weights, see docs/length.md.
    - at the end `output_dir` has `geko_report.json`, see `efficiency.py`, and `samples.jsonl`, see `write_samples`.

    A subclass may override Trainer's hooks if it calls `super()`. If a hook bypasses GEKO, the first step raises a
    `RuntimeError` that names the hook and what it has to do.

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
