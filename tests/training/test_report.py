"""report.html and its PNGs from a run's figures."""

import json
import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

from geko_kernels import GEKOConfig
from geko_kernels.training.report import report
from geko_kernels.training.report.report import write_report

BUCKETS = ("FREEZE", "LIGHT", "FOCUS", "HARD")
PAGE_SIZE = 1_000_000


def run_figures(num_epochs=6, num_samples=20_000):
    """What a run of `num_epochs` writes into geko_report.json; half of the samples end up frozen."""
    epochs, log_history = [], []
    for epoch in range(num_epochs):
        learnt = epoch / max(num_epochs - 1, 1)
        frozen, focus, hard = round(0.5 * learnt * num_samples), round(0.6 * (1 - learnt) * num_samples), 800
        buckets = dict(zip(BUCKETS, (frozen, num_samples - frozen - focus - hard, focus, hard), strict=True))
        loss, accuracy = 2.5 * 0.6**epoch, 0.5 + 0.45 * learnt
        epochs.append(
            {
                "epoch": epoch,
                "samples": num_samples - frozen,
                "probes": frozen // 4,
                "steps": (num_samples - frozen) // 64,
                "loss": loss,
                "accuracy": accuracy,
                "seconds": 14.2 - 6 * learnt,
                "buckets": buckets,
                "quarantined": 40 * epoch,
                "forgotten": 130 - 20 * epoch,
            }
        )
        log_history += [{"epoch": epoch + k / 10, "geko/loss": loss, "geko/accuracy": accuracy} for k in range(1, 11)]
        log_history.append({"epoch": epoch + 1, "eval_loss": loss + 0.2})
    trained, probed = sum(e["samples"] for e in epochs), sum(e["probes"] for e in epochs)
    standard = num_epochs * num_samples
    seconds = {"total": 70.0, "steps": 58.0, "probes": 4.5, "selection": 0.3, "evaluation": 5.0, "checkpoints": 1.2}
    efficiency = {
        "samples_standard": standard,
        "samples_forward": trained + probed,
        "samples_backward": trained,
        "samples_idle": 321,
        "tokens_forward": 20 * (trained + probed),
        "tokens_backward": 20 * trained,
        "saved_compute": 1 - (3 * trained + probed) / (3 * standard) if standard else 0.0,
        "seconds": seconds,
        "epochs": epochs,
    }
    return {
        "version": 1,
        "num_samples": num_samples,
        "config": GEKOConfig().to_dict(),
        "efficiency": efficiency,
        "log_history": log_history,
        "most_forgotten": [{"id": 17 * i, "times": 9 - i, "loss": 1.5 - i / 10, "bucket": "HARD"} for i in range(8)],
        "num_quarantined": 200,
        "quarantined": list(range(1000, 19_000, 100)),
        "num_doubtful": 0,
    }


def write(tmp_path, figures, painted=True):
    """The page; its pictures are made but not `painted`, 0.1 s each, where a test reads its text alone."""
    (tmp_path / "geko_report.json").write_text(json.dumps(figures))
    with pytest.MonkeyPatch.context() as patch:
        if not painted:
            patch.setattr(report, "_png", lambda figure: b"")
        return write_report(tmp_path)


class Page(HTMLParser):
    """Collects what the page loads and whether its tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_stands_alone_and_holds_every_chart(tmp_path):
    page = write(tmp_path, run_figures())
    text = page.read_text()
    parsed = Page(text)
    assert parsed.open == [] and len(text) < PAGE_SIZE
    assert len(parsed.sources) == 5 and all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    assert "url(" not in text and "@import" not in text
    pngs = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pngs == [f"report_{name}.png" for name in ("accuracy", "buckets", "loss", "time", "work")]


def test_page_names_forgotten_and_quarantined_samples(tmp_path):
    figures = run_figures()
    text = write(tmp_path, figures).read_text()
    assert re.search(r"<td>119</td><td>2</td><td>0\.800</td>", text)
    assert "1000, 1100, 1200" in text and "200 samples look mislabelled" in text
    assert "of the first 180" in text
    assert "{:.1%}".format(figures["efficiency"]["saved_compute"]) in text


def test_page_says_what_to_do_about_doubtful_labels(tmp_path):
    figures = run_figures()
    del figures["num_doubtful"]  # as older runs do
    assert "noise_guard_margin = 1 holds" not in write(tmp_path, figures).read_text()
    figures["num_doubtful"] = figures["num_samples"] // 5
    text = write(tmp_path, figures).read_text()
    assert "(20.0%) had labels" in text and "noise_guard_margin = 1 holds such samples back" in text


@pytest.mark.parametrize("num_epochs", [0, 1, 2])
def test_short_runs(tmp_path, num_epochs):
    figures = run_figures(num_epochs) | {"most_forgotten": [], "quarantined": [], "num_quarantined": 0}
    text = write(tmp_path, figures).read_text()
    assert "None" in text and len(Page(text).sources) == (5 if num_epochs else 2)


def test_epoch_that_trained_nothing(tmp_path):
    figures = run_figures()
    figures["efficiency"]["epochs"][-1] |= {"loss": None, "accuracy": None, "samples": 0}
    figures["log_history"] = []
    assert "<td>–</td>" in write(tmp_path, figures).read_text()


def test_text_from_the_run_is_escaped(tmp_path):
    figures = run_figures(1)
    figures["config"]["quality"] = "</pre><script>alert(1)</script>"
    assert "<script>" not in write(tmp_path, figures).read_text()


def test_wrong_input_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="output_dir of a finished GEKOTrainer run"):
        write_report(tmp_path)
    (tmp_path / "geko_report.json").write_text('{"version": 1, "num_sam')
    with pytest.raises(ValueError, match="truncated or not JSON"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="version 99"):
        write(tmp_path, run_figures(1) | {"version": 99})
    with pytest.raises(ValueError, match="damaged"):
        write(tmp_path, {"version": 1})
