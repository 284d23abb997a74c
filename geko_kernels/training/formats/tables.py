"""Reading CSV and TSV: a row of column names, then one record a row; every field is text.

`datasets` is not used, because it reads them with pandas, which drops surplus fields of a row, reads "NA" and "None" as
missing values, and turns "007" into 7.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from geko_kernels.training.formats.errors import DataError
from geko_kernels.training.formats.files import read_content


def table_rows(path: str, delimiter: str) -> list[tuple[str, dict[str, str]]]:
    """("line N", fields by column), N being the line on which the row ends; blank lines are skipped.

    Raises:
        DataError: not UTF-8, a missing or duplicate column name, an unclosed quote, or a row of another length.
    """
    try:
        text = read_content(path, "a .csv or .tsv file").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert the file first") from error
    rows = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    with _any_length():
        try:
            names = next(reader, [])
            if len(set(names)) < len(names) or not all(names):
                raise DataError(f"{path}, line 1: every column needs a different name, got {names}")
            for row in filter(None, reader):
                if len(row) != len(names):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(row)} fields, but line 1 names {len(names)} columns; "
                        "put fields that contain the separator in double quotes"
                    )
                rows.append((f"line {reader.line_num}", dict(zip(names, row, strict=True))))
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}; write the row again") from error
    return rows


@contextmanager
def _any_length() -> Iterator[None]:
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
