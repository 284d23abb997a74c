"""Reading the user's files."""

from __future__ import annotations

import stat
from pathlib import Path

from geko_kernels.cli.errors import UsageError


def read_bytes(path: Path, named: str, wanted: str) -> bytes:
    """The bytes of a regular file; UsageError says that `named` cannot be read and to give `wanted`."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{named}: cannot read the file ({reason}); give the path of {wanted}") from error
    kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
    raise UsageError(f"{named}: cannot read the file (it is {kind}); give the path of {wanted}")
