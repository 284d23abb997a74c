"""R1 and R3 in small: a CPU runs an arm in half a minute, to choose what GPU time is spent on.

R1-small is R1's made-up facts, letter by letter. R3-small is operations on lists of symbols: a small Llama that knows
other operations learns twelve new ones, 60 % of the samples being the same list in ten wordings.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.end_to_end.data import Data, Encode, Split, pack
from benchmarks.end_to_end.engine import Network

_CHARACTERS = " :abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_SYMBOLS = 30
_END, _ANSWER, _FIRST_WORD = _SYMBOLS + 1, _SYMBOLS + 2, _SYMBOLS + 3
_WORDS, _FRAMES = 5, 4  # an operation has five names, and is asked for in four ways
_SHAPE = (17, 7)
_COPIED, _COPIES, _ZIPF = 0.6, 10, 1.5
_PRETRAIN, _RATE, _BATCH = 120_000, 2e-3, 64  # samples, learning rate, batch
Operation = Callable[[list[int]], list[int]]

LEARNT: tuple[Operation, ...] = (
    sorted,
    lambda s: s[::-1],
    lambda s: sorted(s, reverse=True),
    lambda s: [x for x in s if x < _SYMBOLS // 2] or s[:1],
    lambda s: s[::2],
    lambda s: s[1:] + s[:1],
    lambda s: [s[0], s[-1]],
    lambda s: [s[1], s[0], *s[2:]],
    lambda s: s[1::2],
    lambda s: [max(s)],
    lambda s: [min(s), max(s)],
    lambda s: s[-1:] + s[:-1],
)
KNOWN: tuple[Operation, ...] = (
    list,
    lambda s: s[1:],
    lambda s: s[:-1],
    lambda s: s[2:] + s[:2],
    lambda s: s[:1],
    lambda s: s[-1:],
    lambda s: [min(s)],
    lambda s: [s[1], s[0]],
    lambda s: sorted(s)[:2],
    lambda s: s[-2:],
    lambda s: [s[1]],
    lambda s: sorted(s[:3]),
)
_ASKED = _FIRST_WORD + _WORDS * (len(LEARNT) + len(KNOWN))  # the first of the frames' tokens


def small_network(kind: str) -> tuple[Network, Encode | None]:
    """kind "small facts" or "small instructions", "tiny instructions" for tests."""
    if kind == "small facts":
        return Network(_llama(len(_CHARACTERS) + 1, 96)), encode_characters
    return pretrained(_PRETRAIN if kind.startswith("small") else 2 * _BATCH), None


def encode_characters(texts: list[str]) -> list[list[int]]:
    return [[_CHARACTERS.index(character) + 1 for character in text] for text in texts]


def _llama(vocab: int, width: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes, tie_word_embeddings=True))


def pretrained(size: int) -> Network:
    """A small Llama that has learnt the operations KNOWN from `size` lists."""
    network = Network(_llama(_ASKED + _FRAMES, 64))
    draw = random.Random(3)
    split = _ask(KNOWN, len(LEARNT), [(draw.randrange(len(KNOWN)), 1) for _ in range(size)], draw, None)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE)
    steps = size // _BATCH
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5 * (1 + math.cos(math.pi * n / steps)))
    for ids in torch.arange(steps * _BATCH).split(_BATCH):
        logits = network(split.tokens[ids].long(), split.positions[ids].long())
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), split.labels[ids].long().flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay.step()
    return network


def list_operations(size: int, test_size: int) -> Data:
    """The operations LEARNT: in training by Zipf's law and mostly copied, the test set in equal shares and unseen."""
    draw = random.Random(7)
    taken: set[tuple[int, ...]] = set()
    test = _ask(LEARNT, 0, [(i % len(LEARNT), 1) for i in range(test_size)], draw, taken)
    kinds = round(_COPIED * size / _COPIES)
    copies = [_COPIES] * kinds + [1] * (size - _COPIES * kinds)
    weights = [rank**-_ZIPF for rank in range(1, len(LEARNT) + 1)]
    numbers = draw.choices(range(len(LEARNT)), weights, k=len(copies))
    train = _ask(LEARNT, 0, list(zip(numbers, copies, strict=True)), draw, taken)
    return Data(train, test, [f"operation {i}" for i in range(len(LEARNT))])


def _ask(
    operations: tuple[Operation, ...],
    first: int,
    kinds: list[tuple[int, int]],
    draw: random.Random,
    taken: set[tuple[int, ...]] | None,
) -> Split:
    """A list for each of (operation, copies), asked for in as many wordings; none that an operation has `taken`."""
    prompts, answers, groups = [], [], []
    for number, copies in kinds:
        symbols = draw.sample(range(_SYMBOLS), draw.randint(3, 6))
        while taken is not None and (number, *sorted(symbols)) in taken:
            symbols = draw.sample(range(_SYMBOLS), draw.randint(3, 6))
        if taken is not None:
            taken.add((number, *sorted(symbols)))
        answer = [symbol + 1 for symbol in operations[number](symbols)]
        for wording in draw.sample(range(_WORDS * _FRAMES), copies):
            frame, word = divmod(wording, _WORDS)
            asked = [_ASKED + frame, _FIRST_WORD + _WORDS * (first + number) + word]
            prompts.append([*asked, *(symbol + 1 for symbol in symbols), _ANSWER])
            answers.append([*answer, _END])
            groups.append(number)
    return pack(prompts, answers, groups, _SHAPE)
