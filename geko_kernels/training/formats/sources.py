"""The rows of a dataset given by name: a file, a folder, a saved dataset, or a dataset on the hub."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from geko_kernels.training.formats.errors import DataError
from geko_kernels.training.formats.json_lines import json_file, json_lines
from geko_kernels.training.formats.tables import table_rows

Rows = Iterable[tuple[str, dict[str, Any]]]  # where each is ("line 1" or "record 0"), and its fields
_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TRAINING = {"train", "training"}
_HELD_OUT = {"test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev"}


class Source(NamedTuple):
    """The rows of a dataset in order, whether all their fields are text, and notes on the files."""

    rows: list[tuple[str, dict[str, Any]]]
    is_table: bool
    notes: list[str]


def read_source(path: str) -> Source:
    """The rows of the dataset at `path`.

    Raises:
        DataError: there is no such file, or it cannot be read. A path that looks local is never looked up on the hub.
    """
    local = os.path.expanduser(path)
    reader = _reader_of(local)
    if reader and not os.path.isdir(local):
        return Source(list(reader(local)), _is_table(local), [])
    if os.path.isdir(local):
        if reader:
            raise DataError(f"{path}: cannot read the file (it is a directory); rename it without that ending")
        saved = any(os.path.exists(os.path.join(local, name)) for name in ("state.json", "dataset_dict.json"))
        return Source(list(_saved(local)), False, []) if saved else _folder(local)
    if os.path.lexists(local):
        raise DataError(
            f"{path} does not end in {', '.join(_READERS)}; give such a file (unpacked, if it is an archive)"
        )
    _check_hub_name(path)
    return Source(list(_hub(path)), False, [])


def digest_of(source: Source) -> str:
    """A digest of the rows and their order, wherever they were read from."""
    hasher = hashlib.sha256()
    for _, row in source.rows:
        hasher.update(repr(row).encode("utf-8", "surrogatepass") + b"\n")
    return hasher.hexdigest()[:32]


def _parquet(path: str) -> Rows:
    if not os.path.isfile(path):
        raise DataError(
            f"{path}: cannot read the file (it does not exist, or is not a regular file); give the path of a .parquet "
            "file"
        )
    return _numbered(path, _loaded(path, lambda datasets: datasets.Dataset.from_parquet(path, keep_in_memory=True)))


_READERS: dict[str, Callable[[str], Rows]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_file,
    ".csv": lambda path: table_rows(path, ","),
    ".tsv": lambda path: table_rows(path, "\t"),
    ".parquet": _parquet,
}


def _suffix(path: str) -> str:
    """The ending before any .gz; .gz for .parquet.gz, which is not read: Parquet compresses its columns itself."""
    bare = path.removesuffix(".gz")
    suffix = os.path.splitext(bare)[1].lower()
    return suffix if bare == path or suffix != ".parquet" else ".gz"


def _reader_of(path: str) -> Callable[[str], Rows] | None:
    return _READERS.get(_suffix(path))


def _is_table(path: str) -> bool:
    return _suffix(path) in (".csv", ".tsv")


def _folder(path: str) -> Source:
    """The files in and below a folder, in sorted order; if there are several splits, those of the training split."""
    found = []
    for folder, below, names in os.walk(path):
        below[:] = [name for name in below if not name.startswith(".")]
        whole = [os.path.relpath(os.path.join(folder, name), path) for name in names if not name.startswith(".")]
        found += [name for name in whole if _reader_of(name)]
    found.sort()
    words = {name: set(re.split(r"[^a-z]+", name.lower())) for name in found}
    kept = [name for name in found if not words[name] & _HELD_OUT]
    taken = [name for name in kept if words[name] & _TRAINING] or kept
    if not taken:
        why = f"only {_some(found)}, none for training" if found else f"no file that ends in {', '.join(_READERS)}"
        raise DataError(f"the folder {path} holds {why}; give the file that you want")
    kinds = {_is_table(name) for name in taken}
    if len(kinds) > 1:
        raise DataError(
            f"the folder {path} holds tables and other data files ({_some(taken)}); give a folder with one kind of file"
        )
    rows = []
    for name in taken:
        reader = _reader_of(name)
        assert reader is not None
        rows += [(f"{name}, {place}", row) for place, row in reader(os.path.join(path, name))]
    left = [name for name in found if name not in taken]
    notes = [f"{path}: read {_some(taken)}" + (f"; left out, as not for training: {_some(left)}" if left else "")]
    return Source(rows, kinds.pop(), notes)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def _saved(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    return _numbered(path, _loaded(path, lambda datasets: datasets.load_from_disk(path)))


def _check_hub_name(path: str) -> None:
    """Raise for anything that is not a hub name."""
    missing = f"cannot load {path}: there is no such file or folder"
    if not _ON_HUB.fullmatch(path) or os.path.isdir(path.partition("/")[0]):
        raise DataError(
            f"{missing}; a dataset on the hub is written owner/name, and paths are not looked up there. Give a file "
            f"that ends in {', '.join(_READERS)}, a folder of such files, or a directory written by "
            "`Dataset.save_to_disk`"
        )


def _hub(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        return _numbered(name, _loaded(name, lambda datasets: datasets.load_dataset(name)))
    except DataError as error:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
            raise
        raise DataError(
            f"cannot load {name}: there is no such file or folder, and as HF_HUB_OFFLINE is set, only the hub's cache "
            "was searched; unset it or correct the path"
        ) from error


def _loaded(path: str, load: Callable[[Any], Any]) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"reading {path} needs `pip install datasets`") from error
    try:
        return load(datasets)
    except Exception as error:  # of many types, all for data that it cannot read
        cause = error.__cause__ or error
        raise DataError(
            f"cannot load {path} with `datasets` ({type(cause).__name__}: {cause}); give a .jsonl or .parquet file, a "
            "directory written by `Dataset.save_to_disk`, or a hub name"
        ) from error


def _numbered(path: str, data: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(data, dict):
        if "train" not in data:
            raise DataError(f"{path} has the splits {sorted(data)} and no `train`; save the split that you want alone")
        data = data["train"]
    for index, row in enumerate(data):
        yield f"record {index}", row
