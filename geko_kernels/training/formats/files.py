"""Reading the user's files."""

from __future__ import annotations

import gzip
import stat
import zlib
from pathlib import Path

from geko_kernels.training.formats.errors import DataError


def read_bytes(path: Path, named: str, wanted: str) -> bytes:
    """The bytes of a regular file; else a DataError that names `named` and asks for `wanted`."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{named}: cannot read the file ({reason}); give the path of {wanted}") from error
    kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
    raise DataError(f"{named}: cannot read the file (it is {kind}); give the path of {wanted}")


def read_content(path: str, wanted: str) -> bytes:
    """As `read_bytes`; a file whose name ends in .gz is decompressed."""
    content = read_bytes(Path(path), path, wanted)
    if path.endswith(".gz"):
        try:
            return gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} cannot be unpacked with gzip ({error}); write it again") from error
    if content.startswith(b"\x1f\x8b"):
        raise DataError(f"{path} is compressed with gzip; unpack it with gunzip first, or let its name end in .gz")
    return content
