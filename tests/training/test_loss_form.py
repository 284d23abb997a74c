"""The loss that GEKOTrainer trains is the model's own, or it says why not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from torch import nn
from training import VOCAB, arguments, classified, curve, standard, tiny_config, tiny_llama, weights
from transformers import default_data_collator

import geko_kernels as gk

SMALL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
BERT = {
    **SMALL,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": 16,
    **{f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in (("layers", 1), ("ffn_dim", 32))},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{name}dropout": 0.0 for name in ("", "attention_", "activation_")},
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
SWITCH = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_experts": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
    "router_jitter_noise": 0.0,
    "output_router_logits": True,
}


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


def sentences(count, ragged=False):
    """No two tokens running are equal, so that a shift shows."""
    lengths = [8 - i % 3 * ragged for i in range(count)]
    items = [[1 + (i + 2 * k) % (VOCAB - 1) for k in range(length)] for i, length in enumerate(lengths)]
    return [{"input_ids": tokens, "labels": list(tokens)} for tokens in items]


def token_classes(count=12):
    return [
        {"input_ids": [1 + (i + k) % 20 for k in range(8)], "labels": [(i + k) % 3 for k in range(8)]}
        for i in range(count)
    ]


def pairs(count=12):
    """Sources and targets of other lengths."""
    return [
        {"input_ids": [2 + (i + k) % 20 for k in range(8)], "labels": [3 + (i * k) % 20 for k in range(5)] + [1]}
        for i in range(count)
    ]


def sequences(count=12):
    return [{"input_ids": [2 + (i + k) % 20 for k in range(7)] + [1], "labels": i % 2} for i in range(count)]


def gpt2(**fields):
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return T.GPT2LMHeadModel(T.GPT2Config(**{**SMALL, "n_embd": 16, "n_layer": 1, "n_head": 2, **dropouts, **fields}))


def bamba():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "attn_layer_indices": [0]}
    return T.BambaForCausalLM(T.BambaConfig(**SMALL, **sizes, **mamba, num_key_value_heads=2, z_loss_coefficient=0.1))


def jetmoe():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_key_value_heads": 2}
    experts = {"kv_channels": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    return T.JetMoeForCausalLM(T.JetMoeConfig(**SMALL, **sizes, **experts, aux_loss_coef=0.5))


def switch():
    return T.SwitchTransformersForConditionalGeneration(T.SwitchTransformersConfig(**SWITCH))


class MyLlama(T.LlamaForCausalLM):
    """The name does not end in ForCausalLM."""


class Capped(T.LlamaForCausalLM):
    """Its logits are not what its head returns."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, **kwargs)
        outputs.logits = 5 * torch.tanh(outputs.logits * 3)
        if labels is not None:
            outputs.loss = self.loss_function(outputs.logits, labels, VOCAB, **kwargs)
        return outputs


class OwnLoop(nn.Module):
    """A module of one's own that computes its loss without a shift, and adds a term."""

    def __init__(self, term=0.0, name="labels"):
        super().__init__()
        self.embed, self.head, self.term = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB), term

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embed(input_ids))
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + self.term * self.head.weight.square().mean()
        return {"loss": loss, "logits": logits}


class Loose(OwnLoop):
    """Its forward names no labels."""

    def forward(self, num_items_in_batch=None, **inputs):
        return super().forward(**inputs)


class Targets(OwnLoop):
    def forward(self, input_ids, targets=None):
        return super().forward(input_ids, targets)


CASES = {
    "gpt2": (gpt2, sentences(12)),
    "bert as a decoder": (lambda: T.BertLMHeadModel(T.BertConfig(**BERT, is_decoder=True)), sentences(12)),
    "masked LM": (lambda: T.BertForMaskedLM(T.BertConfig(**BERT)), sentences(12)),
    "subclass": (lambda: MyLlama(tiny_config()), sentences(12)),
    "bart as a decoder": (lambda: T.BartForCausalLM(T.BartConfig(**BART)), sentences(12)),
    "bart": (lambda: T.BartForConditionalGeneration(T.BartConfig(**BART)), pairs()),
    "mbart, padding 0": (lambda: T.MBartForConditionalGeneration(T.MBartConfig(**BART)), pairs()),
    "bart classifier": (lambda: T.BartForSequenceClassification(T.BartConfig(**BART, num_labels=2)), sequences()),
    "token classifier": (lambda: T.BertForTokenClassification(T.BertConfig(**BERT, num_labels=3)), token_classes()),
    "classifier": (lambda: T.LlamaForSequenceClassification(tiny_config(num_labels=4)), classified(12)),
    "mixture": (jetmoe, sentences(12)),
    "seq2seq mixture": (
        lambda: T.SwitchTransformersForConditionalGeneration(T.SwitchTransformersConfig(**SWITCH)),
        pairs(),
    ),
    "z-loss": (bamba, sentences(12)),
    "capped": (lambda: Capped(tiny_config()), sentences(12)),
    "module": (OwnLoop, sentences(12)),
    "module that takes what comes": (Loose, sentences(12)),
    "module with a term": (lambda: OwnLoop(3.0), sentences(12)),
    "logits all alike": (lambda: zero_head(tiny_llama()), sentences(12)),
    "compiled token classifier": (
        lambda: torch.compile(T.BertForTokenClassification(T.BertConfig(**BERT, num_labels=3)), backend="eager"),
        token_classes(),
    ),
    "compiled seq2seq": (
        lambda: torch.compile(T.BartForConditionalGeneration(T.BartConfig(**BART)), backend="eager"),
        pairs(),
    ),
}


