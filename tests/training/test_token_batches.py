"""`GEKOConfig(batch_tokens=...)`: batches of a plan filled by tokens, padded and without padding."""

from __future__ import annotations

import pytest
import torch
from training import MapDataset, sentences, tiny_llama, trainer_of, weights
from transformers import DataCollatorWithFlattening

import geko_kernels as gk
from geko_kernels.losses.logits import weighted_loss
from geko_kernels.training.token_batches import sample_lengths

datasets = pytest.importorskip("datasets")
UNIFORM = gk.GEKOConfig.uniform


def documents(count=30, longest=12):
    return [{"input_ids": [1 + (i * 5 + j) % 31 for j in range(1 + i * 7 % longest)]} for i in range(count)]


def form(name):
    return {"data_collator": DataCollatorWithFlattening()} if name == "flat" else {}


def batches_of(trainer):
    """[(ids, tokens)] of the training batches of the next epoch."""
    found = []
    for batch in trainer.get_train_dataloader():
        ids = batch["sample_ids"]
        flat = ids if ids.dim() == 1 else torch.unique_consecutive(ids[0])
        found.append((flat.tolist(), batch["input_ids"].numel()))
    return found


@pytest.mark.parametrize("collator", ["padded", "flat"])
def test_batches_are_as_full_as_their_tokens_allow(tmp_path, collator):
    data = documents()
    trainer = trainer_of(tmp_path, data, UNIFORM(batch_tokens=25), **form(collator))
    batches = batches_of(trainer)
    lengths = [len(item["input_ids"]) for item in data]
    order = [sample for ids, _ in batches for sample in ids]
    expected = torch.randperm(30, generator=torch.Generator().manual_seed(42)).tolist()
    assert order == expected  # as Trainer draws them
    for (ids, tokens), (following, _) in zip(batches, batches[1:], strict=False):
        sizes = [lengths[i] for i in [*ids, following[0]]]
        more = sum(sizes) if collator == "flat" else max(sizes) * len(sizes)
        assert tokens <= 25 < more
        assert tokens == (sum(sizes[:-1]) if collator == "flat" else max(sizes[:-1]) * len(ids))


def test_the_loss_of_flat_batches_is_that_of_padded_ones(tmp_path):
    """One batch an epoch: padded or flat, the same gradients and the same learning state."""
    runs = []
    for name, tokens in (("padded", 10_000), ("flat", 10_000)):
        config = gk.GEKOConfig.recommended(batch_tokens=tokens)
        trainer = trainer_of(tmp_path / name, documents(), config, optim="sgd", learning_rate=0.1, **form(name))
        trainer.train()
        runs.append(trainer)
    assert runs[0].state.global_step == runs[1].state.global_step == 3
    torch.testing.assert_close(weights(runs[1].model), weights(runs[0].model), rtol=1e-5, atol=1e-6)
    for column in ("times_seen", "bucket", "last_loss"):
        ours, theirs = (getattr(run.sample_state, column).float() for run in runs)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_each_documents_loss_is_the_one_computed_alone(tmp_path):
    config, data = UNIFORM(batch_tokens=40), documents()
    trainer = trainer_of(tmp_path, data, config, num_train_epochs=1, learning_rate=0.0, **form("flat"))
    trainer.train()
    model, state = tiny_llama(), trainer.sample_state
    for i, item in enumerate(data):
        tokens = torch.tensor([item["input_ids"]])
        if tokens.shape[1] == 1:  # nothing to predict
            assert state.times_seen[i] == 0
            continue
        alone = weighted_loss(model(tokens).logits, tokens, None, None, shift=True)
        assert state.times_seen[i] == 1
        assert state.last_loss[i].item() == pytest.approx(alone.item(), rel=1e-5)


def learnable(**fields):
    """`recommended()` with thresholds so low that samples freeze and thaw within a few epochs."""
    low = {"correct_loss": 2.6, "freeze_confidence": 0.14, "focus_confidence": 0.1, "freeze_quality": 0.1}
    return gk.GEKOConfig.recommended(**low, **fields)


