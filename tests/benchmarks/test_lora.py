"""The end-to-end benchmark with adapters, and with a rate that restarts, on a tiny random model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from test_end_to_end import run, wordnet  # noqa: F401  a fixture
from transformers import LlamaConfig

from benchmarks.end_to_end.arms import ARMS, learning_rate
from benchmarks.end_to_end.engine import load_network
from benchmarks.end_to_end.lengths import find_arm
from benchmarks.end_to_end.lora import LoRALinear, add_lora
from geko_kernels.training.stopping.average import WeightAverage


def test_an_adapter_adds_its_low_rank_product_and_is_all_that_trains():
    linear = nn.Linear(6, 4)
    adapted = LoRALinear(linear, 2, torch.Generator().manual_seed(0))
    x = torch.randn(3, 6)
    assert torch.equal(adapted(x), linear(x)) and adapted.down.std() > 0
    with torch.no_grad():
        adapted.up.normal_()
    merged = nn.functional.linear(x, linear.weight + 16 * adapted.up @ adapted.down, linear.bias)
    torch.testing.assert_close(adapted(x), merged)


def test_every_linear_layer_of_the_blocks_is_adapted_and_the_rest_frozen(monkeypatch):
    monkeypatch.setattr("smollm2.LlamaConfig", LlamaConfig)  # all eight layers
    network, _ = load_network("tiny")
    linears = sum(isinstance(module, nn.Linear) for module in network.tail.layers.modules())
    tokens, positions = torch.arange(12).view(2, 6), torch.tensor([[2, 5]] * 2)
    before = network(tokens, positions)
    add_lora(network, 4)
    assert torch.equal(network(tokens, positions), before)
    adapted = [module for module in network.modules() if isinstance(module, LoRALinear)]
    assert len(adapted) == linears == 8 * 7 and not isinstance(network.tail.lm_head, LoRALinear)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * linears and {name.rpartition(".")[2] for name in trained} == {"up", "down"}
    assert set(WeightAverage(network).names) == trained
    again, _ = load_network("tiny")
    add_lora(again, 4)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), network.parameters(), strict=True))


def test_a_run_with_adapters_trains_them_alone_in_every_arm(monkeypatch, tmp_path, wordnet):  # noqa: F811
    seen = []
    made = add_lora

    def adapted(network, rank):
        made(network, rank)
        seen.append((network, {name: value.clone() for name, value in network.state_dict().items()}))

    monkeypatch.setattr("benchmarks.end_to_end.__main__.add_lora", adapted)
    arms = ["A", "auto", "A-stop", "H"]
    common = ["--tasks", "R4", "--rates", "1e-2", "--arms", *arms]
    _, rows = run(monkeypatch, tmp_path, wordnet, *common, "--lora", "4")
    assert [row["lora"] for row in rows] == [4] * 4 and {row["arm"] for row in rows} == set(arms)
    ((network, before),) = seen
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.endswith((".up", ".down")) for name in changed)
    assert len({round(row["final"]["test_loss"], 6) for row in rows}) > 1


def test_adapters_are_refused_where_they_make_no_sense(monkeypatch, tmp_path, wordnet, capsys):  # noqa: F811
    for task in ("R5", "R1-small"):
        with pytest.raises(SystemExit):
            run(monkeypatch, tmp_path, wordnet, "--tasks", task, "--arms", "A", "--lora", "4")
        assert (
            f"--lora adapts a network that has been trained, and {task} begins from scratch" in capsys.readouterr().err
        )
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, wordnet, "--tasks", "R4", "--arms", "A", "--lora", "0")
    assert "the rank is a whole number from 1, got 0" in capsys.readouterr().err
    run(monkeypatch, tmp_path, wordnet, "--tasks", "R4", "--arms", "A")
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, wordnet, "--tasks", "R4", "--arms", "A", "--lora", "4")
    assert "holds runs with --lora 0 (0: without), these have 4" in capsys.readouterr().err


class _Engine:
    train = range(100)

    def reset(self, config):
        pass


@pytest.mark.parametrize("arm", ["A-restarts", "A-phases"])
def test_a_rate_that_restarts_is_the_peak_at_each_start_and_ends_at_zero(arm):
    made = ARMS[arm](_Engine(), 8, 1.0, 0)
    starts = [i / 8 for i in range(8)] if arm == "A-restarts" else [0, 0.15, 0.35, 0.65, 0.85]
    assert made.starts() == starts
    assert made.rate(2.0, 0.01) == learning_rate(2.0, 0.01) and made.rate(2.0, 0.03) == 2.0
    for start, end in zip(starts[1:], [*starts[2:], 1.0], strict=True):
        assert made.rate(2.0, start) == 2.0 and made.rate(2.0, start - 1e-6) < 1e-6
        assert made.rate(2.0, (start + end) / 2) == pytest.approx(1.0)
    assert made.rate(2.0, 1 - 1e-9) == pytest.approx(0.0, abs=1e-9)


def test_restarts_follow_the_budget_and_many_epochs():
    made = ARMS["A-restarts"](_Engine(), 4, 0.375, 0)
    assert made.starts() == pytest.approx([0, 2 / 3]) and made.rate(1.0, 2 / 3 - 1e-12) == 1.0  # rounding
    many = ARMS["A-restarts"](_Engine(), 50, 1.0, 0)
    assert all(0 <= many.rate(1.0, i / 1000) <= 1 for i in range(1000)) and many.rate(1.0, 0.04) == 1.0


def test_restarting_arms_draw_what_uniform_training_draws(monkeypatch, tmp_path, wordnet):  # noqa: F811
    arms = ["A", "A-restarts", "A-phases", "A-restarts:budget=0.5"]
    _, rows = run(monkeypatch, tmp_path, wordnet, "--tasks", "R3", "--arms", *arms)
    assert [row["cost"] for row in rows] == pytest.approx([1, 1, 1, 0.5], abs=0.01)
    assert len({row["final"]["test_loss"] for row in rows}) == 4
    assert find_arm("A-restarts:budget=0.5") == (ARMS["A-restarts"], 0.5)
