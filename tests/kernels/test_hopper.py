"""The CUDA kernels for Hopper without a GPU: their arguments, their tilings, and that nvcc takes them."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from geko_kernels.kernels.one_pass import hopper
from geko_kernels.kernels.rows import score_hopper

if torch.cuda.is_available():
    pytest.skip(
        "with a GPU the kernel is launched: see test_predicted_gpu.py and test_score_rows_gpu.py",
        allow_module_level=True,
    )

ROOT = Path(__file__).parents[2]


class FakeLibrary:
    """In place of the CUDA library: keeps the bytes of the arguments it is launched with."""

    def geko_shape(self, shape, clusters):
        self.job = shape._obj.job
        clusters._obj.value = 66
        return 0

    def geko_predicted_rows(self, shape, arguments, stream):
        self.arguments, self.stream = arguments, stream
        return 0

    geko_score_rows = geko_predicted_rows


@pytest.fixture
def fake(monkeypatch):
    fake = FakeLibrary()
    monkeypatch.setattr(hopper, "library", lambda: fake)
    monkeypatch.setattr(hopper, "stream_address", lambda device: 77 + device)
    return fake


def test_a_launch_fills_the_arguments_of_the_kernel(fake, monkeypatch):
    launch = hopper.RowsLaunch(torch.device("cuda", 1), torch.bfloat16, (2, 3, 50257), (7, 8), (9, 10), 4)
    launch(*range(1, 6), None, *range(7, 9), torch.empty(0))
    tiling = hopper.tiling_of(50257, torch.bfloat16)
    # struct PredictedRows of csrc/hopper/predicted_rows.h
    values = struct.unpack("=9Q4q8i", fake.arguments)
    assert values[:9] == (1, 2, 3, 4, 5, 0, 7, 8, torch.empty(0).data_ptr())
    assert values[9:] == (7, 8, 9, 10, 6, 3, 50257, 4, tiling.slice, tiling.chunk, tiling.slots, 66)
    assert (fake.job, fake.stream) == (0, 78)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    hopper.missing.cache_clear()
    assert hopper.missing(torch.device("cuda", 5)) is None
    hopper.missing.cache_clear()


def test_a_launch_fills_the_arguments_of_the_score_kernel(fake):
    launch = score_hopper.ScoreLaunch(torch.device("cuda", 1), torch.float16, 50304, 50257)
    logits, statistics = torch.empty(3, 50304, dtype=torch.float16), torch.empty(5, 11)
    rows, targets = torch.zeros(2, 11, dtype=torch.int64)
    launch(logits, rows, targets, statistics, 1, 4, 2)
    tiling = hopper.tiling_of(50304, torch.float16)
    # struct ScoreRows of csrc/hopper/score_rows.h, and the 4 bytes that end it
    values = struct.unpack("=4Qq7i4x", fake.arguments)
    assert values[:3] == (logits[1:].data_ptr(), rows[4:].data_ptr(), targets[4:].data_ptr())
    assert values[3:5] == (statistics.data_ptr(), 11)
    assert values[5:] == (2, 50257, 50304 * 2 // 16, tiling.slice, tiling.chunk, tiling.slots, 66)
    assert (fake.job, fake.stream) == (1, 78)


@pytest.mark.parametrize(
    ("dtype", "row_stride", "vocab"),
    [
        (torch.float64, 50304, 50257),
        (torch.bfloat16, 700_032, 700_000),
        (torch.bfloat16, 50304, 0),
        (torch.bfloat16, 50304, 50305),
        (torch.bfloat16, 50257, 50257),
    ],
)
def test_score_rows_without_a_kernel_are_refused(dtype, row_stride, vocab):
    with pytest.raises(ValueError, match="no kernel for .* rows of"):
        score_hopper.ScoreLaunch(torch.device("cuda", 0), dtype, row_stride, vocab)


@pytest.mark.parametrize(
    ("dtype", "shape", "parts"),
    [
        (torch.float64, (2, 3, 50257), 4),
        (torch.bfloat16, (2, 3, 700_000), 4),
        (torch.bfloat16, (2, 3, 0), 4),
        (torch.bfloat16, (0, 3, 50257), 4),
        (torch.bfloat16, (2**20, 2**12, 50257), 4),
        (torch.bfloat16, (2, 3, 50257), -1),
    ],
)
def test_a_shape_without_a_kernel_is_refused(dtype, shape, parts):
    with pytest.raises(ValueError, match="no kernel for .* logits of shape"):
        hopper.RowsLaunch(torch.device("cuda", 0), dtype, shape, (7, 8), (9, 10), parts)


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_a_row_fits_its_cluster(dtype, itemsize):
    for vocab in (*range(1025, 2000, 31), *range(2000, 700_000, 7919)):
        tiling = hopper.tiling_of(vocab, dtype)
        if tiling is None:
            assert vocab * itemsize > 8 * 160 * 1024 - 32
            continue
        per = 16 // itemsize
        assert tiling.blocks * tiling.slice * per >= vocab + per - 1
        assert tiling.slots * tiling.chunk >= tiling.slice and tiling.slots <= 64 and tiling.chunk % 8 == 0
        used = tiling.slots * (16 * tiling.chunk + 16) + 64 * tiling.blocks * tiling.warps + 32
        assert used <= tiling.shared <= (113 if tiling.warps == 8 else 227) * 1024


def test_the_cuda_kernels_compile(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    source, target = ROOT / "csrc/hopper/library.cu", tmp_path / "rows.so"
    flags = ["-gencode=arch=compute_90,code=sm_90", "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", f"-I{ROOT}"]
    done = subprocess.run(
        ["nvcc", *flags, "-Werror", "all-warnings", source, "-o", target], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    symbols = subprocess.run(["nm", "-D", "--defined-only", target], capture_output=True, text=True).stdout
    assert {"geko_shape", *hopper._JOBS, "geko_error"} <= set(symbols.split())
