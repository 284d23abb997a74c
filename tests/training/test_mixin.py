"""`GEKOMixin` before other trainers: what they bring stays, what does not go together is refused."""

from __future__ import annotations

import pytest
import tokenizers
import torch
from training import arguments, classified, curve, sentences, tiny_classifier, tiny_llama, weights
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    default_data_collator,
)

import geko_kernels as gk

SIZES = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}  # of Bart


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


class Theirs(Trainer):
    """A trainer with an argument and methods of its own."""

    def __init__(self, *args, greeting="", **named):
        super().__init__(*args, **named)
        self.greeting, self.logged = greeting, 0

    def log(self, logs, *args, **named):
        self.logged += 1
        super().log(logs, *args, **named)


class Mixed(gk.GEKOMixin, Theirs):
    pass


def test_it_trains_as_geko_trainer_does(tmp_path):
    runs = []
    for make, more in ((gk.GEKOTrainer, {}), (Mixed, {"greeting": "hello"})):
        trainer = make(tiny_llama(), arguments(tmp_path), None, sentences(24), config=gk.GEKOConfig(), **more)
        trainer.train()
        runs.append((curve(trainer), trainer.sample_state.times_seen.tolist()))
    assert runs[0] == runs[1]
    assert trainer.greeting == "hello" and trainer.logged == 1 + len(curve(trainer))


def test_seq2seq_trainer(tmp_path):
    class Both(gk.GEKOMixin, Seq2SeqTrainer):
        pass

    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    args = Seq2SeqTrainingArguments(str(tmp_path), num_train_epochs=1, per_device_train_batch_size=4, **quiet)
    data, collator = classified(8), default_data_collator
    trainer = Both(model=tiny_classifier(), args=args, train_dataset=data, data_collator=collator, eval_dataset=data)
    trainer.train()
    assert (trainer.sample_state.times_seen == 1).all() and trainer.config == gk.GEKOConfig.recommended()
    assert trainer.evaluate()["eval_loss"] > 0


def tokenizer():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<end>": 1, "?": 2}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="?")


def encoder_decoder(kind):
    torch.manual_seed(0)
    common = {"vocab_size": 24, "d_model": 16, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    if kind == "t5":
        config = T5Config(**common, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
        return T5ForConditionalGeneration(config)
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in SIZES.items()}
    return BartForConditionalGeneration(
        BartConfig(**common, **sizes, max_position_embeddings=32, forced_eos_token_id=1, dropout=0.0)
    )


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_seq2seq_trainer_with_generation(tmp_path, kind):
    """Trains, evaluates what the model generates, and predicts as Seq2SeqTrainer does."""

    class Both(gk.GEKOMixin, Seq2SeqTrainer):
        pass

    def generated(found):
        return {"tokens": int((found.predictions > 1).sum()), "length": found.predictions.shape[1]}

    data = [{"input_ids": [2 + i % 20] * (2 + i % 4) + [1], "labels": [3 + i % 20] * (1 + i % 3)} for i in range(12)]
    settings = {
        "num_train_epochs": 2, "per_device_train_batch_size": 3, "learning_rate": 0.1, "optim": "sgd",
        "logging_steps": 1, "eval_strategy": "epoch", "predict_with_generate": True, "generation_max_length": 6,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    runs = []
    for cls, named in ((Seq2SeqTrainer, {}), (Both, {"config": gk.GEKOConfig.uniform()})):
        model, words = encoder_decoder(kind), tokenizer()
        args = Seq2SeqTrainingArguments(str(tmp_path / cls.__name__), **settings)
        trainer = cls(
            model, args, DataCollatorForSeq2Seq(words, model), data, data[:5], words, compute_metrics=generated, **named
        )
        trainer.train()
        kept = ("loss", "eval_loss", "eval_tokens", "eval_length")
        curves = [entry[key] for key in kept for entry in trainer.state.log_history if key in entry]
        runs.append((curves, trainer.predict(data[:5], num_beams=2).predictions.tolist(), weights(trainer.model)))
    (theirs, theirs_said, theirs_weights), (ours, ours_said, ours_weights) = runs
    assert len(theirs) == 14 and ours == pytest.approx(theirs, rel=1e-4)
    assert ours_said == theirs_said
    torch.testing.assert_close(ours_weights, theirs_weights, rtol=1e-4, atol=1e-6)


def test_trainers_of_trl_with_losses_of_their_own():
    trl = pytest.importorskip("trl")
    for base in (trl.RewardTrainer, trl.DPOTrainer, trl.KTOTrainer):
        why = rf"{base.__name__} its own loss, .* for another loss or other batches, use weighted_loss"
        with pytest.raises(TypeError, match=why):
            type("Mine", (gk.GEKOMixin, base), {})


def test_the_trainer_comes_last():
    with pytest.raises(TypeError, match=r"write class Wrong\(GEKOMixin, Theirs\)"):

        class Wrong(Theirs, gk.GEKOMixin):
            pass


@pytest.mark.parametrize("hook", ["compute_loss", "get_train_dataloader", "_get_train_sampler"])
def test_a_trainer_with_a_loss_or_batches_of_its_own_is_refused(hook):
    own = type("Own", (Trainer,), {hook: lambda self, *args, **named: None})
    with pytest.raises(TypeError, match=f"Own.{hook} gives Own its own .*, which GEKO's"):
        type("Mine", (gk.GEKOMixin, own), {})


def test_arguments_that_do_not_fit(tmp_path):
    with pytest.raises(TypeError, match="needs a trainer after it"):
        gk.GEKOMixin(tiny_llama())
    with pytest.raises(TypeError, match="config must be a GEKOConfig, got dict"):
        Mixed(tiny_llama(), arguments(tmp_path), config={})
    with pytest.raises(TypeError, match="unexpected keyword argument 'greetings'"):
        gk.GEKOTrainer(tiny_llama(), arguments(tmp_path), greetings="")
    with pytest.raises(TypeError, match="Theirs got model by position and by name"):
        Mixed(tiny_llama(), model=tiny_llama())
