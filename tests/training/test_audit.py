"""A subclass that passes GEKO's hooks by is told so at once, and one that calls them works."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler
from training import arguments, curve, sentences, tiny_llama
from transformers import Trainer

import geko_kernels as gk
from geko_kernels.training.data import CausalCollator


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


def train(folder, cls, **options):
    args = arguments(folder, **{"num_train_epochs": 2, **options})
    trainer = cls(tiny_llama(), args, train_dataset=sentences(24), config=gk.GEKOConfig.uniform())
    trainer.train()
    return trainer


class OwnLoss(gk.GEKOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], labels=inputs["labels"])
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class WholeBatch(gk.GEKOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss


class OwnStep(gk.GEKOTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss
        loss.backward()
        return loss.detach()


class WithoutIds(gk.GEKOTrainer):
    def _prepare_inputs(self, inputs):
        inputs.pop("sample_ids", None)
        return super()._prepare_inputs(inputs)


class OwnLoader(gk.GEKOTrainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=4, collate_fn=self.data_collator)


class DropsLoader(gk.GEKOTrainer):
    """Makes GEKO's loader, and hands on another."""

    def get_train_dataloader(self):
        super().get_train_dataloader()
        return DataLoader(self.train_dataset, batch_size=4, collate_fn=self.data_collator)


class OwnSampler(gk.GEKOTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return RandomSampler(self.train_dataset)


class DropsSampler(gk.GEKOTrainer):
    def _get_train_sampler(self, train_dataset=None):
        super()._get_train_sampler(train_dataset)
        return RandomSampler(self.train_dataset)


class OwnCollator(gk.GEKOTrainer):
    def _get_collator_with_removed_columns(self, data_collator, description=None):
        return lambda identified: CausalCollator(0)([feature.item for feature in identified])


class OwnBatches(gk.GEKOTrainer):
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return [next(epoch_iterator) for _ in range(num_batches)], None


class OwnEpoch(gk.GEKOTrainer):
    def _run_epoch(self, **rest):
        super(gk.training.planned.PlannedMixin, self)._run_epoch(**rest)


class OwnSchedule(gk.GEKOTrainer):
    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer)
        return self.lr_scheduler


class OwnState(gk.GEKOTrainer):
    def _init_training_state(self, *args):
        return Trainer._init_training_state(self, *args)


WRONG = [
    (
        OwnSchedule,
        r"rate does not follow its epochs. OwnSchedule.create_scheduler has to call super\(\).create_scheduler",
    ),
    (OwnState, r"the start of the run is not known. OwnState._init_training_state has to call super\(\)._init"),
    (OwnLoss, r"1 of 1 training batches were trained without its loss. OwnLoss.compute_loss has to call super\(\)"),
    (WholeBatch, r"trained without its loss. WholeBatch.compute_loss has to call super\(\).compute_loss"),
    (OwnStep, r"trained without its loss. OwnStep.training_step has to call super\(\).training_step"),
    (WithoutIds, r"trained without its loss. WithoutIds._prepare_inputs has to leave 'sample_ids' in the batch"),
    (OwnLoader, r"not drawn by its sampler. OwnLoader.get_train_dataloader has to hand on the batches of super"),
    (DropsLoader, r"a training batch has no 'sample_ids'. DropsLoader.get_train_dataloader has to hand on"),
    (OwnSampler, r"not drawn by its sampler. OwnSampler._get_train_sampler has to return the sampler of super"),
    (DropsSampler, r"not drawn by its sampler. DropsSampler._get_train_sampler has to return the sampler of super"),
    (OwnCollator, r"has no 'sample_ids'. OwnCollator._get_collator_with_removed_columns has to call super"),
    (OwnBatches, r"did not pass through it. OwnBatches.get_batch_samples has to call super\(\).get_batch_samples"),
    (OwnEpoch, r"the epoch was not planned. OwnEpoch._run_epoch has to call super\(\)._run_epoch"),
]


