"""The trainer class that `GEKOMixin` is combined with, and whether the two are compatible."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import Trainer

_REPLACED = {  # hooks that GEKO implements without calling super()
    "compute_loss": "its own loss, which GEKO's would replace",
    "get_train_dataloader": "its own training batches, which GEKO's plans would replace",
    "_get_train_sampler": "its own order, which GEKO's plans would replace",
}


def trainer_below(cls: type, mixin: type) -> type | None:
    """The first class after `mixin` in the MRO of `cls` that is a trainer without the mixin."""
    behind = cls.__mro__[cls.__mro__.index(mixin) :]
    return next((base for base in behind if issubclass(base, Trainer) and not issubclass(base, mixin)), None)


def check_bases(cls: type, mixin: type) -> None:
    """Refuse a class in which the mixin would not run, or would replace what another trainer does.

    Raises:
        TypeError: says what to write, or what cannot be combined.
    """
    order = cls.__mro__
    before = [base for base in order[: order.index(mixin)] if issubclass(base, Trainer) and not issubclass(base, mixin)]
    if before:
        raise TypeError(
            f"{cls.__name__}: {mixin.__name__} must come before {before[0].__name__}, or it never runs; write "
            f"class {cls.__name__}({mixin.__name__}, {before[0].__name__})"
        )
    below = trainer_below(cls, mixin)
    if below is None:
        return
    for hook, why in _REPLACED.items():
        owner = next(base for base in below.__mro__ if hook in vars(base))
        if owner is not Trainer and not (hook == "compute_loss" and owner is getattr(cls, "_replaces", None)):
            raise TypeError(
                f"{cls.__name__}: {owner.__name__}.{hook} gives {below.__name__} {why}. GEKO trains cross-entropies "
                "that a model computes; for another loss or other batches, use weighted_loss in a loop of your own"
            )


def arguments_of(trainer: type | None, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """`args` and `named` by name, as `trainer.__init__` takes them.

    Raises:
        TypeError: they do not match its parameters, or no trainer follows the mixin.
    """
    if trainer is None:
        raise TypeError("GEKOMixin needs a trainer after it: class MyTrainer(GEKOMixin, transformers.Trainer)")
    made = (vars(base)["__init__"] for base in trainer.__mro__ if "__init__" in vars(base))
    signatures = (inspect.signature(init).parameters.values() for init in made)  # `*args` is passed on to the next one
    parameters = next(own for own in signatures if not any(p.kind is p.VAR_POSITIONAL for p in own))
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    if len(args) > len(names):
        raise TypeError(f"{trainer.__name__} takes at most {len(names)} positional arguments, got {len(args)}")
    given = dict(zip(names, args, strict=False))
    twice = sorted(given.keys() & named.keys())
    if twice:
        raise TypeError(f"{trainer.__name__} got {', '.join(twice)} by position and by name")
    return {**given, **named}
