"""How the run treated each label: what share of its samples it left out, and how often it visited one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from geko_kernels.config import Bucket, GEKOConfig
from geko_kernels.state import SampleState
from geko_kernels.training.data import IGNORED, LABEL_KEYS
from geko_kernels.training.formats.encode import EncodedDataset
from geko_kernels.training.formats.excerpts import whole_text
from geko_kernels.training.report.samples import is_hf
from geko_kernels.training.stopping.items import TRAINED, label_key, parts_of

logger = logging.getLogger(__name__)

MOST_ANSWERS = 50  # distinct answers of a language model that count as labels
MOST_LISTED = 20
FEWEST = 20  # samples of a label that is warned of
TIMES, LEAST = 2.0, 0.5  # times the share of all, and share, above which it is; measured in docs/data.md
_NAMED = 5  # labels that the warning names
_CHARACTERS = 60  # of a label
_CHUNK = 1 << 16  # samples
_SHARES = ("left_out", "quarantined", "held_back", "right", "visits")
Decode = Callable[..., str]
Figures = dict[str, Any]


class _NoLabelsError(Exception):
    """The samples have no labels that can be counted."""


def label_figures(
    dataset: Any,
    state: SampleState,
    held_back: Tensor | None = None,
    observed: Tensor | None = None,
    label_names: Sequence[str] = (),
    decode: Decode | None = None,
) -> dict[str, Any]:
    """`{"labels": ...}` for `geko_report.json`, as `efficiency.py` says; logs its warning.

    Args:
        dataset: item i is sample i. It is read where its items are at hand: a list, a `TensorDataset` of inputs and
            labels, a `datasets.Dataset` or of `load_dataset`.
        state: the learning state at the run's end.
        held_back: (N,) bool, samples that `auto_stop` keeps for itself; None for none.
        observed: (N,) visits of each sample in a run that was only observed, which leaves none out; else None.
        label_names: keys of the items' labels that come before those of Transformers' default collator.
        decode: makes text of the tokens of an answer.
    """
    items = _items(dataset, label_names) if len(dataset) == len(state) else None
    if items is None:
        return {"labels": None}
    barred = state.quarantined if held_back is None else state.quarantined | held_back
    columns = {
        "left_out": torch.zeros_like(barred) if observed is not None else _left_out(state) & ~barred,
        "quarantined": state.quarantined,
        "held_back": torch.zeros_like(state.quarantined) if held_back is None else held_back,
        "right": (state.bucket <= Bucket.LIGHT) & (state.times_seen > 0),
        "visits": state.times_seen if observed is None else observed,
    }
    try:
        labels, sums = _sums(items, label_names, [columns[name].cpu().numpy() for name in _SHARES])
    except _NoLabelsError:
        return {"labels": None}
    if len(labels) < 2:
        return {"labels": None}
    names = [_name(label, dataset, decode) for label in labels]
    rows = [{"label": name, **_shares(counts)} for name, counts in zip(names, sums.T, strict=True)]
    rows.sort(key=lambda row: (-_lost(row), row["samples"], row["label"]))
    all_samples = _shares(sums.sum(1))
    if not bool(state.times_seen.any()):  # `observe` of a model without logits
        for row in (*rows, all_samples):
            row["right"] = None
    warning = _warning(rows, all_samples, state.config)
    if warning is not None:
        logger.warning(warning)
    figures = {"num_labels": len(rows), "all": all_samples, "listed": rows[:MOST_LISTED], "warning": warning}
    return {"labels": figures}


def _left_out(state: SampleState) -> Tensor:
    """(N,) bool: in a bucket that epochs leave out, whatever the phase of a curriculum."""
    config = state.config
    hard, focus, light = (1, 1, 1) if config.use_curriculum else config.bucket_weights
    weights = {Bucket.FREEZE: config.freeze_weight, Bucket.LIGHT: light, Bucket.FOCUS: focus, Bucket.HARD: hard}
    found = torch.zeros_like(state.quarantined)
    for bucket, weight in weights.items():
        if config.selection and weight == 0:
            found |= state.bucket == bucket
    return found & (state.times_seen > 0)


def _items(dataset: Any, label_names: Sequence[str]) -> Iterable[Any] | None:
    """The items, or what matters of them; None where they are not at hand."""
    if is_hf(dataset) and dataset.format.get("type") != "custom":
        plain = dataset.with_format(None)
        name = next((name for name in (*label_names, *LABEL_KEYS) if name in plain.column_names), None)
        wanted = {name}
        if name is None or (len(plain) and isinstance(plain[0][name], list)):
            wanted |= {"input_ids", "attention_mask", *TRAINED}
        kept = [column for column in plain.column_names if column in wanted]
        return _rows(plain.select_columns(kept)) if kept else None
    if isinstance(dataset, TensorDataset):
        return zip(*dataset.tensors, strict=True)
    if isinstance(dataset, (list, tuple, EncodedDataset)):
        return (dataset[i] for i in range(len(dataset)))
    return None


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a `datasets.Dataset`, read many at a time."""
    for part in table.iter(batch_size=1000):
        for values in zip(*part.values(), strict=True):
            yield dict(zip(part, values, strict=True))


