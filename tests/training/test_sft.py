"""GEKOSFTTrainer against trl.SFTTrainer."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from auto_run import few_samples
from torch.utils._python_dispatch import TorchDispatchMode
from training import tiny_llama, weights

import geko_kernels as gk
from geko_kernels.losses import linear_call
from geko_kernels.losses.linear_head import Budget

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
PLAIN = {"use_curriculum": False, "uniform_finish": 0.0, "noise_guard": False, "probes": False}


def tokenizer():
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1, **{f"w{i}": i + 2 for i in range(20)}}, unk_token="<pad>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def chat_tokenizer():
    words = tokenizer()
    words.chat_template = (
        "{% for m in messages %}w1 {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} w2"
        "{% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    )
    return words


def rows(kind, number=12):
    if kind == "chat":
        talks = [
            [{"role": "user", "content": f"w{i} w4"}, {"role": "assistant", "content": f"w{i + 1} w5 w{i % 3}"}]
            for i in range(number)
        ]
        return datasets.Dataset.from_dict({"messages": talks})
    texts = [" ".join(f"w{(i * 3 + j) % 20}" for j in range(3 + i % 4)) for i in range(number)]
    if kind == "text":
        return datasets.Dataset.from_dict({"text": texts})
    return datasets.Dataset.from_dict({"prompt": texts, "completion": [f" w{i % 20} w3" for i in range(number)]})


def trainer_of(cls, folder, data, **fields):
    named = {name: fields.pop(name) for name in ("config", "eval_dataset", "peft_config") if name in fields}
    model = fields.pop("model", None) or tiny_llama()
    settings = {
        "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "bf16": False, "save_strategy": "no", "train_sampling_strategy": "sequential", "learning_rate": 1e-3,
        "gradient_checkpointing": False, "optim": "sgd", "disable_tqdm": True, **fields,
    }  # fmt: skip
    args = trl.SFTConfig(output_dir=str(folder), **settings)
    return cls(model=model, args=args, train_dataset=data, processing_class=chat_tokenizer(), **named)


@pytest.mark.parametrize("kind", ["text", "prompt"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_uniform_trains_as_sft_does(tmp_path, kind, accumulation):
    fields = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    fields["eval_dataset"] = rows(kind, 5)
    plain = trainer_of(trl.SFTTrainer, tmp_path / "a", rows(kind), **fields)
    ours = trainer_of(gk.GEKOSFTTrainer, tmp_path / "b", rows(kind), config=gk.GEKOConfig.uniform(), **fields)
    for trainer in (plain, ours):
        trainer.train()
    for key in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
        curves = [[e[key] for e in t.state.log_history if key in e] for t in (plain, ours)]
        assert len(curves[0]) == 3 and curves[1] == pytest.approx(curves[0], rel=1e-4), key
    torch.testing.assert_close(weights(ours.model), weights(plain.model), rtol=1e-4, atol=1e-6)
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    assert ours.sample_state.times_seen.tolist() == [1] * 12


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("chat", {}), ("chat", {"assistant_only_loss": True}), ("prompt", {"completion_only_loss": False})],
)
def test_the_masks_of_sft_stay(tmp_path, kind, fields):
    plain = trainer_of(trl.SFTTrainer, tmp_path / "a", rows(kind), **fields)
    ours = trainer_of(gk.GEKOSFTTrainer, tmp_path / "b", rows(kind), config=gk.GEKOConfig.uniform(), **fields)
    for trainer in (plain, ours):
        trainer.train()
    torch.testing.assert_close(weights(ours.model), weights(plain.model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"gradient_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"bf16": True},
        {"neftune_noise_alpha": 5},
    ],
)
def test_the_head_is_fused_however_it_is_trained(tmp_path, fields):
    runs = []
    for cls, named in ((trl.SFTTrainer, {}), (gk.GEKOSFTTrainer, {"config": gk.GEKOConfig.uniform()})):
        trainer = trainer_of(cls, tmp_path / cls.__name__, rows("prompt"), **fields, **named)
        torch.manual_seed(1)
        trainer.train()
        keys = ("loss", "entropy", "mean_token_accuracy", "num_tokens")
        runs.append([entry[key] for key in keys for entry in trainer.state.log_history if key in entry])
    assert len(runs[0]) == 12 and runs[1] == pytest.approx(runs[0], rel=1e-4)
    assert trainer._found.head is not None


def test_peft_config(tmp_path):
    peft = pytest.importorskip("peft")
    losses = []
    for cls, named in ((trl.SFTTrainer, {}), (gk.GEKOSFTTrainer, {"config": gk.GEKOConfig.uniform()})):
        torch.manual_seed(0)
        lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        trainer = trainer_of(cls, tmp_path / cls.__name__, rows("text"), peft_config=lora, **named)
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def prompts(kind):
    peft = pytest.importorskip("peft")
    return getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_prompt_tuning(tmp_path, kind):
    """The tokens that PEFT puts before a row have no label, in the loss and in SFT's metrics."""
    runs = []
    for cls, named in ((trl.SFTTrainer, {}), (gk.GEKOSFTTrainer, {"config": gk.GEKOConfig.uniform()})):
        torch.manual_seed(0)
        fields = {"learning_rate": 1.0, "completion_only_loss": False, "peft_config": prompts(kind), **named}
        trainer = trainer_of(cls, tmp_path / cls.__name__, rows("prompt"), eval_dataset=rows("prompt", 5), **fields)
        trainer.train()
        keys = ("loss", "entropy", "mean_token_accuracy", "num_tokens")
        curves = [entry[key] for key in keys for entry in trainer.state.log_history if key in entry]
        runs.append([*curves, trainer.evaluate()["eval_loss"]])
    assert len(runs[0]) == 13 and runs[1] == pytest.approx(runs[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("fields", [{"packing": True, "max_length": 12}, {"padding_free": True, "max_length": None}])
def test_prompt_tuning_of_packed_rows_is_refused(tmp_path, kind, fields):
    """SFTTrainer trains them, and the documents of a row see each other."""
    trainer = trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("prompt"), peft_config=prompts(kind), **fields)
    with pytest.raises(ValueError, match="prompt tuning does not work with packed samples, as PEFT lets"):
        trainer.train()


def test_sample_ids_are_the_users_rows(tmp_path):
    data = rows("text")
    other = {"train": data.select(range(5))}  # an evaluation dataset of that name is not the training dataset
    trainer = trainer_of(gk.GEKOSFTTrainer, tmp_path, data, shuffle_dataset=True, eval_dataset=other)
    words = tokenizer()
    assert len(trainer.sample_state) == 12
    for i in range(12):
        assert trainer.train_dataset[i]["input_ids"][:-1] == words(data[i]["text"])["input_ids"]


def test_frozen_rows_are_left_out(tmp_path):
    fields = {"max_steps": -1, "num_train_epochs": 2, "config": gk.GEKOConfig(**PLAIN)}
    trainer = trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text"), **fields)
    state = trainer.sample_state
    state.times_seen[:4], state.bucket[:4], state.confidence[:4] = 1, 0, 0.99
    trainer.train()
    assert state.times_seen.tolist() == [1] * 4 + [2] * 8


def test_resuming_is_exact(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text"), **fields)
    whole.train()
    again = trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text"), **fields)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(again.model), weights(whole.model))


def test_dropped_rows_are_named_and_never_drawn(tmp_path, caplog):
    """The others are drawn as SFT draws them, and keep their ids."""
    fields = {"max_length": 4, "max_steps": -1, "num_train_epochs": 2, "train_sampling_strategy": "random"}
    fields["per_device_train_batch_size"] = 2
    plain = trainer_of(trl.SFTTrainer, tmp_path / "a", rows("prompt"), **fields)
    with caplog.at_level("WARNING"):
        ours = trainer_of(gk.GEKOSFTTrainer, tmp_path / "b", rows("prompt"), config=gk.GEKOConfig.uniform(), **fields)
    assert "drops 9 of the 12 rows of train_dataset, first row 1: max_length leaves no token that counts" in caplog.text
    for trainer in (plain, ours):
        trainer.train()
    assert [t.state.global_step for t in (plain, ours)] == [4, 4]
    torch.testing.assert_close(weights(ours.model), weights(plain.model), rtol=1e-4, atol=1e-6)
    assert ours.sample_state.times_seen.tolist() == [2, 0, 0, 0] * 3
    assert ours.get_efficiency_report()["samples_standard"] == 6


def test_dropped_rows_are_never_probed_or_filled_up_with(tmp_path):
    fields = {"max_length": 4, "max_steps": 30, "learning_rate": 2e-2, "dataloader_drop_last": True}
    low = {"correct_loss": 3.2, "freeze_confidence": 0.05, "focus_confidence": 0.04, "freeze_quality": 0.01}
    for name, more in (("rows", {}), ("packed", {"packing": True, "per_device_train_batch_size": 1})):
        config = gk.GEKOConfig.recommended(**low)
        trainer = trainer_of(
            gk.GEKOSFTTrainer, tmp_path / name, rows("prompt", 24), config=config, optim="adamw_torch", **fields, **more
        )
        trainer.train()
        assert trainer.get_efficiency_report()["samples_forward"] > 0
        seen = trainer.sample_state.times_seen.view(6, 4)
        assert int(seen[:, 0].min()) > 0 and int(seen[:, 1:].max()) == 0


def test_where_sft_drops_all_rows(tmp_path):
    with pytest.raises(ValueError, match=r"drops all 12 rows of train_dataset: max_length leaves no token that counts"):
        trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("prompt"), max_length=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing_factor", 0.1),
        ("loss_type", "dft"),
    ],
)
def test_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text"), **{name: value})


