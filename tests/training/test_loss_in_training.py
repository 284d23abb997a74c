"""Models whose loss differs from a plain cross-entropy in training mode alone, or only for some labels."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from torch import nn
from training import VOCAB, arguments, classified, curve, sentences, standard, tiny_classifier, tiny_config, tiny_llama
from transformers import default_data_collator

import geko_kernels as gk


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


class Tagger(nn.Module):
    """A module whose `loss` a test chooses: of logits (N, V), labels (N,), the mask and the module."""

    def __init__(self, loss):
        super().__init__()
        self.embed, self.head, self.other = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB), nn.Linear(8, VOCAB)
        self.loss = loss

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.embed(input_ids)
        logits = self.head(hidden)
        if labels is None:
            return {"logits": logits}
        rows = logits.flatten(0, 1), labels.flatten()
        return {"loss": self.loss(*rows, attention_mask, self, hidden), "logits": logits}


def smoothed(logits, labels, mask, model, hidden):
    return F.cross_entropy(logits, labels, label_smoothing=0.1 * model.training)


def second_head(logits, labels, mask, model, hidden):
    loss = F.cross_entropy(logits, labels)
    return loss + F.cross_entropy(model.other(hidden).flatten(0, 1), labels) if model.training else loss


def penalised(logits, labels, mask, model, hidden):
    return F.cross_entropy(logits, labels) + 0.1 * model.training * logits.square().mean()


def gathered(logits, labels, mask, model, hidden):
    valid = labels != -100
    return -logits.log_softmax(-1)[valid].gather(1, labels[valid, None]).mean()


def attended(logits, labels, mask, model, hidden):
    valid = mask.flatten() == 1
    return F.cross_entropy(logits[valid], labels[valid])


def pads_by_zero(logits, labels, mask, model, hidden):
    return F.cross_entropy(logits, labels, ignore_index=0)


def padded(count, full=0):
    """The first `full` rows have no padding; padding has label 2."""
    items = []
    for i in range(count):
        pads = 0 if i < full else i % 3
        tokens = [1 + (i + 2 * k) % (VOCAB - 1) for k in range(8 - pads)]
        mask = [1] * len(tokens) + [0] * pads
        items.append({"input_ids": tokens + [0] * pads, "attention_mask": mask, "labels": tokens + [2] * pads})
    return items


def compare(tmp_path, model, data, **fields):
    """(the curves and evaluations of GEKOTrainer, those of Trainer)"""
    args, found = arguments(tmp_path, num_train_epochs=2, **fields), []
    options = {"data_collator": default_data_collator, "eval_dataset": data}
    for ours in (True, False):
        one = copy.deepcopy(model)
        if ours:
            trainer = gk.GEKOTrainer(one, args, train_dataset=data, config=gk.GEKOConfig.uniform(), **options)
        else:
            trainer = standard(one, args, data, **options)
        trainer.train()
        found.append(curve(trainer) + [trainer.evaluate()["eval_loss"]])
    return found


@pytest.mark.parametrize("loss", [smoothed, second_head])
def test_another_loss_in_training_alone_is_refused(tmp_path, loss):
    message = r"own loss, in training mode, is not a plain cross-entropy of its logits: on test labels it is \d"
    with pytest.raises(ValueError, match=message):
        gk.GEKOTrainer(Tagger(loss), arguments(tmp_path), train_dataset=sentences(8)).train()


@pytest.mark.parametrize("loss", [penalised, gathered])
def test_what_can_be_had_exactly_is_trained(tmp_path, loss):
    ours, theirs = compare(tmp_path, Tagger(loss), padded(12, full=12))
    assert ours == pytest.approx(theirs, rel=1e-4)


class Late(T.LlamaForCausalLM):
    """Makes use of its logits in training mode alone."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, **kwargs)
        if self.training:
            outputs.logits = self.late(outputs.logits)
        if labels is not None:
            outputs.loss = self.loss_function(outputs.logits, labels, vocab_size=VOCAB)
        return outputs


