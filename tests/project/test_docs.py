"""The documents name what there is: environment variables that are read, and files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from geko_kernels.cli import environment

ROOT = Path(__file__).parents[2]
VARIABLES = ROOT / "docs" / "environment.md"
READS = re.compile(r"(?:environ(?:\.get|\.setdefault|\.pop)?|getenv)\s*[\[(]\s*[\"'](GEKO_\w+)")
FILE = re.compile(r"`([\w./*-]+\.(?:py|cpp|cu|h|j2|md|toml|txt)|Makefile)`")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/environment.md")


def sources() -> dict[str, str]:
    paths = [ROOT / "setup.py"]
    for folder, endings in (("geko_kernels", "py"), ("csrc", "cpp h cu"), ("examples", "py"), ("benchmarks", "py")):
        paths += [path for ending in endings.split() for path in (ROOT / folder).rglob(f"*.{ending}")]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def rows_of(text: str) -> dict[str, str]:
    """{variable: its row of a table}."""
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    return {name: row for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_reads_are_found_in_every_form():
    code = """os.environ.get("GEKO_A", 1); os.environ["GEKO_B"]; std::getenv("GEKO_C"); getenv('GEKO_D'); "GEKO_E" """
    assert READS.findall(code) == ["GEKO_A", "GEKO_B", "GEKO_C", "GEKO_D"]


def test_every_variable_that_is_read_is_documented_and_no_other():
    read = {name for text in sources().values() for name in READS.findall(text)}
    documented = rows_of(VARIABLES.read_text(encoding="utf-8"))
    assert read == {name for name in documented if name.startswith("GEKO_")}
    assert {"GEKO_BACKEND", "GEKO_DEBUG", "GEKO_CPU_CAPABILITY"} <= read
    assert set(environment._VARIABLES) <= set(documented), "what `geko env` prints"


def test_variables_stand_in_the_files_that_are_said_to_read_them():
    for name, row in rows_of(VARIABLES.read_text(encoding="utf-8")).items():
        names = re.findall(r"`(\w+)`", row.split("|")[1])
        for file in FILE.findall(row.split("|")[-2]):
            text = (ROOT / file).read_text(encoding="utf-8")
            assert any(other in text for other in names), f"{file} does not read {name}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_document_names_exist(document):
    named = FILE.findall((ROOT / document).read_text(encoding="utf-8"))
    assert len(named) > 3
    missing = [name for name in named if not any(ROOT.glob(name))]
    assert not missing, f"{document} names {missing}"