def _sums(
    items: Iterable[Any], label_names: Sequence[str], columns: Sequence[np.ndarray]
) -> tuple[list[Hashable], np.ndarray]:
    """The labels, and of each its samples and the sums of the columns over them, (1 + columns, labels)."""
    codes: dict[Hashable, int] = {None: 0}  # samples without a label
    found, begin = _codes(items, label_names, codes), 0
    sums = np.zeros((1 + len(columns), 1))
    while len(at := np.fromiter(islice(found, _CHUNK), np.int64)):
        new = [np.bincount(at, minlength=len(codes))]
        new += [np.bincount(at, column[begin : begin + len(at)], len(codes)) for column in columns]
        sums = np.pad(sums, ((0, 0), (0, len(codes) - sums.shape[1]))) + np.stack(new)
        begin += len(at)
    if any(isinstance(label, tuple) for label in codes) and 2 * len(codes) > begin:
        raise _NoLabelsError  # as good as every sample has an answer of its own
    return list(codes)[1:], sums[:, 1:]


def _codes(items: Iterable[Any], label_names: Sequence[str], codes: dict[Hashable, int]) -> Iterator[int]:
    for item in items:
        label = _label_of(item, label_names)
        if isinstance(label, tuple) and label not in codes and len(codes) > MOST_ANSWERS:
            raise _NoLabelsError
        yield codes.setdefault(label, len(codes))


def _label_of(item: Any, label_names: Sequence[str]) -> Hashable:
    """A class as int, bool or str, an answer as a tuple of its tokens, None for no label."""
    if isinstance(item, Mapping):
        name = label_key(item, label_names)
        label = None if name is None else item[name]
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        label = item[1]
    else:
        raise _NoLabelsError
    if isinstance(label, (Tensor, np.ndarray, np.generic)) and label.ndim == 0:
        label = label.item()
    if isinstance(label, (int, str)):
        return None if label == IGNORED else label
    parts = parts_of(item, label_names)
    if parts is None or parts.kind == "aligned" or isinstance(label, float):
        raise _NoLabelsError
    return tuple(parts.answer) or None


def _name(label: Hashable, dataset: Any, decode: Decode | None) -> str:
    if isinstance(label, tuple):
        text = decode(list(label), skip_special_tokens=True).strip() if decode is not None else ""
        text = text or "tokens " + " ".join(map(str, label))
    elif isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(_class_names(dataset)):
        text = _class_names(dataset)[label]
    else:
        text = str(label)
    return whole_text(text[:_CHARACTERS] + "…" if len(text) > _CHARACTERS else text)


def _class_names(dataset: Any) -> Sequence[str]:
    own = getattr(dataset, "class_names", None)  # of `load_dataset`, or a user's
    if isinstance(own, (list, tuple)) and all(isinstance(name, str) for name in own):
        return own
    columns = dataset.features if is_hf(dataset) else {}
    return next((names for key in LABEL_KEYS if (names := getattr(columns.get(key), "names", None))), ())


def _shares(counts: np.ndarray) -> Figures:
    """Of (samples, sums): how many, and the means."""
    samples, *sums = counts.tolist()
    return {"samples": round(samples), **{name: value / samples for name, value in zip(_SHARES, sums, strict=True)}}


def _lost(row: Mapping[str, Any]) -> float:
    """Share that is not trained though it has not been learnt."""
    return row["quarantined"] + row["held_back"]


def _warning(rows: Sequence[Figures], all_samples: Figures, config: GEKOConfig) -> str | None:
    least = max(LEAST, TIMES * _lost(all_samples))
    lost = [row for row in rows if row["samples"] >= FEWEST and _lost(row) > least]
    if not lost:
        return None
    named = [f"'{row['label']}' ({_lost(row):.0%} of {row['samples']:,})" for row in lost[:_NAMED]]
    more = f" and {len(lost) - _NAMED:,} more" if len(lost) > _NAMED else ""
    own, usual = config.noise_guard_min_share, GEKOConfig.noise_guard_min_share
    advice = (
        "If they are right, train with noise_guard=False or with a larger noise_guard_min_share (here "
        f"{own:g}{'' if own == usual else f', by default {usual:g}'})."
    )
    if sum((row["held_back"] - row["quarantined"]) * row["samples"] for row in lost) > 0:
        advice = "auto_stop holds whole `groups` back: give it smaller ones, or train with auto_stop=False."
    return (
        f"Most samples of {len(lost):,} label{'' if len(lost) == 1 else 's'} were quarantined or held back, so that "
        f"the model may not learn {'it' if len(lost) == 1 else 'them'}: {', '.join(named)}{more}; of all samples "
        f"{_lost(all_samples):.0%}. {advice}"
    )
