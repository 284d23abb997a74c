"""The settings of GEKO: bucket thresholds, weights, learning-state rules and selection."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class Bucket(IntEnum):
    """How much a sample still has to teach; `SampleState.bucket` stores the value."""

    FREEZE = 0  # correct, confident, steady: skipped
    LIGHT = 1  # correct, but not confident or steady enough to freeze
    FOCUS = 2  # wrong and unsure
    HARD = 3  # wrong and sure of it


@dataclass(frozen=True)
class GEKOConfig:
    """Thresholds, weights and rules; immutable, so one config can be shared by states and trainers.

    Buckets
        freeze_confidence: a correct sample freezes only above this mean confidence, in (0, 1].
        freeze_quality: it also needs a quality above this, in (0, 1],
        min_q_for_freeze: and at least this Q-value, in [0, 1]; 0 switches that condition off.
        focus_confidence: a wrong sample is FOCUS up to this confidence and HARD above it.
        bucket_weights: loss weights of (HARD, FOCUS, LIGHT).
        freeze_weight: loss weight of FREEZE; 0 except for `uniform()`.
    Learning state
        correctness: "loss": a sample is correct if its loss is below `correct_loss` (nats a token);
            "accuracy": if at least the share `correct_accuracy` of its tokens is predicted right.
        quality: "rise" counts only rises of the loss as unsteady; "std" is gekolib's rule.
        q_value_lr, q_value_loss_scale: `Q <- (1 - lr) Q + lr (1 - min(loss / scale, 1))`.
    Training (used by `GEKOSampler` and `GEKOTrainer`, not by the loss)
        use_curriculum: take the bucket weights from the mountain curriculum instead of `bucket_weights`.
        selection: leave samples of weight zero out of each epoch's plan.
        light_interval: a LIGHT sample takes part in every n-th epoch, n from 1 to 64: with 2, half of them train in one
            epoch and the other half in the next. When its turn comes, its weight, its gradient and its part of the
            logged loss are multiplied by n, to make up for the samples that rest.
        probes: re-check left-out samples forward-only, so that a forgotten one thaws; the interval doubles.
        spend_saved: train as many samples as the standard run, in more and shorter epochs. False finishes sooner.
        uniform_finish: the last share of the run, in [0, 1), which trains all but quarantined samples with weight 1.
        noise_guard: quarantine samples that look mislabelled; see `training/planning/guard.py` for the rule.
        noise_guard_visits: a sample looks mislabelled if it was wrong at this many visits in a row, from 2 to 5,
        noise_guard_margin: and the model's answer is more likely than its label by this many nats a token, > 0. Use 1
            if wrong labels are known to resemble right ones; hard samples may then be quarantined too.
        noise_guard_min_share: samples are quarantined only if at least this share of all, in [0, 1), looks mislabelled.
            Use 0 with few classes and labels known to be unreliable: with 5 classes and 30 % wrong labels, a calibrated
            model finds a wrong label 2.2 nats less likely than its answer, and few samples reach 3. With N < 3,600
            samples this share is multiplied by sqrt(3600 / N). At three times this share, a third of the margin is
            enough.
        noise_guard_share: largest share of the samples, in (0, 1), that may be quarantined at a time.
    Batches (used by `GEKOTrainer` and `GEKOSFTTrainer`)
        batch_tokens: the most tokens (of input_ids) in one batch of a device, instead of a number of samples
            (per_device_train_batch_size). Whole samples fill a batch in the plan's order. A padded batch counts as
            rows x its longest row, one without padding as the sum of its rows. A longer sample is refused. None counts
            samples.
        probe_batch_size: samples (with packing, packed rows) in one forward-only probe batch of a device; None means 4
            times a training batch. Not allowed with `batch_tokens`, where a probe batch has up to 4 times as many
            tokens.
        auto_stop: the run finds its own length, at most `num_train_epochs` (or `max_steps`). The learning rate is
            constant after the warm-up, held-back samples are evaluated with averaged weights, and the run ends with
            the averaged weights of the best point; see docs/length.md. Not allowed with `use_curriculum` or
            `spend_saved`, which need to know the length. `uniform_finish` counts from the end of the longest run, so
            most runs end before it.
        auto_measure: the measure of the best point: "loss", or "accuracy", the share of the held-back samples whose
            tokens are all right.

    Raises:
        ValueError, TypeError: a field is outside its range or of the wrong kind; names it.
    """

    freeze_confidence: float = 0.85
    freeze_quality: float = 0.80
    focus_confidence: float = 0.60
    bucket_weights: tuple[float, float, float] = (3, 1, 0)
    freeze_weight: float = 0.0
    correctness: str = "loss"
    correct_loss: float = 0.5
    correct_accuracy: float = 1.0
    quality: str = "rise"
    q_value_lr: float = 0.1
    q_value_loss_scale: float = 10.0
    min_q_for_freeze: float = 0.0
    use_curriculum: bool = True
    selection: bool = True
    light_interval: int = 1
    probes: bool = True
    spend_saved: bool = False
    uniform_finish: float = 0.015625
    noise_guard: bool = True
    noise_guard_visits: int = 2
    noise_guard_margin: float = 3.0
    noise_guard_min_share: float = 0.05
    noise_guard_share: float = 0.4
    batch_tokens: int | None = None
    probe_batch_size: int | None = None
    auto_stop: bool = False
    auto_measure: str = "loss"

    def __post_init__(self) -> None:
        for name in ("freeze_confidence", "freeze_quality", "focus_confidence", "correct_accuracy", "q_value_lr"):
            self._check_number(name, 0.0, 1.0, "in (0, 1]", open_low=True)
        self._check_number("min_q_for_freeze", 0.0, 1.0, "in [0, 1]")
        self._check_number("correct_loss", 0.0, math.inf, "> 0", open_low=True)
        self._check_number("q_value_loss_scale", 0.0, math.inf, "> 0", open_low=True)
        self._check_number("freeze_weight", 0.0, math.inf, ">= 0")
        self._check_number("uniform_finish", 0.0, 0.999999, "in [0, 1)")
        self._check_number("noise_guard_margin", 0.0, math.inf, "> 0", open_low=True)
        self._check_number("noise_guard_min_share", 0.0, 0.999999, "in [0, 1)")
        self._check_number("noise_guard_share", 0.0, 0.999999, "in (0, 1)", open_low=True)
        if self.focus_confidence >= self.freeze_confidence:
            raise ValueError(
                f"focus_confidence must be below freeze_confidence ({self.freeze_confidence}), "
                f"got {self.focus_confidence}"
            )
        self._check_choice("correctness", ("loss", "accuracy"))
        self._check_choice("quality", ("rise", "std"))
        for name in ("use_curriculum", "selection", "probes", "spend_saved", "noise_guard", "auto_stop"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._check_integer("noise_guard_visits", 2, 5, "from 2 to 5 (the losses kept per sample)")
        self._check_integer("light_interval", 1, 64, "from 1 to 64")
        self._check_batches()
        self._check_weights()
        self._check_choice("auto_measure", ("loss", "accuracy"))
        for name in ("use_curriculum", "spend_saved"):
            if self.auto_stop and getattr(self, name):
                raise ValueError(
                    f"{name} must be False with auto_stop=True, got True: it depends on the run's length, which is "
                    "known only at the end of such a run"
                )

    def _check_batches(self) -> None:
        for name in ("batch_tokens", "probe_batch_size"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer of at least 1, or None, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {value}")
        if self.batch_tokens is not None and self.probe_batch_size is not None:
            raise ValueError(
                "probe_batch_size cannot be combined with batch_tokens, which also sets the size of probe batches: "
                "leave out one of them"
            )

    def _check_integer(self, name: str, low: int, high: int, allowed: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer from {low} to {high}, got {value!r}")
        if not low <= value <= high:
            raise ValueError(f"{name} must be {allowed}, got {value}")

    def _check_number(self, name: str, low: float, high: float, allowed: str, open_low: bool = False) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number {allowed}, got {value!r}")
        inside = (low < value if open_low else low <= value) and value <= high and math.isfinite(value)
        if not inside:
            raise ValueError(f"{name} must be {allowed}, got {value}")

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")

    def _check_weights(self) -> None:
        weights = self.bucket_weights
        if not isinstance(weights, (tuple, list)) or any(
            isinstance(w, bool) or not isinstance(w, (int, float)) for w in weights
        ):
            raise TypeError(f"bucket_weights must be three numbers (HARD, FOCUS, LIGHT), got {weights!r}")
        if len(weights) != 3 or not all(math.isfinite(w) and w >= 0 for w in weights):
            raise ValueError(f"bucket_weights must be three finite numbers >= 0 (HARD, FOCUS, LIGHT), got {weights}")
        object.__setattr__(self, "bucket_weights", tuple(weights))

    @classmethod
    def recommended(cls, **changes: Any) -> GEKOConfig:
        """`GEKOTrainer`'s default: samples freeze late, and no bucket has a higher weight; see docs/evidence.md.

        Every preset takes changes: `recommended(light_interval=3)` changes that one field of the preset, whereas
        `GEKOConfig(light_interval=3)` has the document's weights and curriculum.
        """
        return cls._preset(
            changes,
            freeze_confidence=0.999,
            light_interval=2,
            bucket_weights=(1, 1, 1),
            use_curriculum=False,
            uniform_finish=0.0,
        )

    @classmethod
    def auto(cls, **changes: Any) -> GEKOConfig:
        """`recommended()` with `auto_stop`: the run finds its own length and ends with the best averaged weights."""
        return cls.recommended(**{"auto_stop": True, **changes})

    @classmethod
    def original(cls, **changes: Any) -> GEKOConfig:
        """The GEKO document to the letter: its buckets, weights and curriculum, and nothing else."""
        return cls._preset(changes, probes=False, uniform_finish=0.0, noise_guard=False)

    @classmethod
    def aggressive(cls, **changes: Any) -> GEKOConfig:
        """The document's preset that freezes late and pushes HARD samples."""
        return cls._preset(changes, freeze_confidence=0.90, freeze_quality=0.85, bucket_weights=(5, 2, 0))

    @classmethod
    def balanced(cls, **changes: Any) -> GEKOConfig:
        """The document's preset that keeps LIGHT samples in training."""
        return cls._preset(changes, bucket_weights=(3, 2, 1))

    @classmethod
    def conservative(cls, **changes: Any) -> GEKOConfig:
        """The document's preset with the flattest weights."""
        return cls._preset(changes, freeze_confidence=0.80, freeze_quality=0.75, bucket_weights=(2, 2, 1))

    @classmethod
    def gekolib(cls, **changes: Any) -> GEKOConfig:
        """The rules of the reference package gekolib 0.3.1: quality by standard deviation, Q gate at 0.8."""
        return cls._preset(changes, quality="std", min_q_for_freeze=0.8)

    @classmethod
    def uniform(cls, **changes: Any) -> GEKOConfig:
        """The standard loss with GEKO's statistics: weight 1 in every bucket, no sample left out."""
        return cls._preset(
            changes,
            bucket_weights=(1, 1, 1),
            freeze_weight=1.0,
            use_curriculum=False,
            selection=False,
            probes=False,
            uniform_finish=0.0,
            noise_guard=False,
        )

    @classmethod
    def _preset(cls, changes: dict[str, Any], **fields: Any) -> GEKOConfig:
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise TypeError(f"GEKOConfig has no fields {unknown}; it has {', '.join(known)}")
        return cls(**{**fields, **changes})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> GEKOConfig:
        """The config that `to_dict` described; raises `ValueError` for unknown fields."""
        if not isinstance(fields, dict):
            raise TypeError(f"fields must be a dict, as to_dict() returns, got {type(fields).__name__}")
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"config has unknown fields {unknown}; was it written by a newer geko_kernels?")
        return cls(**fields)


def check_config(config: object) -> None:
    """Raise TypeError unless `config` is a GEKOConfig or None."""
    if config is not None and not isinstance(config, GEKOConfig):
        raise TypeError(
            f"config must be a GEKOConfig, got {type(config).__name__}: call a preset, such as "
            "GEKOConfig.recommended(), or GEKOConfig(...) with fields"
        )
