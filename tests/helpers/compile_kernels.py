"""Compile the Triton kernels for sm_90 without a GPU, through their own launchers; run by test_triton.py.

The interpreter accepts much that the compiler does not, so every kind of call is compiled once. Prints one line a
kernel: name, registers, spilled bytes. `python tests/helpers/compile_kernels.py all` takes every combination (minutes).
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
compiled: dict[int, Any] = {}


class _NoDevice:
    """Stands in for the CUDA driver: says which GPU to compile for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only() -> None:
    """Make every launch stop after compilation."""
    driver.set_active(_NoDevice())
    launch = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[id(kernel)] = (self.fn.__name__, kernel)

    JITFunction.run = run


def call(form: str, table: bool, dtype: torch.dtype, vocab: int, strided: bool, **options: Any) -> None:
    """One forward and backward of (2, 1000, vocab) logits, memory untouched."""
    from geko_kernels import SampleState, kernels

    reduction, shift, softcap, update, num_items, weighted = (
        options[k] for k in ("reduction", "shift", "softcap", "update", "num_items", "weighted")
    )
    rows, length = 2, 1000
    logits = torch.empty(rows, length, vocab * (2 if strided else 1), dtype=dtype)[..., :: 2 if strided else 1]
    labels = torch.zeros(rows, length, dtype=torch.int64)
    ids = {"none": None, "row": labels[:, 0].clone(), "packed": labels}[form]
    state = SampleState(3)
    columns = (state.columns, state.error) if table else ([], None)
    items = torch.ones(()) if num_items else None
    head = (labels, ids, state.rules, state.weights, items, *columns)
    weights = (torch.ones(rows, length), torch.ones(rows, length if form == "packed" else 1)) if weighted else ()
    out = kernels.loss_forward_(logits, *head, reduction, -100, shift, softcap, update, *weights)
    loss, scale, coeff, token_visit, *_, tokens = out
    kernels.sample_update_(tokens, *head, vocab, reduction, -100, shift, update, *weights)
    kernels.token_stats(logits, labels, ids, -100, shift, softcap)
    upstream = torch.ones(loss.shape)
    kernels.logits_grad(upstream, logits, labels, tokens, coeff, scale, token_visit, shift, softcap)
    if not strided:
        padded = torch.empty(rows, length, vocab + 1, dtype=dtype)[..., :vocab]
        kernels.logits_grad(upstream, padded, labels, tokens, coeff, scale, token_visit, shift, softcap)


def call_predicted(form: str, table: bool, dtype: torch.dtype, vocab: int, **options: Any) -> None:
    """The launches around the CUDA kernel, for such a call."""
    from geko_kernels import SampleState
    from geko_kernels.kernels.one_pass.correct import correct_launch
    from geko_kernels.kernels.one_pass.predict import predict_launch
    from geko_kernels.kernels.table import QUARANTINED, pointers, prepared_of

    reduction, shift, update = (options[k] for k in ("reduction", "shift", "update"))
    logits, labels = torch.empty(2, 1000, vocab, dtype=dtype), torch.zeros(2, 1000, dtype=torch.int64)
    ids = {"none": None, "row": labels[:, 0].clone(), "packed": labels}[form]
    state = SampleState(3)
    held = pointers(state.columns if table else [])
    columns = (*prepared_of(held), held[QUARANTINED], state.error if table else None)
    words, floats = labels.int(), logits.new_empty(5, 2000, dtype=torch.float32)
    predict = predict_launch(labels, ids, 3, vocab, reduction, -100, shift, update)
    predict(labels, ids, state.weights, *columns, words, words, floats, words)
    one = torch.ones(())
    for inplace in (False, True):
        correct = correct_launch(logits, logits, labels, shift, inplace)
        correct(logits, one, logits, labels, floats, floats[0], one, floats[1], state.upstream, state.predictions)


