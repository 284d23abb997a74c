"""The documentation site; runs where `make docs` has installed what it needs, which `make test` does not."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from documents import ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_fetch_nothing_from_elsewhere(site):
    fetched = re.compile(r"<(?:script|link|img)\b[^>]*\b(?:src|href)=\"(?:https?:)?//[^\"]*\"")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    assert not [found for page in pages for found in fetched.findall(page.read_text(encoding="utf-8"))]


def test_files_that_pages_link_to_are_there(site):
    assert (site / "benchmarks" / "results" / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    assert 'src="benchmarks/results/scaling.png"' in (site / "scaling.html").read_text(encoding="utf-8")
    assert 'href="benchmarks/end_to_end/LOG.html"' in (site / "evidence.html").read_text(encoding="utf-8")


def test_fields_comments_and_names_of_docstrings_are_shown(site):
    config = (site / "api" / "config.html").read_text(encoding="utf-8")
    assert re.search(r"<li>\s*<p>?<code>light_interval</code>|<li><code>light_interval</code>", config)
    assert "wrong and sure of it" in config  # the comment beside Bucket.HARD
    losses = (site / "api" / "losses.html").read_text(encoding="utf-8")
    assert "share of tokens whose label has the largest logit" in losses
    assert re.search(r'href="config.html#geko_kernels.GEKOConfig"', losses)


def test_scripts_of_the_build_are_not_published(site):
    assert not list(site.rglob("*.py"))