def test_streams_and_other_losses_are_refused(tmp_path):
    with pytest.raises(ValueError, match="load it without streaming"):
        trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text").to_iterable_dataset(), max_steps=1)
    with pytest.raises(ValueError, match="got list: make one with datasets.Dataset.from_list"):
        trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text").to_list())
    with pytest.raises(TypeError, match="args must be a trl.SFTConfig, got GEKOTrainingArguments"):
        gk.GEKOSFTTrainer("a model", gk.GEKOTrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(TypeError, match="DPOTrainer its own loss"):
        type("MyDPO", (gk.GEKOMixin, trl.DPOTrainer), {})
    assert issubclass(type("MySFT", (gk.GEKOSFTTrainer,), {}), trl.SFTTrainer)


@pytest.mark.parametrize(
    "fields", [{}, {"padding_free": True, "max_length": None}, {"packing": True, "max_length": 12}]
)
def test_no_logits_are_made_in_training(tmp_path, monkeypatch, fields):
    """With a buffer of 3 rows of logits nothing larger of the vocabulary's width is made."""
    monkeypatch.setattr(Budget, "rows", lambda *_: 3)
    monkeypatch.setattr(Budget, "by_blocks", lambda *_: False)
    monkeypatch.setattr(linear_call, "_AT_ONCE", 0)
    vocab = 47
    model = tiny_llama(vocab_size=vocab)
    trainer = trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text"), model=model, **fields)
    batches = list(trainer.get_train_dataloader())
    trainer.compute_loss(trainer.model, batches[0])  # the model is asked about its loss
    made, transposed = [], torch.ops.aten.t.default  # of the weight

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            outputs = func(*args, **(kwargs or {}))
            for tensor in outputs if isinstance(outputs, tuple | list) else (outputs,):
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (vocab,) and func is not transposed:
                    made.append(tensor.numel() // vocab)
            return outputs

    with Watch():
        trainer.compute_loss(trainer.model, batches[1]).backward()
    assert made and max(made) <= 3 < int((batches[1]["labels"] != -100).sum()), made


@pytest.mark.parametrize("kind", ["text", "prompt"])
@pytest.mark.parametrize("fields", [{}, {"padding_free": True, "max_length": None}])
def test_a_head_that_cannot_be_fused_logs_the_same(tmp_path, monkeypatch, kind, fields):
    runs = []
    for name in ("fused", "logits"):
        trainer = trainer_of(gk.GEKOSFTTrainer, tmp_path / name, rows(kind), **fields)
        if name == "logits":
            monkeypatch.setattr(trainer.model.lm_head, "forward", trainer.model.lm_head.forward)  # as if patched
        trainer.train()
        assert (trainer._found.head is None) == (name == "logits")
        keys = ("loss", "entropy", "mean_token_accuracy", "num_tokens")
        runs.append([entry[key] for key in keys for entry in trainer.state.log_history if key in entry])
    assert len(runs[0]) == 12 and runs[1] == pytest.approx(runs[0], rel=1e-4)


def test_outputs_that_are_asked_for_have_logits(tmp_path):
    trainer = trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text"))
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert loss.requires_grad and outputs.logits.shape == (*batch["labels"].shape, trainer.model.config.vocab_size)


def test_missing_trl_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "geko_kernels.training.sft", raising=False)
    with pytest.raises(ImportError, match="pip install trl"):
        _ = gk.GEKOSFTTrainer


@pytest.mark.parametrize("kind", ["text", "prompt"])
def test_sample_weights_of_the_rows(tmp_path, kind):
    """The divisor does not see them: of weight 2 all have twice the loss."""
    uniform = gk.GEKOConfig.uniform()
    data = rows(kind, 8)
    ones, twos = (data.add_column("sample_weights", [value] * 8) for value in (1.0, 2.0))
    losses = []
    for name, some in (("plain", data), ("ones", ones), ("twos", twos)):
        trainer = trainer_of(gk.GEKOSFTTrainer, tmp_path / name, some, config=uniform, max_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == losses[0] and losses[2] == pytest.approx(2 * losses[0], rel=1e-5)


def test_token_weights_of_text_are_refused(tmp_path):
    data = rows("text").add_column("token_weights", [[1.0]] * 12)
    with pytest.raises(
        ValueError, match=r"GEKOSFTTrainer does not take token_weights with text, .*: give .* input_ids"
    ):
        trainer_of(gk.GEKOSFTTrainer, tmp_path, data)


def test_a_run_that_finds_its_own_length(tmp_path):
    """120 rows in clusters of like texts, of which 40 are held back: questions are swapped by their prompts."""
    data = rows("prompt", 120)
    with few_samples():
        trainer = trainer_of(
            gk.GEKOSFTTrainer, tmp_path, data, config=gk.GEKOConfig.auto(), max_steps=-1, num_train_epochs=2
        )
        trainer.train()
    report = json.loads((tmp_path / "geko_report.json").read_text())["stopping"]
    seen = trainer.sample_state.times_seen
    assert 0 < len(report["held_back"]) <= 40 and (seen[report["held_back"]] == 0).all()
    assert report["looked_at"] == "held_back" and report["swap_test"] and len(report["curve"]) >= 5


def test_rows_that_trl_prepares_by_another_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gk.GEKOSFTTrainer, "_prepare_dataset", trl.SFTTrainer._prepare_dataset)
    with pytest.raises(
        RuntimeError, match="rows .* were not kept as they were given. _prepare_dataset is not replaced"
    ):
        trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text"))
