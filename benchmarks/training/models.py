"""Models of random weights: the shapes of SmolLM2-135M, Llama 3.2 1B and Llama 3.1 8B, and a tiny one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
TINY = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_LLAMA_1B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
_LLAMA_8B = _LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "135m": SMOLLM2_135M,
    "1b": _LLAMA_1B,
    "8b-lora": _LLAMA_8B,
    "tiny": TINY,
    "tiny-lora": TINY,
}


def new_model(name: str, device: torch.device, positions: int = 2048, attention: str = "sdpa") -> Any:
    """Made on the device: in float32, or with LoRA in bfloat16. ImportError without peft."""
    lora = name.endswith("-lora")
    if lora:
        import peft
    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[name], max_position_embeddings=positions)
    with torch.device(device):
        dtype = torch.bfloat16 if lora else torch.float32
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention)
        if lora:
            model = peft.get_peft_model(
                model, peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
            )
    return model.to(device)
