"""WordNet glosses as prompt and completion, for the examples with Transformers. Data: data/glosses.tsv."""

from pathlib import Path
from typing import Any

Item = dict[str, Any]


def gloss_records(split: str, limit: int) -> list[dict[str, str]]:
    """The first `limit` records of "train" or "test", like {"prompt": "avens\\nCategory:", "completion": " plant"}."""
    lines = (Path(__file__).parent / "data" / "glosses.tsv").read_text(encoding="utf8").splitlines()
    rows = [row for row in (line.split("\t") for line in lines) if row[0] == split]
    return [{"prompt": f"{gloss}\nCategory:", "completion": f" {name}"} for _, name, gloss in rows[:limit]]


def gloss_items(tokenizer: Any, split: str, limit: int) -> list[Item]:
    """The same as token ids; the loss counts only the completion."""
    return [
        _item(tokenizer(r["prompt"]).input_ids, tokenizer(r["completion"]).input_ids)
        for r in gloss_records(split, limit)
    ]


def _item(prompt: list[int], completion: list[int]) -> Item:
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}
