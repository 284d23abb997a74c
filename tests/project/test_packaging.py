"""What an sdist and a wheel hold, and what the wheel's tag says of it."""

import email
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
    """The tracked files, and nothing that an earlier build left."""
    folder = tmp_path_factory.mktemp("clone")
    for name in tracked():
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
    names = {name for name in names if not name.startswith("geko_kernels.egg-info/")}
    assert names - {"PKG-INFO", "setup.cfg"} == {name for name in tracked() if not name.startswith(".")}


@pytest.fixture(scope="module")
def wheel_made_without_torch(clone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("no_torch")
    told = run(clone, "-c", WITHOUT_TORCH, "-q", "bdist_wheel", "-d", str(folder))
    assert "no torch at build time, so this is the pure Python package" in told
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_without_compiled_code_is_for_all_platforms(clone, wheel_made_without_torch, tmp_path):
    told = run(clone, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path), CXX="false")
    assert "did not build and are left out, so this is the pure Python package" in told
    (without_compiler,) = tmp_path.glob("*.whl")
    for path in (wheel_made_without_torch, without_compiler):
        assert path.name == f"geko_kernels-{geko_kernels.__version__}-py3-none-any.whl"
        with zipfile.ZipFile(path) as wheel:
            assert not [name for name in wheel.namelist() if name.endswith(".so")]
            assert (
                "geko = geko_kernels.cli:main"
                in wheel.read(next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))).decode()
            )


def test_the_version_stands_in_one_place():
    """CITATION.cff cannot read it from there."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"] == {
        "version": {"attr": "geko_kernels.__version__"}
    }
    assert f"\nversion: {geko_kernels.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_wheel_tells_who_it_is_for(wheel_made_without_torch):
    with zipfile.ZipFile(wheel_made_without_torch) as wheel:
        (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        told = email.message_from_bytes(wheel.read(metadata))
        assert {"geko_kernels/py.typed", "geko_kernels/training/report/report.css"} <= set(wheel.namelist())
    assert (told["Name"], told["Version"]) == ("geko_kernels", geko_kernels.__version__)
    assert (told["License-Expression"], told["Description-Content-Type"]) == ("Apache-2.0", "text/markdown")
    assert told.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(told.get_all("Provides-Extra")) == {"triton", "train", "data", "trl"}
    assert "Typing :: Typed" in told.get_all("Classifier")


def test_advice_names_the_packages_of_the_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"""[\w.>=-]+""", TRAINING.removeprefix("pip install "))
    assert named == project["optional-dependencies"]["train"]
