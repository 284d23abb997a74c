"""Every run over packs ends, draws no sample twice in an epoch, and lets its rate fall; whatever is left to teach."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run_ends import CONFIGS, Holds
from training import trainer_of
from transformers import DataCollatorWithFlattening

import geko_kernels as gk


@settings(max_examples=25)
@given(st.data())
def test_every_packed_run_ends(tmp_path_factory, data):
    size = data.draw(st.integers(1, 14), "size")
    lengths = data.draw(st.lists(st.integers(2, 9), min_size=size, max_size=size), "lengths")
    items = [{"input_ids": [1 + i] * length, "labels": [1 + i] * length} for i, length in enumerate(lengths)]
    kind, drop_last = data.draw(st.sampled_from(["padded", "flat", "rows"]), "kind"), data.draw(st.booleans(), "drop")
    config = data.draw(CONFIGS, "config").to_dict()
    tokens, batch = data.draw(st.sampled_from([9, 16, 40]), "tokens"), data.draw(st.sampled_from([1, 2]), "batch")
    length = data.draw(
        st.sampled_from([{"num_train_epochs": e} for e in (0.4, 1, 3.3)] + [{"max_steps": s} for s in (1, 7)]), "length"
    )
    if kind != "rows":
        config["batch_tokens"] = tokens
    buckets = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size), "buckets")
    hold = Holds(buckets, data.draw(st.sets(st.integers(0, size - 1)), "quarantined"), 0)
    trainer = trainer_of(
        tmp_path_factory.mktemp("run"),
        items,
        gk.GEKOConfig.from_dict(config),
        callbacks=[hold],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=data.draw(st.sampled_from([1, 3]), "accumulation"),
        dataloader_drop_last=drop_last,
        learning_rate=1e-9,
        **({} if kind == "padded" else {"data_collator": DataCollatorWithFlattening()}),
        **length,
    )
    hold.trainer = trainer
    trainer._row_tokens = tokens if kind == "rows" else None  # as GEKOSFTTrainer sets it
    trainer.get_train_dataloader()
    packs, trainer.sampler = trainer.sampler.all_units, None
    if drop_last and kind == "rows" and packs < batch and "num_train_epochs" in length:
        with pytest.raises(ValueError, match=f"{packs} packs, fewer than the {batch} of one batch"):
            trainer.train()
        return
    trainer.train()
    epochs = trainer.get_efficiency_report()["epochs"]
    plan = trainer.sampler.plan
    assert len(plan.ids.unique()) == len(plan.ids) and plan.packs[-1:].sum() == len(plan.ids)
    assert sum(epoch["steps"] for epoch in epochs) == trainer.state.global_step
    assert max(epoch["samples"] for epoch in epochs) <= size
    if "num_train_epochs" in length and not trainer.counts_steps:
        assert len(epochs) == -(-length["num_train_epochs"] // 1)
        assert trainer._progress() == pytest.approx(1.0)
        if epochs[-1]["steps"]:
            assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.0, abs=1e-12)
    elif trainer.state.global_step < trainer._run_steps:  # then there was nothing
        free = torch.ones(size, dtype=torch.bool) & ~trainer.sample_state.quarantined
        assert int(free.sum()) == 0 or drop_last
    else:
        assert trainer.state.global_step == trainer._run_steps
