"""accelerate's regional compilation trains a copy of the model whose blocks are compiled: the loss is still its own."""

from __future__ import annotations

import peft
import pytest
import torch
from test_loss_form import jetmoe
from training import arguments, curve, sentences, tiny_llama, weights
from transformers import Trainer, default_data_collator

import geko_kernels as gk


@pytest.fixture(autouse=True)
def regional(reference, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")


def adapted():
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("make", [tiny_llama, jetmoe, adapted])
def test_the_loss_is_the_models_own(tmp_path, make):
    runs, data = [], sentences(12)
    for cls, config in ((Trainer, {}), (gk.GEKOTrainer, {"config": gk.GEKOConfig.uniform()})):
        torch.manual_seed(0)
        fields = {"num_train_epochs": 2, "torch_compile": True, "torch_compile_backend": "eager"}
        trainer = cls(make(), arguments(tmp_path, **fields), default_data_collator, data, data, **config)
        trainer.train()
        assert "_orig_mod" in vars(trainer.model_wrapped), "the model is not compiled by regions"
        runs.append((curve(trainer), trainer.evaluate()["eval_loss"], weights(trainer.model)))
    (losses, evaluated, trained), (ours, ours_evaluated, ours_trained) = runs
    torch.testing.assert_close(ours, losses, rtol=1e-4, atol=1e-5)
    assert ours_evaluated == pytest.approx(evaluated, rel=1e-4)
    torch.testing.assert_close(ours_trained, trained, rtol=1e-3, atol=1e-4)


def test_blocks_of_one_graph_each_keep_the_logits(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_FULLGRAPH", "true")
    args = arguments(tmp_path, num_train_epochs=1, torch_compile=True, torch_compile_backend="eager")
    trainer = gk.GEKOTrainer(tiny_llama(), args, train_dataset=sentences(12), config=gk.GEKOConfig.uniform())
    trainer.train()
    assert trainer._found.head is None
    assert len(curve(trainer)) > 0
