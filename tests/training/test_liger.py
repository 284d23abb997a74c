"""use_liger_kernel=True: Liger's kernels for the layers, and GEKO's fused head instead of Liger's."""

from __future__ import annotations

import pytest
import torch
from training import arguments, curve, sentences, tiny_llama
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, default_data_collator
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import geko_kernels as gk


class FasterNorm(LlamaRMSNorm):
    """Stands for one of Liger's layers."""


@pytest.fixture
def given(monkeypatch):
    """The kernel_config of each call; Liger itself needs a GPU."""
    configs = []

    def apply(model, config):
        configs.append(config)
        model.model.norm.__class__ = FasterNorm

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", apply)
    return configs


@pytest.mark.parametrize("config", [None, {"rope": False, "fused_linear_cross_entropy": True}])
def test_layers_are_ligers_and_the_head_is_fused(reference, tmp_path, given, config):
    data, runs = sentences(12), []
    for cls, liger, more in ((Trainer, False, {}), (gk.GEKOTrainer, True, {"config": gk.GEKOConfig.uniform()})):
        torch.manual_seed(0)
        args = arguments(tmp_path, num_train_epochs=2, use_liger_kernel=liger, liger_kernel_config=config)
        trainer = cls(tiny_llama(), args, default_data_collator, data, data, **more)
        trainer.train()
        assert args.liger_kernel_config == config
        runs.append((curve(trainer), trainer.evaluate()["eval_loss"]))
    assert given == [{**(config or {}), "fused_linear_cross_entropy": False}]
    assert isinstance(trainer.model.model.norm, FasterNorm) and trainer._found.head is not None
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-6)


def test_arguments_are_the_users_for_callbacks_other_trainers_and_after_an_error(reference, tmp_path, given):
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **named):
            seen.append(args.liger_kernel_config)

        def on_step_end(self, args, state, control, **named):
            raise KeyError

    args, data = arguments(tmp_path, use_liger_kernel=True, max_steps=1), sentences(4)
    for cls in (gk.GEKOTrainer, Trainer, gk.GEKOTrainer):
        trainer = cls(tiny_llama(), args, default_data_collator, data, callbacks=[Look()])
        with pytest.raises(KeyError):
            trainer.train()
    assert seen == [None] * 3 and args.liger_kernel_config is None
    layers = {"fused_linear_cross_entropy": False}
    assert given == [layers, None, layers]


def test_observe_says_how_to_keep_the_logits(tmp_path, monkeypatch):
    def fused(model, config):
        model.register_forward_hook(lambda _module, _inputs, outputs: CausalLMOutput(loss=outputs.loss))

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", fused)
    trainer = Trainer(tiny_llama(), arguments(tmp_path, use_liger_kernel=True), default_data_collator, sentences(4))
    gk.observe(trainer)
    with pytest.raises(ValueError, match=r"liger_kernel_config=\{'fused_linear_cross_entropy': False\}"):
        trainer.train()


class Strict(LlamaForCausalLM):
    """Takes what Llama takes and nothing else, as models without **kwargs do."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(input_ids, attention_mask, labels=labels)


def test_an_evaluation_passes_nothing_of_ligers_to_the_model(reference, tmp_path, given):
    args = arguments(tmp_path, use_liger_kernel=True, prediction_loss_only=True)
    trainer = gk.GEKOTrainer(Strict(tiny_llama().config), args, train_dataset=sentences(4), eval_dataset=sentences(4))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(3.47, abs=0.2)


def test_sft_takes_the_layers_and_refuses_ligers_loss_itself(reference, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from test_sft import rows, trainer_of

    configs = []
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda model, config: configs.append(config))
    trainer = trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text"), use_liger_kernel=True, max_steps=1)
    trainer.train()
    assert configs == [{"fused_linear_cross_entropy": False}] and trainer._found.head is not None
    whole = {"fused_linear_cross_entropy": True}
    with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
        trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text"), use_liger_kernel=True, liger_kernel_config=whole)
