"""The samples of the end-to-end tasks: token ids, the positions that predict, and their labels."""

from __future__ import annotations

import functools
import gzip
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

CLASSES = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive "
    "object person phenomenon plant possession process quantity relation shape state substance time"
).split()
# classes that a careless annotator would mix up
_PAIRS = (
    "Tops time, act event, animal plant, artifact object, attribute state, body food, cognition communication, "
    "feeling motive, group person, location shape, phenomenon process, possession quantity, relation substance"
)
_FIRST_NUMBER = 3  # lexicographer file of noun.Tops
_GLOSS = (40, 2)  # tokens of a sample, and of its class's name
Encode = Callable[[list[str]], list[list[int]]]


class Split(NamedTuple):
    """N samples padded on the right; `labels` are -100 where a sample has fewer than C."""

    tokens: Tensor  # (N, S) int32
    positions: Tensor  # (N, C) int16: where the logits predict the labels
    labels: Tensor  # (N, C) int32
    lengths: Tensor  # (N,) int64, on the CPU
    groups: Tensor  # (N,) int64, on the CPU: difficulty, or class
    wrong: Tensor  # (N,) bool, on the CPU: the label is not the true one

    def __len__(self) -> int:
        return len(self.tokens)

    def answer_tokens(self) -> Tensor:
        """(N,) int64 on the CPU: labels of each sample."""
        return (self.labels >= 0).sum(1).cpu()

    def to(self, device: torch.device) -> Split:
        tokens, positions, labels, *rest = self
        return Split(tokens.to(device), positions.to(device), labels.to(device), *rest)


class Ratings(NamedTuple):
    """What the test samples are to be rated on a scale whose values are one token each."""

    tokens: list[int]  # of the values, the lowest first
    means: Tensor  # (N,) int64, on the CPU: of all raters, in any unit


class Data(NamedTuple):
    train: Split
    test: Split
    group_names: Sequence[str]
    ratings: Ratings | None = None


def _padded(rows: list[list[int]], width: int, fill: int) -> Tensor:
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.int32)


def pack(
    prompts: list[list[int]],
    answers: list[list[int]],
    groups: Sequence[int],
    shape: tuple[int, int],
    wrong: Tensor | None = None,
) -> Split:
    """Prompt and answer as one row of `shape[0]` tokens; the answer's tokens, at most `shape[1]`, are the labels."""
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    starts = torch.tensor([[len(prompt) - 1] for prompt in prompts])
    counts = torch.tensor([[len(answer)] for answer in answers])
    places = torch.arange(shape[1])
    positions = torch.where(places < counts, starts + places, 0).short()
    tokens, labels = _padded(rows, shape[0], 0), _padded(answers, shape[1], -100)
    lengths = torch.tensor([len(row) for row in rows])
    wrong = torch.zeros(len(prompts), dtype=torch.bool) if wrong is None else wrong
    return Split(tokens, positions, labels, lengths, torch.tensor(groups), wrong)


