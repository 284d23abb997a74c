"""Unusual data under `GEKOConfig.uniform()`: the run of transformers.Trainer, or an error that names the reason."""

from __future__ import annotations

import math

import datasets
import pytest
import torch
import transformers as T
from training import arguments, curve, sentences, standard, tiny_llama, trainer_of, weights

import geko_kernels as gk


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


def both(folder, data, model=tiny_llama, eval_dataset=None, **fields):
    """(GEKOTrainer, Trainer), not yet trained."""
    args = arguments(folder, **{"train_sampling_strategy": "sequential", "optim": "sgd", **fields})
    ours = gk.GEKOTrainer(model(), args, train_dataset=data, eval_dataset=eval_dataset, config=gk.GEKOConfig.uniform())
    return ours, standard(model(), args, data, data_collator=ours.data_collator, eval_dataset=eval_dataset)


def masked_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return T.BertForMaskedLM(T.BertConfig(vocab_size=32, max_position_embeddings=64, **sizes, **off))


FIRST = {
    "one label, where nothing predicts it": {"input_ids": [1, 2, 3], "labels": [1, -100, -100]},
    "two tokens, one label": {"input_ids": [1, 2], "labels": [1, -100]},
    "one token": {"input_ids": [1], "labels": [1]},
    "one token, its mask": {"input_ids": [1], "labels": [1], "attention_mask": [1]},
    "one token without a label": {"input_ids": [1], "labels": [-100]},
    "labels under the mask": {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 0, 0]},
}


@pytest.mark.parametrize("model", [tiny_llama, masked_model])
@pytest.mark.parametrize("first", FIRST)
def test_a_first_batch_in_which_little_is_predicted(tmp_path, first, model):
    """The model's own loss of it may be NaN, a mean of no labels, which tells nothing about its form."""
    rest = [{**item, "attention_mask": [1] * 8} if "attention_mask" in FIRST[first] else item for item in sentences(5)]
    ours, theirs = both(tmp_path, [FIRST[first], *rest], model, per_device_train_batch_size=1)
    ours.train()
    theirs.train()
    assert len(curve(theirs)) == 18 and ours._found.form.shift == (model is tiny_llama)
    torch.testing.assert_close(curve(ours), curve(theirs), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(ours.model), weights(theirs.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metrics", [None, lambda _: {}])
@pytest.mark.parametrize("unlabelled", [1, 4, 9])
@pytest.mark.parametrize("size", [1, 4])
def test_an_evaluation_batch_without_labels_gives_nan(tmp_path, size, unlabelled, metrics):
    """A loss of 0 would lower the mean: 3.1 where the labelled samples have 3.5."""
    held_out = [{**item, "labels": [-100] * 8} if i < unlabelled else item for i, item in enumerate(sentences(9))]
    pair = both(tmp_path, sentences(8), eval_dataset=held_out, per_device_eval_batch_size=size)
    losses = []
    for trainer in pair:
        trainer.compute_metrics = metrics
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses == pytest.approx([losses[1]] * 2, rel=1e-5, nan_ok=True)
    assert math.isnan(losses[1]) == (unlabelled >= size)


class NoLoss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(32, 8), torch.nn.Linear(8, 32)

    def forward(self, input_ids):
        return {"logits": self.head(self.embed(input_ids))}


def test_an_evaluation_batch_without_labels_gives_nan_for_a_module_without_a_loss(tmp_path):
    rows = [{"input_ids": [1, 2, 3], "labels": [4, 5, 6]}] * 4
    trainer = trainer_of(tmp_path, rows, model=NoLoss(), per_device_eval_batch_size=1)
    labelled = trainer.evaluate(rows)["eval_loss"]
    assert 2 < labelled < 5
    assert math.isnan(trainer.evaluate([*rows, {"input_ids": [1, 2, 3], "labels": [-100] * 3}])["eval_loss"])


@pytest.mark.parametrize("collator", [None, T.default_data_collator])
@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_a_model_that_hides_its_arguments_keeps_no_columns(tmp_path, kind, collator):
    model = torch.compile(tiny_llama(), backend="eager")
    told = r"the forward of OptimizedModule takes .* here \['input_ids'\]\)\. .*remove_unused_columns=False"
    with pytest.raises(ValueError, match=told):
        trainer_of(tmp_path, kind(sentences(8)), model=model, data_collator=collator).train()
    trainer = trainer_of(
        tmp_path, kind(sentences(8)), model=model, data_collator=collator, remove_unused_columns=False, max_steps=1
    )
    trainer.train()
    assert curve(trainer) == [pytest.approx(3.47, abs=0.2)]


def test_a_collator_may_make_the_inputs_of_the_labels(tmp_path):
    def copied(items):
        labels = torch.tensor([item["labels"] for item in items])
        return {"input_ids": labels, "labels": labels}

    rows = [{"labels": [1 + i] * 4} for i in range(8)]
    trainer = trainer_of(tmp_path, rows, data_collator=copied, num_train_epochs=1)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_checkpoint_within_an_epoch_is_not_resumed_with_ignore_data_skip(tmp_path):
    """Trainer begins the epoch anew and ends after as many steps, so a part of the last epoch is missing."""
    saved = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    whole, _ = both(tmp_path / "a", sentences(8), **saved)
    whole.train()
    again, _ = both(tmp_path / "b", sentences(8), **saved, ignore_data_skip=True)
    with pytest.raises(ValueError, match=r"written within an epoch, and ignore_data_skip=True .* False"):
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))  # at its end nothing is to be skipped
    assert weights(again.model).equal(weights(whole.model))


def test_what_is_no_checkpoint_of_ours_is_named(tmp_path):
    ours, theirs = both(tmp_path, sentences(8), max_steps=2, save_strategy="steps", save_steps=1)
    theirs.train()
    with pytest.raises(ValueError, match=r"it has no geko_state.* Another trainer wrote it: load the model from it"):
        ours.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(ValueError, match="checkpoint-9 cannot be resumed by GEKOTrainer: there is no such folder"):
        ours.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


@pytest.mark.parametrize("name", ["index", "sample_id", "sample_ids"])
def test_a_column_of_the_users_may_have_a_name_of_ours(tmp_path, name):
    data = [{**item, name: 100 + i} for i, item in enumerate(sentences(8))]
    ours, theirs = both(tmp_path, data)
    ours.train()
    theirs.train()
    torch.testing.assert_close(curve(ours), curve(theirs), rtol=1e-5, atol=1e-6)
    assert ours.sample_state.times_seen.tolist() == [3] * 8


def test_sample_ids_in_the_batch_are_ours(tmp_path):
    data = [{**item, "sample_ids": 100 + i} for i, item in enumerate(sentences(8))]
    with pytest.raises(ValueError, match="already has 'sample_ids', a name that GEKO needs; rename that column"):
        trainer_of(tmp_path, data, remove_unused_columns=False).train()
