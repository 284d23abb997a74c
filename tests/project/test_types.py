"""The types of every public name serve a user's script under strict mypy; pyright is run by the workflow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import geko_kernels as gk

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "helpers" / "public_names.py"


def attributes(tree):
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def public(cls, below):
    """What a class of ours adds to the class `below`, without underscores."""
    return {name for base in cls.__mro__ if base not in below.__mro__ for name in vars(base) if name[0] != "_"}


def test_the_script_has_every_public_name():
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    of_package = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "gk"
    }
    assert of_package == set(gk.__all__)


@pytest.mark.parametrize("name", ["SampleStats", "GEKOConfig", "MountainCurriculum", "SampleState", "GEKOLoader"])
def test_the_script_has_every_method(name):
    made = {"GEKOConfig": set(gk.GEKOConfig.__dataclass_fields__), "SampleState": {"freeze_weight"}}  # by keyword, old
    inherited = tuple if name == "SampleStats" else object
    assert public(getattr(gk, name), inherited) - made.get(name, set()) <= attributes(ast.parse(SCRIPT.read_text()))


def test_mypy_takes_the_script():
    pytest.importorskip("mypy")
    done = subprocess.run([sys.executable, "-m", "mypy", str(SCRIPT)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
