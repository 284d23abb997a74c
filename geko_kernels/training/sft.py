"""`GEKOSFTTrainer`: `trl.SFTTrainer` on the samples that still have something to teach."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers.utils import logging
from trl import SFTTrainer

from geko_kernels.config import GEKOConfig
from geko_kernels.training.arguments import GEKOTrainingArguments
from geko_kernels.training.audit import bypassed
from geko_kernels.training.bases import arguments_of
from geko_kernels.training.model_loss.loss_call import ModelLoss
from geko_kernels.training.trainer import GEKOMixin
from geko_kernels.training.weights import WEIGHT_COLUMNS

logger = logging.get_logger(__name__)
_ROW = "geko_row"  # the user's row, while SFT prepares the dataset


class GEKOSFTTrainer(GEKOMixin, SFTTrainer):
    """`trl.SFTTrainer` with GEKO's loss and plans; `GEKOConfig.uniform()` trains as SFTTrainer does.

    Dataset preparation, collator, evaluation and metrics are SFTTrainer's, and so is the auxiliary loss of a mixture of
    experts (`router_aux_loss_coef`). Where GEKOTrainer fuses the loss with the model's head, so does this trainer, and
    computes the entropy in the same pass. A sample id is a row of `train_dataset` as it was given. A row that SFT
    drops, because no token of it counts, is never drawn. `shuffle_dataset` has no effect: each plan is shuffled.

    `packing=True` packs the documents of each epoch's plan by best-fit decreasing into rows of `max_length` tokens, so
    that none is cut and hardly any padding is computed; SFTTrainer packs once, before training. Documents are truncated
    to `max_length` by `truncation_mode`, as without packing. A batch has `per_device_train_batch_size` such rows, or,
    with `GEKOConfig(batch_tokens=...)`, up to that many tokens. `packing_strategy` "wrapped" and "bfd_split" cut
    documents: SFTTrainer packs them, and with `GEKOConfig.uniform()` each of its packs is a sample.

    Vision models are trained as by SFTTrainer, whose collator prepares the rows; `batch_tokens` is not for them.

    The columns `sample_weights` and, beside `input_ids`, `token_weights` work as in GEKOTrainer. Truncation cuts the
    token weights along with the tokens, and mean_token_accuracy is weighted by them.

    Args: those of SFTTrainer, and
        config: a GEKOConfig (default: `recommended()`).

    Raises:
        ValueError: a packing strategy that cuts documents, if GEKO chooses or weights documents or the data have
            weights; token_weights of text; a loss other than "nll"; Liger's fused loss; iterable datasets; at the first
            training batch, prompt tuning with packed rows.
    """

    _replaces = SFTTrainer
    _entropy = True  # SFT logs it

    def __init__(self, *args: Any, config: GEKOConfig | None = None, **named: Any) -> None:
        given = arguments_of(SFTTrainer, args, named)
        _check_given(given, config)
        own: Any = given.get("args")
        prepares = not (getattr(own, "dataset_kwargs", None) or {}).get("skip_prepare_dataset", False)
        if getattr(own, "packing", False) and own.packing_strategy == "bfd" and prepares:
            self._row_tokens = own.max_length
        self._given_rows: Any = given.get("train_dataset")
        super().__init__(**given, config=config)
        prepares = prepares and not self._is_vision_dataset  # there the collator prepares the rows
        if self._given_rows is not None and prepares:
            raise bypassed(self, "the rows of train_dataset were not kept as they were given", ("_prepare_dataset",))

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any, **named: Any
    ) -> Any:
        trains, self._given_rows = dataset is self._given_rows, None  # the training data come first
        if not trains or (packing and self._row_tokens is None):  # evaluation data, or packs are the samples
            return super()._prepare_dataset(dataset, processing_class, args, packing, *rest, **named)
        marked = dataset.add_column(_ROW, list(range(len(dataset))))
        prepared = super()._prepare_dataset(marked, processing_class, args, False, *rest, **named)
        columns = [name for name in WEIGHT_COLUMNS if name in dataset.column_names]
        if packing:
            prepared = prepared.select_columns(["input_ids", "labels", _ROW, *columns])  # as SFT does, with our columns
        if "token_weights" in columns:
            prepared = _with_cut_weights(prepared, dataset, args.truncation_mode == "keep_end")
        rows, every = torch.tensor(prepared[_ROW][:], dtype=torch.long), torch.arange(len(dataset))
        if not torch.equal(rows, every):  # shuffle_dataset, or dropped rows
            prepared = prepared.select(self._places(rows, len(dataset)).tolist())
        return prepared.remove_columns(_ROW)

    def _places(self, rows: Tensor, number: int) -> Tensor:
        """(number,) the place of each of the user's rows in the prepared dataset; dropped rows are never drawn."""
        if len(rows) == 0:
            raise ValueError(
                f"SFTTrainer drops all {number} rows of train_dataset: max_length leaves no token that counts. Raise "
                "max_length"
            )
        places = torch.full((number,), -1)
        places[rows] = torch.arange(len(rows))
        there = places >= 0
        if not there.all():
            logger.warning(
                f"SFTTrainer drops {number - len(rows)} of the {number} rows of train_dataset, first row "
                f"{int(there.logical_not().nonzero()[0])}: max_length leaves no token that counts. They are "
                "never drawn."
            )
            self._present = there.nonzero()[:, 0].int()
        return places.clamp(min=0)  # a dropped row points to row 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if "sample_ids" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "attention_mask" not in inputs and "position_ids" not in inputs:
            raise ValueError(
                "GEKOSFTTrainer counts tokens by attention_mask or position_ids: let the data_collator return one"
            )
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if return_outputs and outputs.logits is None:  # as SFT does
            bare = {k: value for k, value in inputs.items() if k not in ("labels", "sample_ids", *self._weight_columns)}
            with torch.no_grad():
                outputs = model(**bare)
        return (loss, outputs) if return_outputs else loss

    def _forward_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **named: Any) -> ModelLoss:
        inputs = {**inputs, "use_cache": False}  # as SFT does: with a cache the documents of a row would see each other
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        outcome = super()._forward_loss(model, inputs, *args, **named)
        aux = self._aux_loss(outcome.outputs) if self.aux_loss_enabled else None
        # as SFT does, whatever the model adds to its loss itself
        outcome = outcome._replace(terms=None if aux is None else self.router_aux_loss_coef * aux)
        if outcome.entropy is not None:
            self._count(outcome, inputs)
            if aux is not None:
                mean = self.accelerator.reduce(aux.detach().clone(), "mean")
                self._metrics["train"]["aux_loss"].append(mean.item())
        return outcome

    def _aux_loss(self, outputs: Any) -> Tensor:
        if getattr(outputs, "aux_loss", None) is None:
            raise ValueError(
                f"{type(self._base()).__name__} returns no aux_loss for router_aux_loss_coef="
                f"{self.router_aux_loss_coef}: set it to 0.0 in SFTConfig"
            )
        return outputs.aux_loss

    def _share_of_terms(self, factor: float, num_items: Tensor | int | None) -> float:
        return 1.0 if num_items is None else 1 / self.current_gradient_accumulation_steps

    def _evaluates_in_head(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        return False  # SFT's own head has SFT's metrics

    def _count(self, outcome: ModelLoss, inputs: dict[str, Any]) -> None:
        """SFT's metrics of a training batch."""
        stats, entropy, mask = outcome.stats, outcome.entropy, inputs.get("attention_mask")
        assert entropy is not None
        number = stats.num_tokens.double()
        here = inputs["position_ids"].shape[1] if mask is None else mask.sum()  # as SFT counts them
        here = torch.as_tensor(here, device=number.device)
        sums = torch.stack([entropy.double().sum(), (stats.accuracy * number).sum(), number.sum(), here])
        entropies, hits, labels, tokens = self.accelerator.reduce(sums, "sum").tolist()
        metrics = self._metrics["train"]
        metrics["entropy"].append(entropies / labels if labels else 0.0)
        metrics["mean_token_accuracy"].append(hits / labels if labels else 0.0)
        self._total_train_tokens += int(tokens)
        metrics["num_tokens"] = [self._total_train_tokens]


def _check_given(given: dict[str, Any], config: GEKOConfig | None) -> None:
    args, data = given.get("args"), given.get("train_dataset")
    if isinstance(args, GEKOTrainingArguments):
        raise TypeError("args must be a trl.SFTConfig, got GEKOTrainingArguments, whose fields are GEKOTrainer's")
    columns = getattr(data, "column_names", None) or ()
    if getattr(args, "packing", False):
        _check_packing(args, config or GEKOConfig.recommended(), columns)
    kind = getattr(args, "loss_type", "nll")
    if kind != "nll":
        raise ValueError(f"GEKOSFTTrainer trains loss_type='nll', got {kind!r}: set it to 'nll'")
    if "token_weights" in columns and "input_ids" not in columns:
        raise ValueError(
            "GEKOSFTTrainer does not take token_weights with text, as SFTTrainer tokenises it: give the rows of "
            "train_dataset input_ids (and labels) of the same length, or sample_weights, one number a row"
        )
    if data is not None and not isinstance(data, Dataset):
        how = "make one with datasets.Dataset.from_list" if isinstance(data, list) else "load it without streaming"
        raise ValueError(f"train_dataset must be a datasets.Dataset with a length, got {type(data).__name__}: {how}")


def _with_cut_weights(prepared: Any, given: Any, from_the_end: bool) -> Any:
    """`prepared` with its token_weights cut like the tokens of the rows `given`, which SFT has cut."""
    lengths = [len(tokens) for tokens in given["input_ids"]]

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        weights, sample, kept = row["token_weights"], row[_ROW], len(row["input_ids"])
        if weights is not None and len(weights) != lengths[sample]:
            raise ValueError(
                f"token_weights must be as long as input_ids: sample {sample} has {len(weights)} of them and "
                f"{lengths[sample]} tokens"
            )
        part = slice(lengths[sample] - kept, None) if from_the_end else slice(kept)
        return {"token_weights": None if weights is None else weights[part]}

    return prepared.map(cut, desc="Truncating token_weights")


def _check_packing(args: Any, config: GEKOConfig, columns: Any) -> None:
    if args.packing_strategy != "bfd" and not _treats_all_alike(config):
        raise ValueError(
            f"GEKOSFTTrainer chooses and weights whole documents, and packing_strategy={args.packing_strategy!r} cuts "
            "them: set packing_strategy='bfd', which is packed again in each epoch, or config=GEKOConfig.uniform(), "
            "which trains all of it"
        )
    weights = [name for name in WEIGHT_COLUMNS if name in columns]
    if args.packing_strategy != "bfd" and weights:
        raise ValueError(
            f"packing_strategy={args.packing_strategy!r} makes rows of parts of documents, but train_dataset has "
            f"{weights} of whole documents: set packing_strategy='bfd', or drop that column"
        )
    if args.max_length is None:
        raise ValueError("packing=True needs max_length, the tokens of a packed row: got max_length=None")


def _treats_all_alike(config: GEKOConfig) -> bool:
    weights = {*config.bucket_weights, config.freeze_weight}
    return weights == {1} and not (config.selection or config.use_curriculum or config.noise_guard)