@pytest.mark.parametrize(("cls", "message"), WRONG, ids=[cls.__name__ for cls, _ in WRONG])
@pytest.mark.parametrize("options", [{"max_steps": 1}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_hook_passed_by_is_named(tmp_path, cls, message, options):
    if options.get("gradient_accumulation_steps") and cls is OwnLoss:
        message = message.replace("1 of 1", "2 of 2")
    with pytest.raises(RuntimeError, match=message):
        train(tmp_path, cls, **options)
    assert not (tmp_path / "geko_report.json").exists()


def test_a_model_that_knows_no_sample_ids_is_explained(tmp_path):
    class Strict(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_llama()

        def forward(self, input_ids, labels=None):
            return self.inner(input_ids=input_ids, labels=labels)

    trainer = WholeBatch(Strict(), arguments(tmp_path), train_dataset=sentences(8))
    with pytest.raises(RuntimeError, match=r"called with 'sample_ids' \(.*WholeBatch.compute_loss has to call super"):
        trainer.train()


def test_transformers_that_no_longer_calls_a_hook_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gk.GEKOTrainer, "compute_loss", Trainer.compute_loss)
    monkeypatch.setattr(Trainer, "_prepare_inputs", lambda self, inputs: _plain(inputs))
    with pytest.raises(RuntimeError, match=r"none of compute_loss, .* \(Transformers \d.*\) does not call them"):
        train(tmp_path, gk.GEKOTrainer)


def _plain(inputs):
    return {name: value for name, value in inputs.items() if name != "sample_ids"}


class Penalty(gk.GEKOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (loss[0] + 0.0, loss[1]) if return_outputs else loss + 0.0


class Twice(gk.GEKOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        first = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return 0.5 * (first + super().compute_loss(model, inputs, return_outputs, num_items_in_batch))


class Wrapped(gk.GEKOTrainer):
    def get_train_dataloader(self):
        loader = super().get_train_dataloader()

        class Batches:
            def __len__(self):
                return len(loader)

            def __iter__(self):
                return iter(loader)

        return Batches()


class Ordered(gk.GEKOTrainer):
    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        sampler.shuffle = False
        return sampler


class Logs(gk.GEKOTrainer):
    def training_step(self, *args, **named):
        loss = super().training_step(*args, **named)
        self.log({"mine": 1.0})
        return loss


class OwnCount(gk.GEKOTrainer):
    """Counts the items of a loss itself, which is its own affair."""

    def _get_num_items_in_batch(self, batch_samples, device):
        return sum(batch["labels"][..., 1:].ne(-100).sum() for batch in batch_samples)


@pytest.mark.parametrize("cls", [Penalty, Twice, Wrapped, Ordered, Logs, OwnCount])
def test_a_subclass_that_calls_the_hooks_trains(tmp_path, cls):
    trainer = train(tmp_path, cls, num_train_epochs=1)
    assert trainer.state.global_step == 6 and len(curve(trainer, "geko/loss")) == 6
    assert trainer.sample_state.times_seen.tolist() == [2 if cls is Twice else 1] * 24
    if cls is not Twice:
        assert trainer.get_efficiency_report()["saved_compute"] == 0
    if cls is not Ordered:
        assert curve(trainer) == pytest.approx(curve(train(tmp_path, gk.GEKOTrainer, num_train_epochs=1)), rel=1e-4)


def test_a_save_without_the_learning_state_is_named(tmp_path):
    class OwnSave(gk.GEKOTrainer):
        def _save_checkpoint(self, model, trial):
            Trainer._save_checkpoint(self, model, trial)

    with pytest.raises(
        RuntimeError, match="the checkpoint has no learning state. OwnSave._save_checkpoint has to call"
    ):
        train(tmp_path, OwnSave, save_strategy="epoch")


class OwnRate(gk.GEKOTrainer):
    """Brings a scheduler of its own, as the message for `OwnSchedule` says."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=0.5, total_iters=100)
        return super().create_scheduler(num_training_steps, optimizer)


def test_a_scheduler_of_a_subclass_stays_as_it_is(tmp_path):
    trainer = train(tmp_path, OwnRate, num_train_epochs=1)
    assert curve(trainer, "learning_rate") == [0.005] * 6


@pytest.mark.parametrize("workers", [0, 2])
def test_stopping_within_an_accumulated_step_is_no_fault(tmp_path, workers):
    class Stops(gk.GEKOTrainer):
        def training_step(self, *args, **named):
            loss = super().training_step(*args, **named)
            if self.state.global_step == 1:
                self.control.should_training_stop = True
            return loss

    trainer = train(tmp_path, Stops, gradient_accumulation_steps=3, dataloader_num_workers=workers)
    assert trainer.state.global_step == 1
