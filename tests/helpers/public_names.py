"""A user's script with every public name of geko_kernels, which strict mypy and strict pyright have to take."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import DefaultDataCollator, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl.trainer.sft_config import SFTConfig

import geko_kernels as gk


def losses(model: nn.Module, hidden: Tensor, head: nn.Linear, labels: Tensor, ids: Tensor, flag: bool) -> Tensor:
    config = gk.GEKOConfig(freeze_confidence=0.9, bucket_weights=(3, 1, 0))
    state = gk.SampleState(100, config, device="cpu")
    logits: Tensor = model(hidden)
    loss = gk.weighted_loss(logits, labels, ids, state)
    assert_type(loss, Tensor)
    loss, stats = gk.weighted_loss(
        logits,
        labels,
        ids,
        state,
        reduction="token_mean",
        shift=True,
        ignore_index=-1,
        num_items=7,
        softcap=30.0,
        token_weights=torch.ones_like(labels),
        sample_weights=torch.ones(2),
        update=False,
        inplace=True,
        return_stats=True,
    )
    assert_type(stats, gk.SampleStats)
    sums: Tensor = stats.loss + stats.confidence + stats.accuracy + stats.quality + stats.q_value + stats.weight
    counted = stats.sample_ids[stats.correct & (stats.num_tokens > 0)], stats.bucket == gk.Bucket.HARD
    either = gk.weighted_loss(logits, labels, return_stats=flag)
    loss = either[0] if isinstance(either, tuple) else either
    loss = loss + gk.weighted_linear_loss(hidden, head.weight, labels, ids, state, bias=head.bias, chunk_mib=64)
    linear, stats = gk.weighted_linear_loss(hidden, head.weight, labels, return_stats=True)
    assert_type(stats, gk.SampleStats)
    linear, entropy = gk.weighted_linear_loss(hidden, head.weight, labels, return_entropy=True)
    linear, stats, entropy = gk.weighted_linear_loss(
        hidden, head.weight, labels, return_stats=True, return_entropy=True, reduction="sum"
    )
    assert_type(stats, gk.SampleStats)
    asked = gk.weighted_linear_loss(hidden, head.weight, labels, return_stats=flag, return_entropy=flag)
    linear = asked if isinstance(asked, Tensor) else asked[0]
    return loss + linear + sums.sum() + entropy.mean() + counted[0].sum()


def learning_state(path: Path) -> None:
    presets = [
        gk.GEKOConfig.recommended(light_interval=3),
        gk.GEKOConfig.auto(),
        gk.GEKOConfig.original(),
        gk.GEKOConfig.aggressive(),
        gk.GEKOConfig.balanced(),
        gk.GEKOConfig.conservative(),
        gk.GEKOConfig.gekolib(),
        gk.GEKOConfig.uniform(),
    ]
    assert gk.GEKOConfig.from_dict(presets[0].to_dict()) == presets[0]
    state = gk.SampleState(100, presets[0])
    state.bucket_weights = (3.0, 1.0, 0.0)
    columns: list[Tensor] = [
        state.q_value,
        state.confidence,
        state.quality,
        state.last_loss,
        state.times_seen,
        state.bucket,
        state.loss_history,
        state.quarantined,
        state.bucket_weights,
        state.bucket_counts(),
    ]
    state.sync()
    state.check()
    state.load_state_dict(state.state_dict())
    state.save(path)
    loaded = gk.SampleState.load(path, device="cpu")
    assert_type(loaded, gk.SampleState)
    print(len(loaded), columns[0].shape, [bucket.name for bucket in gk.Bucket])
    curriculum = gk.MountainCurriculum()
    hard, focus, light = curriculum.weights(0.5)
    phase = curriculum.phase(0.5)
    print(hard + focus + light, phase is gk.Phase.PEAK)


def loop_with_a_loader(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    dataset = TensorDataset(torch.zeros(100, 4), torch.zeros(100, dtype=torch.int64))
    loader = gk.GEKOLoader(dataset, batch_size=32, num_epochs=10, config=gk.GEKOConfig.recommended(), device="cpu")
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1 - loader.progress)
    for batch in loader:
        model.train(batch.trains)
        with torch.set_grad_enabled(batch.trains):
            inputs, labels = batch.data
            loss = gk.weighted_loss(
                model(inputs), labels, batch.ids, loader.state, sample_weights=batch.weights, update=True
            )
        if batch.trains:
            loss.backward()  # type: ignore[no-untyped-call]  # pyright: ignore[reportUnknownMemberType]  # torch's
            optimizer.step()
    for epoch in loader.epochs():
        print(loader.epoch, [batch.epoch for batch in epoch])
    loader.load_state_dict(loader.state_dict())
    loader.write_samples(folder / "samples.jsonl")
    page = loader.write_report(folder)
    assert_type(page, Path)


def loop_with_a_sampler(state: gk.SampleState, rows: TensorDataset) -> None:
    sampler = gk.GEKOSampler(state, 10, seed=1)
    data = gk.IdDataset(rows)
    loader = DataLoader(data, batch_size=8, sampler=sampler, collate_fn=gk.IdCollator(DefaultDataCollator()))
    for epoch in range(sampler.next_epoch, 10):
        due = sampler.due_probes(epoch)
        if len(due):
            sampler.probed(due, epoch)
        sampler.set_epoch(epoch)
        for step, batch in enumerate(loader):
            sampler.advance(8 * step)
            print(batch["sample_ids"], sampler.sample_weights(batch["sample_ids"]), sampler.weights(8 * step))
        print(len(sampler), sampler.progress(len(sampler)), sampler.guarded)
    sampler.load_state_dict(sampler.state_dict(consumed=0))


def trainers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    data = gk.load_dataset("chats.jsonl", tokenizer, max_length=512)
    print(len(data), data.class_names, data.notes)
    arguments = gk.GEKOTrainingArguments(str(folder), num_train_epochs=5, probe_batch_size=64, shift_labels=True)
    trainer = gk.GEKOTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer, config=gk.GEKOConfig.auto()
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    print(trainer.evaluate())
    trainer.write_samples(folder / "samples.jsonl")
    print(trainer.config.auto_stop, trainer.state.log_history)
    if trainer.sample_state is not None and trainer.sampler is not None:
        print(trainer.sample_state.bucket_counts(), trainer.sampler.forgotten)

    sft = gk.GEKOSFTTrainer(
        model, SFTConfig(output_dir=str(folder), packing=True), train_dataset=None, config=gk.GEKOConfig.recommended()
    )
    sft.train()


class OwnTrainer(gk.GEKOMixin, Trainer):
    pass


def observed(trainer: Trainer, folder: Path) -> None:
    observation = gk.observe(trainer, gk.GEKOConfig())
    trainer.train()  # pyright: ignore[reportUnknownMemberType]  # Transformers names optuna
    recorded: list[Tensor | None] = [
        observation.losses,
        observation.label_probabilities,
        observation.hits,
        observation.confidences,
        observation.margins,
    ]
    observation.write_samples(folder / "samples.jsonl")
    page = observation.write_report(folder)
    observation.close()
    print(page, len(recorded), observation.state.bucket_counts())
