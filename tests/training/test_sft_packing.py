"""GEKOSFTTrainer without padding: padding-free batches, and documents packed after selection."""

from __future__ import annotations

import json

import pytest
import torch
from auto_run import few_samples
from test_sft import chat_tokenizer, rows, trainer_of
from training import tiny_llama, weights

import geko_kernels as gk
from geko_kernels.losses.logits import weighted_loss

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
UNIFORM = gk.GEKOConfig.uniform
PACKED = {"packing": True, "max_length": 16}
FREE = {"padding_free": True, "max_length": None}
RUN = {"max_steps": -1, "num_train_epochs": 8, "learning_rate": 2e-2, "optim": "adamw_torch"}


def learnable(**fields):
    """`recommended()` with thresholds so low that samples freeze within a few epochs."""
    low = {"correct_loss": 2.6, "freeze_confidence": 0.14, "focus_confidence": 0.1, "freeze_quality": 0.1}
    return gk.GEKOConfig.recommended(**low, **fields)


def repeated(number=24):
    """Each text repeats one word."""
    return datasets.Dataset.from_dict({"text": [" ".join([f"w{i % 20}"] * (2 + i % 5)) for i in range(number)]})


def packs_of(trainer):
    """[[ids of a batch]] of the next epoch, and the batches."""
    batches = list(trainer.get_train_dataloader())
    ids = [b["sample_ids"] for b in batches]
    return [(torch.unique_consecutive(i[0]) if i.dim() == 2 else i).tolist() for i in ids], batches


