"""The single samples that the page shows, read from `samples.jsonl` if the run folder has one."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SAMPLES_NAME = "samples.jsonl"
MOST_LISTED = 100
_MOST_POINTS = 4000  # of the data map
_CHARACTERS = 300  # of a text
_LIKELY = 0.5  # a label error that the noise guard suspects scores above it


@dataclass
class SampleLists:
    """Lists of samples that need a look; each sample is a dict of id, text (or None), loss, bucket, held and score."""

    label_errors: list[dict[str, Any]] = field(default_factory=list)  # most likely first, up to `MOST_LISTED`
    num_label_errors: int = 0
    never_learnt: list[dict[str, Any]] = field(default_factory=list)  # highest loss first, up to `MOST_LISTED`
    num_never_learnt: int = 0
    texts: dict[int, str] = field(default_factory=dict)  # of the ids asked for
    points: list[tuple[float, float, str]] = field(default_factory=list)  # mean p(label), its deviation, bucket


def read_sample_lists(run_dir: Path, run: Mapping[str, Any]) -> SampleLists | None:
    """Read `samples.jsonl` in one pass: a JSON object a line, of which only `id` is required.

    None if there is no such file, or if it has another number of samples, as an earlier run may have left it.

    Raises:
        ValueError: a line is not JSON, or has no integer `id`.
    """
    path = run_dir / SAMPLES_NAME
    if not path.is_file():
        return None
    wanted = {sample["id"] for sample in run["most_forgotten"]} | set(run["quarantined"][:MOST_LISTED])
    lists, count, stride = SampleLists(), 0, max(run["num_samples"] // _MOST_POINTS, 1)
    errors: list[tuple[float, int, dict[str, Any]]] = []
    never: list[tuple[float, int, dict[str, Any]]] = []
    for count, row in enumerate(_rows(path), 1):
        sample = _sample(row)
        if sample["id"] in wanted and sample["text"]:
            lists.texts[sample["id"]] = sample["text"]
        visits = _label_probabilities(row)
        if sample["score"] > _LIKELY:
            lists.num_label_errors += 1
            _keep(errors, sample["score"], count, sample)
        elif len(visits) > 1 and not sample["held"] and _always_wrong(row, run["config"]):
            lists.num_never_learnt += 1
            _keep(never, sample["loss"], count, sample)
        if len(visits) > 1 and count % stride == 0:
            mean = sum(visits) / len(visits)
            spread = math.sqrt(sum((p - mean) ** 2 for p in visits) / len(visits))
            lists.points.append((mean, spread, sample["bucket"]))
    if count != run["num_samples"]:
        return None
    lists.label_errors = [sample for *_, sample in sorted(errors, reverse=True, key=lambda entry: entry[:2])]
    lists.never_learnt = [sample for *_, sample in sorted(never, reverse=True, key=lambda entry: entry[:2])]
    return lists


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} is damaged: line {number} is not JSON ({error})") from error
            if not isinstance(row, dict) or type(row.get("id")) is not int:
                raise ValueError(f"{path} is damaged: line {number} has no integer id")
            yield row


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    text, losses, score = row.get("text"), _numbers(row.get("losses")), _numbers([row.get("label_error")])
    if isinstance(text, str):
        cut = text[:_CHARACTERS] + "…" if len(text) > _CHARACTERS else text
        text = cut.encode("utf-8", "replace").decode("utf-8")  # JSON may hold half a surrogate pair
    return {
        "id": row["id"],
        "text": text if isinstance(text, str) else None,
        "loss": losses[-1] if losses else None,
        "bucket": row["bucket"] if isinstance(row.get("bucket"), str) else "",
        "held": row.get("quarantined") is True,
        "score": score[0] if score else 0.0,
    }


def _numbers(values: Any) -> list[float]:
    """The values of visits that took place; the list has null for one that did not."""
    numbers = [x for x in values if type(x) in (int, float)] if isinstance(values, list) else []
    return [x for x in numbers if math.isfinite(x)]


def _label_probabilities(row: Mapping[str, Any]) -> list[float]:
    given = _numbers(row.get("label_probabilities"))
    return given or [math.exp(-max(loss, 0.0)) for loss in _numbers(row.get("losses"))]


def _always_wrong(row: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether no visit was correct, by the run's own rule."""
    if config.get("correctness") == "accuracy":
        hits = _numbers(row.get("hits"))
        return bool(hits) and max(hits) < config.get("correct_accuracy", 1.0)
    losses = _numbers(row.get("losses"))
    return bool(losses) and min(losses) >= config.get("correct_loss", 0.5)


def _keep(heap: list[tuple[float, int, dict[str, Any]]], key: float | None, count: int, sample: dict[str, Any]) -> None:
    """Keep the `MOST_LISTED` samples with the largest keys; among equal keys, the earlier ones."""
    entry = (key or 0.0, -count, sample)
    if len(heap) < MOST_LISTED:
        heapq.heappush(heap, entry)
    else:
        heapq.heappushpop(heap, entry)
