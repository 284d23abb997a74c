"""GEKO for PyTorch: a cross-entropy that knows what each sample still has to teach; a trainer that skips the rest."""

import importlib
from typing import TYPE_CHECKING, Any

from geko_kernels.config import Bucket, GEKOConfig
from geko_kernels.curriculum import MountainCurriculum, Phase
from geko_kernels.extras import TRAINING
from geko_kernels.losses.linear import weighted_linear_loss
from geko_kernels.losses.logits import weighted_loss
from geko_kernels.losses.results import SampleStats
from geko_kernels.state import SampleState

if TYPE_CHECKING:
    from geko_kernels.training.arguments import GEKOTrainingArguments
    from geko_kernels.training.data import IdCollator, IdDataset
    from geko_kernels.training.formats import load_dataset
    from geko_kernels.training.loader import GEKOLoader
    from geko_kernels.training.observe import observe
    from geko_kernels.training.planning.sampler import GEKOSampler
    from geko_kernels.training.sft import GEKOSFTTrainer
    from geko_kernels.training.trainer import GEKOMixin, GEKOTrainer

_LAZY = {
    "GEKOLoader": "loader",
    "GEKOSampler": "planning.sampler",
    "GEKOMixin": "trainer",
    "GEKOSFTTrainer": "sft",
    "GEKOTrainer": "trainer",
    "GEKOTrainingArguments": "arguments",
    "IdCollator": "data",
    "IdDataset": "data",
    "load_dataset": "formats",
    "observe": "observe",
}

__version__ = "0.1.0"
__all__ = [
    "Bucket",
    "GEKOConfig",
    "GEKOLoader",
    "GEKOMixin",
    "GEKOSFTTrainer",
    "GEKOSampler",
    "GEKOTrainer",
    "GEKOTrainingArguments",
    "IdCollator",
    "IdDataset",
    "MountainCurriculum",
    "Phase",
    "SampleState",
    "SampleStats",
    "load_dataset",
    "observe",
    "weighted_linear_loss",
    "weighted_loss",
]


def __getattr__(name: str) -> Any:
    """The training classes on first use, so that transformers is imported by those who need it."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"geko_kernels.training.{_LAZY[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name in ("transformers", "accelerate"):
            raise ImportError(f"{name} needs {error.name}: {TRAINING}") from error
        if error.name in ("trl", "datasets"):
            raise ImportError(f"{name} needs {error.name}: pip install trl") from error
        raise
