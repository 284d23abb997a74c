"""`python -m geko_kernels clean RUN_DIR --out FILE`: the data of a run without the rows whose labels are suspected."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from geko_kernels._files import write_whole
from geko_kernels.cli.errors import UsageError
from geko_kernels.training.formats.labels import listed, typed_alike
from geko_kernels.training.formats.records import Records
from geko_kernels.training.formats.sources import Source, digest_of, read_source
from geko_kernels.training.report.efficiency import write_json
from geko_kernels.training.report.samples import SAMPLES_NAME, read_samples

DATA_NAME = "geko_data.json"
_VERSION = 1
_Rows = list[dict[str, Any]]


def note_data(run_dir: str, records: Records, label_column: str) -> None:
    """Record in a run's folder which data it was trained on."""
    local = os.path.abspath(os.path.expanduser(records.source))
    data = local if os.path.exists(local) else records.source
    label = (label_column or "label") if records.is_classification else ""
    known = {"data": data, "label": label, "digest": records.digest}
    write_json(Path(run_dir) / DATA_NAME, {"version": _VERSION, **known})


def clean(run_dir: str, out: str, overwrite: bool) -> str:
    """Write the data of `run_dir` without the suspected rows to `out`; returns the lines to print.

    Raises:
        UsageError, DataError: something is missing in the run, or `out` cannot be written; then nothing is written.
    """
    known = _known_data(run_dir)
    _check_out(out, overwrite, known["data"])
    suspected = _suspected(run_dir)
    source = read_source(known["data"])
    if digest_of(source) != known["digest"]:
        raise UsageError(
            f"{known['data']} has changed since {run_dir} was trained on it, so its rows are others now: restore the "
            "data that it was trained on, or train on the new data"
        )
    if max(suspected, default=0) >= len(source.rows):
        raise UsageError(
            f"{Path(run_dir) / SAMPLES_NAME} is of another run: it suspects row {max(suspected):,}, but "
            f"{known['data']} has {len(source.rows):,} rows, counted from 0; train again"
        )
    rows = [row for number, (_, row) in enumerate(source.rows) if number not in suspected]
    if not rows:
        raise UsageError(f"all {len(source.rows):,} rows of {known['data']} are suspected, so nothing would be left")
    write = _writer(out, source, rows, known["label"])
    try:
        write(Path(out))
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written ({error.strerror}); give another file") from error
    samples = Path(run_dir) / SAMPLES_NAME
    those = (
        f': those with "suspected": true in {samples}'
        if suspected
        else f", since no label is suspected; {samples} ranks all labels by label_error, and a run with a smaller "
        "noise_guard_margin suspects more"
    )
    told = f"{out}: {len(rows):,} of {len(source.rows):,} rows of {known['data']}; {len(suspected):,} left out{those}"
    return told + _lost_classes(source, suspected, known["label"], samples)


def _lost_classes(source: Source, suspected: set[int], label: str, samples: Path) -> str:
    """A line that names the classes of which every row is left out; empty if there are none."""
    if not label or label not in source.rows[0][1]:
        return ""
    labels = [row[label] for _, row in source.rows]
    labels = typed_alike(labels) if source.is_table else labels
    left = {name for number, name in enumerate(labels) if number not in suspected}
    lost = {name: count for name, count in Counter(labels).items() if name not in left}
    if not lost:
        return ""
    names = listed([f"{name!r} ({count:,})" for name, count in lost.items()])
    return (
        f"\nWarning: no row is left of {'the class' if len(lost) == 1 else f'{len(lost):,} classes'} {names}, so a "
        f"model trained on these data cannot learn {'it' if len(lost) == 1 else 'them'}. Look at the rows; in "
        f'{samples} set "suspected" and "quarantined" to false for those that are right, and give the command again '
        "with --overwrite"
    )


def _known_data(run_dir: str) -> dict[str, str]:
    path = Path(run_dir) / DATA_NAME
    if not path.is_file():
        raise UsageError(
            f"{run_dir} has no {DATA_NAME}: give the --output-dir of a `geko train` run that has ended; after your own "
            'script, remove from its data the rows that write_samples marks as "suspected"'
        )
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["version"] != _VERSION:
            raise UsageError(f"{path} has version {known['version']}, this geko_kernels reads {_VERSION}; update it")
        return {name: str(known[name]) for name in ("data", "label", "digest")}
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is damaged ({error!r}): train again") from error


def _check_out(out: str, overwrite: bool, data: str) -> None:
    path = Path(out)
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise UsageError(f"--out must end in .jsonl or .csv, got {out}")
    target, own = path.resolve(), Path(data).resolve()
    if target == own or own in target.parents:
        raise UsageError(f"--out {out} would change the data that the run was trained on; give another file")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"--out {out} must be a file in a directory that exists")
    if os.path.lexists(path) and not overwrite:
        raise UsageError(f"--out {out} exists; give another name, or --overwrite to replace it")


def _suspected(run_dir: str) -> set[int]:
    try:
        samples = read_samples(run_dir)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if samples is None:
        raise UsageError(
            f"{run_dir} has no {SAMPLES_NAME}, which a run of up to 200,000 samples writes at its end: train to the "
            "end, or write it with GEKOTrainer.write_samples"
        )
    if all(sample.get("suspected") is None and not sample.get("quarantined") for sample in samples):
        raise UsageError(
            f"the noise guard of {run_dir} judged no labels: it was off, the run had one epoch, or its model did not "
            f"generalise; {SAMPLES_NAME} still ranks all labels, by label_error"
        )
    return {sample["id"] for sample in samples if sample.get("suspected") or sample.get("quarantined")}


def _writer(out: str, source: Source, rows: _Rows, label: str) -> Callable[[Path], None]:
    """The function that writes `rows` so that reading gives the same rows; refuses an ending for which it would not."""
    table = out.lower().endswith(".csv")
    if source.is_table and not table:
        raise UsageError(f"--out must end in .csv, got {out}: the data are a table, whose fields are all text")
    if table and not source.is_table:
        _check_fields(rows, label)
    text = _csv if table else _jsonl
    return lambda path: write_whole(path, lambda temporary: text(temporary, rows))


def _check_fields(rows: _Rows, label: str) -> None:
    for row in rows:
        for name, value in row.items():
            number = name == label and isinstance(value, str) and value.lstrip("+-").isdecimal()
            if number or not isinstance(value, (str, int)):
                kind = "a number written as text" if number else type(value).__name__
                raise UsageError(f"--out must end in .jsonl: a .csv file cannot hold `{name}`, which is {kind}")
        if row.keys() != rows[0].keys():
            raise UsageError("--out must end in .jsonl: the rows have different columns, which a .csv file cannot hold")


def _csv(path: Path, rows: _Rows) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            plain = {name: str(v).lower() if isinstance(v, bool) else v for name, v in row.items()}
            writer.writerow(plain)


def _jsonl(path: Path, rows: _Rows) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            try:
                line = json.dumps(row, ensure_ascii=False)
                line.encode("utf-8")
            except UnicodeEncodeError:  # half a character in a column that is not trained
                line = json.dumps(row)
            except TypeError as error:
                raise UsageError(f"a .jsonl file cannot hold these data: {error}") from error
            file.write(line + "\n")