def zero_head(model):
    nn.init.zeros_(model.lm_head.weight)
    return model


def run_of(trainer):
    trainer.train()
    return curve(trainer), [trainer.evaluate()["eval_loss"]], weights(trainer.model)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_models_own(tmp_path, name):
    make, data = CASES[name]
    torch.manual_seed(0)
    model = make()
    fields = {"eval_dataset": data, "data_collator": default_data_collator}
    args = arguments(tmp_path, num_train_epochs=2)
    if "compiled" in name or "what comes" in name:  # Trainer finds neither columns nor labels in their signatures
        args = arguments(tmp_path, num_train_epochs=2, remove_unused_columns=False, label_names=["labels"])
    ours = gk.GEKOTrainer(copy.deepcopy(model), args, train_dataset=data, config=gk.GEKOConfig.uniform(), **fields)
    found, expected = run_of(ours), run_of(standard(model, args, data, **fields))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)
    assert (ours.sample_state.times_seen == 2).all()


def test_the_models_modes_rng_and_loss_stay_as_they_were(tmp_path):
    model = tiny_llama(attention_dropout=0.2)
    given = model.loss_function
    state = torch.get_rng_state()
    trainer = gk.GEKOTrainer(model, arguments(tmp_path, num_train_epochs=1), train_dataset=sentences(4))
    model.model.norm.eval()
    batch = {**default_data_collator(sentences(4)), "sample_ids": torch.arange(4)}
    torch.set_rng_state(state)
    trainer._find_loss(model, batch)
    assert torch.get_rng_state().equal(state)
    assert model.loss_function is given and "_loss_function" not in vars(model)
    assert model.training and not model.model.norm.training


class Counting(OwnLoop):
    """Its forward draws random numbers and counts what it has seen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input_ids, labels=None, **kwargs):
        self.seen += len(input_ids)
        outputs = super().forward(input_ids)
        outputs["logits"] = outputs["logits"] + 0.3 * torch.randn_like(outputs["logits"])
        if labels is not None:
            outputs["loss"] = F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())
        return outputs


def test_asking_leaves_no_traces(tmp_path):
    """Random numbers drawn in a forward, and buffers that it writes."""
    runs = []
    for make in (gk.GEKOTrainer, None):
        torch.manual_seed(0)
        model, args = Counting(), arguments(tmp_path, remove_unused_columns=False)
        options = {"data_collator": default_data_collator}
        if make is None:
            trainer = standard(model, args, sentences(12), **options)
        else:
            trainer = make(model, args, train_dataset=sentences(12), config=gk.GEKOConfig.uniform(), **options)
        trainer.train()
        runs.append((curve(trainer), float(model.seen)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-4)
    assert runs[0][1] == runs[1][1] == 36


def test_labels_of_another_name(tmp_path):
    data = [{"input_ids": item["input_ids"], "targets": item["labels"]} for item in sentences(12)]
    runs = []
    for make in (gk.GEKOTrainer, None):
        torch.manual_seed(0)
        args = arguments(tmp_path, label_names=["targets"])
        if make is None:
            trainer = standard(Targets(), args, data, data_collator=stack)
        else:
            config = gk.GEKOConfig.uniform()
            trainer = make(Targets(), args, train_dataset=data, data_collator=stack, config=config)
        trainer.train()
        runs.append(curve(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def stack(items):
    return {name: torch.tensor([item[name] for item in items]) for name in items[0]}


@pytest.mark.parametrize("key", ["label_ids", "label"])
def test_other_keys_of_labels(tmp_path, key):
    """As Transformers' default collator takes them; a copy of the inputs was trained once."""
    ignored = [-100] * 4
    data = [{"input_ids": item["input_ids"], key: ignored + item["labels"][4:]} for item in sentences(8)]
    trainer = gk.GEKOTrainer(tiny_llama(), arguments(tmp_path, max_steps=1), train_dataset=data)
    trainer.train()
    assert trainer.efficiency.train["labels"] == 4 * 4


