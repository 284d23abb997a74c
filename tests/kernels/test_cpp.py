"""The C++ kernels below `weighted_loss`: op by op against the reference, every instruction set, threads, the build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Case, cases
from hypothesis import given
from hypothesis import strategies as st

import geko_kernels as gk
from geko_kernels.reference import ops as reference
from geko_kernels.state import NO_ERROR, rules_tensor

cpp = pytest.importorskip("geko_kernels.cpu", exc_type=ImportError)
ROOT = Path(__file__).parents[2]
NO_VISITS = torch.empty(0, dtype=torch.int32)  # token_visit with one id a row
# around the widths of a vector (8, 16), of eight of them and of a block (4096)
VOCABS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000, 4095, 4096, 4097, 8209]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def columns(state: gk.SampleState | None) -> tuple[list[torch.Tensor], torch.Tensor]:
    if state is None:
        return [], torch.tensor(NO_ERROR)
    return state.columns, state.error


def update(backend, case: Case, tokens, state, vocab: int):
    plain = rules_tensor(gk.GEKOConfig(), torch.device("cpu")), torch.ones(4)
    rules, weights = plain if state is None else (state.rules, state.weights)
    options = case.options
    items = None if options["num_items"] is None else torch.tensor(options["num_items"])
    reduction = reference.Reduction[options["reduction"].upper()]
    held = columns(state)
    out = backend.sample_update_(
        *(tokens, case.labels, case.sample_ids, rules, weights, items, *held),
        *(vocab, int(reduction), options["ignore_index"], options["shift"], options["update"]),
    )
    return out, (*held[0], held[1])


@given(case=cases(dtypes=(torch.float32,)), spoil=st.sampled_from(["nothing", "labels", "ids", "inf", "nan"]))
def test_sample_update_decides_exactly_as_the_reference(case, spoil):
    vocab, options = case.logits.shape[-1], case.options
    if spoil == "labels":
        case.labels[0, -1] = vocab + 2
    elif spoil == "ids" and case.sample_ids is not None:
        case.sample_ids.view(-1)[-1] = 77 if case.state is not None else -7
    rest = options["ignore_index"], options["shift"], options["softcap"] or 0.0
    tokens = reference.token_stats(case.logits, case.labels, case.sample_ids, *rest)
    if spoil in ("inf", "nan"):
        tokens[[0, 3], 0] = float(spoil)
    ours, our_columns = update(cpp, case, tokens, case.new_state(), vocab)
    want, want_columns = update(reference, case, tokens, case.new_state(), vocab)
    for got, expected in zip((*ours, *our_columns), (*want, *want_columns), strict=True):
        if expected is None:
            continue
        assert got.dtype == expected.dtype and got.shape == expected.shape
        if expected.is_floating_point():
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7, equal_nan=True)
        else:
            assert got.equal(expected)


def rows_of(vocab: int, dtype: torch.dtype, stride: str):
    logits = (torch.randn(3, 4, vocab) * 4).to(dtype)
    labels = torch.randint(vocab, (3, 4))
    if vocab > 8:
        logits[..., -5:], labels = -torch.inf, labels % (vocab - 5)
    logits.view(12, -1)[torch.arange(3), labels.flatten()[:3]] = 30  # confident rows
    labels[2, 3] = -100
    if stride == "vocab_first":
        logits = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    return logits, labels


def error_of(ours, theirs, exact) -> None:
    """Every value of ours within twice the largest error of theirs and two roundings of the largest value."""
    own = (theirs.double() - exact).abs().max()
    rounding = torch.finfo(torch.float32).eps * exact.abs().max().clamp(min=1)
    assert (ours.double() - exact).abs().max() <= 2 * own + 2 * rounding


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("stride", ["contiguous", "vocab_first"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_length(dtype, stride, softcap):
    for vocab in VOCABS:
        logits, labels = rows_of(vocab, dtype, stride)
        rest = labels, None, -100, False, softcap
        ours, theirs, exact = (
            cpp.token_stats(logits, *rest),
            reference.token_stats(logits, *rest),
            reference.token_stats(logits.double(), *rest),
        )
        for row in range(5):
            error_of(ours[row], theirs[row], exact[row])
        assert ours[4].equal(theirs[4]), "hits"
        coeff = torch.rand(12) + 0.1
        coeff[[5, 11]] = 0
        fixed = coeff, torch.tensor(0.37), NO_VISITS, False, softcap
        upstream = torch.tensor([0.5, -2.0, 1.0])
        grads = [
            op.logits_grad(upstream, values, labels, tokens, *fixed)
            for op, values, tokens in (
                (cpp, logits, ours),
                (reference, logits, theirs),
                (reference, logits.double(), exact),
            )
        ]
        assert grads[0].is_contiguous() and not grads[0].view(12, -1)[[5, 11]].any()
        error_of(*grads)
        overwritten = logits.clone(memory_format=torch.preserve_format)
        cpp.logits_grad_(upstream, overwritten, labels, ours, *fixed)
        assert overwritten.stride() == logits.stride() and overwritten.equal(grads[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 3, 16, 40])
def test_non_finite_logits_show_as_in_the_reference(vocab, dtype):
    specials = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    logits = torch.randn(1, 200, vocab).to(dtype)
    spots = torch.rand(logits.shape) < 0.2
    logits[spots] = specials[torch.randint(3, (int(spots.sum()),))]
    logits[0, 0], logits[0, 1] = -torch.inf, torch.nan
    labels = torch.randint(vocab, (1, 200))
    ours, want = (op.token_stats(logits, labels, None, -100, False, 0.0) for op in (cpp, reference))
    torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-6, equal_nan=True)
    rest = labels, want, torch.rand(200), torch.tensor(1.0), NO_VISITS, False, 0.0
    ours, want = (op.logits_grad(torch.tensor(2.0), logits, *rest) for op in (cpp, reference))
    assert ours.isnan().equal(want.isnan())
    torch.testing.assert_close(ours, want, equal_nan=True, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_rows_without_weight_are_not_read_and_far_logits_give_exact_zeros():
    logits, labels = torch.full((1, 3, 33), torch.nan), torch.tensor([[1, 2, 3]])
    logits[0, 1] = 0
    logits[0, 1, 5:] = -200
    tokens = cpp.token_stats(logits, labels, None, -100, False, 0.0)
    rest = tokens, torch.tensor([0.0, 1.0, 0.0]), torch.tensor(1.0), NO_VISITS, False, 0.0
    grad = cpp.logits_grad(torch.tensor(1.0), logits, labels, *rest)
    assert not grad[0, [0, 2]].any() and not grad[0, 1, 5:].any()
    torch.testing.assert_close(grad[0, 1, :5], torch.tensor([0.2, 0.2, -0.8, 0.2, 0.2]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_does_not_change_a_bit(dtype):
    logits = (torch.randn(5, 13, 3001) * 3).to(dtype).requires_grad_()
    labels, ids = torch.randint(3001, (5, 13)), torch.arange(65).view(5, 13) // 3
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert cpp.num_threads() == threads
            state, logits.grad = gk.SampleState(22), None
            loss, stats = gk.weighted_loss(logits, labels, ids, state, return_stats=True)
            loss.backward()
            results.append((loss.detach(), logits.grad, *stats, *state.state_dict().values()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


def test_no_rows_at_all():
    for shape in ((0, 4), (2, 0)):
        logits, labels = torch.empty(*shape, 9), torch.empty(shape, dtype=torch.int64)
        assert cpp.token_stats(logits, labels, None, -100, False, 0.0).shape == (5, 0)
        loss = gk.weighted_loss(logits.requires_grad_(), labels)
        loss.backward()
        assert loss == 0 and logits.grad.shape == logits.shape


def test_large_gradients_share_no_memory_while_they_live():
    """From 4 MiB on, the memory of a gradient that was freed serves the next one."""
    logits, labels = torch.randn(1, 60, 20011), torch.randint(20011, (1, 60))
    tokens = cpp.token_stats(logits, labels, None, -100, False, 0.0)
    coeff = torch.ones(60)
    coeff[7] = 0

    def grad(scale: float) -> torch.Tensor:
        rest = labels, tokens, coeff, torch.tensor(scale), NO_VISITS, False, 0.0
        return cpp.logits_grad(torch.tensor(1.0), logits, *rest)

    want = reference.logits_grad(
        torch.tensor(1.0), logits, labels, tokens, coeff, torch.tensor(2.0), NO_VISITS, False, 0.0
    )
    first, second = grad(2.0), grad(-3.0)
    torch.testing.assert_close(first, want)
    torch.testing.assert_close(second, -1.5 * want)
    for _ in range(3):
        at = second.data_ptr()
        del second
        second = grad(2.0)
        assert second.data_ptr() == at or sys.platform != "linux"
        assert second.equal(first) and not second[0, 7].any()


def test_tensors_that_do_not_fit_are_refused_before_any_access():
    logits, labels = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="labels must have the logits' shape"):
        cpp.token_stats(logits, labels[:1], None, -100, False, 0.0)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        cpp.token_stats(logits.double(), labels, None, -100, False, 0.0)
    with pytest.raises(RuntimeError, match="coeff must be a contiguous CPU tensor of 6 elements"):
        rest = torch.zeros(5, 6), torch.ones(5), torch.tensor(1.0), NO_VISITS, False, 0.0
        cpp.logits_grad(torch.tensor(1.0), logits, labels, *rest)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    everything = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *command], env=everything, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("capability", ["avx512", "avx2", "portable"])
def test_every_instruction_set(capability):
    program = "from geko_kernels import cpu; print(cpu.cpu_capability(), flush=True)\n"
    if capability != cpp.cpu_capability():  # which the other tests of this file ran on
        program += f"import sys, pytest; sys.exit(pytest.main(['-q', '-k', 'rows or non_finite', {__file__!r}]))"
    found = run("-c", program, GEKO_CPU_CAPABILITY=capability)
    if "that this CPU runs" in found.stderr:
        pytest.skip(f"this CPU does not run {capability}")
    assert found.stdout.split("\n")[0] == capability
    if capability != cpp.cpu_capability():
        assert found.returncode == 0 and "passed" in found.stdout, found.stdout


def test_an_unknown_instruction_set_is_refused_by_name():
    found = run("-c", "from geko_kernels import cpu; cpu.cpu_capability()", GEKO_CPU_CAPABILITY="mmx")
    assert found.returncode != 0 and "GEKO_CPU_CAPABILITY must be" in found.stderr and "'mmx'" in found.stderr


def test_without_the_extension_one_warning_and_the_right_loss():
    program = """
import sys, warnings, torch
sys.modules["geko_kernels._C"] = None
import geko_kernels as gk
logits, labels = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        loss = gk.weighted_loss(logits, labels, reduction="token_mean")
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
print(*[str(w.message) for w in seen if "geko_kernels" in str(w.message)], sep="\\n")
"""
    found = run("-c", program)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.strip().splitlines()) == 1 and "the extension was not built" in found.stdout


@pytest.mark.parametrize("missing", ["compiler", "torch"])
def test_a_build_that_cannot_be_is_a_warning(tmp_path, missing):
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").touch()
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "geko_kernels").mkdir()
    (tmp_path / "geko_kernels" / "__init__.py").write_text('__version__ = "0"')
    environment = {"CC": "/no/such/cc", "CXX": "/no/such/c++"} if missing == "compiler" else {}
    if missing == "torch":
        (tmp_path / "torch.py").write_text("raise ImportError('no torch')")
        environment = {"PYTHONPATH": str(tmp_path)}
    built = subprocess.run(
        [sys.executable, "setup.py", "build"],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr
    assert "the pure Python package, right but slow on the CPU" in built.stderr
    assert list(tmp_path.glob("build/**/geko_kernels/__init__.py")) and not list(tmp_path.glob("build/**/*.so"))