@pytest.mark.parametrize("late", [lambda z: 0.5 * z, lambda z: F.dropout(z, 0.3)], ids=["scale", "dropout"])
def test_a_head_whose_logits_are_used_in_training_alone(tmp_path, late):
    model, data = Late(tiny_config()), [{**item, "labels": list(range(1, 9))} for item in sentences(12)]
    Late.late = staticmethod(late)
    ours, theirs = compare(tmp_path, model, data, remove_unused_columns=False)
    assert ours == pytest.approx(theirs, rel=1e-4)


class Unpadded(T.LlamaForCausalLM):
    """Leaves labels of the pad token out of its loss."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        labels = None if labels is None else labels.masked_fill(labels == self.config.pad_token_id, -100)
        return super().forward(input_ids=input_ids, labels=labels, **kwargs)


@pytest.mark.parametrize("pad", [0, 30])
def test_a_class_that_the_loss_leaves_out_is_noticed(tmp_path, pad):
    model = Unpadded(tiny_config(vocab_size=1000, pad_token_id=pad))
    with pytest.raises(ValueError, match="not a plain cross-entropy"):
        gk.GEKOTrainer(model, arguments(tmp_path), train_dataset=sentences(8)).train()


def test_the_classes_of_the_data_are_asked_about(tmp_path):
    """One of a thousand has a weight, and made-up labels need not hold it."""
    weight = torch.ones(1000)
    weight[77] = 5
    model = Tagger(lambda logits, labels, *_: F.cross_entropy(logits, labels, weight))
    model.head = nn.Linear(8, 1000)
    data = [{**item, "labels": [77, 1, 2, 3, 4, 5, 6, 7]} for item in sentences(8)]
    with pytest.raises(ValueError, match="not a plain cross-entropy"):
        gk.GEKOTrainer(model, arguments(tmp_path), train_dataset=data).train()


def biogpt():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    drops = {f"{name}_dropout_prob": 0.0 for name in ("hidden", "attention_probs")}
    config = T.BioGptConfig(
        vocab_size=VOCAB, pad_token_id=0, num_labels=VOCAB, layerdrop=0.0, activation_dropout=0.0, **sizes, **drops
    )
    return T.BioGptForTokenClassification(config)


@pytest.mark.parametrize("make", [lambda: Tagger(attended), biogpt], ids=["module", "biogpt"])
@pytest.mark.parametrize("full", [0, 8], ids=["padding at once", "padding later"])
def test_labels_under_the_attention_mask(tmp_path, make, full):
    """These models leave them out of their loss, also where the first batch has none."""
    model, data = make(), padded(16, full)
    ours, theirs = compare(tmp_path, model, data, train_sampling_strategy="sequential")
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_labels_under_the_mask_count_where_the_model_counts_them(tmp_path):
    ours, theirs = compare(tmp_path, Tagger(lambda logits, labels, *_: F.cross_entropy(logits, labels)), padded(16))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_another_mark_of_labels_that_do_not_count_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mark ignored labels by -100, torch's default `ignore_index`"):
        gk.GEKOTrainer(Tagger(pads_by_zero), arguments(tmp_path), train_dataset=sentences(8)).train()


@pytest.mark.parametrize("kind", ["one label a row", "long rows"])
def test_shapes_of_labels(tmp_path, kind):
    if kind == "long rows":  # only a part of them is asked about
        model = Tagger(lambda logits, labels, *_: F.cross_entropy(logits, labels.view(-1)))
        data = [{"input_ids": [(i + 3 * k) % VOCAB for k in range(100)]} for i in range(8)]
        data = [{**item, "labels": item["input_ids"]} for item in data]
    else:
        model, data = tiny_classifier(), [{**item, "labels": torch.tensor([item["labels"]])} for item in classified(8)]
    ours, theirs = compare(tmp_path, model, data)
    assert ours == pytest.approx(theirs, rel=1e-4)


class Remembers(Tagger):
    """Its forward counts, draws from a generator of its own, and enlarges a cache whose size it keeps beside it."""

    def __init__(self):
        super().__init__(self.counted)
        self.calls, self.size = 0, 0
        self.register_buffer("cache", torch.zeros(0))

    def forward(self, input_ids, attention_mask=None, labels=None):
        self.calls += 1
        if self.size < input_ids.shape[1]:
            self.size = input_ids.shape[1]
            self.cache = torch.full((self.size,), 0.1)
        return super().forward(input_ids, attention_mask, labels)

    def counted(self, logits, labels, mask, model, hidden):
        noise = torch.randn(logits.shape, generator=model.generator)
        return F.cross_entropy(logits, labels) + 0.1 * (noise * logits).mean() + model.cache[:8].sum()


def test_asking_leaves_no_counts_behind(tmp_path):
    runs = []
    for ours in (True, False):
        torch.manual_seed(0)
        model, data, args = Remembers(), sentences(12), arguments(tmp_path, num_train_epochs=1)
        model.generator = torch.Generator().manual_seed(3)
        trainer = (
            gk.GEKOTrainer(model, args, train_dataset=data, config=gk.GEKOConfig.uniform())
            if ours
            else standard(model, args, data)
        )
        trainer.train()
        runs.append((curve(trainer), model.calls, model.size))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-4)
    assert runs[0][1:] == runs[1][1:] == (3, 8)


def test_a_forward_that_writes_to_a_parameter_is_refused(tmp_path):
    def centred(logits, labels, mask, model, hidden):
        if model.training:
            with torch.no_grad():
                model.other.bias.add_(logits.mean())
        return F.cross_entropy(logits, labels)

    model = Tagger(centred)
    model.other.requires_grad_(False)
    with pytest.raises(ValueError, match="writes to its parameter 'other.bias' in training mode"):
        gk.GEKOTrainer(model, arguments(tmp_path), train_dataset=sentences(8)).train()


def test_a_models_own_error_stays_as_it_is(tmp_path):
    data = [{**item, "input_ids": [VOCAB + 1] * 8} for item in sentences(8)]
    with pytest.raises(IndexError, match="index out of range in self"):
        gk.GEKOTrainer(tiny_llama(), arguments(tmp_path), train_dataset=data).train()


class Number(Tagger):
    """Returns its loss alone."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)["loss"]


