"""GEKO for PyTorch: a cross-entropy that knows what each sample still has to teach, and a trainer that skips the rest."""

from geko_kernels.config import Bucket, GEKOConfig
from geko_kernels.curriculum import MountainCurriculum, Phase
from geko_kernels.linear_loss import weighted_linear_loss
from geko_kernels.loss import SampleStats, weighted_loss
from geko_kernels.state import SampleState

__version__ = "0.1.0"
__all__ = [
    "Bucket",
    "GEKOConfig",
    "MountainCurriculum",
    "Phase",
    "SampleState",
    "SampleStats",
    "weighted_linear_loss",
    "weighted_loss",
]
