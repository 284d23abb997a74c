"""What the trainer's tests share: tiny models, data that can be learnt, a trainer's curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, Trainer, TrainingArguments

import geko_kernels as gk

VOCAB = 32


def tiny_config(**fields: Any) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaConfig(**{"vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0, **sizes, **fields})


def tiny_llama(**fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(**fields))


def tiny_classifier(num_labels: int = 4) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(tiny_config(num_labels=num_labels))


def sentences(count: int, length: int = 8, ragged: bool = False) -> list[dict[str, list[int]]]:
    """Each sample repeats one token, so a tiny model can learn it; ragged ones have 3 to `length` tokens."""
    items = []
    for i in range(count):
        tokens = [1 + i % (VOCAB - 1)] * (3 + i % (length - 2) if ragged else length)
        items.append({"input_ids": tokens, "labels": list(tokens)})
    return items


def classified(count: int) -> list[dict[str, Any]]:
    return [{"input_ids": [1 + i % 20, 1 + i % 4] * 3, "labels": i % 4} for i in range(count)]


def arguments(folder: Path | str, **fields: Any) -> gk.GEKOTrainingArguments:
    """Few and quick steps on the CPU, every one logged."""
    common = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return gk.GEKOTrainingArguments(str(folder), **{**common, **quiet, **fields})


def standard(model: torch.nn.Module, args: gk.GEKOTrainingArguments, data: Any, **fields: Any) -> Trainer:
    plain = {name: value for name, value in args.to_dict().items() if name in TrainingArguments.__dataclass_fields__}
    del plain["accelerator_config"]
    return Trainer(model, TrainingArguments(**plain), train_dataset=data, **fields)


def curve(trainer: Trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(model: torch.nn.Module) -> torch.Tensor:
    """All parameters in one vector, those that FSDP shards included."""
    whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in map(torch.Tensor.detach, model.parameters()))
    return torch.cat([parameter.flatten() for parameter in whole])


class MapDataset:
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def trainer_of(folder, data=None, config=None, model=None, **fields) -> gk.GEKOTrainer:
    named = {name: fields.pop(name) for name in ("data_collator", "eval_dataset", "callbacks") if name in fields}
    data = sentences(24) if data is None else data
    model = tiny_llama() if model is None else model
    return gk.GEKOTrainer(model, arguments(folder, **fields), train_dataset=data, config=config, **named)
