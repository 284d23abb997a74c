"""What a run's first epochs tell of longer and shorter runs."""

import pytest

from geko_kernels import GEKOConfig
from geko_kernels.training.report.forecast import LONGEST, forecast

RECOMMENDED = GEKOConfig.recommended()


def epoch(index, frozen, light, focus, hard, samples=1000, probes=0, quarantined=0, **more):
    buckets = {"FREEZE": frozen, "LIGHT": light, "FOCUS": focus, "HARD": hard}
    counts = {"samples": samples, "probes": probes, "quarantined": quarantined}
    return {"epoch": index, "buckets": buckets, **counts, **more}


FIRST = epoch(0, 0, 400, 500, 100)
SECOND = epoch(1, 100, 600, 200, 100, samples=800, probes=30)


def saved(told):
    return {run["epochs"]: run["saved"] for run in told["runs"]}


def test_first_epoch_is_taken_to_stay_as_it_is():
    told = forecast([FIRST], RECOMMENDED)
    assert (told["after_epoch"], told["right"], told["wrong"], told["wrong_factor"]) == (1, 0.4, 0.6, None)
    assert saved(told)[10] == pytest.approx(1 - (1 + 9 * (0.6 + 0.2)) / 10) and max(saved(told)) == LONGEST
    assert told["pays_from"] == 2 and saved(told)[2] == pytest.approx(0.1)
    assert told["text"] == (
        "After epoch 1, 40% of the samples are right (loss below 0.5). If that does not change, a run of 10 epochs "
        "with GEKOConfig.recommended() would do 18% less work than uniform training, one of 2 epochs 10%. Use uniform "
        "training if you plan one epoch. Usually more is saved; after a second epoch the forecast is better."
    )


def test_wrong_ones_shrink_and_light_ones_freeze_at_the_rate_of_two_epochs():
    told = forecast([FIRST, SECOND], RECOMMENDED)
    assert told["wrong_factor"] == pytest.approx(0.5) and told["freeze_rate"] == pytest.approx(0.25)
    third = 0.3 + 0.6 / 2 + 0.1 / 24  # wrong, half of LIGHT, an eighth of FREEZE looked at for a third
    fourth = 0.15 + 0.6 / 2 + 0.25 / 24  # 0.1 + 0.25 * 0.6 are frozen, 0.15 wrong, the rest LIGHT
    assert saved(told)[2] == pytest.approx(1 - (1 + 0.8 + 0.01) / 2)
    assert saved(told)[4] == pytest.approx(1 - (1 + 0.81 + third + fourth) / 4)
    assert told["enough"] == 5 and "wrong after epoch 5: uniform training of 5 epochs may be as good" in told["text"]


def test_held_back_samples_stay_out():
    second = epoch(1, 0, 400, 300, 300, samples=700, quarantined=300)
    told = forecast([FIRST, second], RECOMMENDED)
    assert (told["wrong"], told["held"], told["wrong_factor"]) == (0.3, 0.3, 0.5)
    assert "after epoch 1 40%; 30% are held back as probably mislabelled" in told["text"]
    assert "may be as good" not in told["text"]  # uniform training would learn the wrong labels


def test_observed_run_is_forecast_for_the_recommended_settings():
    epochs = [FIRST, epoch(1, 500, 200, 200, 100)]
    told = forecast(epochs, GEKOConfig(), observed=True)
    assert told["freeze_rate"] == 0.0 and "with GEKOConfig.recommended()" in told["text"]
    assert saved(told)[3] == pytest.approx(1 - (1 + (0.6 + 0.2) + (0.3 + 0.35)) / 3)
    assert told["text"].endswith("hold back as probably mislabelled are not counted; they save more.")
    assert forecast(epochs, GEKOConfig.uniform()) == told
    own = forecast(epochs, GEKOConfig.recommended(light_interval=1), observed=True)
    assert own["freeze_rate"] == 1.0 and "with these settings" in own["text"]


def test_light_samples_of_weight_zero_are_left_out():
    told = forecast([FIRST], GEKOConfig(use_curriculum=False, uniform_finish=0.0))
    assert saved(told)[2] == pytest.approx(1 - (1 + 0.6 + 0.4 / 24) / 2)
    finish = forecast([FIRST], GEKOConfig(use_curriculum=False, uniform_finish=0.5, probes=False))
    assert saved(finish)[4] == pytest.approx(1 - (1 + 0.6 + 1 + 1) / 4)


def test_uniform_training_where_little_is_left_out():
    slow = [epoch(0, 0, 110, 890, 0), epoch(1, 0, 112, 888, 0)]
    told = forecast(slow, RECOMMENDED)
    assert told["pays_from"] is None and told["enough"] is None
    assert "Up to 20 epochs that is less than 10%: use uniform training." in told["text"]
    none_right = forecast([epoch(0, 0, 20, 980, 0)], RECOMMENDED)
    assert none_right["runs"] == [] and none_right["text"] == (
        "After epoch 1, 2% of the samples are right (loss below 0.5). That is too few for a forecast of longer runs: "
        "look again when a tenth is right."
    )
    accurate = forecast([epoch(0, 0, 20, 980, 0)], GEKOConfig(correctness="accuracy", correct_accuracy=0.9))
    assert "2% of the samples are right (accuracy of at least 0.9)." in accurate["text"]
    one_epoch = forecast([epoch(0, 0, 120, 880, 0)], RECOMMENDED)["text"]
    assert "That is not worth it. Usually more is saved" in one_epoch


def test_saved_work_that_is_spent():
    told = forecast([FIRST, SECOND], GEKOConfig.recommended(spend_saved=True))
    assert "with these settings" in told["text"] and "spend_saved uses that work for more training." in told["text"]


@pytest.mark.parametrize(
    "epochs",
    [
        [],
        [epoch(0, None, None, None, None)],
        [epoch(0, 0, 0, 0, 0)],
        [epoch(0, 0, 1, 2, 3, end=0.5)],
        [FIRST | {"nonfinite": 3}],
    ],
    ids=["none", "not measured", "no samples", "half an epoch", "diverged"],
)
def test_nothing_is_told_without_a_full_epoch(epochs):
    assert forecast(epochs, RECOMMENDED) is None


def test_last_epoch_that_was_cut_short_does_not_count():
    assert forecast([FIRST | {"end": 1.0}, SECOND | {"end": 1.5}], RECOMMENDED) == forecast([FIRST], RECOMMENDED)