@functools.cache
def read_wordnet(path: Path) -> list[tuple[str, int, str]]:
    """(word, class, gloss) of WordNet 3.0's data.noun, plain or gzipped, shuffled; of equal glosses the first."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    rows: dict[str, tuple[str, int, str]] = {}
    for line in text.splitlines():
        fields, bar, rest = line.partition("|")
        gloss = re.split(r';\s*"', rest.strip())[0].strip(" ;")
        if bar and gloss and not line.startswith("  "):
            _, number, _, _, word = fields.split()[:5]
            rows.setdefault(gloss.lower(), (word.replace("_", " "), int(number) - _FIRST_NUMBER, gloss))
    shuffled = list(rows.values())
    random.Random(0).shuffle(shuffled)
    return shuffled


def confusable() -> dict[int, int]:
    """For each class the one that it is mixed up with."""
    other = {CLASSES.index(a): CLASSES.index(b) for a, b in (pair.split() for pair in _PAIRS.split(", "))}
    return other | {b: a for a, b in other.items()}


def gloss_classes(
    rows: list[tuple[str, int, str]], encode: Encode, size: int, test_size: int, noise: float, kind: str
) -> Data:
    """Gloss -> class; a share `noise` of the training labels is wrong: any other class, or the confusable one."""
    rows = rows[: test_size + size]
    names = encode([f" {name}" for name in CLASSES])
    prompts = [tokens[2 - _GLOSS[0] :] for tokens in encode([f"{gloss}\nCategory:" for _, _, gloss in rows])]
    true = torch.tensor([number for _, number, _ in rows])
    given, wrong = true.clone(), torch.zeros(len(rows), dtype=torch.bool)
    generator = torch.Generator().manual_seed(1234)
    some = test_size + torch.randperm(len(rows) - test_size, generator=generator)[: round(noise * size)]
    wrong[some] = True
    if kind == "pairs":
        other = confusable()
        given[some] = torch.tensor([other[int(c)] for c in true[some]], dtype=torch.int64)
    else:
        given[some] = (true[some] + torch.randint(1, len(CLASSES), (len(some),), generator=generator)) % len(CLASSES)
    answers = [names[c] for c in given.tolist()]
    return Data(
        pack(prompts[test_size:], answers[test_size:], true[test_size:].tolist(), _GLOSS, wrong[test_size:]),
        pack(prompts[:test_size], answers[:test_size], true[:test_size].tolist(), _GLOSS),
        CLASSES,
    )


def facts(encode: Encode, size: int, seed: int = 11) -> Data:
    """Made-up name -> number of 1 to 6 digits, which nothing but the fact itself can teach. The test set is the facts.

    A quarter of the numbers repeat one digit, so difficulty is uneven by more than length.
    """
    draw = random.Random(seed)
    syllables = [a + b for a in "b d f g k l m n p r s t v z".split() for b in "a e i o u".split()]
    names: dict[str, None] = {}
    while len(names) < size:
        first, last = ("".join(draw.choices(syllables, k=2)).capitalize() for _ in range(2))
        names[f"{first} {last}"] = None
    digits = [draw.randint(1, 6) for _ in names]
    values = [draw.choice("123456789") * n if draw.random() < 0.25 else _number(n, draw) for n in digits]
    prompts = [tokens[-18:] for tokens in encode([f"{name}: " for name in names])]
    split = pack(prompts, encode(values), [n - 1 for n in digits], (24, 6))
    return Data(split, split, [f"{n} digits" for n in range(1, 7)])


def _number(digits: int, draw: random.Random) -> str:
    return str(draw.randint(10 ** (digits - 1), 10**digits - 1))


def additions(size: int, test_size: int) -> Data:
    """a + b = c, digits reversed: 1 to 3 digits in 70 % of the training and half of the test samples, else 6 to 8."""
    draw = random.Random(7)
    code = {character: i + 1 for i, character in enumerate("0123456789+=;")}

    def split(number: int, easy_share: float, banned: set[tuple[int, int]]) -> tuple[Split, set[tuple[int, int]]]:
        prompts, answers, hard, seen = [], [], [], set()
        while len(prompts) < number:
            easy = draw.random() < easy_share
            lengths = [draw.randint(1, 3) if easy else draw.randint(6, 8) for _ in range(2)]
            a, b = (draw.randint(10 ** (n - 1), 10**n - 1) for n in lengths)
            if (a, b) in banned:
                continue
            seen.add((a, b))
            prompts.append([code[c] for c in f"{str(a)[::-1]}+{str(b)[::-1]}="])
            answers.append([code[c] for c in f"{str(a + b)[::-1]};"])
            hard.append(int(not easy))
        return pack(prompts, answers, hard, (32, 10)), seen

    test, taken = split(test_size, 0.5, set())
    train, _ = split(size, 0.7, taken)
    return Data(train, test, ("short", "long"))
