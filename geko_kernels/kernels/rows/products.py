"""The GEMMs of dW and dX over rows whose number only the device knows, so that the host need not wait for it.

They take up to 1.5 times as long as cuBLAS, which must be told that number. So they are for few rows, where the GPU
would otherwise idle for longer while the host waits and then prepares what follows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geko_kernels.kernels.launch import cdiv
from geko_kernels.kernels.rows.launch import KeyedLaunch, multiprocessors, shared_memory
from geko_kernels.kernels.rows.move import gather_rows
from geko_kernels.reference import rows as reference_rows

BLOCK, WIDE, STEP = 128, 256, 128  # rows and columns of an output tile, bytes of a row of operands at a time
WARPS, STAGES_OF_WEIGHT, STAGES_OF_HIDDEN = 8, 3, 4  # 4 and 3 take 1 to 15 % longer on an H200
SHARED = 192 * 2**10  # bytes of shared memory that the stages of dX take
ADDED = 16  # rows of parts that a program adds at a time
PROGRAMS = 8  # of those, on a multiprocessor
CPU_PROGRAMS = 5  # under the interpreter


@triton.jit(do_not_specialize=["row_count"])
def _weight_product_kernel(
    out_ptr,
    tile_ptr,
    scaled_ptr,
    end_ptr,
    row_count,
    vocab,
    columns,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`out = tile[:end].T @ scaled[:end]`, a tile of the output a program."""
    count = tl.minimum(tl.load(end_ptr), row_count)
    across = tl.cdiv(columns, WIDE)
    entry = tl.program_id(0) // across * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) % across * WIDE + tl.arange(0, WIDE)
    out = out_ptr + entry[:, None].to(tl.int64) * columns + column[None, :]
    inside = (entry < vocab)[:, None] & (column < columns)[None, :]
    if count == 0:  # stored by whole vectors, which a product is not
        tl.store(out, tl.zeros([BLOCK, WIDE], out_ptr.dtype.element_ty), mask=inside)
        return
    row = tl.arange(0, STEP)
    # an index beyond the edge wraps around, so that loads need no mask; its result is not stored
    tile = tile_ptr + row[:, None].to(tl.int64) * vocab + (entry % vocab)[None, :]
    scaled = scaled_ptr + row[:, None].to(tl.int64) * columns + (column % columns)[None, :]
    total = tl.zeros([BLOCK, WIDE], tl.float32)
    for start in tl.range(0, count, STEP, num_stages=STAGES):
        there = (row < count - start)[:, None]
        left = tl.load(tile, mask=there, other=0.0)
        total = tl.dot(tl.trans(left), tl.load(scaled, mask=there, other=0.0), total, input_precision="ieee")
        tile += STEP * vocab
        scaled += STEP * columns
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _split(end_ptr, row_count, vocab, columns, programs, SIZE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """(rows, output tiles, parts of each, float32 elements of `tile`): as many parts as keep all programs busy.

    The parts lie behind the rows of `tile`; if they do not fit there, there is one.
    """
    count = tl.minimum(tl.load(end_ptr), row_count)
    tiles = tl.cdiv(count, BLOCK) * tl.cdiv(columns, WIDE)
    room = tl.full([], vocab, tl.int64) * row_count * SIZE // 4
    free = room - tl.full([], vocab, tl.int64) * count * SIZE // 4
    some = tl.maximum(tiles, 1)
    fitting = (free // (BLOCK * WIDE * tl.full([], some, tl.int64))).to(tl.int32)
    return count, tiles, tl.maximum(tl.minimum(programs // some, fitting), 1), room


@triton.jit
def _scatter(out_ptr, values, row, column, positions_ptr, coeff_ptr, count, columns, token_count):
    """`out[t] = values * coeff[t]` with t = positions[row], for rows below `count`; 0 if coeff is. No token: none."""
    t = tl.load(positions_ptr + row, mask=row < count, other=-1)
    known = (t >= 0) & (t < token_count)
    coefficient = tl.load(coeff_ptr + t, mask=known, other=0.0)
    out = out_ptr + t[:, None] * columns + column[None, :]
    values = tl.where(coefficient[:, None] != 0, values * coefficient[:, None], 0.0)
    tl.store(out, values.to(out_ptr.dtype.element_ty), mask=known[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["row_count", "token_count"])
def _hidden_product_kernel(
    out_ptr,
    parts_ptr,
    tile_ptr,
    weight_ptr,
    positions_ptr,
    coeff_ptr,
    end_ptr,
    row_count,
    token_count,
    vocab,
    columns,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`out[t] = tile[i] @ weight * coeff[t]` with t = positions[i], or parts of those sums over the vocabulary."""
    programs = tl.num_programs(0)
    count, tiles, parts, room = _split(end_ptr, row_count, vocab, columns, programs, SIZE, BLOCK, WIDE)
    across = tl.cdiv(columns, WIDE)
    each = tl.cdiv(tl.cdiv(vocab, STEP), parts) * STEP
    for item in range(tl.program_id(0), tiles * parts, programs):
        place = item // parts
        row, column = place // across * BLOCK + tl.arange(0, BLOCK), place % across * WIDE + tl.arange(0, WIDE)
        first = item % parts * each
        entry = first + tl.arange(0, STEP)
        tile = tile_ptr + tl.minimum(row, count - 1)[:, None].to(tl.int64) * vocab + entry[None, :]
        weight = weight_ptr + entry[:, None].to(tl.int64) * columns + (column % columns)[None, :]
        total = tl.zeros([BLOCK, WIDE], tl.float32)
        for _ in tl.range(first, tl.minimum(first + each, vocab), STEP, num_stages=STAGES):
            total = tl.dot(tl.load(tile), tl.load(weight), total, input_precision="ieee")
            tile += STEP
            weight += STEP * columns
        if parts == 1:
            _scatter(out_ptr, total, row, column, positions_ptr, coeff_ptr, count, columns, token_count)
        else:
            inner = tl.arange(0, BLOCK)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
            tl.store(parts_ptr + room - (item + 1) * (BLOCK * WIDE) + inner, total)


@triton.jit(do_not_specialize=["row_count", "token_count", "programs"])
def _add_parts_kernel(
    out_ptr,
    parts_ptr,
    positions_ptr,
    coeff_ptr,
    end_ptr,
    row_count,
    token_count,
    programs,
    vocab,
    columns,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    ADDED: tl.constexpr,
):
    """Add the parts that `programs` programs of `_hidden_product_kernel` left, in order, if each sum has several."""
    count, tiles, parts, room = _split(end_ptr, row_count, vocab, columns, programs, SIZE, BLOCK, WIDE)
    across = tl.cdiv(columns, WIDE)
    pieces = BLOCK // ADDED
    for item in range(tl.program_id(0), tl.where(parts > 1, tiles * pieces, 0), tl.num_programs(0)):
        place, inside = item // pieces, item % pieces * ADDED + tl.arange(0, ADDED)
        total = tl.zeros([ADDED, WIDE], tl.float32)
        for part in range(parts):
            start = room - (place * parts + part + 1) * (BLOCK * WIDE)
            total += tl.load(parts_ptr + start + inside[:, None] * WIDE + tl.arange(0, WIDE)[None, :])
        row, column = place // across * BLOCK + inside, place % across * WIDE + tl.arange(0, WIDE)
        _scatter(out_ptr, total, row, column, positions_ptr, coeff_ptr, count, columns, token_count)


_launch_weight, _launch_hidden = KeyedLaunch(_weight_product_kernel), KeyedLaunch(_hidden_product_kernel)
_launch_parts = KeyedLaunch(_add_parts_kernel)


def weight_product_(out: Tensor, tile: Tensor, hidden: Tensor, positions: Tensor, coeff: Tensor, end: Tensor) -> None:
    """See `reference.rows.weight_product_`, which runs where shared memory is small; all contiguous. Two launches."""
    if not _fits(tile):
        reference_rows.weight_product_(out, tile, hidden, positions, coeff, end)
        return
    (vocab, columns), rows = out.shape, len(tile)
    scaled = gather_rows(hidden, positions, coeff, rows, end)
    constants = {"BLOCK": BLOCK, "WIDE": WIDE, "STEP": STEP // tile.itemsize, "STAGES": STAGES_OF_WEIGHT}
    args = (out, tile, scaled, end, rows, vocab, columns)
    programs = cdiv(vocab, BLOCK) * cdiv(columns, WIDE)
    _launch_weight(_about(out, tile, hidden), programs, args, constants, WARPS)


def hidden_product_(out: Tensor, tile: Tensor, weight: Tensor, positions: Tensor, coeff: Tensor, end: Tensor) -> None:
    """See `reference.rows.hidden_product_`, which runs there too, and for V % 64 != 0. Three launches."""
    (vocab, columns), rows, tokens = weight.shape, len(tile), len(out)
    if vocab * tile.itemsize % STEP or not _fits(tile):
        reference_rows.hidden_product_(out, tile, weight, positions, coeff, end)
        return
    programs = multiprocessors(tile.get_device()) if tile.is_cuda else CPU_PROGRAMS
    parts = tile.view(-1).view(torch.float32)
    key = *_about(out, tile, weight), positions.data_ptr() % 16
    sizes, shape = (rows, tokens), {"SIZE": tile.itemsize, "BLOCK": BLOCK, "WIDE": WIDE}
    out.zero_()
    constants = {**shape, "STEP": STEP // tile.itemsize, "STAGES": STAGES_OF_HIDDEN}
    args = (out, parts, tile, weight, positions, coeff, end, *sizes, vocab, columns)
    _launch_hidden(key, programs, args, constants, WARPS)
    added = (out, parts, positions, coeff, end, *sizes, programs, vocab, columns)
    _launch_parts(key, programs * PROGRAMS, added, {**shape, "ADDED": ADDED}, 4)


def _fits(tile: Tensor) -> bool:
    return not tile.is_cuda or shared_memory(tile.get_device()) >= SHARED


def _about(out: Tensor, *operands: Tensor) -> tuple[object, ...]:
    """What a binary depends on, of tensors of one device: dtypes, sizes and alignments."""
    kinds = ((x.dtype, x.data_ptr() % 16) for x in (out, *operands))
    return out.get_device(), *kinds, *operands[-1].shape[1:], operands[0].shape[1]
