"""Scores of how likely a sample's label is wrong, from its losses."""

from __future__ import annotations

import numpy as np


def label_error_scores(sample: np.ndarray, label_probability: np.ndarray, suspected: np.ndarray) -> np.ndarray:
    """(N,) float64 in [0, 1], higher where a wrong label is more likely; NaN for samples without a visit.

        doubt = 1 - mean(label_probability of the sample's visits)
        score = (rank of doubt among the N samples, from 0 to 1, + suspected) / 2

    A wrong label is learnt late or never, so its probability stays low for most of the run. Suspects of the noise
    guard, on which the model was repeatedly sure of another answer, score above 0.5, all others at most 0.5. Equal
    doubts share the mean of their ranks.

    Args: sample (V,) integers: of each visit; label_probability (V,): of each visit; suspected (N,) bool.
    """
    num_samples = len(suspected)
    visits = np.bincount(sample, minlength=num_samples)
    seen = visits > 0
    doubt = 1 - np.bincount(sample, label_probability, num_samples)[seen] / visits[seen]
    _, place, ties = np.unique(doubt, return_inverse=True, return_counts=True)
    ranks = np.cumsum(ties) - (ties + 1) / 2
    scores = np.full(num_samples, np.nan)
    scores[seen] = (ranks[place] / max(len(doubt) - 1, 1) + suspected[seen]) / 2
    return scores
