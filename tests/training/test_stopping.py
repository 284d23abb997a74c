"""The parts of a run that finds its own length: average, rule, samples held back."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import nn

from benchmarks.results import RESULTS, read
from geko_kernels import torch_private
from geko_kernels.training.stopping import average as stopping_average
from geko_kernels.training.stopping.average import WeightAverage
from geko_kernels.training.stopping.rule import Look, StopRule, surely_above, surely_above_without
from geko_kernels.training.stopping.sentinels import hold_back, how_many, joined, near_duplicates


def test_the_average_is_the_formula_of_float64():
    model = nn.Linear(3, 2)
    average, truth = WeightAverage(model), model.weight.detach().double()
    for step in range(1, 40):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update()
        truth = truth.lerp(model.weight.detach().double(), min(1, 5 / step))
    torch.testing.assert_close(average.values[0].double(), truth, rtol=1e-5, atol=1e-6)


def test_a_bfloat16_model_moves_its_average_and_comes_back_bit_for_bit():
    model = nn.Linear(4, 4, bias=False).bfloat16()
    average = WeightAverage(model)
    assert average.values[0].dtype == torch.float32 and average.nbytes == 64
    with torch.no_grad():
        model.weight.fill_(1.0)
    average.step = 999
    average.values[0].fill_(0.9)
    average.update()  # a two-hundredth of 0.1: less than bfloat16 can add to 0.9
    torch.testing.assert_close(average.values[0], torch.full((4, 4), 0.9005), rtol=0, atol=1e-6)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="in between"), average.in_place():
        assert not model.weight.equal(before)
        raise RuntimeError("in between")
    assert model.weight.equal(before)


def test_only_what_is_trained_is_averaged_and_saved_under_its_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    average = WeightAverage(model)
    assert list(average.state_dict()) == ["step", "1.weight", "1.bias"]
    average.update()
    other = WeightAverage(model)
    other.load_state_dict(average.state_dict())
    assert other.step == 1 and all(a.equal(b) for a, b in zip(other.values, average.values, strict=True))
    with pytest.raises(ValueError, match="has other parameters than the model, the first is '1.bias'"):
        average.load_state_dict({"step": torch.tensor(1), "1.weight": torch.zeros(1, 2)})
    with pytest.raises(
        ValueError, match=r"the average of '1.weight' has the shape \(1, 3\), but the model's is \(1, 2\)"
    ):
        average.load_state_dict({**other.state_dict(), "1.weight": torch.zeros(1, 3)})


def look(epoch, held, gain=1.0, seen=0.0, seen_gain=1.0, accuracy=0.0, n=200):
    noise = torch.randn(n, generator=torch.Generator().manual_seed(0)) * 0.5
    of = lambda value: noise - noise.mean() + value  # noqa: E731
    return Look(epoch, of(held), of(held + gain), of(seen), of(seen + seen_gain), accuracy)


def run(losses, **others):
    """(the epoch at which the rule stops, or None; the epoch that it keeps)"""
    rule = StopRule()
    for quarter, loss in enumerate(losses, 1):
        rule.add(look(quarter / 4, loss, **others))
        if rule.stops():
            return quarter / 4, rule.curve[rule.kept][0]
    return None, rule.curve[rule.kept][0]


def test_it_stops_half_an_epoch_after_the_minimum():
    assert run([3, 2.5, 2.2, 2.0, 1.9, 1.95, 1.99, 2.1]) == (1.75, 1.25)


def test_its_patience_is_a_quarter_of_the_kept_epoch_where_that_is_more():
    falling = [3 - 0.1 * quarter for quarter in range(16)]  # the lowest after four epochs
    assert run([*falling, 2.0, 2.0, 2.0, 2.0]) == (5.0, 4.0)
    rule = StopRule()
    for quarter, loss in enumerate([*falling, 2.0, 2.0, 2.0, 2.0], 1):
        rule.add(look(quarter / 4, loss))
    assert rule.patience == 1.0 and "and did not improve for 1 epochs." in rule.why()


def test_it_does_not_stop_before_an_epoch_and_a_quarter():
    assert run([2.0, 2.5, 2.4, 2.3, 2.2, 1.8]) == (1.25, 0.25)
    assert run([2.0, 2.5, 2.4, 2.3, 1.9, 1.8, 1.7]) == (None, 1.75)


def test_a_task_that_has_not_begun_or_is_learnt_by_heart_goes_to_its_end():
    rising = [2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6]
    assert run(rising, gain=0.0, seen_gain=0.0)[0] is None and run(rising, gain=0.0)[0] is None
    rule = StopRule()
    rule.add(look(1.0, 2.0, gain=0.0))
    assert rule.by_heart and rule.why().startswith("The task is learnt by heart")
    rule.add(look(1.25, 2.0, gain=0.5))
    assert rule.armed and not rule.by_heart


def test_accuracy_is_a_measure_too_and_a_broken_loss_is_never_kept():
    rule = StopRule("accuracy")
    assert [rule.add(look(e, loss, accuracy=a)) for e, loss, a in ((0.5, 1, 0.5), (1, 2, 0.6), (1.5, 3, 0.6))] == [
        True,
        True,
        False,
    ]
    assert rule.kept == 1 and rule.stops() and "accuracy 60.0%" in rule.why()
    rule = StopRule()
    rule.add(look(1.0, 2.0))
    rule.add(look(1.25, math.nan))
    rule.add(look(1.5, 2.1))
    assert rule.kept == 0 and rule.stops()


@pytest.mark.parametrize("measure", ["loss", "accuracy"])
@pytest.mark.parametrize("losses", [torch.empty(0), torch.full((40,), math.nan), torch.full((40,), math.inf)])
def test_looks_without_a_number_are_never_kept_nor_end_the_run(losses, measure):
    """No sample has a label, or the model has diverged: the first look is not better than nothing."""
    rule, seen = StopRule(measure), torch.zeros(40)
    rule.armed = True  # as where no swap can be made
    accuracy = math.nan if measure == "accuracy" else 0.0
    for quarter in range(1, 9):
        assert not rule.add(Look(quarter / 4, losses, losses, seen, seen + 1, accuracy))
        assert rule.kept is None and not rule.stops()
    assert rule.why("samples of eval_dataset") == (
        "The mean loss of the samples of eval_dataset was never a number: none of them has a label, or one had a loss "
        "that was NaN or infinite. The run went to its end."
    )
    fresh = StopRule(measure)
    fresh.add(Look(0.25, losses, losses, seen, seen + 1, accuracy))
    assert not fresh.by_heart  # the training samples alone cannot tell


def test_a_later_look_with_a_number_is_kept():
    rule = StopRule()
    assert [rule.add(look(epoch, held)) for epoch, held in ((0.25, math.nan), (0.5, 2.0), (0.75, 1.9))] == [
        False,
        True,
        True,
    ]
    assert rule.kept == 2


@pytest.mark.parametrize("share", range(0, 100, 7))
def test_the_share_left_out_is_the_one_that_is_said(share):
    """100 * 0.07 is above 7 in floating point."""
    rule = StopRule()
    held = torch.arange(100.0)
    rule.add(Look(1.0, held, held + 1, held, held + 1, 0.0), share / 100)
    assert rule.curve[0][1] == pytest.approx(float(held[: 100 - share].mean()))


def test_what_the_report_says_of_a_run_that_the_rule_did_not_end():
    rule = StopRule()
    rule.add(look(0.25, 2.0))
    rule.add(look(0.5, 1.9))
    best = "the held-back samples were best after 0.50 epochs (loss 1.9000)."
    longer = "A longer run may be better: raise num_train_epochs or max_steps."
    assert rule.why() == f"The run went to its end; {best} {longer}"
    assert rule.why(idle=True) == f"The run went to its end; {best}"
    assert rule.why(cut=True) == f"Something other than auto_stop (a callback, too few samples) ended the run; {best}"
    rule.add(look(0.75, 1.95))
    assert rule.why() == f"The run went to its end; {best}"


def test_it_says_that_a_look_given_up_would_be_better_by_the_share_of_today():
    """The kept weights are those of the best look when it was taken; what was given up cannot come back."""
    rule, wrong = StopRule(), torch.full((30,), 5.0)
    for epoch, right, surer, share in ((1.0, 1.0, 0.0, 0.0), (1.25, 0.5, 9.0, 0.0), (1.5, 0.8, 9.0, 0.3)):
        held = torch.cat([torch.full((70,), right), wrong + surer])
        rule.add(Look(epoch, held, held + 1, held, held + 1, 0.0), share)
    assert rule.kept == 2 and rule.why().endswith(
        "Without the share that looks mislabelled now, 1.25 epochs were better; those weights were not kept, since "
        "fewer samples looked mislabelled at the time."
    )


def test_a_model_without_a_trained_parameter_is_refused():
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient, so there is nothing to train"):
        stopping_average.WeightAverage(nn.Linear(2, 2).requires_grad_(False))


def test_it_goes_on_from_its_state():
    rule, other = StopRule(), StopRule()
    with pytest.raises(ValueError, match="the rule's epochs, kept are missing"):
        other.load_state_dict({k: v for k, v in rule.state_dict().items() if k not in ("epochs", "kept")})
    rule.add(look(1.0, 2.0))
    other.load_state_dict(rule.state_dict())
    other.add(look(1.5, 2.1))
    assert other.stops() and other.curve[0] == rule.curve[0]


def test_the_paired_difference_has_to_be_sure():
    noise = torch.randn(100, generator=torch.Generator().manual_seed(1))
    assert surely_above(noise + 0.06, noise, 0.05) and not surely_above(noise + 0.04, noise, 0.05)
    assert not surely_above(noise + 0.06, noise.roll(1), 0.05) and not surely_above(noise[:1] + 1, noise[:1], 0.05)


@pytest.mark.parametrize(
    "task, rate, kept, stopped",
    [("d1", 3e-4, 1.0, 1.5), ("d1", 1e-4, 1.0, 1.5), ("R2-0", 1e-4, 2.0, 2.5), ("R2-30", 1e-4, 2.0, 2.5)]
    + [("R2-pairs", 1e-4, 2.0, 2.5)],
)
def test_on_recorded_curves_it_keeps_what_the_test_set_calls_best(task, rate, kept, stopped):
    """Within 0.6 % of the least test loss of D1, and within half a point of the most right of R2."""
    rows = read(RESULTS / "curves_2026-11-27.jsonl.gz")
    (row,) = (r for r in rows if (r["task"], r["rate"], r["schedule"]) == (task, rate, "constant"))
    rule = StopRule()
    for entry in row["looks"]:
        point = entry["5/t"]
        swapped = entry["swapped"]["random"][0] - point["random"][0]
        rule.add(look(entry["epoch"], point["cluster"][0], gain=swapped))
        if rule.stops():
            break
    assert rule.curve[rule.kept][0] == pytest.approx(kept, abs=0.02)
    assert rule.curve[-1][0] == pytest.approx(stopped, abs=0.02)
    ends = [entry["5/t"]["test"] for entry in row["looks"]]
    if task == "d1":
        assert ends[rule.kept][0] <= 1.006 * min(end[0] for end in ends)
    else:
        assert ends[rule.kept][2] >= max(end[2] for end in ends) - 0.005


def test_how_many_are_held_back():
    assert [how_many(n) for n in (1_000, 4_000, 10_000, 40_000)] == [50, 200, 200, 800]


def test_near_duplicates_are_held_back_together():
    long = list(range(100, 140))
    inputs = [[1, i] for i in range(600)]
    answers = [[7]] * 600
    answers[10], answers[20] = long, [*long[:24], 5]
    inputs[30] = inputs[20]
    groups = near_duplicates(inputs, answers)
    assert groups[10] == groups[20] == groups[30] and len(set(groups)) == 598
    held = hold_back(groups, 30, seed=3)
    assert held.tolist() == sorted(set(held.tolist())) and 28 <= len(held) <= 30
    assert held.equal(hold_back(groups, 30, seed=3)) and not held.equal(hold_back(groups, 30, seed=4))
    inside = {groups[i] for i in held.tolist()}
    assert inside.isdisjoint(groups[i] for i in range(600) if i not in set(held.tolist()))


def test_a_template_joins_nobody():
    template = list(range(24))
    assert len(set(near_duplicates([[*template, i] for i in range(500)], [[1]] * 500))) == 500
    assert joined([("a",), ("a", "b"), ("b",)]) == [joined([("a",), ("a", "b"), ("b",)])[0]] * 3


def test_held_back_samples_that_look_mislabelled_do_not_end_the_run():
    """Once the guard keeps the wrong labels from training, the model gets surer that the held-back ones are wrong."""
    right, wrong = torch.linspace(0.1, 1.0, 70), torch.linspace(3, 5, 30)

    def add(rule, epoch, better, surer, share):
        held = torch.cat([right * better, wrong + surer])
        return rule.add(Look(epoch, held, held + 1, right, right + 1, 0.0), share)

    rule, blind = StopRule(), StopRule()
    looks = [(1.0, 1.0, 0.0, 0.0), (1.25, 0.9, 1.0, 0.3), (1.5, 0.8, 2.0, 0.3), (1.75, 0.7, 3.0, 0.3)]
    assert [add(rule, *each) for each in looks] == [True] * 4 and rule.kept == 3 and not rule.stops()
    assert [add(blind, *each[:3], 0.0) for each in looks] == [True, False, False, False] and blind.stops()
    assert [loss for _, loss, _ in rule.curve] == pytest.approx([0.55, 0.495, 0.44, 0.385])  # all by the same measure
    assert "without the highest 30%, the share that looks mislabelled in training" in rule.why()


def test_mislabelled_held_back_samples_do_not_make_a_task_one_that_is_learnt_by_heart():
    """Their own answer is the wrong one, so another's is likelier; the training samples' wrong answers are learnt."""
    noise = torch.linspace(-0.1, 0.1, 60)
    own = torch.cat([0.3 + noise, 4.0 + noise[:40]])  # 60 right labels, 40 wrong ones
    swapped = torch.cat([2.5 + noise, 0.5 + noise[:40]])
    seen = torch.full((100,), 0.2)
    look = Look(2.0, own, swapped, seen, seen + 3, 0.6)
    rule, blind = StopRule(), StopRule()
    rule.add(look, 0.4)
    blind.add(look)
    assert rule.armed and not rule.by_heart and blind.by_heart and not blind.armed
    heart = StopRule()
    heart.add(Look(2.0, own, own.flip(0), seen, seen + 3, 0.6), 0.1)
    assert not heart.armed and not heart.by_heart  # the guard has seen that it generalises


def test_trimmed_means_of_one_distribution_are_not_told_apart():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.rand(1000, 2, 100, generator=generator).log().neg()  # trimmed by 40 %
    found = sum(surely_above_without(0.4, a, b, 0.0) for a, b in pairs)
    assert found <= 8  # 1.3 in a thousand are beyond three standard errors
    assert surely_above_without(0.4, pairs[0, 0] + 1, pairs[0, 1], 0.05)
    nowhere = torch.full((100,), math.nan)
    assert not surely_above_without(0.4, nowhere, pairs[0, 0], 0.05)
    few = torch.tensor([1.0, 2.0, 3.0])
    assert not surely_above_without(0.6, few + 9, few, 0.05)


def test_without_torchs_private_name_the_average_is_the_same(monkeypatch):
    def averaged():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        average = stopping_average.WeightAverage(model)
        for _ in range(9):
            with torch.no_grad():
                model.weight.add_(torch.randn(2, 3))
            average.update()
        return average.values

    expected = averaged()
    with monkeypatch.context() as without:
        without.delattr(torch, "_foreach_lerp_")
        importlib.reload(torch_private)
    monkeypatch.setattr(stopping_average, "foreach_lerp_", torch_private.foreach_lerp_)
    try:
        assert all(map(torch.equal, averaged(), expected)) and not hasattr(torch_private.foreach_lerp_, "__self__")
    finally:
        importlib.reload(torch_private)
