"""`GEKOMixin` before other trainers: what they bring stays, what does not go together is refused."""

from __future__ import annotations

import pytest
import torch
from training import arguments, classified, curve, sentences, tiny_classifier, tiny_llama
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, default_data_collator

import geko_kernels as gk


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


def test_the_trainer_comes_last():
    with pytest.raises(TypeError, match=r"write class Wrong\(GEKOMixin, Theirs\)"):

        class Wrong(Theirs, gk.GEKOMixin):
            pass


@pytest.mark.parametrize("hook", ["compute_loss", "get_train_dataloader", "_get_train_sampler"])
def test_a_trainer_with_a_loss_or_batches_of_its_own_is_refused(hook):
    own = type("Own", (Trainer,), {hook: lambda self, *args, **named: None})
    with pytest.raises(TypeError, match=f"Own.{hook} gives Own .* of its own, which GEKO's"):
        type("Mine", (gk.GEKOMixin, own), {})


def test_arguments_that_do_not_fit(tmp_path):
    with pytest.raises(TypeError, match="needs a trainer behind it"):
        gk.GEKOMixin(tiny_llama())
    with pytest.raises(TypeError, match="config must be a GEKOConfig, got dict"):
        Mixed(tiny_llama(), arguments(tmp_path), config={})
    with pytest.raises(TypeError, match="unexpected keyword argument 'greetings'"):
        gk.GEKOTrainer(tiny_llama(), arguments(tmp_path), greetings="")
    with pytest.raises(TypeError, match="Theirs got model by position and by name"):
        Mixed(tiny_llama(), model=tiny_llama())
