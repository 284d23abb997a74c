"""Loads the model and its tokenizer, and checks that they fit each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from geko_kernels.cli.errors import UsageError
from geko_kernels.cli.options import TrainOptions


def load_config(options: TrainOptions) -> Any:
    """The model's configuration."""
    return _load(AutoConfig, options)


def load_tokenizer(options: TrainOptions) -> Any:
    """The tokenizer; if it has no padding token, it pads with the end token."""
    tokenizer = _load(AutoTokenizer, options)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(
                f"the tokenizer of {options.model} has neither a padding nor an end token; add one and save it again"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(options: TrainOptions, names: list[str] | None, tokenizer: Any) -> Any:
    """The model in float32 (--precision autocasts), with a new head if its classes are not `names`."""
    if names is None:
        model = _load(AutoModelForCausalLM, options, dtype=torch.float32)
    else:
        classes = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        kind = AutoModelForSequenceClassification
        model = _load(kind, options, dtype=torch.float32, ignore_mismatched_sizes=True, **classes)
        model.config.pad_token_id = tokenizer.pad_token_id  # decoders classify at the last token before the padding
    rows, tokens = model.get_input_embeddings().num_embeddings, 1 + max(tokenizer.get_vocab().values(), default=0)
    if tokens > rows:
        raise UsageError(
            f"the tokenizer of {options.model} has {tokens:,} tokens, but the model embeds only {rows:,}: give "
            f"it its own tokenizer, or call model.resize_token_embeddings({tokens}) and save it again"
        )
    return model


def most_tokens(model: nn.Module, tokenizer: Any) -> int | None:
    """The longest input of the model, in tokens; None without a limit."""
    config: Any = model.config
    limits = [getattr(config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length]
    for name, module in model.named_modules():
        # RoBERTa and its variants count positions from the padding index on
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((limit for limit in limits if isinstance(limit, int) and 0 < limit < 2**31), default=None)


def _load(kind: Any, options: TrainOptions, **settings: Any) -> Any:
    try:
        return kind.from_pretrained(options.model, trust_remote_code=options.trust_remote_code, **settings)
    except Exception as error:  # none of our code runs here, and a damaged folder raises errors of many types
        if "trust_remote_code" in str(error) and not options.trust_remote_code:
            raise UsageError(
                f"--model {options.model} comes with its own Python code (`auto_map` in its files), which was not run: "
                "read it, and give --trust-remote-code if you trust it"
            ) from error
        raise UsageError(
            f"cannot load --model {options.model} ({type(error).__name__}: {error}); give a directory that "
            "`save_pretrained` wrote, or a hub name"
        ) from error
