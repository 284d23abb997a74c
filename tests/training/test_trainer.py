"""GEKOTrainer in one process: its loss, the data and the models it takes."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors import safe_open
from torch import nn
from training import (
    MapDataset,
    arguments,
    classified,
    curve,
    sentences,
    standard,
    tiny_classifier,
    tiny_llama,
    trainer_of,
    weights,
)
from transformers import DataCollatorWithFlattening, default_data_collator

import geko_kernels as gk

FREEZE, LIGHT, FOCUS, HARD = range(4)
ADAM = 5e-5  # at a learning rate of 1e-2 Adam turns the rounding of a gradient near 0 into this much of a weight
PLAIN = {"use_curriculum": False, "uniform_finish": 0.0, "noise_guard": False}


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


# The loss is Trainer's where every weight is 1


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("bf16", [False, True])
def test_uniform_weights_give_the_standard_curve(tmp_path, accumulation, bf16):
    """Order, dropout, learning rate and normalisation included: 22 ragged samples, the last batch is short."""
    options = {"gradient_accumulation_steps": accumulation, "bf16": bf16, "warmup_steps": 2}
    args, data = arguments(tmp_path, **options), sentences(22, ragged=True)
    ours, theirs = tiny_llama(attention_dropout=0.1), tiny_llama(attention_dropout=0.1)
    trainer = gk.GEKOTrainer(ours, args, train_dataset=data, config=gk.GEKOConfig.uniform())
    trainer.train()
    reference = standard(theirs, args, data, data_collator=trainer.data_collator)
    reference.train()
    assert len(curve(reference)) == {1: 18, 4: 6}[accumulation]
    close = {"rtol": 2e-2, "atol": 2e-3} if bf16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(curve(trainer), curve(reference), **close)
    torch.testing.assert_close(curve(trainer, "learning_rate"), curve(reference, "learning_rate"), rtol=1e-9, atol=0)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=5e-2 if bf16 else ADAM)


def test_uniform_weights_give_the_standard_curve_for_classification(tmp_path):
    """Without accumulation: with it Transformers 5.17 adds up the micro-batches' means of a classifier undivided."""
    args, data = arguments(tmp_path), classified(22)
    ours, theirs = tiny_classifier(), tiny_classifier()
    trainer = gk.GEKOTrainer(ours, args, train_dataset=data, config=gk.GEKOConfig.uniform())
    trainer.train()
    reference = standard(theirs, args, data, data_collator=default_data_collator)
    reference.train()
    torch.testing.assert_close(curve(trainer), curve(reference), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=ADAM)
    assert (trainer.sample_state.times_seen == 3).all()


@pytest.mark.parametrize("make", [tiny_llama, tiny_classifier])
def test_micro_batches_equal_one_batch_under_weights(tmp_path, make):
    lm = make is tiny_llama
    config = gk.GEKOConfig(**PLAIN, bucket_weights=(3, 2, 1), correct_loss=3.4 if lm else 1.3)
    data, runs = sentences(16, ragged=True) if lm else classified(16), []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = make()
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = trainer_of(tmp_path, data, config, model, num_train_epochs=1, **options)
        trainer.train()
        runs.append((weights(model), torch.tensor(curve(trainer)), trainer.sample_state.last_loss))
    for one, many in zip(*runs, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-4, atol=ADAM)


def test_the_loss_is_weighted(tmp_path):
    """gekolib never weights its loss."""
    losses = []
    for focus in (1, 2):
        config = gk.GEKOConfig(**PLAIN, bucket_weights=(3, focus, 0))
        trainer = trainer_of(tmp_path, config=config, max_steps=1)
        trainer.train()
        losses.append(curve(trainer)[0])
        assert curve(trainer, "geko/loss")[0] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-5)


# Data


@pytest.mark.parametrize("kind", ["list", "map", "torch", "dict", "datasets"])
def test_any_dataset_with_a_length(tmp_path, kind):
    items = [{**item, "note": "kept out of the model"} for item in sentences(12)]
    before = copy.deepcopy(items)
    if kind == "datasets":
        data = pytest.importorskip("datasets").Dataset.from_list(items)
    elif kind == "torch":
        data = torch.utils.data.Subset(items, range(12))
    else:
        data = {"list": items, "map": MapDataset(items), "dict": dict(enumerate(items))}[kind]
    trainer = trainer_of(tmp_path, data, gk.GEKOConfig.uniform(), data_collator=default_data_collator)
    trainer.train()
    assert items == before  # gekolib writes its ids into the user's items
    assert trainer.sample_state.times_seen.tolist() == [3] * 12
    with torch.no_grad():
        batch = default_data_collator(sentences(12))
        assert trainer.model(**batch).loss < 3.4