@pytest.mark.parametrize("collator", ["padded", "flat"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_selection_shortens_epochs_and_the_rate_falls(tmp_path, collator, accumulation):
    data = sentences(30, ragged=True)
    fields = {"num_train_epochs": 10, "gradient_accumulation_steps": accumulation, "learning_rate": 2e-2}
    trainer = trainer_of(tmp_path, data, learnable(batch_tokens=24), **fields, **form(collator))
    trainer.train()
    report = trainer.get_efficiency_report()
    samples, steps = ([epoch[name] for epoch in report["epochs"]] for name in ("samples", "steps"))
    assert samples[0] == 30 and min(samples) < 20
    assert min(steps) < steps[0]
    assert sum(steps) == trainer.state.global_step == trainer.state.max_steps
    assert report["samples_standard"] == 300 and report["samples_backward"] == sum(samples)
    assert 0 < report["saved_compute"] < 1
    assert report["samples_forward"] > report["samples_backward"]  # probes
    assert trainer.lr_scheduler.get_last_lr()[0] < 1e-6
    assert trainer.state.epoch == 10


def test_max_steps_is_kept_to(tmp_path):
    data = sentences(30, ragged=True)
    trainer = trainer_of(tmp_path, data, learnable(batch_tokens=24), max_steps=23, learning_rate=2e-2)
    trainer.train()
    assert trainer.state.global_step == 23
    assert trainer.lr_scheduler.get_last_lr()[0] < 1e-6


@pytest.mark.parametrize("fields", [{"num_train_epochs": 0.5}, {"num_train_epochs": 2.5}])
def test_partial_epochs(tmp_path, fields):
    trainer = trainer_of(tmp_path, sentences(30), UNIFORM(batch_tokens=24), **fields)  # 3 a batch
    trainer.train()
    assert trainer.state.global_step == 10 * fields["num_train_epochs"]
    assert int(trainer.sample_state.times_seen.sum()) == 30 * fields["num_train_epochs"]


def test_drop_last_drops_no_batch_of_one_process(tmp_path):
    trainer = trainer_of(tmp_path, sentences(31), UNIFORM(batch_tokens=24), dataloader_drop_last=True)
    trainer.train()
    assert trainer.state.global_step == 33
    assert trainer.sample_state.times_seen.tolist() == [3] * 31


@pytest.mark.parametrize("collator", ["padded", "flat"])
@pytest.mark.parametrize("fields", [{}, {"gradient_accumulation_steps": 2}, {"max_steps": 30}])
def test_resuming_in_mid_epoch_is_exact(tmp_path, collator, fields):
    fields = {"num_train_epochs": 8, "learning_rate": 2e-2, "save_strategy": "steps", "save_steps": 3, **fields}
    data, config = sentences(30, ragged=True), learnable(batch_tokens=24)
    whole = trainer_of(tmp_path, data, config, **fields, **form(collator))
    whole.train()
    for step in (6, 9):
        again = trainer_of(tmp_path, data, config, **fields, **form(collator))
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert torch.equal(weights(again.model), weights(whole.model))
        assert again.state.global_step == whole.state.global_step
        for name, column in whole.sample_state.state_dict().items():
            assert torch.equal(again.sample_state.state_dict()[name], column), name
        reports = [trainer.get_efficiency_report() for trainer in (again, whole)]
        for name in ("samples_forward", "samples_backward", "tokens_forward", "samples_standard"):
            assert reports[0][name] == reports[1][name], name


def test_resuming_another_kind_of_batch_is_refused(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer_of(tmp_path, sentences(12), UNIFORM(batch_tokens=24), **fields).train()
    again = trainer_of(tmp_path, sentences(12), UNIFORM(), **fields)
    with pytest.raises(
        ValueError, match=r"planned in packs, but this run plans single samples: resume with the same packing"
    ):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_resuming_with_other_batch_tokens_is_told(tmp_path, caplog):
    """The epoch at hand keeps its batches, the next one has the new ones."""
    fields = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    trainer_of(tmp_path, sentences(12), UNIFORM(batch_tokens=24), **fields).train()  # 4 batches of 3
    again = trainer_of(tmp_path, sentences(12), UNIFORM(batch_tokens=48), **fields)
    with caplog.at_level("WARNING"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "batch_tokens was 24, is 48: the rest of the current epoch keeps its plan" in caplog.text
    assert [epoch["steps"] for epoch in again.get_efficiency_report()["epochs"]] == [4, 2]
    assert again.sample_state.times_seen.tolist() == [2] * 12


def test_length_groups_pay_less_padding(tmp_path):
    sizes = []
    for name in ("random", "group_by_length"):
        config = UNIFORM(batch_tokens=36)
        trainer = trainer_of(tmp_path, documents(300), config, train_sampling_strategy=name)
        batches = batches_of(trainer)
        assert sorted(sample for ids, _ in batches for sample in ids) == list(range(300))
        sizes.append(sum(tokens for _, tokens in batches))
    assert sizes[1] < 0.8 * sizes[0]


def test_no_batch_straddles_the_uniform_finish(tmp_path):
    config = learnable(batch_tokens=40, uniform_finish=0.2)
    trainer = trainer_of(tmp_path, sentences(30, ragged=True), config, num_train_epochs=3, **form("flat"))
    trainer.train()
    plan = trainer.sampler.plan
    assert 0 < plan.selected < len(plan.ids) and plan.selected in plan.packs.tolist()
    assert trainer.lr_scheduler.get_last_lr()[0] < 1e-6


def test_workers_load_packs(tmp_path):
    fields = {"dataloader_num_workers": 2, "num_train_epochs": 1}
    trainer = trainer_of(tmp_path, sentences(30, ragged=True), UNIFORM(batch_tokens=24), **fields, **form("flat"))
    trainer.train()
    assert trainer.sample_state.times_seen.tolist() == [1] * 30


def test_probe_batches_have_up_to_four_times_as_many_tokens(tmp_path):
    sizes = []
    trainer = trainer_of(tmp_path, documents(60), learnable(batch_tokens=30), num_train_epochs=1, **form("flat"))
    trainer.train()
    trainer.model.register_forward_pre_hook(
        lambda module, args, named: sizes.append(named["input_ids"].numel()), with_kwargs=True
    )
    before = trainer.sample_state.times_seen.clone()
    trainer._probe(trainer.model, torch.arange(0, 60, 2))
    assert max(sizes) <= 120 and len(sizes) == -(-sum(sizes) // 120)
    long = torch.tensor([len(item["input_ids"]) > 1 for item in documents(60)])
    expected = (torch.arange(60) % 2 == 0) & long
    assert torch.equal(trainer.sample_state.times_seen > before, expected)


def test_a_document_longer_than_a_batch_is_named(tmp_path):
    data = documents(20, longest=12)
    trainer = trainer_of(tmp_path, data, UNIFORM(batch_tokens=9))
    words = r"5 of the 20 rows of train_dataset have more tokens than batch_tokens=9, first row 3, which has 10; the "
    with pytest.raises(ValueError, match=words + r"longest has 12\. No document is cut: raise batch_tokens to 12"):
        trainer.train()


def test_padding_to_a_multiple_is_counted(tmp_path):
    from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    collator = DataCollatorForSeq2Seq(
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"), pad_to_multiple_of=8
    )
    data = [{**item, "labels": item["input_ids"]} for item in documents()]
    sizes = [
        tokens for _, tokens in batches_of(trainer_of(tmp_path, data, UNIFORM(batch_tokens=40), data_collator=collator))
    ]
    assert max(sizes) == 40 and all(size % 8 == 0 for size in sizes)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"auto_find_batch_size": True}, "batch_tokens cannot be combined with auto_find_batch_size=True"),
        ({"accelerator_config": {"split_batches": True}}, "batch_tokens cannot be combined with split_batches=True"),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            "batch_tokens cannot be combined with dispatch_batches",
        ),
        ({"probe_batch_size": 3}, "probe_batch_size cannot be combined with batch_tokens"),
    ],
)
def test_refused_by_name(tmp_path, fields, words):
    with pytest.raises(ValueError, match=words):
        trainer_of(tmp_path, sentences(8), UNIFORM(batch_tokens=24), **fields)


