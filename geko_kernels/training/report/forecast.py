"""A forecast of what GEKO would leave out of a run, from its first epochs or from a run that was only observed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from geko_kernels.config import GEKOConfig
from geko_kernels.curriculum import MountainCurriculum
from geko_kernels.training.planning.probes import STAGGER

LONGEST = 20  # epochs of the longest run that is forecast
_BEGUN = 0.1  # share of the samples that has to be right before a forecast is possible
_PAYS = 0.1  # share of the work that has to be saved for leaving samples out to be worth it
_SHORT = 5  # the most epochs of a run that is called short
_ENOUGH = 0.05  # share of the samples that may still be wrong when a run is called long enough


class Shares(NamedTuple):
    """Shares of the samples at the end of an epoch; they sum to 1."""

    frozen: float
    light: float
    wrong: float  # FOCUS and HARD without those held back
    held: float  # quarantined


def forecast(epochs: Sequence[Mapping[str, Any]], config: GEKOConfig, observed: bool = False) -> dict[str, Any] | None:
    """What selection would save in runs of 2 to `LONGEST` epochs, from the counts of the first ones.

    The rule extrapolates the last two epochs: the share of wrong samples keeps shrinking by the same factor, the same
    share of LIGHT samples freezes in each epoch, and held-back samples stay held back. An epoch trains the wrong
    samples and `1 / light_interval` of LIGHT, and probes an eighth of the left-out ones at a third of the cost. After a
    single epoch everything is assumed to stay as it is, so the forecast savings are usually too low.

    Args:
        epochs: `efficiency["epochs"]`.
        config: the rules by which the samples were sorted.
        observed: the run trained every sample (`observe`). Such a run, and one without selection, is forecast for
            `GEKOConfig.recommended()`: its FREEZE samples count as LIGHT, which they are in `recommended()` up to a
            confidence of 0.999. An observation under another config is forecast for that config.

    Returns:
        None if there is no full epoch, its buckets were not measured, or losses were not finite. Else a dict:
        after_epoch: the number of epochs it is based on; right, wrong, held: shares at their end; wrong_factor,
        freeze_rate: the rule's two rates, None after one epoch; runs: [{"epochs", "saved"}], empty if too little is
        learnt for a forecast; pays_from: the shortest run that saves a tenth of the work, None if above 20; enough: the
        epochs after which fewer than 5 % of all are wrong and not held back, None if above 20; text: the forecast in
        words.
    """
    known = _full(epochs)
    shares = [_shares(epoch) for epoch in known]
    if not shares or None in shares or known[-1].get("nonfinite"):
        return None
    past = [row for row in shares if row is not None]
    planned, observed = config, observed or not config.selection
    if observed and (config == GEKOConfig() or not config.selection):
        planned = GEKOConfig.recommended()
        past = [Shares(0.0, row.frozen + row.light, row.wrong, row.held) for row in past]
    factor, rate = _rates(past) if len(past) > 1 else (None, None)
    future = _extrapolated(past, factor, rate)
    begun = 1 - past[-1].wrong - past[-1].held >= _BEGUN
    spent = [] if observed else [epoch["samples"] + epoch["probes"] / 3 for epoch in known]
    total = sum(known[-1]["buckets"].values())
    saved = {length: _saved(future, length, planned, [n / total for n in spent]) for length in range(2, LONGEST + 1)}
    values: dict[str, Any] = {
        "after_epoch": len(past),
        "right": past[-1].frozen + past[-1].light,
        "wrong": past[-1].wrong,
        "held": past[-1].held,
        "wrong_factor": factor,
        "freeze_rate": rate,
        "runs": [{"epochs": length, "saved": share} for length, share in saved.items()] if begun else [],
        "pays_from": next((length for length, share in saved.items() if begun and share >= _PAYS), None),
        "enough": next((e for e, row in enumerate(future, 1) if begun and row.wrong < _ENOUGH), None),
    }
    return {**values, "text": _text(values, past, config, planned, observed)}


def _full(epochs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """`epochs` without a last one that was cut short, which says nothing about a whole one."""
    ends = [0.0, *(epoch.get("end", epoch["epoch"] + 1) for epoch in epochs)]
    lengths = [end - begin for begin, end in zip(ends[:-1], ends[1:], strict=True)]
    cut = bool(lengths) and lengths[-1] < 0.99 and all(length > 0.99 for length in lengths[:-1])
    return list(epochs[: len(epochs) - cut])


def _shares(epoch: Mapping[str, Any]) -> Shares | None:
    buckets = epoch["buckets"]
    if None in buckets.values() or not sum(buckets.values()):
        return None
    total = sum(buckets.values())
    wrong = buckets["FOCUS"] + buckets["HARD"]
    held = min(epoch["quarantined"], wrong)
    return Shares(buckets["FREEZE"] / total, buckets["LIGHT"] / total, (wrong - held) / total, held / total)


def _rates(past: list[Shares]) -> tuple[float, float]:
    """The factor by which the wrong share shrinks in an epoch, and the share of LIGHT that freezes; both in [0, 1]."""
    before, now = past[-2:]
    factor = min(now.wrong / before.wrong, 1.0) if before.wrong else 1.0
    rate = min(max(now.frozen - before.frozen, 0.0) / before.light, 1.0) if before.light else 0.0
    return factor, rate


def _extrapolated(past: list[Shares], factor: float | None, rate: float | None) -> list[Shares]:
    """`past` and forecasts of the epochs after it, `LONGEST` in all."""
    rows = list(past)
    while len(rows) < LONGEST:
        frozen, light, wrong, held = rows[-1]
        if factor is not None and rate is not None:
            wrong, frozen = wrong * factor, frozen + rate * light
        rows.append(Shares(frozen, max(1 - frozen - wrong - held, 0.0), wrong, held))
    return rows


def _saved(rows: list[Shares], length: int, config: GEKOConfig, spent: list[float]) -> float:
    """Share of a uniform run's work that a run of `length` epochs saves; `spent` is the work of the past epochs."""
    work = 0.0
    for epoch in range(length):
        if epoch < len(spent):
            work += spent[epoch]
        else:
            work += _work(rows[epoch - 1], epoch, length, config) if epoch else 1.0
    return round(1 - work / length, 9)


