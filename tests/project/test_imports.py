"""docs/architecture.md says in which order the parts of the package stand on each other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "geko_kernels"
BACK = {("training/report/facts.py", "__init__.py")}  # the release's number


def part_of(path: Path) -> str:
    """A folder of the package with a slash, or a file of its top level."""
    first, *rest = path.relative_to(PACKAGE).parts
    return f"{first}/" if rest else first


def imports_of(path: Path) -> set[str]:
    """The parts of the package that a file imports when it runs, wherever it does so."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {id(node) for each in typing for node in ast.walk(each)}
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    own = [name.split(".")[1:] for name in names if name.split(".")[0] == "geko_kernels"]
    return {named(parts) for parts in own if parts != ["_C"]}  # the compiled library is no file of the tree


def named(parts: list[str]) -> str:
    """The part that holds the module `parts`, or the module whose name `parts[-1]` is."""
    for module in (parts, parts[:-1]):
        path = PACKAGE.joinpath(*module)
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return part_of(file)
    raise AssertionError(f"no module of {parts}")


def test_a_part_imports_only_what_stands_below_it():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## What imports what")[1]
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", text.split("\n## ")[0], re.MULTILINE)
    floor = {part: int(number) for number, parts in rows for part in re.findall(r"`geko_kernels/([\w/.]+)`", parts)}
    files = [path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts]
    assert {part_of(path) for path in files} == set(floor)
    up = {
        (str(path.relative_to(PACKAGE)), part)
        for path in files
        for part in imports_of(path) - {part_of(path)}
        if floor[part] >= floor[part_of(path)]
    }
    assert up == BACK
