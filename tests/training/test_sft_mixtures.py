"""GEKOSFTTrainer against trl.SFTTrainer with mixtures of experts: their auxiliary loss, resuming, LoRA."""

from __future__ import annotations

import pytest
import torch
from test_sft import rows, trainer_of
from training import weights

import geko_kernels as gk

trl = pytest.importorskip("trl")


def mixture(kind):
    import transformers as T

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    if kind == "mixtral":
        return T.MixtralForCausalLM(T.MixtralConfig(**sizes, num_local_experts=4, router_aux_loss_coef=0.5))
    sizes |= {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "router_aux_loss_coef": 0.5}
    return T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**sizes))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("mixtral", {}),
        ("mixtral", {"padding_free": True, "max_length": None}),
        ("qwen", {}),
        ("qwen", {"router_aux_loss_coef": 0.25}),  # the model keeps its own of 0.5
        ("qwen", {"router_aux_loss_coef": 0.0}),
    ],
)
def test_an_auxiliary_loss_is_trained_as_sft_does(tmp_path, kind, fields, accumulation):
    fields = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation, **fields}
    runs, data = [], rows("prompt")
    for cls, named in ((trl.SFTTrainer, {}), (gk.GEKOSFTTrainer, {"config": gk.GEKOConfig.uniform()})):
        named |= {"eval_dataset": rows("prompt", 5), "model": mixture(kind), "learning_rate": 0.1}
        trainer = trainer_of(cls, tmp_path / cls.__name__, data, **named, **fields)
        trainer.train()
        keys = ("loss", "aux_loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm")
        curves = [entry[key] for key in keys for entry in trainer.state.log_history if key in entry]
        runs.append((curves, weights(trainer.model), trainer.evaluate()["eval_loss"]))
    off = fields.get("router_aux_loss_coef") == 0.0
    assert len(runs[0][0]) == (15 if off else 18) and runs[1][0] == pytest.approx(runs[0][0], rel=1e-4)
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=1e-4, atol=1e-6)
    assert runs[1][2] == pytest.approx(runs[0][2], rel=1e-4)
    assert trainer._found.head is not None


@pytest.mark.parametrize("kind", ["mixtral", "qwen"])
def test_resuming_a_mixture_is_exact(tmp_path, kind):
    """Transformers saves its experts under other names, which Trainer does not load; the best checkpoint too."""
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 0.1}
    whole, again = (
        trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text"), model=mixture(kind), **fields) for _ in range(2)
    )
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(again.model), weights(whole.model))
    saved = mixture(kind).from_pretrained(tmp_path / "checkpoint-2")
    again.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    again._load_best_model()
    assert torch.equal(weights(again.model), weights(saved)) and not torch.equal(weights(saved), weights(whole.model))


def test_resuming_with_another_model_is_refused(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text"), model=mixture("mixtral"), **fields).train()
    other = trainer_of(gk.GEKOSFTTrainer, tmp_path, rows("text"), model=mixture("qwen"), **fields)
    with pytest.raises(ValueError, match="checkpoint-2 lacks weights of Qwen3MoeForCausalLM: .*It is of another model"):
        other.train(resume_from_checkpoint=True)


def test_lora_of_the_experts(tmp_path):
    """PEFT's `target_parameters` puts each parameter aside and back in every forward, which writes to none."""
    peft = pytest.importorskip("peft")
    runs = []
    for cls, named in ((trl.SFTTrainer, {}), (gk.GEKOSFTTrainer, {"config": gk.GEKOConfig.uniform()})):
        model = mixture("qwen")
        lora = peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj"], task_type="CAUSAL_LM")
        fields = {"peft_config": lora, "learning_rate": 1.0, "model": model, **named}
        trainer = trainer_of(cls, tmp_path / cls.__name__, rows("text"), **fields)
        trainer.train()
        keys = ("loss", "aux_loss", "entropy")
        runs.append([entry[key] for key in keys for entry in trainer.state.log_history if key in entry])
    assert len(runs[0]) == 9 and runs[1] == pytest.approx(runs[0], rel=1e-4)
