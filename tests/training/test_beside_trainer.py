"""Unusual data under `GEKOConfig.uniform()`: the run of transformers.Trainer, or an error that names the reason."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from training import arguments, curve, sentences, standard, tiny_config, tiny_llama, weights

import geko_kernels as gk


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


def both(folder, data, model=tiny_llama, eval_dataset=None, **fields):
    """(GEKOTrainer, Trainer), not yet trained."""
    args = arguments(folder, **{"train_sampling_strategy": "sequential", "optim": "sgd", **fields})
    ours = gk.GEKOTrainer(
        model(), args, train_dataset=data, eval_dataset=eval_dataset, config=gk.GEKOConfig.uniform()
    )
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
