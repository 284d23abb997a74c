"""Loading the weights of a checkpoint whose file has other names for them than the model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.trainer_utils import unwrap_peft_model

from geko_kernels.training.model_loss.own_loss import unwrap_compiled
from geko_kernels.training.progress import ProgressMixin


class LoadingMixin(ProgressMixin):
    """`transformers.Trainer` that also loads weights that `save_pretrained` has renamed.

    Transformers saves mixtures of experts and vision models under the names of their published checkpoints, and
    `from_pretrained` renames them back. Trainer (5.17) does not: it warns of missing keys, and resumes with whatever
    weights the model had.
    """

    _loads_from: str | None = None  # the checkpoint that a run is resumed from, while its weights are loaded

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._loads_from = resume_from_checkpoint
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        finally:
            self._loads_from = None

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        base = unwrap_peft_model(unwrap_compiled(self.model))
        folder = self._loads_from or self.state.best_model_checkpoint
        renamed = load_result.missing_keys and load_result.unexpected_keys
        if not (renamed and folder and isinstance(base, PreTrainedModel)):
            super()._issue_warnings_after_load(load_result)
            return
        wide = torch.float64 if base.dtype == torch.float64 else torch.float32  # represents any other dtype exactly
        loaded, about = type(base).from_pretrained(folder, config=base.config, dtype=wide, output_loading_info=True)
        if about["missing_keys"]:
            raise ValueError(
                f"the checkpoint {folder} lacks weights of {type(base).__name__}: {sorted(about['missing_keys'])}. "
                "It is of another model; resume with that one"
            )
        base.load_state_dict(loaded.state_dict())