def test_ids_are_the_samples_own(tmp_path):
    """Each row of the state is about the item of that index, however the epoch is shuffled."""
    data, model = sentences(12, ragged=True), tiny_llama()
    trainer = trainer_of(tmp_path, data, gk.GEKOConfig.uniform(), model, learning_rate=0.0, num_train_epochs=1)
    trainer.train()
    for i, item in enumerate(data):
        tokens = torch.tensor([item["input_ids"]])
        with torch.no_grad():
            loss = model.eval()(input_ids=tokens, labels=tokens).loss
        torch.testing.assert_close(trainer.sample_state.last_loss[i], loss, rtol=1e-4, atol=1e-5)


def test_quick_start(tmp_path, monkeypatch):
    """As the GEKO document prints it: a tokenizer without padding token, samples of many lengths, no labels."""
    from tiny_model import save_tiny_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    path = save_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = None
    your_dataset = [tokenizer("geko " * n) for n in range(1, 9)]
    trainer = gk.GEKOTrainer(model=model, tokenizer=tokenizer, train_dataset=your_dataset)
    trainer.train()
    report = trainer.get_efficiency_report()
    assert report["samples_forward"] == report["samples_standard"] == 24
    with pytest.raises(TypeError, match="another name of processing_class"):
        gk.GEKOTrainer(model, tokenizer=tokenizer, processing_class=tokenizer)


def state_after(folder, data, collator):
    """The state after one epoch in which nothing is learnt."""
    options = {"num_train_epochs": 1, "learning_rate": 0.0}
    trainer = trainer_of(folder, data, gk.GEKOConfig.uniform(), data_collator=collator, **options)
    trainer.train()
    return trainer.sample_state


def packer(items, sample_ids):
    """Two samples a row, as a packing collator of one's own would do it."""
    rows = {"input_ids": [], "labels": [], "position_ids": [], "sample_ids": []}
    for start in range(0, len(items), 2):
        pair = items[start : start + 2]
        lengths = [len(item["input_ids"]) for item in pair]
        pad = 16 - sum(lengths)
        tokens = [token for item in pair for token in item["input_ids"]]
        labels = [token for item in pair for token in [-100, *item["input_ids"][1:]]]
        rows["input_ids"].append(tokens + [0] * pad)
        rows["labels"].append(labels + [-100] * pad)
        rows["position_ids"].append([place for length in lengths for place in range(length)] + list(range(pad)))
        owners = sample_ids[start : start + 2]
        ids = [owner for owner, length in zip(owners, lengths, strict=True) for _ in range(length)]
        rows["sample_ids"].append(ids + [-1] * pad)
    return {name: torch.tensor(row) for name, row in rows.items()}


def test_merged_rows_count_for_each_sample(tmp_path):
    """Padding-free collators, Transformers' and TRL's, and one that packs on its own."""
    data = sentences(10, ragged=True)
    expected = state_after(tmp_path, data, None)
    collators = [DataCollatorWithFlattening(), packer]
    try:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        collators.append(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True))
    except ImportError:
        pass
    for collator in collators:
        state = state_after(tmp_path, data, collator)
        assert state.times_seen.tolist() == [1] * 10
        if collator is not packer:  # rows of several samples attend across them in this model
            torch.testing.assert_close(state.last_loss, expected.last_loss, rtol=1e-3, atol=1e-3)


def test_a_collator_without_ids_or_function_is_refused():
    with pytest.raises(TypeError, match=r"items of an IdDataset, got dict: wrap the data, IdDataset\(dataset\)"):
        gk.IdCollator(default_data_collator)(sentences(2))
    with pytest.raises(TypeError, match="collator must be callable, got NoneType"):
        gk.IdCollator(None)


@pytest.mark.parametrize("steps", [-1, 3])
def test_a_stream_is_refused_before_trainer_asks_for_max_steps(tmp_path, steps):
    with pytest.raises(ValueError, match="needs a train_dataset with a length and items by index, not an iterable one"):
        trainer_of(tmp_path, iter(sentences(4)), max_steps=steps)


