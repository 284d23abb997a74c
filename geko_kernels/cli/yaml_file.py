"""Reading a YAML file of options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from geko_kernels.cli.errors import UsageError


class _Loader(yaml.SafeLoader):
    """Reads 2e-5 as a number: YAML 1.1 asks for 2.0e-5 and takes the rest as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str) -> dict[str, Any]:
    """`yaml.safe_load` of the file, which must hold a mapping; raises `UsageError` otherwise."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UsageError(
            f"--config {path}: cannot read the file ({error.strerror}); give the path of a YAML file"
        ) from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must hold `option: value` lines, for example `epochs: 3`")
    return values
