"""The mountain curriculum: bucket weights as a function of the run's progress."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """A stretch of the run; the value is its name in logs."""

    WARMUP = "warmup"
    ASCENT = "ascent"
    PEAK = "peak"
    DESCENT = "descent"
    CONSOLIDATE = "consolidate"


# (phase, progress at which it ends, weights of (HARD, FOCUS, LIGHT)); the GEKO document's table
_PHASES: tuple[tuple[Phase, float, tuple[float, float, float]], ...] = (
    (Phase.WARMUP, 0.15, (1.0, 2.0, 3.0)),
    (Phase.ASCENT, 0.35, (2.0, 3.0, 1.0)),
    (Phase.PEAK, 0.65, (5.0, 2.0, 0.0)),
    (Phase.DESCENT, 0.85, (2.0, 3.0, 1.0)),
    (Phase.CONSOLIDATE, 1.0, (1.0, 2.0, 3.0)),
)


class MountainCurriculum:
    """The bucket weights over a run: easy samples first, then hard ones, then easy ones again.

    `progress` is the finished share of the whole run, in [0, 1]; a phase starts at its lower end
    (0.15 is ASCENT) and CONSOLIDATE includes 1. A value outside [0, 1] raises `ValueError`.
    """

    def phase(self, progress: float) -> Phase:
        """The phase at `progress`."""
        return self._row(progress)[0]

    def weights(self, progress: float) -> tuple[float, float, float]:
        """Weights of (HARD, FOCUS, LIGHT) at `progress`; FREEZE weighs 0 in every phase."""
        return self._row(progress)[2]

    def _row(self, progress: float) -> tuple[Phase, float, tuple[float, float, float]]:
        if not hasattr(progress, "__float__"):
            raise TypeError(f"progress must be a number in [0, 1], got {progress!r}")
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress must be in [0, 1], got {progress}")
        return next((row for row in _PHASES if progress < row[1]), _PHASES[-1])
