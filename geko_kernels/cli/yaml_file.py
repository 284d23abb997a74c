"""Reading a YAML file of options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from geko_kernels.cli.errors import UsageError
from geko_kernels.training.formats.files import read_bytes


class _Loader(yaml.SafeLoader):
    """Reads 2e-5 as a number; in YAML 1.1 that is text, and only 2.0e-5 a number.

    Refuses duplicate keys, of which PyYAML would keep the last, and references, which can turn a few lines into
    gigabytes.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"the reference *{event.anchor} is not allowed: write the value out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    message = f"the key {key.value!r} is there twice"
                    raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str) -> dict[str, Any]:
    """`yaml.safe_load` of the file, which must hold a mapping; raises UsageError or DataError otherwise."""
    content = read_bytes(Path(path), f"--config {path}", "a YAML file")
    try:
        values = yaml.load(content.decode("utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path} is not UTF-8 text (byte {error.start}); convert it first") from error
    except RecursionError as error:
        raise UsageError(f"--config {path} nests too deeply; it must hold `option: value` lines") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date, a number with too many digits
        raise UsageError(f"--config {path} is not valid YAML: {_reason(error)}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must hold `option: value` lines, for example `epochs: 3`")
    return values


def _reason(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error).partition(";")[0]
    return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"  # type: ignore[attr-defined]
