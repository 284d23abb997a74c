"""A model whose own loss is no plain cross-entropy of its logits is refused, with both figures."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from test_loss_form import OwnLoop, sentences
from torch import nn
from training import VOCAB, arguments, classified, curve, standard, tiny_config, tiny_llama
from transformers import default_data_collator

import geko_kernels as gk


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


class Weighted(T.LlamaForSequenceClassification):
    """Class weights: equal for the first two classes."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if labels is not None:
            outputs.loss = F.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 1.0, 1.0, 2.0]))
        return outputs


class Reweighted(T.LlamaForCausalLM):
    """One token of the vocabulary counts more."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, **kwargs)
        if labels is not None:
            weight = torch.ones(VOCAB)
            weight[3] = 9
            outputs.loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), weight)
        return outputs


class Smoothed(T.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, **kwargs)
        if labels is not None:
            rows = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            outputs.loss = F.cross_entropy(*rows, label_smoothing=0.1)
        return outputs


class Rows(T.LlamaForCausalLM):
    """The mean over rows of their means."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, **kwargs)
        if labels is not None:
            loss = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
            valid = labels[:, 1:].ne(-100)
            outputs.loss = (loss.sum(1) / valid.sum(1).clamp(min=1)).mean()
        return outputs


def test_one_output_is_refused(tmp_path):
    model = T.LlamaForSequenceClassification(tiny_config(num_labels=1))
    options = {"train_dataset": classified(8), "data_collator": default_data_collator}
    with pytest.raises(ValueError, match="one output, which is regression: .* num_labels=2 or more"):
        gk.GEKOTrainer(model, arguments(tmp_path), **options).train()


def test_a_compiled_model_with_a_term_in_its_forward_is_refused(tmp_path):
    model = torch.compile(OwnLoop(3.0), backend="eager")
    args = arguments(tmp_path, remove_unused_columns=False)
    with pytest.raises(ValueError, match="not a plain cross-entropy"):
        gk.GEKOTrainer(model, args, train_dataset=sentences(8), data_collator=default_data_collator).train()


def focal(model):
    def loss_function(logits, labels, vocab_size, **kwargs):
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return ((1 - (-loss).exp()) * loss).mean()

    model.loss_function = loss_function
    return model


@pytest.mark.parametrize("name", ["class weights", "token weight", "smoothing", "rows", "loss_function"])
def test_another_loss_is_refused(tmp_path, name):
    model, data = {
        "class weights": (lambda: Weighted(tiny_config(num_labels=4)), classified(12)),
        "token weight": (lambda: Reweighted(tiny_config()), sentences(12)),
        "smoothing": (lambda: Smoothed(tiny_config()), sentences(12)),
        "rows": (lambda: Rows(tiny_config()), sentences(12)),
        "loss_function": (lambda: focal(tiny_llama()), sentences(12)),
    }[name]
    torch.manual_seed(0)
    options = {"train_dataset": data, "data_collator": default_data_collator, "config": gk.GEKOConfig.uniform()}
    message = r"not a plain cross-entropy of its logits: on test labels it is \d\.\d{4}, the cross-entropy \d"
    with pytest.raises(ValueError, match=message):
        gk.GEKOTrainer(model(), arguments(tmp_path), **options).train()
    trainer = gk.GEKOTrainer(model(), arguments(tmp_path, shift_labels=name != "class weights"), **options)
    trainer.train()  # the way out that the message names
    assert curve(trainer, "geko/loss") == pytest.approx(curve(trainer), rel=1e-4)


class Squared(nn.Module):
    """A regression: its loss is no cross-entropy, and evaluates as Trainer does."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 2)

    def forward(self, x, labels=None):
        logits = self.head(x)
        return {"loss": (logits.sum(-1) - labels).square().mean(), "logits": logits}


def test_evaluation_alone_is_trainers(tmp_path):
    data = [{"x": [float(i)], "labels": i % 2} for i in range(8)]
    fields = {"eval_dataset": data, "data_collator": default_data_collator}
    model = Squared()
    ours = gk.GEKOTrainer(model, arguments(tmp_path), train_dataset=data, **fields)
    theirs = standard(model, arguments(tmp_path), data, **fields)
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"])
    with pytest.raises(ValueError, match="not a plain cross-entropy"):
        ours.train()


def test_a_model_gone_nan_is_told(tmp_path):
    model = tiny_llama()
    nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="the model's loss is nan before its first step"):
        gk.GEKOTrainer(model, arguments(tmp_path), train_dataset=sentences(8)).train()


def test_labels_of_a_later_batch_that_are_no_classes_are_refused(tmp_path):
    batches = []

    def collate(items):
        batches.append(default_data_collator(items))
        return {**batches[-1], "labels": batches[-1]["labels"].float()} if len(batches) > 2 else batches[-1]

    trainer = gk.GEKOTrainer(tiny_llama(), arguments(tmp_path), collate, sentences(16))
    with pytest.raises(ValueError, match=r"labels must be integers, got torch\.float32"):
        trainer.train()
    assert trainer.state.global_step > 0


class Graph(OwnLoop):
    def forward(self, input_ids, edges, labels=None):
        assert edges.is_sparse
        return super().forward(input_ids, labels)


def test_a_sparse_input_is_not_cut(tmp_path):
    def collate(items):
        return {**default_data_collator(items), "edges": torch.eye(len(items)).to_sparse()}

    args = arguments(tmp_path, num_train_epochs=1, remove_unused_columns=False)
    trainer = gk.GEKOTrainer(Graph(), args, collate, sentences(8))
    trainer.train()
    assert len(curve(trainer)) == 2