def test_columns_that_the_model_does_not_take_are_named_as_the_reason(tmp_path):
    with pytest.raises(ValueError, match=r"`input_ids`, got none of the columns .* \(remove_unused_columns drops"):
        gk.GEKOTrainer(tiny_llama(), arguments(tmp_path), train_dataset=[{"text": "a"}] * 8).train()


@pytest.mark.parametrize("column", ["labels", "label"])
def test_labels_that_are_texts_are_refused_by_name(column):
    items = gk.IdDataset([{"input_ids": [1, 2], column: text} for text in ("bad", "good")]).__getitems__([0, 1])
    with pytest.raises(ValueError, match=f"column {column}, which holds texts, sample 0 has 'bad': number the classes"):
        gk.IdCollator(default_data_collator)(items)


def test_a_collator_that_hides_whose_tokens_they_are_is_refused(tmp_path):
    def merge(items):
        tokens = torch.tensor([token for item in items for token in item["input_ids"]])
        return {"input_ids": tokens.view(2, -1), "labels": tokens.view(2, -1)}

    with pytest.raises(ValueError, match="unknown which token belongs to which sample"):
        trainer_of(tmp_path, data_collator=merge).train()
    with pytest.raises(ValueError, match="needs labels"):
        trainer_of(tmp_path, data_collator=lambda items: {"input_ids": torch.ones(4, 3, dtype=torch.long)}).train()


@pytest.mark.parametrize("strategy", ["group_by_length", "sequential"])
def test_sampling_strategies(tmp_path, strategy):
    trainer = trainer_of(tmp_path, sentences(30, ragged=True), train_sampling_strategy=strategy, num_train_epochs=1)
    trainer.train()
    plan = trainer.sampler.plan.ids.tolist()
    assert sorted(plan) == list(range(30))
    assert (plan == list(range(30))) == (strategy == "sequential")
    if strategy == "group_by_length":  # of 30 samples Trainer's windows hold 4
        lengths = [3 + sample % 6 for sample in plan]
        assert all(part == sorted(part, reverse=True) for part in (lengths[i : i + 4] for i in range(0, 30, 4)))
        assert lengths != sorted(lengths, reverse=True)


# Models


class Bag(nn.Module):
    """A module of one's own; `form` is how it gives its logits."""

    def __init__(self, form):
        super().__init__()
        self.embed, self.head, self.form = nn.Embedding(32, 8), nn.Linear(8, 32), form

    def forward(self, input_ids):
        logits = self.head(self.embed(input_ids))
        return {"tensor": logits, "tuple": (None, logits), "dict": {"logits": logits}, "none": {"logits": None}}[
            self.form
        ]


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_modules_that_return_logits(tmp_path, form):
    data, eval_data = sentences(12), sentences(4)
    trainer = trainer_of(tmp_path, data, model=Bag(form), eval_dataset=eval_data, data_collator=default_data_collator)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert (trainer.sample_state.times_seen > 0).all()


def test_logits_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="returned no logits"):
        trainer_of(tmp_path, model=Bag("none"), data_collator=default_data_collator).train()


def test_labels_shift_where_asked(tmp_path):
    losses = []
    for shift in (True, False):
        options = {"shift_labels": shift, "max_steps": 1, "data_collator": default_data_collator}
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path, sentences(4), gk.GEKOConfig.uniform(), Bag("tensor"), **options)
        trainer.train()
        losses.append(trainer.efficiency.train["labels"])
    assert losses == [4 * 7, 4 * 8]


def test_adapters_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    trainer = trainer_of(tmp_path, model=model, save_strategy="epoch", config=gk.GEKOConfig.uniform())
    trainer.train()
    assert (trainer.sample_state.times_seen == 3).all()
    assert (tmp_path / "checkpoint-6" / "adapter_model.safetensors").exists()


def test_compiled_models_save_their_own_names(tmp_path):
    """gekolib's checkpoints of compiled models carry `_orig_mod.` keys."""
    options = {"torch_compile": True, "torch_compile_backend": "eager", "save_strategy": "epoch", "num_train_epochs": 1}
    trainer_of(tmp_path, sentences(8), **options).train()
    with safe_open(tmp_path / "checkpoint-2" / "model.safetensors", "pt") as file:
        assert all(name.startswith(("model.", "lm_head.")) for name in file.keys())  # noqa: SIM118