@pytest.mark.parametrize("labels", [[1, 2], [1] * 9, 1])
def test_labels_of_another_length_are_refused(tmp_path, labels):
    data = [{**item, "labels": labels} for item in sentences(8)]
    with pytest.raises(ValueError, match="an item has labels of shape .* and input_ids of shape"):
        gk.GEKOTrainer(tiny_llama(), arguments(tmp_path), train_dataset=data).train()


def test_a_copy_of_the_inputs_needs_a_shift(tmp_path):
    data = [{"input_ids": item["input_ids"]} for item in sentences(8)]
    model = T.BartForCausalLM(T.BartConfig(**BART))
    with pytest.raises(ValueError, match="would learn to repeat its input"):
        gk.GEKOTrainer(model, arguments(tmp_path), train_dataset=data).train()


@pytest.mark.parametrize("make", [gpt2, lambda: MyLlama(tiny_config())])
def test_ragged_items_need_no_collator(tmp_path, make):
    trainer = gk.GEKOTrainer(make(), arguments(tmp_path), train_dataset=sentences(12, ragged=True))
    trainer.train()
    assert (trainer.sample_state.times_seen > 0).all()


@pytest.mark.parametrize("kind", ["prompt", "p", "prefix"])
def test_prompts_of_peft(tmp_path, kind):
    peft = pytest.importorskip("peft")
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    config = {
        "prompt": lambda: peft.PromptTuningConfig(**common),
        "p": lambda: peft.PromptEncoderConfig(**common, encoder_hidden_size=8),
        "prefix": lambda: peft.PrefixTuningConfig(**common),
    }[kind]()
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_llama(), config)
    data, args = sentences(12), arguments(tmp_path, num_train_epochs=2)
    fields = {"data_collator": default_data_collator}
    ours = gk.GEKOTrainer(copy.deepcopy(model), args, train_dataset=data, config=gk.GEKOConfig.uniform(), **fields)
    ours.train()
    theirs = standard(model, args, data, **fields)
    theirs.train()
    assert curve(ours) == pytest.approx(curve(theirs), rel=1e-3)


class Packed(torch.Tensor):
    """A weight that only F.linear can use, as quantised ones are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            hidden, weight, *bias = args
            return F.linear(hidden, weight.as_subclass(torch.Tensor), *bias)
        if func.__name__ in ("t", "transpose", "mm", "matmul", "__matmul__", "addmm", "addmm_", "__getitem__", "split"):
            raise NotImplementedError(f"{func.__name__} of a packed weight")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_quantised_head_is_left_to_the_model(tmp_path):
    models = [tiny_llama(), tiny_llama()]
    for model in models:
        model.lm_head.weight.requires_grad_(False)
    models[0].lm_head._parameters["weight"] = models[0].lm_head.weight.data.as_subclass(Packed)
    runs = []
    for model in models:
        args = arguments(tmp_path, num_train_epochs=1)
        trainer = gk.GEKOTrainer(model, args, train_dataset=sentences(8), config=gk.GEKOConfig.uniform())
        trainer.train()
        runs.append(curve(trainer))
        assert (trainer._found.head is None) == (model is models[0])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


class Rounded(OwnLoop):
    """As autocast does it on a GPU: the loss of each label is rounded to bfloat16, and float32 comes back."""

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embed(input_ids)).bfloat16().float()
        if labels is None:
            return {"logits": logits}
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
        valid = labels.flatten().ne(-100)
        return {"loss": losses.bfloat16().float().sum() / valid.sum(), "logits": logits}


def test_a_loss_rounded_to_low_precision_is_taken(tmp_path):
    torch.manual_seed(0)
    args = arguments(tmp_path, num_train_epochs=1)
    options = {"data_collator": default_data_collator, "config": gk.GEKOConfig.uniform()}
    trainer = gk.GEKOTrainer(Rounded(), args, train_dataset=sentences(12), **options)
    trainer.train()
    assert not trainer._found.form.shift
    assert curve(trainer) == pytest.approx(curve(trainer, "geko/loss"), rel=1e-4)
