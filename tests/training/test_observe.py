"""`observe`: what it records, and that training stays bit for bit the same."""

import json

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import geko_kernels as gk
from geko_kernels.training.observed_tokens import find_shift

Dataset = pytest.importorskip("datasets").Dataset


def _trainer(path, causal, **given):
    torch.manual_seed(0)
    if causal:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=19, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    else:
        model = BertForSequenceClassification(
            BertConfig(vocab_size=19, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        )
    tokens = torch.randint(0, 19, (10, 8), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row if causal else row[0] % 2} for row in tokens]
    options = {"learning_rate": 1e-2, "num_train_epochs": 2, "gradient_accumulation_steps": 2, **given}
    args = TrainingArguments(
        str(path),
        per_device_train_batch_size=3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, args, train_dataset=data)


@pytest.mark.parametrize("causal", [True, False])
def test_observed_training_is_bit_for_bit_the_same(tmp_path, causal):
    plain, observed = _trainer(tmp_path, causal), _trainer(tmp_path, causal)
    torch.manual_seed(7)
    plain.train()
    observation = gk.observe(observed)
    torch.manual_seed(7)
    observed.train()
    losses = [[entry.get("loss") for entry in one.state.log_history] for one in (plain, observed)]
    assert losses[0] == losses[1]
    for a, b in zip(plain.model.state_dict().values(), observed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert observation.losses.shape == (2, 10) and observation.losses.isfinite().all()
    assert observation.state.times_seen.tolist() == [2] * 10
    observation.close()
    assert "compute_loss" not in vars(observed) and "_get_dataloader" not in vars(observed)
    observation.write_samples(tmp_path / "samples.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(10)) and rows[3]["losses"] == observation.losses[:, 3].tolist()


def test_records_equal_those_computed_apart(tmp_path):
    trainer = _trainer(tmp_path, True, num_train_epochs=1, learning_rate=0.0)
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    observation = gk.observe(trainer)
    trainer.train()
    tokens = torch.stack([item["input_ids"] for item in trainer.train_dataset])
    with torch.no_grad():
        logs = trainer.model(tokens).logits[:, :-1].log_softmax(-1)
    chosen = logs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(observation.losses[0], -chosen.mean(1))
    torch.testing.assert_close(observation.label_probabilities[0], chosen.exp().mean(1))
    torch.testing.assert_close(observation.hits[0], (logs.argmax(-1) == tokens[:, 1:]).float().mean(1))


def test_refusals(tmp_path):
    trainer = _trainer(tmp_path, True)
    with pytest.raises(TypeError, match=r"transformers\.Trainer, got int"):
        gk.observe(3)
    gk.observe(trainer)
    with pytest.raises(ValueError, match="observed already"):
        gk.observe(trainer)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        gk.observe(_trainer(tmp_path, True, label_smoothing_factor=0.1))
    trainer = _trainer(tmp_path, True)
    gk.observe(trainer)
    loss = trainer.model.loss_function
    trainer.model.loss_function = lambda *args, **named: 2 * loss(*args, **named)
    with pytest.raises(ValueError, match="is the cross-entropy of the logits"):
        trainer.train()
    trainer = _trainer(tmp_path, True)
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="not an iterable one"):
        gk.observe(trainer)


@pytest.mark.parametrize("given", [{}, {"train_sampling_strategy": "group_by_length"}, {"dataloader_num_workers": 1}])
def test_seq2seq_with_evaluation_and_columns_nobody_reads(tmp_path, given):
    def run(observe):
        torch.manual_seed(0)
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        model = BartForConditionalGeneration(BartConfig(vocab_size=19, max_position_embeddings=16, **sizes, **heads))
        tokens = torch.randint(4, 19, (10, 8), generator=torch.Generator().manual_seed(1)).tolist()
        data = Dataset.from_dict({"input_ids": tokens, "labels": tokens, "source": ["x"] * 10})
        options = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "eval_strategy": "epoch", "use_cpu": True}
        args = Seq2SeqTrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            **options,
            **given,
        )
        trainer = Seq2SeqTrainer(model, args, train_dataset=data, eval_dataset=data)
        observation = gk.observe(trainer) if observe else None
        trainer.train()
        return trainer, observation

    (plain, _), (observed, observation) = run(False), run(True)
    for key in ("loss", "eval_loss"):
        assert [e.get(key) for e in plain.state.log_history] == [e.get(key) for e in observed.state.log_history]
    for a, b in zip(plain.model.state_dict().values(), observed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert observation.state.times_seen.tolist() == [2] * 10


def test_what_is_no_class_index_or_names_no_logits_is_refused(tmp_path):
    trainer = _trainer(tmp_path, False)
    trainer.train_dataset = [{**item, "labels": 0.5} for item in trainer.train_dataset]
    gk.observe(trainer)
    trainer.compute_loss_func = lambda outputs, labels, **named: outputs.logits.sum()
    with pytest.raises(ValueError, match=r"number of a class as label.*got labels of torch.float32 and shape \(3,\)"):
        trainer.train()
    trainer = _trainer(tmp_path, False)
    trainer.model.config.return_dict = False
    gk.observe(trainer)
    with pytest.raises(ValueError, match=r"outputs \(tuple\) have none; call the model with return_dict=True"):
        trainer.train()
    trainer = _trainer(tmp_path, False)
    gk.observe(trainer)
    trainer.get_train_dataloader = lambda: DataLoader(trainer.train_dataset, 3)
    with pytest.raises(ValueError, match="Trainer makes its own dataloader: let its get_train_dataloader return"):
        trainer.train()


def test_a_single_class_is_refused(tmp_path):
    sizes = {"vocab_size": 1, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, intermediate_size=32, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=1, save_strategy="no")
    data = [{"input_ids": [0] * 4, "labels": [0] * 4}] * 4
    trainer = Trainer(LlamaForCausalLM(config), args, default_data_collator, data)
    gk.observe(trainer)
    with pytest.raises(ValueError, match="observe needs logits of at least two classes, got 1"):
        trainer.train()


def test_samples_that_were_not_seen_have_no_bucket(tmp_path):
    trainer = _trainer(tmp_path, False, max_steps=1, gradient_accumulation_steps=1)
    observation = gk.observe(trainer)
    trainer.train()
    observation.write_samples(tmp_path / "samples.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    seen = [row["losses"] != [None] for row in rows]
    assert sum(seen) == 3 and [row["bucket"] is not None for row in rows] == seen


def test_a_recording_trainer_is_refused(tmp_path):
    model = _trainer(tmp_path, True).model
    trainer = gk.GEKOTrainer(model, gk.GEKOTrainingArguments(str(tmp_path), use_cpu=True), train_dataset=[{}])
    with pytest.raises(TypeError, match="GEKOTrainer records its samples already"):
        gk.observe(trainer)


def test_samples_joined_in_one_row_are_refused(tmp_path):
    trainer = _trainer(tmp_path, True)

    def flat(items):
        tokens = torch.cat([item["input_ids"] for item in items])[None]
        return {"input_ids": tokens, "labels": tokens}

    trainer.data_collator = flat
    gk.observe(trainer)
    with pytest.raises(ValueError, match="one row a sample"):
        trainer.train()


def test_a_batch_that_both_shifts_fit_settles_nothing():
    """As at an output layer that begins at zero, where every loss is log V."""
    labels = torch.tensor([[1, 2, 3, 4]])
    assert find_shift(torch.zeros(1, 4, 5), labels, torch.tensor(5.0).log(), None)[1] is False
    logits = torch.randn(1, 4, 5)
    for shift in (False, True):
        loss = gk.weighted_loss(logits, labels, reduction="token_mean", shift=shift)
        assert find_shift(logits, labels, loss, None) == (shift, True)
