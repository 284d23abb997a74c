"""GEKOConfig, Bucket and MountainCurriculum: values of the definition, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import geko_kernels as gk


def test_bucket_codes():
    assert [(b.name, b.value) for b in gk.Bucket] == [("FREEZE", 0), ("LIGHT", 1), ("FOCUS", 2), ("HARD", 3)]


def test_defaults():
    config = gk.GEKOConfig()
    assert (config.freeze_confidence, config.freeze_quality, config.focus_confidence) == (0.85, 0.80, 0.60)
    assert config.bucket_weights == (3, 1, 0) and config.freeze_weight == 0
    assert (config.correctness, config.correct_loss, config.correct_accuracy) == ("loss", 0.5, 1.0)
    assert (config.quality, config.q_value_lr, config.q_value_loss_scale) == ("rise", 0.1, 10.0)
    assert config.min_q_for_freeze == 0 and config.use_curriculum and not config.spend_saved


def test_presets():
    assert gk.GEKOConfig.aggressive() == gk.GEKOConfig(
        freeze_confidence=0.9, freeze_quality=0.85, bucket_weights=(5, 2, 0)
    )
    assert gk.GEKOConfig.balanced() == gk.GEKOConfig(bucket_weights=(3, 2, 1))
    assert gk.GEKOConfig.conservative() == gk.GEKOConfig(
        freeze_confidence=0.8, freeze_quality=0.75, bucket_weights=(2, 2, 1)
    )
    assert gk.GEKOConfig.gekolib() == gk.GEKOConfig(quality="std", min_q_for_freeze=0.8)
    uniform = gk.GEKOConfig.uniform()
    assert uniform.bucket_weights == (1, 1, 1) and uniform.freeze_weight == 1
    assert not (uniform.use_curriculum or uniform.selection or uniform.probes or uniform.noise_guard)


def test_the_document_s_settings_to_the_letter():
    config = gk.GEKOConfig.original()
    assert (config.freeze_confidence, config.freeze_quality, config.focus_confidence) == (0.85, 0.80, 0.60)
    assert config.bucket_weights == (3, 1, 0) and config.freeze_weight == 0
    assert config.use_curriculum and config.selection
    assert not (config.probes or config.noise_guard or config.uniform_finish or config.spend_saved)


@pytest.mark.parametrize(
    "name", ["recommended", "original", "aggressive", "balanced", "conservative", "gekolib", "uniform"]
)
def test_presets_take_changes(name):
    preset = getattr(gk.GEKOConfig, name)
    assert preset(light_interval=3, freeze_confidence=0.95) == dataclasses.replace(
        preset(), light_interval=3, freeze_confidence=0.95
    )
    with pytest.raises(TypeError, match=r"no fields \['light_intervals'\]; it has freeze_confidence, "):
        preset(light_intervals=3)
    with pytest.raises(ValueError, match="light_interval must be from 1 to 64"):
        preset(light_interval=0)


def test_presets_are_those_of_the_reference_package():
    core = pytest.importorskip("geko.core")
    for name in ("aggressive", "balanced", "conservative"):
        theirs, ours = getattr(core, f"GEKO_{name.upper()}"), getattr(gk.GEKOConfig, name)()
        for field in ("freeze_confidence", "freeze_quality", "focus_confidence", "bucket_weights"):
            assert getattr(ours, field) == getattr(theirs, field)


def test_a_config_is_frozen_and_hashable():
    config = gk.GEKOConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.quality = "std"
    assert len({config, gk.GEKOConfig(), gk.GEKOConfig(bucket_weights=[3, 1, 0])}) == 1


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("freeze_confidence", 0, ValueError, "freeze_confidence must be in (0, 1], got 0"),
        ("freeze_confidence", 1.01, ValueError, "freeze_confidence must be in (0, 1], got 1.01"),
        ("freeze_quality", math.nan, ValueError, "freeze_quality must be in (0, 1], got nan"),
        ("focus_confidence", 0.85, ValueError, "focus_confidence must be below freeze_confidence (0.85), got 0.85"),
        ("focus_confidence", "0.6", TypeError, "focus_confidence must be a number in (0, 1], got '0.6'"),
        ("bucket_weights", (1, 2), ValueError, "bucket_weights must be three finite numbers >= 0 (HARD, FOCUS, LIGHT)"),
        ("bucket_weights", (1, 2, -1), ValueError, "bucket_weights must be three finite numbers >= 0"),
        ("bucket_weights", (1, 2, math.inf), ValueError, "bucket_weights must be three finite numbers >= 0"),
        ("bucket_weights", 3, TypeError, "bucket_weights must be three numbers (HARD, FOCUS, LIGHT), got 3"),
        ("bucket_weights", (1, 2, True), TypeError, "bucket_weights must be three numbers"),
        ("freeze_weight", -1, ValueError, "freeze_weight must be >= 0, got -1"),
        ("correctness", "f1", ValueError, "correctness must be one of ('loss', 'accuracy'), got 'f1'"),
        ("correct_loss", 0, ValueError, "correct_loss must be > 0, got 0"),
        ("correct_accuracy", 2, ValueError, "correct_accuracy must be in (0, 1], got 2"),
        ("quality", "var", ValueError, "quality must be one of ('rise', 'std'), got 'var'"),
        ("q_value_lr", 0, ValueError, "q_value_lr must be in (0, 1], got 0"),
        ("q_value_loss_scale", math.inf, ValueError, "q_value_loss_scale must be > 0, got inf"),
        ("min_q_for_freeze", -0.1, ValueError, "min_q_for_freeze must be in [0, 1], got -0.1"),
        ("uniform_finish", 1, ValueError, "uniform_finish must be in [0, 1), got 1"),
        ("noise_guard_margin", 0, ValueError, "noise_guard_margin must be > 0, got 0"),
        ("light_interval", 0, ValueError, "light_interval must be from 1 to 64, got 0"),
        ("light_interval", 2.0, TypeError, "light_interval must be an integer from 1 to 64, got 2.0"),
        ("noise_guard_min_share", 1, ValueError, "noise_guard_min_share must be in [0, 1), got 1"),
        ("spend_saved", "yes", TypeError, "spend_saved must be True or False, got 'yes'"),
        ("use_curriculum", 1, TypeError, "use_curriculum must be True or False, got 1"),
        ("probes", None, TypeError, "probes must be True or False, got None"),
    ],
)
def test_what_is_refused(field, value, error, message):
    with pytest.raises(error, match=re.escape(message)):
        gk.GEKOConfig(**{field: value})


def test_a_config_survives_json():
    for config in (gk.GEKOConfig(), gk.GEKOConfig.uniform(), gk.GEKOConfig(bucket_weights=(1.5, 0, 2))):
        assert gk.GEKOConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_field_is_named():
    with pytest.raises(ValueError, match=re.escape("unknown fields ['warp']")):
        gk.GEKOConfig.from_dict({"warp": 9})


@pytest.mark.parametrize(
    ("progress", "phase", "weights"),
    [
        (0, "warmup", (1, 2, 3)),
        (0.1499999, "warmup", (1, 2, 3)),
        (0.15, "ascent", (2, 3, 1)),
        (0.35, "peak", (5, 2, 0)),
        (0.6499999, "peak", (5, 2, 0)),
        (0.65, "descent", (2, 3, 1)),
        (0.85, "consolidate", (1, 2, 3)),
        (1, "consolidate", (1, 2, 3)),
    ],
)
def test_phases(progress, phase, weights):
    curriculum = gk.MountainCurriculum()
    assert curriculum.phase(progress) is gk.Phase(phase) and curriculum.weights(progress) == weights
    assert str(curriculum.phase(progress)) == phase


@given(st.floats(0, 1), st.floats(0, 1))
def test_phases_come_in_order(one, other):
    order = list(gk.Phase)
    low, high = sorted((one, other))
    curriculum = gk.MountainCurriculum()
    assert order.index(curriculum.phase(low)) <= order.index(curriculum.phase(high))


@pytest.mark.parametrize("progress", [-1e-9, 1.0000001, math.nan])
def test_progress_outside_the_run(progress):
    with pytest.raises(ValueError, match=re.escape("progress must be in [0, 1], got")):
        gk.MountainCurriculum().weights(progress)


def test_progress_that_is_no_number():
    with pytest.raises(TypeError, match=r"progress must be a number in \[0, 1\], got '0.5'"):
        gk.MountainCurriculum().weights("0.5")


def test_fields_that_are_no_dict():
    with pytest.raises(TypeError, match=r"fields must be a dict, as to_dict\(\) returns, got NoneType"):
        gk.GEKOConfig.from_dict(None)