@pytest.mark.parametrize("kind", ["text", "prompt"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_padding_free_trains_as_sft_does(tmp_path, kind, accumulation):
    fields = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation, **FREE}
    fields["eval_dataset"] = rows(kind, 5)
    plain = trainer_of(trl.SFTTrainer, tmp_path / "a", rows(kind), **fields)
    ours = trainer_of(gk.GEKOSFTTrainer, tmp_path / "b", rows(kind), config=UNIFORM(), **fields)
    for trainer in (plain, ours):
        trainer.train()
    for key in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
        curves = [[e[key] for e in t.state.log_history if key in e] for t in (plain, ours)]
        assert len(curves[0]) == 3 and curves[1] == pytest.approx(curves[0], rel=1e-4), key
    torch.testing.assert_close(weights(ours.model), weights(plain.model), rtol=1e-4, atol=1e-6)
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    assert ours.sample_state.times_seen.tolist() == [1] * 12


def test_padding_free_batches_of_one_document(tmp_path):
    fields = {**FREE, "per_device_train_batch_size": 1}
    plain = trainer_of(trl.SFTTrainer, tmp_path / "a", rows("text"), **fields)
    ours = trainer_of(gk.GEKOSFTTrainer, tmp_path / "b", rows("text"), config=UNIFORM(), **fields)
    losses = [trainer.train().training_loss for trainer in (plain, ours)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention trains on a CUDA device only")
FLEX = pytest.param("flex_attention", marks=[pytest.mark.gpu, NO_GPU])


@pytest.mark.parametrize("attention", ["eager", "sdpa", FLEX])
@pytest.mark.parametrize("fields", [FREE, PACKED])
def test_each_documents_loss_is_the_one_computed_alone(tmp_path, attention, fields):
    on_gpu = attention == "flex_attention"
    model = tiny_llama(attn_implementation=attention, **({"hidden_size": 64} if on_gpu else {}))
    args = trl.SFTConfig(
        output_dir=str(tmp_path), num_train_epochs=1, learning_rate=0.0, report_to="none", use_cpu=not on_gpu,
        bf16=False, save_strategy="no", per_device_train_batch_size=2, disable_tqdm=True, use_cache=True, **fields,
    )  # fmt: skip
    args._n_gpu = min(args.n_gpu, 1)  # else Trainer takes nn.DataParallel where several GPUs are visible
    data = rows("text", 20)
    trainer = gk.GEKOSFTTrainer(model, args, train_dataset=data, processing_class=chat_tokenizer(), config=UNIFORM())
    trainer.train()
    assert trainer.sample_state.times_seen.tolist() == [1] * 20
    for i in range(20):
        tokens = torch.tensor([trainer.train_dataset[i]["input_ids"]], device=model.device)
        alone = weighted_loss(model(tokens).logits, tokens, None, None, shift=True)
        close = pytest.approx(alone.item(), rel=1e-3 if on_gpu else 1e-5)  # the GPU's attention multiplies in TF32
        assert trainer.sample_state.last_loss[i].item() == close


def test_rows_are_packed_anew_in_each_epoch(tmp_path):
    data = rows("text", 40)
    trainer = trainer_of(
        gk.GEKOSFTTrainer, tmp_path, data, config=UNIFORM(), per_device_train_batch_size=2,
        train_sampling_strategy="random", max_steps=-1, num_train_epochs=2, **PACKED,
    )  # fmt: skip
    assert len(trainer.train_dataset) == len(trainer.sample_state) == 40
    assert trainer.train_dataset.column_names == ["input_ids", "labels"]
    loader = trainer.get_train_dataloader()
    epochs = []
    for _ in range(2):
        batches = [(b["sample_ids"][0], b) for b in loader]
        ids = [torch.unique_consecutive(tokens).tolist() for tokens, _ in batches]
        assert sorted(sum(ids, [])) == list(range(40))  # every document once
        sizes = [batch["input_ids"].shape[1] for _, batch in batches]
        total = sum(len(trainer.train_dataset[i]["input_ids"]) for i in range(40))
        assert sum(sizes) == total and max(sizes) <= 32  # no padding; two rows of 16 tokens
        assert len(loader) == len(ids) == -(-len(trl.pack_dataset(trainer.train_dataset, 16)) // 2)
        for tokens, batch in batches:
            for sample in tokens.unique().tolist():
                whole = trainer.train_dataset[sample]["input_ids"]
                assert batch["input_ids"][0][tokens == sample].tolist() == whole
                assert batch["position_ids"][0][tokens == sample].tolist() == list(range(len(whole)))
        epochs.append(ids)
    assert epochs[0] != epochs[1]


def test_batch_tokens_sizes_packed_and_padding_free_batches(tmp_path):
    for name, fields in (("packed", PACKED), ("free", FREE), ("padded", {})):
        config = UNIFORM(batch_tokens=40)
        trainer = trainer_of(gk.GEKOSFTTrainer, tmp_path / name, rows("text", 40), config=config, **fields)
        ids, batches = packs_of(trainer)
        assert sorted(sum(ids, [])) == list(range(40)), name
        sizes = [batch["input_ids"].numel() for batch in batches]
        assert max(sizes) <= 40 and sorted(sizes)[1] > 24, name
        total = sum(len(trainer.train_dataset[i]["input_ids"]) for i in range(40))
        assert sum(sizes) == total or name == "padded"
        if name == "packed":
            assert len(sizes) == -(-total // 40)
        trainer.train()
        assert trainer.state.global_step == 3


@pytest.mark.parametrize("fields", [FREE, PACKED, {**PACKED, "per_device_train_batch_size": 1}])
@pytest.mark.parametrize("tokens", [None, 20])
def test_selection_leaves_documents_out(tmp_path, fields, tokens):
    trainer = trainer_of(
        gk.GEKOSFTTrainer, tmp_path, repeated(), config=learnable(batch_tokens=tokens), **{**RUN, **fields}
    )
    trainer.train()
    report = trainer.get_efficiency_report()
    samples, steps = ([epoch[name] for epoch in report["epochs"]] for name in ("samples", "steps"))
    assert samples[0] == 24 and min(samples) < 16
    assert min(steps) < steps[0] and sum(steps) == trainer.state.global_step
    assert report["samples_standard"] == 8 * 24
    assert report["saved_compute"] > 0
    assert trainer.lr_scheduler.get_last_lr()[0] < 1e-6
    assert int(trainer.sample_state.times_seen.min()) >= 2


@pytest.mark.parametrize(("rows_a_batch", "largest"), [(None, 128), (3, 48)])
def test_probes_are_packed_too(tmp_path, rows_a_batch, largest):
    """4 x 2 rows of 16 tokens, or as many as `probe_batch_size` says; documents left apart."""
    config = learnable(probe_batch_size=rows_a_batch)
    trainer = trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text", 60), config=config, per_device_train_batch_size=2,
                         max_steps=1, learning_rate=0.0, use_cache=True, packing=True, max_length=16)  # fmt: skip
    trainer.train()
    sizes = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, named: sizes.append(named["input_ids"].numel()), with_kwargs=True
    )
    trainer._probe(trainer.model, torch.arange(60))
    total = sum(len(trainer.train_dataset[i]["input_ids"]) for i in range(60))
    assert sum(sizes) == total and max(sizes) <= largest and len(sizes) <= -(-total // largest) + 1
    for i in (0, 31, 59):
        tokens = torch.tensor([trainer.train_dataset[i]["input_ids"]])
        alone = weighted_loss(trainer.model(input_ids=tokens).logits, tokens, None, None, shift=True)
        assert trainer.sample_state.last_loss[i].item() == pytest.approx(alone.item(), rel=1e-5)


@pytest.mark.parametrize("fields", [FREE, PACKED, {**PACKED, "gradient_accumulation_steps": 2}])
def test_resuming_in_mid_epoch_is_exact(tmp_path, fields):
    fields = {**RUN, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2, **fields}
    whole = trainer_of(gk.GEKOSFTTrainer, tmp_path, repeated(), config=learnable(), **fields)
    whole.train()
    steps = [epoch["steps"] for epoch in whole.get_efficiency_report()["epochs"]]
    ends = [sum(steps[: k + 1]) for k in range(len(steps))]
    assert any(step not in ends for step in (3, 6))  # in the middle of an epoch
    for step in (3, 6):
        again = trainer_of(gk.GEKOSFTTrainer, tmp_path, repeated(), config=learnable(), **fields)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert torch.equal(weights(again.model), weights(whole.model))
        assert again.state.global_step == whole.state.global_step
        assert torch.equal(again.sample_state.times_seen, whole.sample_state.times_seen)
        assert torch.equal(again.sample_state.last_loss, whole.sample_state.last_loss)


def test_documents_are_truncated_as_without_packing(tmp_path):
    for mode, first in (("keep_start", slice(None, 4)), ("keep_end", slice(-4, None))):
        fields = {"packing": True, "max_length": 4, "truncation_mode": mode}
        trainer = trainer_of(gk.GEKOSFTTrainer, tmp_path / mode, rows("text"), config=UNIFORM(), **fields)
        longer = trainer_of(gk.GEKOSFTTrainer, tmp_path / "whole", rows("text"), config=UNIFORM())
        for i in range(12):
            assert trainer.train_dataset[i]["input_ids"] == longer.train_dataset[i]["input_ids"][first]


@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
def test_what_cuts_documents_is_refused_under_selection(tmp_path, strategy):
    fields = {**PACKED, "packing_strategy": strategy}
    words = rf"packing_strategy='{strategy}' cuts them: set packing_strategy='bfd', which is packed again in each"
    for config in (None, learnable(), gk.GEKOConfig(), UNIFORM(noise_guard=True), UNIFORM(bucket_weights=(3, 1, 1))):
        with pytest.raises(ValueError, match=words + r" epoch, or config=GEKOConfig\.uniform\(\)"):
            trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text"), config=config, **fields)


@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
@pytest.mark.parametrize("shuffles", [False, True])
def test_what_cuts_documents_trains_as_sft_under_uniform(tmp_path, strategy, shuffles):
    fields = {"packing": True, "max_length": 8, "packing_strategy": strategy, "shuffle_dataset": shuffles}
    fields["per_device_train_batch_size"] = 2
    plain = trainer_of(trl.SFTTrainer, tmp_path / "a", rows("text", 20), **fields)
    ours = trainer_of(gk.GEKOSFTTrainer, tmp_path / "b", rows("text", 20), config=UNIFORM(), **fields)
    for trainer in (plain, ours):
        trainer.train()
    for key in ("loss", "num_tokens", "entropy"):
        curves = [[e[key] for e in t.state.log_history if key in e] for t in (plain, ours)]
        assert len(curves[0]) == 3 and curves[1] == pytest.approx(curves[0], rel=1e-4), key
    torch.testing.assert_close(weights(ours.model), weights(plain.model), rtol=1e-4, atol=1e-6)
    assert len(ours.sample_state) == len(plain.train_dataset) < 20  # a pack is a sample
    assert ours.sample_state.times_seen.sum() == 6


@pytest.mark.parametrize("eval_packing", [None, False, True])
def test_evaluation_is_sfts(tmp_path, eval_packing):
    """Packed where SFT packs it, also of the dataset that is trained."""
    data = rows("text")
    fields = {**PACKED, "eval_packing": eval_packing, "eval_dataset": data, "max_steps": 1, "learning_rate": 0.0}
    plain = trainer_of(trl.SFTTrainer, tmp_path / "a", data, **fields)
    ours = trainer_of(gk.GEKOSFTTrainer, tmp_path / "b", data, config=UNIFORM(), **fields)
    assert len(ours.train_dataset) == 12
    assert ours.eval_dataset[:] == plain.eval_dataset[:]
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def test_prepared_rows_are_not_packed_again(tmp_path):
    """`skip_prepare_dataset`: SFT takes the rows as they are, whatever `packing` says."""
    packed = trl.pack_dataset(datasets.Dataset.from_dict({"input_ids": [[3, 4, 5]] * 8, "labels": [[3, 4, 5]] * 8}), 6)
    fields = {**PACKED, "dataset_kwargs": {"skip_prepare_dataset": True}, "max_steps": 1}
    plain = trainer_of(trl.SFTTrainer, tmp_path / "a", packed, **fields)
    ours = trainer_of(gk.GEKOSFTTrainer, tmp_path / "b", packed, config=UNIFORM(), **fields)
    losses = [trainer.train().training_loss for trainer in (plain, ours)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(ours.sample_state) == 4


def test_a_batch_is_padded_to_a_multiple_and_a_row_is_not(tmp_path):
    fields = {"packing": True, "max_length": 7, "pad_to_multiple_of": 8, "per_device_train_batch_size": 2}
    trainer = trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text", 20), config=UNIFORM(), **fields)
    ids, batches = packs_of(trainer)
    assert sorted(sample for batch in ids for sample in batch if sample >= 0) == list(range(20))
    assert {batch["input_ids"].shape[1] for batch in batches} == {16}
    trainer.train()


def test_dispatched_batches_are_refused(tmp_path):
    fields = {**PACKED, "accelerator_config": {"dispatch_batches": True}}
    with pytest.raises(
        ValueError, match="packing cannot be combined with dispatch_batches=True: leave one of them out"
    ):
        trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text"), config=UNIFORM(), **fields)


def test_no_max_length_to_pack_into(tmp_path):
    with pytest.raises(ValueError, match=r"packing=True needs max_length, the tokens of a packed row"):
        trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text"), packing=True, max_length=None)


def test_a_document_longer_than_batch_tokens_is_named(tmp_path):
    config = UNIFORM(batch_tokens=6)
    trainer = trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text"), config=config, **PACKED)
    with pytest.raises(ValueError, match=r"3 of the 12 rows of train_dataset have more tokens than batch_tokens=6"):
        trainer.train()


@pytest.mark.parametrize(
    ("form", "tokens"),
    [(PACKED, None), (FREE, None), (FREE, 64), ({}, 64)],
    ids=["packed", "free", "free64", "padded64"],
)
def test_a_run_that_finds_its_own_length_in_any_form(tmp_path, form, tokens):
    """Held-back documents stand in no pack, and looks and swapped answers go through the same batches."""
    config = gk.GEKOConfig.auto(batch_tokens=tokens)
    with few_samples():
        fields = {"max_steps": -1, "num_train_epochs": 2, **form}
        trainer = trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("prompt", 120), config=config, **fields)
        trainer.train()
    report = json.loads((tmp_path / "geko_report.json").read_text())["stopping"]
    seen = trainer.sample_state.times_seen
    assert 0 < len(report["held_back"]) <= 40 and (seen[report["held_back"]] == 0).all()
    assert report["swap_test"] and len(report["curve"]) >= 5
