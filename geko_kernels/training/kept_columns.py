"""The columns that Trainer's `remove_unused_columns` leaves of the training data: an error if they are labels alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def without_columns(remove: Callable[[Any], Any], labels: frozenset[str], model: str, item: Any) -> Any:
    """`remove(item)`, Trainer's; see `check_kept`."""
    kept = remove(item)
    if kept is not item:
        check_kept(item, kept, labels, model)
    return kept


def check_kept(given: Iterable[str], kept: Iterable[str], labels: frozenset[str], model: str) -> None:
    """Raise if none of the columns `given` is left but `labels`. `model`: the name of its class.

    Trainer compares the columns with the arguments of the model's forward, and a wrapper such as that of torch.compile
    hides them.

    Raises:
        ValueError: names the columns that are gone.
    """
    if labels.issuperset(kept) and not labels.issuperset(given):
        raise ValueError(
            "an item of train_dataset must have a column that the model reads, such as `input_ids`, got none of the "
            f"columns that the forward of {model} takes (remove_unused_columns drops the others, here "
            f"{sorted(set(given) - set(kept))}). Tokenise the dataset; or set remove_unused_columns=False, if the data "
            "collator reads them or the model hides its arguments, as one from torch.compile does"
        )