def call_rows(dtype: torch.dtype, vocab: int, shift: bool, softcap: float) -> None:
    """The launches of the linear path on a buffer of 64 rows."""
    from geko_kernels import kernels

    tile, hidden = torch.empty(64, vocab, dtype=dtype), torch.empty(2000, 100, dtype=dtype)
    labels, tokens = torch.zeros(2, 1000, dtype=torch.int64), torch.empty(5, 2000)
    rows, slots = labels.flatten(), torch.zeros(64, dtype=torch.int64)
    kernels.scored_rows(labels, None, vocab, -100, shift)
    for fused in (False, True):
        for entropy in (None, tokens[0]):
            kernels.score_rows_(tile, rows, rows, tokens, fused, 0, 0, 64, vocab - 3, softcap, entropy)
    end = kernels.kept_rows_(tokens[0], rows, slots, slots, 0, 0, 64)
    for sources, last in ((slots, end), (None, None)):
        kernels.gradient_rows_(tile, slots, sources, last, labels, tokens, 0, 64, 64, vocab - 3, shift, softcap)
    kernels.gather_rows(hidden, slots, tokens[0], 64)
    kernels.scatter_rows_(hidden, torch.empty(64, 100), slots, tokens[0], 0)
    kernels.clear_rows_(tile, slots, tokens[0])
    kernels.column_sums(tile, tokens[0, :64])
    kernels.rescale_(tile, torch.ones(()))
    if dtype == torch.bfloat16:
        few, coeff = torch.empty(64, 1024, dtype=dtype), tokens[0]
        for columns in (256, 576, 128):
            x, weight = torch.empty(2000, columns, dtype=dtype), torch.empty(1024, columns, dtype=dtype)
            kernels.weight_product_(weight, few, x, slots, coeff, end)
            kernels.hidden_product_(x, few, weight, slots, coeff, end)


def resources(kernel: Any) -> tuple[int, int]:
    """(registers, spilled bytes) as ptxas reports them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        arch = re.search(r"\.target (\w+)", kernel.asm["ptx"])
        command = [PTXAS, "-v", f"--gpu-name={arch[1] if arch else 'sm_90'}", source, "-o", source.with_suffix(".o")]
        said = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stderr
    return int(re.findall(r"Used (\d+) reg", said)[-1]), max(map(int, re.findall(r"(\d+) bytes spill stores", said)))


def main(everything: bool) -> None:
    compile_only()
    names = ("reduction", "shift", "softcap", "update", "num_items", "weighted")
    if everything:
        product = itertools.product(range(4), (False, True), (0.0, 30.0), (False, True), (False, True), (False, True))
        settings = [dict(zip(names, values, strict=True)) for values in product]
    else:
        rows = [
            (0, True, 0.0, True, False, False),
            (1, False, 30.0, True, True, True),
            (2, True, 0.0, False, True, False),
            (3, True, 0.0, True, False, True),
            (2, True, 0.0, True, False, True),
        ]
        settings = [dict(zip(names, values, strict=True)) for values in rows]
    shapes = [(32000, False), (50257, False), (1000, False), (2000, True), (32000, False)]
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    forms = [("none", False), ("row", True), ("packed", True)]
    if everything:
        for (form, table), options in itertools.product(
            [*forms, ("row", False), ("packed", False), ("none", True)], settings
        ):
            call(form, table, torch.bfloat16, 32000, False, **options)
        for shape, dtype, softcap in itertools.product(shapes, dtypes, (0.0, 30.0)):
            call("row", True, dtype, *shape, **{**settings[0], "softcap": softcap})
    else:
        for i, options in enumerate(settings):
            call(*forms[i % 3], dtypes[i % 3], *shapes[i], **options)
            call_rows(dtypes[i % 3], shapes[i][0], options["shift"], options["softcap"])
            if options["reduction"]:
                call_predicted(*forms[i % 3], dtypes[i % 3], shapes[i % 2][0], **options)
    for name, kernel in compiled.values():
        print(name, *resources(kernel))


if __name__ == "__main__":
    main(sys.argv[1:] == ["all"])
