"""`GEKOSFTTrainer`: `trl.SFTTrainer` that trains what still has something to teach."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import SFTTrainer

from geko_kernels.config import GEKOConfig
from geko_kernels.training.audit import bypassed
from geko_kernels.training.bases import arguments_of
from geko_kernels.training.trainer import GEKOMixin

_ROW = "geko_row"  # the user's row, while SFT prepares the dataset


class GEKOSFTTrainer(GEKOMixin, SFTTrainer):
    """`trl.SFTTrainer` with GEKO's loss and plans; `GEKOConfig.uniform()` trains as SFTTrainer does.

    Dataset preparation, collator, evaluation and metrics are SFTTrainer's. Training goes through the logits, because
    entropy needs them. A sample id is a row of `train_dataset` as it was given. `shuffle_dataset` changes nothing
    here: each epoch's plan is shuffled.

    Args: those of SFTTrainer, and
        config: a GEKOConfig (default: `recommended()`).

    Raises:
        ValueError: packing, padding-free batches, a loss other than "nll", Liger kernels, iterable datasets, vision
            models and auxiliary losses; a row that SFT drops because no token of it counts.
    """

    _replaces = SFTTrainer
    _fuses_head = False  # the metrics need logits

    def __init__(self, *args: Any, config: GEKOConfig | None = None, **named: Any) -> None:
        given = arguments_of(SFTTrainer, args, named)
        _check_given(given)
        self._given_rows: Any = given.get("train_dataset")
        self._prepared = False
        super().__init__(**given, config=config)
        skips = (self.args.dataset_kwargs or {}).get("skip_prepare_dataset", False)
        if self._given_rows is not None and not (self._prepared or skips):
            raise bypassed(self, "the rows of train_dataset were not kept as they were given", ("_prepare_dataset",))
        if self._is_vlm:
            raise ValueError("GEKOSFTTrainer trains text models: train a vision model with SFTTrainer")
        if self.aux_loss_enabled:
            raise ValueError(
                "GEKOSFTTrainer has no auxiliary loss: set router_aux_loss_coef=0.0 in SFTConfig, or use SFTTrainer"
            )

    def _prepare_dataset(self, dataset: Any, *args: Any, **named: Any) -> Any:
        if dataset is not self._given_rows:  # of evaluation
            return super()._prepare_dataset(dataset, *args, **named)
        self._prepared = True
        marked = dataset.add_column(_ROW, list(range(len(dataset))))
        prepared = super()._prepare_dataset(marked, *args, **named)
        rows = torch.tensor(prepared[_ROW][:], dtype=torch.long)
        missing = torch.ones(len(dataset), dtype=torch.bool)
        missing[rows] = False
        if missing.any():
            raise ValueError(
                f"SFTTrainer drops {int(missing.sum())} of the {len(dataset)} rows of train_dataset, first row "
                f"{int(missing.nonzero()[0])}: max_length leaves no token that counts. Filter them out beforehand, or "
                "raise max_length"
            )
        if not torch.equal(rows, torch.arange(len(dataset))):  # shuffle_dataset
            prepared = prepared.select(rows.argsort().tolist())
        return prepared.remove_columns(_ROW)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if "sample_ids" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "attention_mask" not in inputs:
            raise ValueError("GEKOSFTTrainer counts tokens by attention_mask: let the data_collator return it")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._count(outputs["logits"].detach(), inputs)
        return (loss, outputs) if return_outputs else loss

    def _count(self, logits: Tensor, inputs: dict[str, Any]) -> None:
        """SFT's metrics of a training batch; logits (B, S, V)."""
        labels = inputs["labels"][:, 1:]
        sums = torch.zeros(4, dtype=torch.float64, device=logits.device)  # entropy, hits, labels, tokens
        for row, target in zip(logits[:, :-1], labels, strict=True):  # one row at a time: (S, V) in float32
            counts = target != -100
            logp = row[counts].float().log_softmax(-1)
            sums[0] -= (logp.exp() * logp).sum()
            sums[1] += (logp.argmax(-1) == target[counts]).sum()
            sums[2] += counts.sum()
        sums[3] = inputs["attention_mask"].sum()
        entropy, hits, number, tokens = self.accelerator.reduce(sums, "sum").tolist()
        metrics = self._metrics["train"]
        metrics["entropy"].append(entropy / number if number else 0.0)
        metrics["mean_token_accuracy"].append(hits / number if number else 0.0)
        self._total_train_tokens += int(tokens)
        metrics["num_tokens"] = [self._total_train_tokens]


def _check_given(given: dict[str, Any]) -> None:
    args, data = given.get("args"), given.get("train_dataset")
    for name in ("packing", "padding_free", "use_liger_kernel"):
        if getattr(args, name, False):
            raise ValueError(f"GEKOSFTTrainer does not combine with {name}=True: set it to False")
    kind = getattr(args, "loss_type", "nll")
    if kind != "nll":
        raise ValueError(f"GEKOSFTTrainer trains loss_type='nll', got {kind!r}: set it to 'nll'")
    if data is not None and not isinstance(data, Dataset):
        raise ValueError(
            f"train_dataset must be a datasets.Dataset with a length, got {type(data).__name__}: "
            "load it without streaming"
        )
