"""Instructions on lists of words: the operations, their wordings, and the samples made of them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.end_to_end.data import Data, Encode, Split, pack

COPIED, COPIES = 0.6, 10  # share of the training samples that are near-duplicates, and how many of a kind
_SHAPE = (32, 8)  # tokens of a sample, and of its answer
_LENGTHS = (3, 7)  # words of a list
_ZIPF = 1.5  # operations are drawn in proportion to rank ** -_ZIPF
_ORDINALS = "first second third fourth fifth sixth seventh".split()
_NUMBERS = "three four five six seven".split()
_FRAMES = ("{}: {} =", "please {}: {} =", "now {}: {} =", "your task, {}: {} =")


class Operation(NamedTuple):
    """What is asked of a list of words, and the answer. "{}" in a wording stands for what `argument` draws."""

    name: str
    answer: Callable[[list[str], str], list[str]]
    wordings: str  # separated by bars
    argument: Callable[[list[str], random.Random], str] = lambda words, draw: ""
    repeats: bool = False  # the list has words twice


# the most frequent in training first
OPERATIONS = (
    Operation(
        "sort",
        lambda words, _: sorted(words),
        "sort the words | put in alphabetical order | arrange from a to z | order by the alphabet | "
        "sort alphabetically",
    ),
    Operation(
        "reverse",
        lambda words, _: words[::-1],
        "reverse the words | write backwards | turn the order around | list from last to first | in reverse order",
    ),
    Operation(
        "sort by length",
        lambda words, _: sorted(words, key=len),
        "sort by length | shortest words first | order from short to long | arrange by number of letters | "
        "put long words last",
    ),
    Operation(
        "first letters",
        lambda words, _: [word[0] for word in words],
        "write the first letters | spell the initials | give each word's first letter | shorten to initials | "
        "only the letters that words begin with",
    ),
    Operation(
        "drop repeats",
        lambda words, _: list(dict.fromkeys(words)),
        "drop repeated words | remove duplicates | keep each word once | delete second mentions | without repeats",
        repeats=True,
    ),
    Operation(
        "starting with",
        lambda words, letter: [word for word in words if word.startswith(letter)],
        "keep words starting with {} | find words that begin with {} | which words start with {} | "
        "only words with initial {} | select by first letter {}",
        argument=lambda words, draw: draw.choice(words)[0],
    ),
    Operation(
        "k-th",
        lambda words, ordinal: [words[_ORDINALS.index(ordinal)]],
        "write the {} word | which word is {} | pick the {} one | give only the {} word | name the {} in the list",
        argument=lambda words, draw: draw.choice(_ORDINALS[: len(words)]),
    ),
    Operation(
        "count",
        lambda words, _: [_NUMBERS[len(words) - _LENGTHS[0]]],
        "count the words | how many words | give the number of words | how long is the list | say how many there are",
    ),
    Operation(
        "every second",
        lambda words, _: words[1::2],
        "every second word | skip every other word | words at even places | leave out odd places | "
        "take the second, fourth and so on",
    ),
    Operation(
        "rotate",
        lambda words, _: words[1:] + words[:1],
        "move the first word to the end | rotate by one | put the first word last | shift left by one | "
        "send the front word to the back",
    ),
    Operation(
        "first and last",
        lambda words, _: [words[0], words[-1]],
        "first and last word | keep only both ends | drop the middle | the two outer words | start and end of the list",
    ),
    Operation(
        "swap",
        lambda words, _: [words[1], words[0], *words[2:]],
        "swap the first two words | exchange words one and two | switch the first pair | "
        "trade places of the first and second | flip the two in front",
    ),
)


class Sample(NamedTuple):
    operation: int
    words: tuple[str, ...]
    prompt: str
    answer: str


def instructions(rows: list[tuple[str, int, str]], encode: Encode, size: int, test_size: int, seed: int = 7) -> Data:
    """Instruction and list -> list; a long tail of operations, and near-duplicates, in the training set only.

    Of the training samples COPIED are copies, COPIES of a kind, of one list and operation in other wordings; the others
    have none. The test set has all operations in equal shares, and other lists.
    """
    words = common_words(rows, encode)
    test, train = samples(words, size, test_size, seed)

    def split(part: list[Sample]) -> Split:
        prompts, answers = encode([sample.prompt for sample in part]), encode([sample.answer for sample in part])
        return pack(prompts, answers, [sample.operation for sample in part], _SHAPE)

    return Data(split(train), split(test), [operation.name for operation in OPERATIONS])


def common_words(rows: list[tuple[str, int, str]], encode: Encode) -> list[str]:
    """Nouns of 3 to 6 letters that are one token each."""
    nouns = sorted({word for word, _, _ in rows if re.fullmatch("[a-z]{3,6}", word)})
    return [
        word for word, tokens in zip(nouns, encode([f" {word}" for word in nouns]), strict=True) if len(tokens) == 1
    ]


def samples(words: list[str], size: int, test_size: int, seed: int = 7) -> tuple[list[Sample], list[Sample]]:
    """(test, train); no two lists but copies hold the same words."""
    draw = random.Random(seed)
    taken: set[frozenset[str]] = set()

    def draw_list(operation: Operation) -> list[str]:
        while True:
            length = draw.randint(*_LENGTHS)
            twice = draw.randint(1, length // 2) if operation.repeats else 0
            chosen = draw.sample(words, length - twice)
            if frozenset(chosen) not in taken:
                taken.add(frozenset(chosen))
                chosen += draw.sample(chosen, twice)
                draw.shuffle(chosen)
                return chosen

    def kind(number: int, copies: int) -> list[Sample]:
        operation = OPERATIONS[number]
        chosen = draw_list(operation)
        argument = operation.argument(chosen, draw)
        answer = " " + " ".join(operation.answer(chosen, argument)) + "\n"
        asked = [(frame, wording) for frame in _FRAMES for wording in operation.wordings.split(" | ")]
        return [
            Sample(number, tuple(chosen), frame.format(wording.format(argument), " ".join(chosen)), answer)
            for frame, wording in draw.sample(asked, copies)
        ]

    test = [sample for i in range(test_size) for sample in kind(i % len(OPERATIONS), 1)]
    kinds = round(COPIED * size / COPIES)
    copies = [COPIES] * kinds + [1] * (size - COPIES * kinds)
    weights = [rank**-_ZIPF for rank in range(1, len(OPERATIONS) + 1)]
    numbers = draw.choices(range(len(OPERATIONS)), weights, k=len(copies))
    train = [sample for number, n in zip(numbers, copies, strict=True) for sample in kind(number, n)]
    return test, train
