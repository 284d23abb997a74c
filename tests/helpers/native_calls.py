"""Random calls of the ops of the C++ backend, most of them hostile: for test_native_calls.py and sanitize.py."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geko_kernels.columns import COLUMNS

INT32_MAX = 2**31 - 1
LABELS = (-(2**63), -(2**31), -101, -100, -1, 0, 1, 2, 5, 2**31, 2**40, 2**63 - 1)
FLOATS = (0.0, -0.0, 0.5, 1.0, -3.0, 1e-45, 3e38, -3e38, float("inf"), -float("inf"), float("nan"))
Arguments = dict[str, Any]


class Calls:
    """Calls drawn from one seed; `run` makes one and says whether the op took it."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def run(self, module: Any) -> tuple[str, bool]:
        """The op, and whether it returned. An error of these kinds is an answer; anything else is raised.

        Args: module: where the ops are, `geko_kernels.cpu` or `geko_kernels.ops`.
        """
        name, arguments = self._call(module)
        for spoilt in self.draw.sample(list(arguments), self.draw.choice((0, 0, 1, 1, 2))):
            self._spoil(arguments, spoilt)
        try:
            getattr(module, name)(*arguments.values())
        except (RuntimeError, ValueError, IndexError):
            return name, False
        return name, True

    def _call(self, module: Any) -> tuple[str, Arguments]:
        name = self.draw.choice(("token_stats", "sample_update_", "loss_forward_", "logits_grad", "logits_grad_"))
        batch, length = self.draw.choice((0, 1, 1, 2, 3)), self.draw.choice((0, 1, 2, 4, 9))
        vocab = self.draw.choice((0, 1, 2, 7, 8, 17, 33, 140))
        logits, labels = self._logits(batch, length, vocab), self._labels(batch, length, vocab)
        form = self.draw.choice(("none", "row", "token"))
        rows = self.draw.choice((0, 1, 3))
        ids = None
        if form != "none":
            ids = self._numbers((batch,) if form == "row" else (batch, length), -1, max(rows - 1, -1))
            if self.draw.random() < 0.2 and ids.numel():
                ids.view(-1)[0] = self.draw.choice(LABELS)
        options = {"ignore_index": self.draw.choice((-100, 0, -(2**63))), "shift": self.draw.random() < 0.5}
        softcap = {"softcap": self.draw.choice((0.0, 5.0, 5.0, float("nan"), -1.0, 1e300))}
        if name == "token_stats":
            return name, {"logits": logits, "labels": labels, "sample_ids": ids, **options, **softcap}
        count = batch * length
        if name in ("logits_grad", "logits_grad_"):
            return name, self._gradient(logits, labels, count, form == "token", options["shift"], softcap)
        head = {"tokens": self._floats((5, count))} if name == "sample_update_" else {"logits": logits}
        table = {"labels": labels, "sample_ids": ids, "rules": self._floats((10,)), "weights": self._floats((4,))}
        items = self._floats(()) if self.draw.random() < 0.3 else None
        given = self.draw.random() < 0.7
        columns = self._columns(rows) if given else []
        error = torch.tensor(INT32_MAX) if self.draw.random() < 0.7 else None
        rest = {"reduction": self.draw.choice((0, 1, 2, 3)), **options}
        if name == "sample_update_":
            rest = {"vocab": vocab, **rest}
        else:
            rest |= softcap
        last: Arguments = {"update": self.draw.random() < 0.8, "token_weights": None, "sample_weights": None}
        if self.draw.random() < 0.3:
            last["token_weights"] = self._floats((batch, length))
        if self.draw.random() < 0.3:
            last["sample_weights"] = self._floats((batch, length) if form == "token" else (batch,))
        return name, {**head, **table, "num_items": items, "columns": columns, "error": error, **rest, **last}

    def _gradient(
        self, logits: Tensor, labels: Tensor, count: int, packed: bool, shift: bool, softcap: Arguments
    ) -> Arguments:
        visits = count if packed else labels.shape[0]
        upstream = self._floats((visits,) if self.draw.random() < 0.5 else ())
        if upstream.dim() and visits and self.draw.random() < 0.3:
            upstream = upstream[:1].expand(visits)
        coeff = self._floats((count,)) * (torch.rand(count, generator=self.torch) < 0.7)
        token_visit = self._numbers((count if packed else 0,), -1, max(visits - 1, 0)).int()
        if token_visit.numel() and self.draw.random() < 0.3:
            token_visit[-1] = self.draw.choice((-1, -2, visits, INT32_MAX, -INT32_MAX - 1))
        saved = {"tokens": self._floats((5, count)), "coeff": coeff, "scale": self._floats(())}
        return {
            **{"grad_output": upstream, "logits": logits, "labels": labels},
            **saved,
            **{"token_visit": token_visit, "shift": shift},
            **softcap,
        }

    def _floats(self, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=self.torch)
        if self.draw.random() < 0.4 and values.numel():
            values.view(-1)[self.draw.randrange(values.numel())] = self.draw.choice(FLOATS)
        return values

    def _numbers(self, shape: tuple[int, ...], low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.torch)

    def _labels(self, batch: int, length: int, vocab: int) -> Tensor:
        labels = self._numbers((batch, length), 0, max(vocab - 1, 0))
        if self.draw.random() < 0.4 and labels.numel():
            labels.view(-1)[self.draw.randrange(labels.numel())] = self.draw.choice((*LABELS, vocab))
        return labels.t().contiguous().t() if self.draw.random() < 0.2 else labels

    def _logits(self, batch: int, length: int, vocab: int) -> Tensor:
        logits = 4 * self._floats((batch, length, vocab))
        logits = logits.to(self.draw.choice((torch.float32, torch.bfloat16, torch.float16)))
        how = self.draw.random()
        if how < 0.15:
            return logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        if how < 0.3:
            return torch.cat([logits, logits], 2)[..., :vocab]
        if how < 0.4:
            return logits[:, :1].expand(batch, length, vocab) if length else logits
        if how < 0.5 and logits.numel():
            return torch.as_strided(logits, logits.shape, (0, 0, self.draw.choice((0, 1))))
        return logits

    def _bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Anything at all in every byte."""
        size = torch.empty(0, dtype=dtype).element_size()
        room = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=self.torch)
        return room.view(dtype).reshape(shape) if shape else room.view(dtype)[0]

    def _columns(self, rows: int) -> list[Tensor | None]:
        """A table such as a damaged file brings."""
        columns = {name: self._bytes((rows, *column.row), column.dtype) for name, column in COLUMNS.items()}
        if rows:
            columns["times_seen"][0] = self.draw.choice((-INT32_MAX - 1, -1, 0, 3, INT32_MAX))
        return list(columns.values())

    def _spoil(self, arguments: Arguments, name: str) -> None:
        """Make one argument one that does not fit."""
        value = arguments[name]
        if isinstance(value, bool):
            return
        if isinstance(value, int):
            arguments[name] = self.draw.choice(LABELS)
        elif isinstance(value, float):
            arguments[name] = self.draw.choice(FLOATS)
        elif value is None:
            if name in ("error", "num_items", "token_weights", "sample_weights"):
                arguments[name] = self._floats((2,))
        elif isinstance(value, list):
            self._spoil_columns(value)
        else:
            with contextlib.suppress(RuntimeError):  # not every tensor has every misfit
                arguments[name] = self.draw.choice(_MISFITS)(value)

    def _spoil_columns(self, columns: list[Tensor | None]) -> None:
        """One that does not fit, one too many or one too few."""
        how = self.draw.random()
        if not columns or how < 0.1:
            columns.append(self._floats((2,)))
        elif how < 0.2:
            columns.pop(self.draw.randrange(len(columns)))
        else:
            place = self.draw.randrange(len(columns))
            with contextlib.suppress(RuntimeError):
                columns[place] = self.draw.choice(_MISFITS)(columns[place])


def _nothing_behind(value: Tensor) -> Tensor:
    value = value.clone()
    value.untyped_storage().resize_(0)
    return value


def _unaligned(value: Tensor) -> Tensor:
    room = torch.zeros(value.numel() * value.element_size() + 1, dtype=torch.uint8)
    return torch.frombuffer(memoryview(room.numpy()), dtype=value.dtype, offset=1).view(value.shape)


_MISFITS: tuple[Callable[[Tensor], Tensor | None], ...] = (
    lambda value: None,
    lambda value: value[..., None],
    lambda value: value.flatten(),
    lambda value: value.flatten()[1:],
    lambda value: torch.cat([value.flatten(), value.flatten()]),
    lambda value: value.new_empty(0),
    lambda value: value.double(),
    lambda value: value.long(),
    lambda value: value.bool(),
    lambda value: value.to(torch.complex64),
    lambda value: value.to("meta"),
    lambda value: value.expand(3, *value.shape),
    lambda value: value.new_zeros(1).expand(value.shape),
    lambda value: value.flatten()[:1].expand(2**40),
    lambda value: value.t() if value.dim() == 2 else value[..., ::2] if value.dim() else value,
    lambda value: torch.as_strided(value, value.shape, [0] * value.dim()),
    _nothing_behind,
    lambda value: _unaligned(value) if value.numel() and value.dtype != torch.bfloat16 else value.new_empty(0),
    lambda value: value.to_sparse() if value.dim() else value,
)
