"""Unusual data under `GEKOConfig.uniform()`: the run of transformers.Trainer, or an error that names the reason."""

from __future__ import annotations

import math

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
