"""`samples.jsonl`: a row for each sample of a run, with the results of its visits."""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from geko_kernels._files import write_whole
from geko_kernels.config import Bucket
from geko_kernels.state import SampleState
from geko_kernels.training.formats.encode import EncodedDataset
from geko_kernels.training.formats.excerpts import TOLD, excerpts_of_columns
from geko_kernels.training.planning.guard import suspects
from geko_kernels.training.planning.sampler import GEKOSampler
from geko_kernels.training.report.label_errors import label_error_scores
from geko_kernels.training.report.summary import row_of
from geko_kernels.training.report.visits import Visits

SAMPLES_NAME = "samples.jsonl"
MOST_SAMPLES = 200_000  # the most samples for which a run's end writes the file
_DIGITS = 6

Row = dict[str, Any]


def sample_rows(state: SampleState, sampler: GEKOSampler, visits: Visits, dataset: Any) -> Iterator[Row]:
    """The rows that `GEKOTrainer.write_samples` documents, in order of the samples."""
    judged = sampler.guarded
    suspected = suspects(state).cpu().numpy() if judged else np.zeros(len(state), bool)
    scores = label_error_scores(visits.sample, visits.label_probability, suspected)
    ends = np.searchsorted(visits.sample, np.arange(len(state) + 1))
    lists = {
        "epochs": visits.epoch.tolist(),
        "losses": rounded(visits.loss),
        "label_probabilities": rounded(visits.label_probability),
        "hits": rounded(visits.hit),
    }
    columns: dict[str, list[Any]] = {
        "bucket": [Bucket(bucket).name for bucket in state.bucket.tolist()],
        "times_seen": state.times_seen.tolist(),
        "times_forgotten": sampler.forgotten.tolist(),
        "quarantined": state.quarantined.tolist(),
        "suspected": suspected.tolist() if judged else [None] * len(state),
        "label_error": [None if math.isnan(score) else score for score in rounded(scores)],
    }
    skipped = getattr(dataset, "skipped_rows", ())
    groups = duplicate_groups(dataset, len(state))
    told = told_of(dataset)
    for i in range(len(state)):
        row: Row = {"id": row_of(i, skipped), **(told[i] if told else {})}
        row |= {name: values[ends[i] : ends[i + 1]] for name, values in lists.items()}
        row |= {name: values[i] for name, values in columns.items()}
        group = groups[i]
        yield row | {"duplicate_group": None if group is None else row_of(group, skipped)}


def told_of(dataset: Any) -> list[Row]:
    """`record_id` and `text` of each item, as far as the dataset has them; empty if it makes its items when read."""
    if isinstance(dataset, EncodedDataset):
        return dataset.excerpts
    if is_hf(dataset):
        plain = dataset.with_format(None)
        return excerpts_of_columns({name: plain[name] for name in TOLD if name in dataset.column_names})
    if isinstance(dataset, (list, tuple)) and all(isinstance(item, Mapping) for item in dataset):
        names = [name for name in TOLD if any(name in item for item in dataset[:1])]
        return excerpts_of_columns({name: [item.get(name) for item in dataset] for name in names})
    return []


def rounded(values: np.ndarray) -> list[Any]:
    """`values` rounded to six decimals, as Python numbers."""
    return np.round(values.astype(np.float64), _DIGITS).tolist()


def duplicate_groups(dataset: Any, num_samples: int) -> list[Any]:
    """For each item the first one with the same `input_ids`; None if no other item has them.

    All None for a dataset that makes its items when they are read.
    """
    first: dict[bytes, int] = {}
    groups: list[int | None] = [None] * num_samples
    for i, tokens in enumerate(_token_lists(dataset)):
        key = hashlib.blake2b(np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=16).digest()
        group = first.setdefault(key, i)
        if group != i:
            groups[group] = groups[i] = group
    return groups


def is_hf(dataset: Any) -> bool:
    """Is it a datasets.Dataset?"""
    return isinstance(getattr(dataset, "column_names", None), list) and isinstance(
        getattr(dataset, "format", None), dict
    )


def _token_lists(dataset: Any) -> Iterable[Any]:
    if is_hf(dataset) and dataset.format.get("type") != "custom":
        return dataset.with_format(None)["input_ids"] if "input_ids" in dataset.column_names else ()
    if not isinstance(dataset, (list, tuple, EncodedDataset)):
        return ()
    items = (dataset[i] for i in range(len(dataset)))
    if not all(isinstance(item, Mapping) and item.get("input_ids") is not None for item in items):
        return ()
    return (dataset[i]["input_ids"] for i in range(len(dataset)))


def write_rows(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Write rows of the same names as `.jsonl`, `.csv` or `.parquet`, whole or not at all.

    In a CSV file lists and booleans are written as JSON, and null as an empty field.

    Raises:
        ValueError: `path` ends in something else.
        FileNotFoundError: its directory is missing.
        ImportError: pandas or pyarrow is missing, for `.parquet`; says what to install.
    """
    path = Path(path)
    writer = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}.get(path.suffix.lower())
    if writer is None:
        raise ValueError(f"path must end in .jsonl, .csv or .parquet, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no directory {path.parent}")
    if writer is _write_parquet:
        _check_parquet()
    write_whole(path, lambda temporary: writer(temporary, rows))


def _write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def _write_csv(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer: Any = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
            writer.writerow({name: _field(value) for name, value in row.items()})


def _field(value: Any) -> Any:
    return json.dumps(value, allow_nan=False) if isinstance(value, (list, bool)) else value


def _check_parquet() -> None:
    try:
        for name in ("pandas", "pyarrow"):
            importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"a .parquet file needs {error.name}: pip install pandas pyarrow; or write a .jsonl or .csv file"
        ) from error


def _write_parquet(path: Path, rows: Iterable[Row]) -> None:
    pandas: Any = importlib.import_module("pandas")
    pandas.DataFrame(list(rows)).to_parquet(path, engine="pyarrow", index=False)


def read_samples(run_dir: str | os.PathLike[str]) -> list[Row] | None:
    """The rows of `samples.jsonl` in a run's folder; None where there is no such file.

    Raises:
        ValueError: the file is damaged; names the line.
    """
    path = Path(run_dir) / SAMPLES_NAME
    if not path.is_file():
        return None
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: line {number} is not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("id"), int):
            raise ValueError(f"{path} is damaged: line {number} is no sample")
        for name in ("suspected", "quarantined"):  # which users edit
            if not isinstance(row.get(name), bool | None):
                raise ValueError(f"{path}, line {number}: {name} must be true, false or null, got {row[name]!r}")
        rows.append(row)
    return rows