def test_a_model_that_returns_a_number_is_refused(tmp_path):
    model = Number(lambda logits, labels, *_: F.cross_entropy(logits, labels))
    data = [{"input_ids": item["input_ids"], "labels": item["labels"]} for item in sentences(8)]
    args = arguments(tmp_path, remove_unused_columns=False)
    with pytest.raises(ValueError, match="the model returned no logits .* only {'output': 'a number'}"):
        gk.GEKOTrainer(model, args, train_dataset=data, data_collator=default_data_collator).train()


def test_logits_of_another_shape_are_refused(tmp_path):
    """A discriminator: one logit a token."""
    config = T.ElectraConfig(
        vocab_size=VOCAB,
        embedding_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    data = [{**item, "labels": [k % 2 for k in range(8)]} for item in sentences(8)]
    with pytest.raises(ValueError, match=r"have shape \(4, 8\), its labels \(4, 8\): train it with transformers.Train"):
        gk.GEKOTrainer(T.ElectraForPreTraining(config), arguments(tmp_path), train_dataset=data).train()


def test_an_item_without_tokens_counts_for_nothing(tmp_path):
    data = [*sentences(7), {"input_ids": [], "labels": []}]
    trainer = gk.GEKOTrainer(tiny_llama(), arguments(tmp_path, num_train_epochs=1), train_dataset=data)
    trainer.train()
    assert trainer.sample_state.times_seen.tolist() == [1] * 7 + [0]
    assert all(torch.tensor(curve(trainer)).isfinite())


def test_text_and_none_are_left_out_of_batches(tmp_path):
    """As by Transformers' default collator."""
    data = [{**item, "text": "a", "position_ids": None} for item in sentences(8)]
    trainer = gk.GEKOTrainer(tiny_llama(), arguments(tmp_path, remove_unused_columns=False), train_dataset=data)
    assert trainer.data_collator(data).keys() == {"input_ids", "labels"}
    trainer.train()
    assert (trainer.sample_state.times_seen > 0).all()
