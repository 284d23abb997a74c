"""Task G1's rows: a sum of three to five numbers -> its steps, one after the other, and so its result.

    pip install reasoning-gym==0.1.25
    python -m benchmarks.end_to_end.sums --out g1.npz

Writes the rows as tokens. TASKS.md says how the rows were chosen.

Licence: reasoning-gym is Apache-2.0 (its task `chain_sum`); no problem of it is in this repo.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.end_to_end import row_hashes
from benchmarks.end_to_end.data import Encode
from benchmarks.end_to_end.texts import save

SOURCE = "reasoning-gym 0.1.25"
SIZES = {"test": 1_000, "choose": 500, "train": 2_000}  # problems, in the order in which they are drawn
TERMS, DIGITS = (3, 5), (1, 3)
LONGEST, LONGEST_ANSWER = 96, 64  # tokens of a row, and of its answer
END = 2  # <|im_end|>
_SEED = 0
_DRAWN = 5_000


class Sum(NamedTuple):
    question: str
    steps: str
    group: int  # by terms and digits

    def line(self) -> str:
        return f"{self.group}\t{self.question}\t{self.steps}"


def worked(expression: str) -> str:
    """ "9 + 21 - 8" -> "9+21=30, 30-8=22"."""
    first, *rest = expression.split()
    result, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        before, result = result, result + int(term) * (1 if sign == "+" else -1)
        steps.append(f"{before}{sign}{term}={result}")
    return ", ".join(steps)


def problems() -> Iterable[dict[str, Any]]:
    """What reasoning-gym draws."""
    try:
        import reasoning_gym
    except ImportError:
        sys.exit("reasoning-gym is missing: pip install reasoning-gym==0.1.25")
    bounds = {"min_terms": TERMS[0], "max_terms": TERMS[1], "min_digits": DIGITS[0], "max_digits": DIGITS[1]}
    return reasoning_gym.create_dataset("chain_sum", size=_DRAWN, seed=_SEED, **bounds)


def read(drawn: Iterable[dict[str, Any]]) -> list[Sum]:
    """The problems with their steps; of equal ones the first.

    Raises:
        ValueError: the steps do not end with the answer that came with the problem.
    """
    found: dict[str, Sum] = {}
    for each in drawn:
        about = each["metadata"]
        steps = worked(about["expression"])
        if steps.rpartition("=")[2] != each["answer"]:
            raise ValueError(f"{each['question']} has the answer {each['answer']}, and its steps are {steps}")
        group = (about["num_terms"] - TERMS[0]) * (DIGITS[1] - DIGITS[0] + 1) + about["num_digits"] - DIGITS[0]
        found.setdefault(each["question"], Sum(each["question"], steps, group))
    return list(found.values())


def deal(rows: list[Sum]) -> dict[str, list[Sum]]:
    if len(rows) < sum(SIZES.values()):
        raise ValueError(f"{len(rows)} problems are too few for {SIZES}")
    left = iter(rows)
    return {part: [next(left) for _ in range(size)] for part, size in SIZES.items()}


def build(parts: dict[str, list[Sum]], encode: Encode, out: Path) -> None:
    rows = [row for part in parts.values() for row in part]
    prompts, answers = encode([f"{row.question}\n" for row in rows]), encode([row.steps for row in rows])
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        answer.append(END)
        if len(answer) > LONGEST_ANSWER or len(prompt) + len(answer) > LONGEST:
            raise ValueError(
                f"{row.question} and its steps take {len(prompt)} and {len(answer)} tokens: an answer may have "
                f"{LONGEST_ANSWER}, both {LONGEST}"
            )
    bounds = np.cumsum([0, *map(len, parts.values())])
    ids = {part: range(bounds[i], bounds[i + 1]) for i, part in enumerate(parts)}
    save(out, prompts, answers, ids, {"groups": np.array([row.group for row in rows], np.uint8)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deal", action="store_true", help=f"write the rows' hashes to {row_hashes.FILE.name}")
    given = parser.parse_args()
    parts = deal(read(problems()))
    row_hashes.settle("G1", {name: [row.line() for row in part] for name, part in parts.items()}, SOURCE, given.deal)
    from smollm2 import load_smollm2  # in examples/, on the path since benchmarks.end_to_end.engine was imported

    encode_one = load_smollm2()[1]
    build(parts, lambda texts: [encode_one(text) for text in texts], given.out)
    print({name: f"{len(part)} problems" for name, part in parts.items()})


if __name__ == "__main__":
    main()