def test_config_fields_are_checked():
    for name in ("batch_tokens", "probe_batch_size"):
        with pytest.raises(TypeError, match=f"{name} must be an integer of at least 1, or None, got 1.5"):
            gk.GEKOConfig(**{name: 1.5})
        with pytest.raises(ValueError, match=f"{name} must be at least 1, or None, got 0"):
            gk.GEKOConfig(**{name: 0})
        with pytest.raises(ValueError, match=rf"config\.{name} is for GEKOTrainer"):
            gk.GEKOLoader([1, 2], config=gk.GEKOConfig(**{name: 4}))
    with pytest.raises(ValueError, match="leave out one of them"):
        gk.GEKOConfig(batch_tokens=8, probe_batch_size=2)


def test_lengths_of_every_kind_of_dataset():
    items = documents(9)
    lengths = [len(item["input_ids"]) for item in items]
    table = datasets.Dataset.from_list(items)
    mixed = table.shuffle(seed=0)
    assert sample_lengths(table).tolist() == sample_lengths(items).tolist() == lengths
    assert sample_lengths(MapDataset(items)).tolist() == lengths
    assert sample_lengths(mixed).tolist() == [len(item["input_ids"]) for item in mixed]
    assert sample_lengths(mixed.with_format("torch")).tolist() == sample_lengths(mixed).tolist()
    cut = table.with_transform(lambda rows: {"input_ids": [row[:2] for row in rows["input_ids"]]})
    assert sample_lengths(cut).tolist() == [min(length, 2) for length in lengths]
    told = datasets.Dataset.from_dict({"text": ["a", "b"], "length": [3, 5]})
    assert sample_lengths(told).tolist() == [3, 5]
    assert sample_lengths([{"text": "a", "tokens": 3}], "tokens").tolist() == [3]
    words = r"train_dataset\[0\] has the keys \['pixels'\]: tokenise the dataset, add a column 'length', or leave"
    with pytest.raises(ValueError, match=words):
        sample_lengths([{"pixels": 1}])
    with pytest.raises(ValueError, match=r"train_dataset\[1\] has no input_ids"):
        sample_lengths(datasets.Dataset.from_dict({"input_ids": [[1], None, [2, 3]]}))


def test_lengths_are_learnt_once(tmp_path):
    reads = []

    class Counting(MapDataset):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    trainer = trainer_of(tmp_path, Counting(sentences(8)), UNIFORM(batch_tokens=24), num_train_epochs=1)
    for _ in range(2):
        trainer.get_train_dataloader()
    assert reads.count(3) == 1
