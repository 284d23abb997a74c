"""The plain loop's benchmark: that it runs, what the noise guard finds in it, and how long the loops are."""

import inspect

import pytest

from benchmarks.training import plain_loop


def loop_lines(function):
    """Lines of the body without docstring and return, but with what is read off the loop afterwards left out."""
    lines = [line for line in inspect.getsource(function).splitlines()[1:] if line.strip()]
    return len([line for line in lines if '"""' not in line and not line.strip().startswith("return")])


@pytest.mark.parametrize(("arm", "held_right"), [("geko_margin_1", 280), ("geko_min_share_0", 30)])
def test_wrong_labels_among_few_classes_are_found_if_the_guard_is_told(arm, held_right):
    plain, found = (plain_loop.run("mlp", 2000, 0.3, arm, 0) for arm in ("geko", arm))
    assert plain["wrong"] == found["wrong"] == 600
    assert plain["held_wrong"] == plain["held_right"] == 0
    assert found["held_wrong"] > 0.9 * 600 and found["held_right"] < held_right
    assert found["accuracy"] > plain["accuracy"] + 0.02
    assert found["trained"] < 0.7 * plain["trained"]


@pytest.mark.parametrize(("arm", "most"), [("geko_margin_1", 0), ("geko_min_share_0", 50)])
def test_what_that_costs_on_clean_labels(arm, most):
    row = plain_loop.run("mlp", 2000, 0.0, arm, 0)
    assert row["held_right"] <= most and row["accuracy"] > 0.94 and row["trained"] < 12_000


def test_the_loops_are_as_long_as_the_readme_says():
    assert loop_lines(plain_loop.train_cross_entropy) == 11
    assert loop_lines(plain_loop.train_geko) == 13
