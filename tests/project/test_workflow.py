"""The workflow runs what pyproject.toml claims: each Python, and the oldest and newest releases of what it needs."""

import re
import tomllib
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".github"
if not FOLDER.exists():
    pytest.skip("an sdist has no .github", allow_module_level=True)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
JOBS = yaml.safe_load((FOLDER / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
COMMANDS = [step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step]


def test_every_supported_python_is_tested_and_gets_a_wheel():
    pythons = [entry.split()[-1] for entry in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", entry)]
    assert JOBS["test"]["strategy"]["matrix"]["python"] == pythons
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    assert f"PYTHONS = {' '.join(f'python{version}' for version in pythons)}\n" in MAKEFILE
    assert any(f"for version in {' '.join(pythons)}; do" in command for command in COMMANDS)


def test_oldest_and_newest_releases_are_tested():
    extras = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], *extras["train"], *extras["trl"]]
    oldest = dict(re.findall(r"^(torch|transformers|trl)>=([\d.]+)$", "\n".join(needed), re.MULTILINE))
    old, new = (row["packages"].split() for row in JOBS["versions"]["strategy"]["matrix"]["include"])
    assert old == [f"{name}=={version}.0" for name, version in oldest.items()]
    assert new == list(oldest)


def test_every_make_target_of_the_workflow_exists():
    targets = {target for command in COMMANDS for target in re.findall(r"^make (\w+)$", command, re.MULTILINE)}
    assert {"lint", "test", "dist"} <= targets
    assert not {target for target in targets - {"docs"} if not re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)}


def test_every_action_has_a_version():
    used = [step["uses"] for job in JOBS.values() for step in job["steps"] if "uses" in step]
    assert used and all(re.fullmatch(r"actions/[\w-]+@v\d+\.\d+\.\d+", action) for action in used)


@pytest.mark.parametrize("form", sorted(path.name for path in (FOLDER / "ISSUE_TEMPLATE").glob("*.yml")))
def test_issue_forms_are_forms(form):
    read = yaml.safe_load((FOLDER / "ISSUE_TEMPLATE" / form).read_text(encoding="utf-8"))
    assert set(read) >= {"name", "description", "body"}
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in read["body"])
    asked = [field["attributes"]["label"] for field in read["body"] if field.get("validations", {}).get("required")]
    assert ("Output of `geko env`" in asked) == (form == "bug.yml")
