"""The gradients of the head, summed over batches of kept rows: dX, dW in float32, d(bias) in float64."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from geko_kernels import ops
from geko_kernels.reference.visits import sum_dtype

_COPIED = 2**24  # elements of a float16 tile that are in float32 at a time
HIDDEN_BYTES = 16 * 2**20  # a first piece of dX: 128 tiles of a GEMM, about one a multiprocessor


def multiply_(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """`out = a @ b`, or `out += a @ b`; `out` may be float32 where a and b are of lower precision."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out) if add else torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif a.dtype == torch.float16:  # no CPU GEMM has a wider output, and float16's range is too small for a product
        wide, step = b.to(out.dtype), max(1, _COPIED // a.shape[1])
        for start in range(0, len(out), step):
            multiply_(out[start : start + step], a[start : start + step].to(out.dtype), wide, add)
    else:  # each product is rounded once, the sum is not
        product = torch.mm(a, b)
        out.add_(product) if add else out.copy_(product)


class WeightGradient:
    """`sum(tile.T @ hidden)` over calls of `add`, (rows, columns) in `dtype`, summed in float32 (float64 for float64).

    A single product is written in `dtype` directly. Otherwise the sum is held in float32. If `dtype` is narrower, the
    upper half of that sum lies in the memory of the result, so that the conversion at the end needs no more memory.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, compute: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.compute, self.device = (rows, columns), dtype, compute, device
        self.parts: list[Tensor] = []  # float32 sums of the rows, in order

    @functools.cached_property
    def memory(self) -> Tensor:
        """Taken with the first product: until then the logits need what there is."""
        rows, columns = self.shape
        return torch.empty(-(-rows * columns // 2) * 2, dtype=self.dtype, device=self.device)

    @functools.cached_property
    def result(self) -> Tensor:
        rows, columns = self.shape
        return self.memory[: rows * columns].view(rows, columns)

    def add(self, tile: Tensor, hidden: Tensor, last: bool) -> None:
        """Args: tile (n, rows), hidden (n, columns); last: nothing will follow."""
        first = not self.parts
        if first and last and self.dtype == self.compute:
            self.write(tile, hidden, 0)
            return
        if first:
            self._hold()
        start = 0
        for part in self.parts:
            multiply_(part, tile[:, start : start + len(part)].t(), hidden, add=not first)
            start += len(part)

    def write(self, tile: Tensor, hidden: Tensor, start: int) -> None:
        """Write the rows from `start` on, (tile's columns, columns), as one product to which nothing is added."""
        result = self.result
        multiply_(result[start : start + tile.shape[1]], tile.t(), hidden)
        self.parts = [result]

    def _hold(self) -> None:
        rows, columns = self.shape
        wide = torch.float64 if self.compute == torch.float64 else torch.float32
        if self.dtype == wide:
            self.parts = [self.result]
            return
        upper = rows // 128 * 64  # half of the rows at twice the bytes fit
        inside = self.memory.view(wide)[: upper * columns].view(upper, columns)
        self.parts = [inside, torch.empty(rows - upper, columns, dtype=wide, device=self.memory.device)]

    def finish(self) -> Tensor:
        """The sum in `dtype`; 0 if nothing was added."""
        result = self.result
        if not self.parts:
            return result.zero_()
        if len(self.parts) == 2:
            inside, outside = self.parts
            narrow_(inside, self.memory)
            result[len(inside) :] = outside
        self.parts = []
        return result


def narrow_(wide: Tensor, memory: Tensor) -> None:
    """`memory[:n] = wide.flatten()`, where `wide` (4 bytes) starts in the same memory as `memory` (2 bytes).

    Element i is read at byte 4i and written at byte 2i: writing elements [k, 2k) overwrites only elements [k/2, k).
    """
    source, count = wide.view(-1), wide.numel()
    start = min(count, 2**16)
    memory[:start] = source[:start].clone()
    while start < count:
        stop = min(2 * start, count)
        memory[start:stop] = source[start:stop]
        start = stop


class BiasGradient:
    """`by_row @ tile` summed over calls of `add`, (V,) in `dtype`; see `ops.column_sums`."""

    def __init__(self, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.total = dtype, torch.zeros(vocab, dtype=sum_dtype(device), device=device)

    def add(self, tile: Tensor, by_row: Tensor, columns: int | None = None, start: int = 0) -> None:
        """Add the sums of the tile's first `columns` columns, which are those of the vocabulary from `start` on."""
        sums = ops.direct.column_sums(tile, by_row)[:columns]
        self.total[start : start + len(sums)] += sums

    def finish(self) -> Tensor:
        return self.total.to(self.dtype)


class HeadGradients:
    """The gradients of `hidden` (T, H), `weight` (V, H) and `bias` (V,) that are asked for; the others cost nothing.

    Args:
        hidden, weight: as in the GEMM, of one dtype; the vocabulary may be padded.
        hidden_needed, weight_dtype, bias_dtype: whether dX is asked for, and the dtypes of the others or None. All are
            float32 instead of float16, whose range is too small before the upstream gradient multiplies them.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        hidden_needed: bool,
        weight_dtype: torch.dtype | None,
        bias_dtype: torch.dtype | None,
    ) -> None:
        self.hidden, self.weight = hidden, weight
        self.hidden_needed = hidden_needed
        self.hidden_dtype = self._held(hidden.dtype)
        weight_dtype, bias_dtype = self._held(weight_dtype), self._held(bias_dtype)
        narrow = weight_dtype is not None and weight_dtype.itemsize == 2
        self.wanted = narrow, hidden_needed, weight_dtype is not None  # as `Budget` takes it
        self.factor: Tensor | None = None  # of the float16 rows in the sum of dW
        self.ahead: Tensor | None = None  # what `scale_ahead` left
        self.hidden_grad: Tensor | None = None
        vocab, columns = weight.shape
        self.weight_grad: WeightGradient | None = None
        self.bias_grad: BiasGradient | None = None
        if weight_dtype is not None:
            self.weight_grad = WeightGradient(vocab, columns, weight_dtype, weight.dtype, weight.device)
        if bias_dtype is not None:
            self.bias_grad = BiasGradient(vocab, bias_dtype, weight.device)

    def add(
        self,
        tile: Tensor,
        positions: Tensor,
        missing: Tensor,
        coeff: Tensor,
        last: bool,
    ) -> None:
        """Add the tokens `positions[:n]`, whose logits have the gradient `coeff[positions[:n], None] * tile`.

        Args:
            tile (n, V) unscaled, contiguous, overwritten; positions (n or more,) distinct tokens; coeff (T,);
            missing (T,): the part of `coeff` that the sums of dW and d(bias) do not hold yet;
            last: nothing will follow.
        """
        at = positions[: len(tile)]
        if self.weight_grad is not None:
            scaled, self.ahead = self.ahead, None
            if scaled is None:
                scaled = self.scale(positions, missing, len(tile))
            self.weight_grad.add(tile, scaled[: len(tile)], last)
            del scaled  # dX takes its memory
        if self.bias_grad is not None:
            self.bias_grad.add(tile, missing.index_select(0, at))
        if self.hidden_needed:
            self._add_hidden(tile, positions, coeff)

    def counts_on_device(self) -> bool:
        """Whether `add_all` runs: where it was measured, in bfloat16 on compute capability 9.0 with aligned rows."""
        vocab, columns = self.weight.shape
        return (
            self.bias_grad is None
            and self.weight.dtype == torch.bfloat16
            and vocab % 64 == 0
            and columns % 16 == 0
            and self.weight.is_cuda
            and torch.cuda.get_device_capability(self.weight.device) == (9, 0)
        )

    def add_all(self, tile: Tensor, positions: Tensor, coeff: Tensor, end: Tensor) -> None:
        """`add` of the first `end` () rows of `tile` alone: nothing was added before, and nothing will follow.

        The host need not know their number, see `kernels/rows/products.py`. The other rows of `tile` are overwritten.
        """
        rest = positions, coeff, end
        if self.weight_grad is not None:
            result = self.weight_grad.result
            ops.direct.weight_product_(result, tile, self.hidden, *rest)
            self.weight_grad.parts = [result]
        if self.hidden_needed:
            self.hidden_grad = torch.empty_like(self.hidden, dtype=self.hidden_dtype)
            ops.direct.hidden_product_(self.hidden_grad, tile, self.weight, *rest)

    def scale_ahead(self, positions: Tensor, missing: Tensor, count: int) -> None:
        """Launch `scale` for the next call of `add` already, which will take the first of these tokens, if any."""
        self.ahead = self.scale(positions, missing, count) if count and self.weight_grad is not None else None

    def scale(self, positions: Tensor, missing: Tensor, count: int) -> Tensor:
        """dW's operand for the tokens `positions[:count]`."""
        fp16 = self.weight.dtype == torch.float16
        fitting = missing * self._refit(positions[:count], missing) if fp16 else missing
        return ops.direct.gather_rows(self.hidden, positions, fitting, count)

    def wide(self, tile: Tensor) -> torch.dtype:
        """The dtype in which products of `tile` are summed for dX."""
        if tile.dtype == torch.float64:
            return torch.float64
        return torch.float32 if tile.is_cuda or tile.dtype == torch.float16 else tile.dtype

    def write_hidden(self, product: Tensor, positions: Tensor, coeff: Tensor) -> None:
        """Make dX `coeff * product` in the rows `positions`, and 0 in the others."""
        make = torch.empty_like if len(product) == len(self.hidden) else torch.zeros_like
        self.hidden_grad = make(self.hidden, dtype=self.hidden_dtype)
        ops.direct.scatter_rows_(self.hidden_grad, product, positions, coeff, 0)

    def _held(self, dtype: torch.dtype | None) -> torch.dtype | None:
        return torch.float32 if dtype == torch.float16 else dtype

    def _refit(self, at: Tensor, missing: Tensor) -> Tensor:
        """The () float32 factor by which the rows `at` of dW's sum just fit into float16; rescales the sums so far.

        It makes the largest coefficient a power of two, so that equal coefficients are not rounded.
        """
        low, high = self.hidden.index_select(0, at).aminmax()
        exponent = torch.frexp(torch.maximum(-low, high).float().clamp(min=1)).exponent
        largest = missing.index_select(0, at).abs().amax().clamp(min=2.0**-100)
        factor = torch.ldexp(1 / largest, 15 - exponent)
        if self.factor is not None:
            for part in self.weight_grad.parts if self.weight_grad is not None else ():
                part *= factor / self.factor
        self.factor = factor
        return factor

    def _add_hidden(self, tile: Tensor, positions: Tensor, coeff: Tensor) -> None:
        """Write the rows of dX; the rows of `tile` that are done make room for the next products."""
        wide = self.wide(tile)
        columns, count = self.weight.shape[1], len(tile)
        if self.hidden_grad is None:
            self.hidden_grad = torch.empty_like(self.hidden, dtype=self.hidden_dtype)
            small = count * columns * wide.itemsize <= HIDDEN_BYTES // 16
            product = None if small else self._first_product(self.hidden_grad, tile, wide)
            if count < self.hidden.shape[0]:
                self.hidden_grad.zero_()
            if product is not None:
                ops.direct.scatter_rows_(self.hidden_grad, product, positions, coeff, 0)
                return
        room = min(count, max(1, HIDDEN_BYTES // (columns * wide.itemsize)))
        product = torch.empty(room, columns, dtype=wide, device=tile.device)
        start = 0
        while start < count:
            if start:
                free = tile[:start].view(-1).view(wide)
                if len(free) // columns > len(product):
                    product = free[: len(free) // columns * columns].view(-1, columns)
            rows = product[: count - start]
            multiply_(rows, tile[start : start + len(rows)], self.weight)
            ops.direct.scatter_rows_(self.hidden_grad, rows, positions, coeff, start)
            start += len(rows)

    def _first_product(self, memory: Tensor, tile: Tensor, wide: torch.dtype) -> Tensor | None:
        """`tile @ weight` in `wide`, in the memory of `tile`; None if the vocabulary is too small for that.

        The first rows are computed in `memory`, that of dX, which nothing has been written to. They free so many rows
        of the tile that the other rows are computed there, and the first are moved there.
        """
        columns, count = self.weight.shape[1], len(tile)
        first = min(count, memory.numel() * memory.itemsize // (columns * wide.itemsize)) if columns else 0
        if first * tile.shape[1] * tile.itemsize < count * columns * wide.itemsize or not first:
            return None
        ahead = memory.view(-1)[: first * columns * wide.itemsize // memory.itemsize].view(wide).view(first, columns)
        multiply_(ahead, tile if first == count else tile[:first], self.weight)
        product = tile.view(-1)[: count * columns * wide.itemsize // tile.itemsize].view(wide).view(count, columns)
        if first < count:
            multiply_(product[first:], tile[first:], self.weight)
        product[:first] = ahead
        return product

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dX (T, H), dW (V, H) and d(bias) (V,); None for what was not asked for."""
        if self.hidden_needed and self.hidden_grad is None:
            self.hidden_grad = torch.zeros_like(self.hidden, dtype=self.hidden_dtype)
        weight_grad = self.weight_grad.finish() if self.weight_grad is not None else None
        if self.factor is not None and weight_grad is not None:
            weight_grad /= self.factor
        bias_grad = self.bias_grad.finish() if self.bias_grad is not None else None
        return self.hidden_grad, weight_grad, bias_grad
