"""The documents name what there is: environment variables that are read, files, pages, messages and logged figures."""

from __future__ import annotations

import ast
import re

import pytest
from documents import DOCUMENTS, ROOT, anchors_of, links_of, text_of

import geko_kernels as gk
from geko_kernels.cli import _parser, environment

VARIABLES = ROOT / "docs" / "environment.md"
READS = re.compile(r"(?:environ(?:\.get|\.setdefault|\.pop)?|getenv)\s*[\[(]\s*[\"'](GEKO_\w+)")
FILE = re.compile(r"`([\w./*-]+\.(?:py|cpp|cu|h|j2|md|toml|txt)|Makefile)`")
WITH_FILES = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/environment.md")


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


@pytest.mark.parametrize("document", WITH_FILES)
def test_files_that_a_document_names_exist(document):
    named = FILE.findall((ROOT / document).read_text(encoding="utf-8"))
    assert len(named) > 3
    missing = [name for name in named if not any(ROOT.glob(name))]
    assert not missing, f"{document} names {missing}"


def test_architecture_names_every_file():
    named = {path for name in FILE.findall(text_of("docs/architecture.md")) for path in ROOT.glob(name)}
    files = {path for part in ("geko_kernels", "csrc") for path in (ROOT / part).rglob("*")}
    code = {path for path in files if path.suffix in (".py", ".cpp", ".h", ".cu") and path.name != "__init__.py"}
    assert len(code) > 100
    assert not sorted(str(path.relative_to(ROOT)) for path in code - named)


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md", "benchmarks/README.md"])
def test_links_lead_somewhere(document):
    for link in links_of(document):
        path, _, anchor = link.partition("#")
        target = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        assert target.exists(), f"{document} links to {link}"
        assert not anchor or anchor in anchors_of(str(target.relative_to(ROOT))), f"{document} links to {link}"


def test_every_option_of_the_command_line_is_documented_and_no_other():
    commands = next(action.choices for action in _parser()._actions if isinstance(action.choices, dict))
    options = {name for command in commands.values() for action in command._actions for name in action.option_strings}
    told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text_of("docs/guides/command-line.md")))
    assert told == {name for name in options if name.startswith("--")} | {"--version"}


def test_every_public_name_and_field_of_the_settings_is_documented():
    entries = "".join(text_of(document) for document in DOCUMENTS if document.startswith("docs/api/"))
    assert set(gk.__all__) <= set(re.findall(r"^::: geko_kernels\.(\w+)$", entries, re.M))
    for kind in (gk.GEKOConfig, gk.GEKOTrainingArguments):
        told = set(re.findall(r"\w+", kind.__doc__))
        assert not set(kind.__annotations__) - told, f"{kind.__name__} says nothing of them"


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1].split("\n\n")[0]
    listed = re.findall(r": (\S+\.md)$", nav, re.M)
    assert ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page}" for page in listed)] == DOCUMENTS


def test_messages_that_are_explained_are_those_of_the_code():
    written = set()
    for name, code in sources().items():
        if name.endswith(".py"):
            written |= {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    told = "\n".join(value for value in written if isinstance(value, str))
    cells = [line.split("|")[1] for line in text_of("docs/guides/troubleshooting.md").splitlines() if line[:1] == "|"]
    quoted = re.findall(r"`([^`]* [^`]*)`", "".join(cells))
    assert len(quoted) > 9
    assert not [part for part in quoted if part not in told]


def test_logged_names_are_those_of_the_log(tmp_path):
    pytest.importorskip("transformers")
    from training import trainer_of

    trainer = trainer_of(tmp_path, logging_steps=1, num_train_epochs=1)
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry if "geko" in name}
    rows = [line for line in text_of("docs/guides/watching.md").splitlines() if line.startswith("| `")]
    told = {name for line in rows for name in re.findall(r"`([^`]+)`", line.split("|")[1])}
    assert told == logged | {"geko/nonfinite", "geko/left_out", "geko/held_out_loss", "geko/held_out_accuracy"}
