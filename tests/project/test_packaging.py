"""What an sdist and a wheel hold, and what the wheel's tag says of it."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import geko_kernels
from geko_kernels.extras import TRAINING

pytest.importorskip("setuptools")

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = "import runpy, sys; sys.modules['torch'] = None; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py')"


def tracked(*folders):
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The tracked files that a build reads, and nothing that an earlier build left."""
    folder = tmp_path_factory.mktemp("clone")
    for name in tracked("csrc", "geko_kernels", "tests", "*.toml", "*.in", "*.md", "*.txt", "setup.py", "LICENSE"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def run(clone, *command, **environment):
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_sdist_made_without_torch_holds_every_source(clone, tmp_path):
    run(clone, "-c", WITHOUT_TORCH, "-q", "sdist", "-d", str(tmp_path))
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        names = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    held = {name for name in names if name.split("/")[0] in ("csrc", "geko_kernels", "tests")}
    assert held == tracked("csrc", "geko_kernels", "tests")
    assert {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "requirements-dev.txt"} <= names


def test_wheel_without_compiled_code_is_for_all_platforms(clone, tmp_path):
    told = run(clone, "-c", WITHOUT_TORCH, "-q", "bdist_wheel", "-d", str(tmp_path / "no_torch"))
    assert "no torch at build time, so this is the pure Python package" in told
    told = run(clone, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path / "no_compiler"), CXX="false")
    assert "did not build and are left out, so this is the pure Python package" in told
    for path in tmp_path.glob("*/*.whl"):
        assert path.name == f"geko_kernels-{geko_kernels.__version__}-py3-none-any.whl"
        with zipfile.ZipFile(path) as wheel:
            assert not [name for name in wheel.namelist() if name.endswith(".so")]
            assert (
                "geko = geko_kernels.cli:main"
                in wheel.read(next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))).decode()
            )
    assert len(list(tmp_path.glob("*/*.whl"))) == 2


def test_advice_names_the_packages_of_the_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"""[\w.>=-]+""", TRAINING.removeprefix("pip install "))
    assert named == project["optional-dependencies"]["train"]