def _work(row: Shares, epoch: int, length: int, config: GEKOConfig) -> float:
    """The work of an epoch that begins with `row`, in epochs of uniform training."""
    light = (
        MountainCurriculum().weights((epoch + 0.5) / length)[2] if config.use_curriculum else config.bucket_weights[2]
    )
    turns = 1 / config.light_interval if light > 0 else 0.0
    frozen = 1.0 if config.freeze_weight > 0 else 0.0
    chosen = row.wrong + turns * row.light + frozen * row.frozen
    finish = min(max(epoch + 1 - (1 - config.uniform_finish) * length, 0.0), 1.0)  # the part that trains all samples
    waits = row.held + (1 - frozen) * row.frozen + (0.0 if light > 0 else row.light)
    probes = waits / STAGGER / 3 if config.probes else 0.0
    return (1 - finish) * chosen + finish * (1 - row.held) + probes


def rule_of_right(config: GEKOConfig) -> str:
    """What makes a sample FREEZE or LIGHT, in words."""
    if config.correctness == "accuracy":
        return f"accuracy of at least {config.correct_accuracy:g}"
    return f"loss below {config.correct_loss:g}"


def _text(
    values: Mapping[str, Any], past: list[Shares], config: GEKOConfig, planned: GEKOConfig, observed: bool
) -> str:
    after, pays, enough = values["after_epoch"], values["pays_from"], values["enough"]
    told = f"After epoch {after}, {values['right']:.0%} of the samples are right ({rule_of_right(config)})"
    if after > 1:
        told += f", after epoch {after - 1} {past[-2].frozen + past[-2].light:.0%}"
    if values["held"]:
        told += f"; {values['held']:.0%} are held back as probably mislabelled"
    if not values["runs"]:
        return f"{told}. That is too few for a forecast of longer runs: look again when a tenth is right."
    saved = {run["epochs"]: run["saved"] for run in values["runs"]}
    long, short = 10 if after < 10 else LONGEST, next((length for length in (2, 3) if length > after), 5)
    rough = values["wrong_factor"] is None
    rules = "GEKOConfig.recommended()" if planned == GEKOConfig.recommended() else "these settings"
    sentences = [
        f"{told}.",
        f"{'If that does not change' if rough else 'At this rate'}, a run of {long} epochs with {rules} would do "
        f"{_percent(saved[long])} less work than uniform training, one of {short} epochs {_percent(saved[short])}.",
    ]
    if planned.spend_saved:
        sentences.append("spend_saved uses that work for more training.")
    if pays is None and rough:
        sentences.append("That is not worth it.")
    elif pays is None:
        sentences.append(f"Up to {LONGEST} epochs that is less than {_PAYS:.0%}: use uniform training.")
    else:
        fewer = "one epoch" if pays == 2 else f"fewer than {pays} epochs"
        sentences.append(f"Use uniform training if you plan {fewer}.")
    if rough:
        sentences.append("Usually more is saved; after a second epoch the forecast is better.")
    elif enough is not None and 1 < enough <= _SHORT and values["held"] < _ENOUGH:
        verb, span = "were" if enough <= after else "would be", f"{enough} epochs"
        sentences.append(
            f"Fewer than {_ENOUGH:.0%} {verb} wrong after epoch {enough}: uniform training of {span} may be as good."
        )
    if observed:
        sentences.append("Samples that GEKO would hold back as probably mislabelled are not counted; they save more.")
    return " ".join(sentences)


def _percent(share: float) -> str:
    return f"{max(share, 0.0):.0%}"
