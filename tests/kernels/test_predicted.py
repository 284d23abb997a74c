"""The predicted gradient: whatever was predicted, the corrected one is the true one. The CUDA launch is emulated."""

from __future__ import annotations

import pytest
import torch
from cases import cases, random_state
from hypothesis import Phase, given, settings
from torch.utils.checkpoint import checkpoint

import geko_kernels as gk
from geko_kernels import ops
from geko_kernels.reference import one_pass as reference_predicted
from geko_kernels.reference import ops as reference
from geko_kernels.reference.layout import layout
from geko_kernels.reference.ops import Reduction

pytest.importorskip("geko_kernels.kernels", exc_type=ImportError)
if torch.cuda.is_available():
    pytest.skip("with a GPU the kernels are compiled: see test_predicted_gpu.py", allow_module_level=True)
from predicted import EmulatedRows, emulate, predicts

from geko_kernels.kernels.one_pass.correct import correct_launch
from geko_kernels.kernels.one_pass.predict import predict_launch, predict_parts
from geko_kernels.kernels.sample_update.prepare import scratch_words
from geko_kernels.kernels.table import QUARANTINED, pointers, prepared_of

pytestmark = pytest.mark.no_cover


def batch(rows, length, vocab, dtype=torch.float32, right=0.5):
    labels = torch.randint(0, vocab, (rows, length))
    logits = torch.randn(rows, length, vocab) * 2
    logits.scatter_add_(2, labels[..., None], 12.0 * (torch.rand(rows, 1, 1) < right).expand(rows, length, 1))
    return logits.to(dtype), torch.where(torch.rand(rows, length) < 0.2, -100, labels)


def columns_of(state):
    return (state.columns, state.error) if state else ([], None)


@given(cases())
def test_a_sample_that_stays_in_its_bucket_is_predicted_right(case):
    if case.options["reduction"] == "none":
        return
    batch, length, vocab = case.logits.shape
    reduction = Reduction[case.options["reduction"].upper()]
    shift, ignore_index = case.options["shift"], case.options["ignore_index"]
    state = case.new_state()
    weights = state.weights if state else torch.ones(4)
    rules = state.rules if state else gk.SampleState(1).rules
    tokens = reference.token_stats(case.logits, case.labels, case.sample_ids, ignore_index, shift, 0.0)
    head = (case.labels, case.sample_ids, rules, weights, None, *columns_of(state))
    reference.sample_update_(tokens, *head, vocab, reduction, ignore_index, shift, True)
    if state is not None and (state.times_seen == case.state.times_seen).any():
        finite = tokens.isfinite().all()
        if not finite:
            return  # its visits judge by what the state does not keep
    # judged again, with the bucket it has now: as in a visit that changes nothing
    _, scale, coeff, *_, floats, _, flags = reference.sample_update_(
        tokens, *head, vocab, reduction, ignore_index, shift, False
    )
    bucket = quarantined = None
    if state is not None:
        bucket, quarantined = state.bucket.clone(), state.quarantined
        visits = layout(case.labels, case.sample_ids, len(state), vocab, ignore_index, shift).ids
        inside = (visits >= 0) & (visits < len(state))
        bucket[visits[inside]] = flags[0, inside]
        if (bucket[visits[inside]] != flags[0, inside]).any():
            return  # two visits of one sample in different buckets
    target, predicted, count = reference_predicted.predict(
        case.labels, case.sample_ids, weights, bucket, quarantined, vocab, reduction, ignore_index, shift
    )
    torch.testing.assert_close(predicted, coeff)
    where = layout(case.labels, case.sample_ids, -1, vocab, ignore_index, shift)
    assert target.equal(torch.where(where.scored, where.target, -1).int())
    if reduction != Reduction.SUM:
        assert scale == (1 / count if count else 0)


@given(cases())
def test_the_prediction_kernel_equals_the_reference(case):
    if case.options["reduction"] == "none":
        return
    vocab = case.logits.shape[-1]
    reduction = int(Reduction[case.options["reduction"].upper()])
    shift, ignore_index, update = (case.options[k] for k in ("shift", "ignore_index", "update"))
    labels, ids, state = case.labels, case.sample_ids, case.new_state()
    packed = ids is not None and ids.dim() == 2
    weights = state.weights if state else torch.ones(4)
    bucket, quarantined = (state.bucket.clone(), state.quarantined) if state else (None, None)
    want = reference_predicted.predict(labels, ids, weights, bucket, quarantined, vocab, reduction, ignore_index, shift)
    table, error = pointers(columns_of(state)[0]), columns_of(state)[1]
    counts = torch.empty(predict_parts(labels, packed), dtype=torch.int32)
    target, coeff = torch.empty(labels.numel(), dtype=torch.int32), torch.empty(labels.numel())
    scratch = torch.empty(scratch_words(labels, packed), dtype=torch.int32)
    launch = predict_launch(labels, ids, len(state) if state else -1, vocab, reduction, ignore_index, shift, update)
    prepared = (*prepared_of(table), table[QUARANTINED], error, scratch)
    launch(labels, ids, weights, *prepared, target, coeff, counts)
    assert target.equal(want[0]) and coeff.equal(want[1])
    if reduction != Reduction.SUM:
        assert counts.sum() == want[2]


def saved_of(vocab, dtype, shift=False):
    logits, labels = batch(3, 5, vocab, dtype)
    state = random_state(3, 6, gk.GEKOConfig(), (3, 1, 0))
    head = (labels, torch.tensor([4, 0, 2]), state.rules, state.weights, None, *columns_of(state))
    _, scale, coeff, token_visit, *_, tokens = reference.loss_forward_(
        logits, *head, Reduction.MEAN, -100, shift, 0.0, True
    )
    target = reference_predicted.predict(labels, None, torch.ones(4), None, None, vocab, 1, -100, shift)[0]
    return logits, labels, target, tokens, coeff, scale, token_visit


PREDICTIONS = {
    "right": lambda coeff: coeff,
    "zero": torch.zeros_like,
    "wrong": lambda coeff: torch.where(coeff != 0, coeff * 3, 0.3),
    "random": lambda coeff: torch.where(torch.rand_like(coeff) < 0.5, coeff, torch.rand_like(coeff).round()),
}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("upstreams", [(1.0, 1.0), (1.0, -0.3), (1.0, 65536.0), (65536.0, 65536.0), (2.0, 0.0)])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_corrected_gradient_is_the_true_one(prediction, inplace, upstreams, backend):
    dtypes = (torch.float32, torch.bfloat16) if inplace else (torch.float32, torch.bfloat16, torch.float16)
    for vocab, dtype in zip((40, 1001, 4100), dtypes, strict=False):
        logits, labels, target, tokens, coeff, scale, token_visit = saved_of(vocab, dtype)
        before, now = torch.tensor(upstreams[0]), torch.tensor(upstreams[1])
        want = reference.logits_grad(now, logits, labels, tokens, coeff, scale, token_visit, False, 0.0)
        guess = torch.where(target >= 0, PREDICTIONS[prediction](coeff), 0)
        grad = logits if inplace else torch.full_like(logits, torch.nan)
        divisor = None if scale == 1 else 1 / scale
        stats, factor = reference_predicted.predicted_rows_(logits, grad, target, guess, divisor, before)
        torch.testing.assert_close(stats, tokens)
        counts, upstream = torch.zeros(2, dtype=torch.int64), before.clone()
        if backend == "reference":
            saved = (tokens, coeff, scale, factor, upstream, counts)
            reference_predicted.correct_rows_(grad, now, logits, target, *saved)
        else:
            launch = correct_launch(grad, logits, labels, False, inplace)
            launch(grad, now, logits, labels, tokens, coeff, scale, factor, upstream, counts)
        twice = 2 if inplace else 1  # rounded twice
        torch.testing.assert_close(grad, want, rtol=2 * twice * torch.finfo(dtype).eps + 1e-5, atol=1e-7)
        assert upstream == (upstreams[1] or upstreams[0])
        true = torch.where(coeff != 0, coeff * scale * now, 0)
        assert counts.tolist() == [int(((factor == true) & (true != 0)).sum()), int((factor != true).sum())]
        if prediction == "right" and upstreams[0] == upstreams[1]:
            assert counts[1] == 0 and counts[0] > 0


@settings(max_examples=8, phases=[Phase.generate])
@given(cases())
def test_calls_that_predict_equal_the_reference(case):
    with pytest.MonkeyPatch.context() as patch:
        results = []
        for ours in (True, False):
            if ours:
                emulate(patch)
            else:
                patch.setattr(ops, "_override", "reference")
                patch.setattr(ops, "backend_name", lambda *_: "reference")
            state = case.new_state()
            for upstream in (case.upstream, case.upstream, 0.5):
                leaf = case.logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
                loss, stats = gk.weighted_loss(
                    leaf, case.labels, case.sample_ids, state, return_stats=True, **case.options
                )
                (loss.sum() * upstream).backward()
            results.append((loss.detach(), leaf.grad, *stats, *(state.state_dict().values() if state else ())))
        fits = predicts(leaf) and case.options["softcap"] is None and case.options["reduction"] != "none"
        assert (EmulatedRows.calls > 0) == fits
    eps = torch.finfo(case.logits.dtype).eps
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2 * eps + 1e-5, atol=1e-6, equal_nan=True)


@pytest.fixture
def emulated(monkeypatch):
    emulate(monkeypatch)


def step(state, logits, labels, upstream=1.0, **options):
    leaf = logits.clone().requires_grad_()
    loss = gk.weighted_loss(leaf * 1, labels, torch.arange(len(labels)), state, **options)
    (loss * upstream).backward()
    return leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_equals_out_of_place(emulated, dtype):
    logits, labels = batch(4, 3, 50, dtype)
    grads = []
    for inplace in (False, True):
        state = gk.SampleState(4)
        for upstream in (1.0, 3.0, 3.0, 0.25):
            grad = step(state, logits, labels, upstream, inplace=inplace)
        grads.append(grad)
        assert state.predictions.min() > 0
    torch.testing.assert_close(*grads, rtol=4 * torch.finfo(dtype).eps, atol=1e-8)
    assert EmulatedRows.calls == 8


def test_an_upstream_gradient_is_missed_once(emulated):
    logits, labels = batch(4, 3, 50, right=0)
    state, count = gk.SampleState(4), int((labels >= 0).sum())
    for upstream, misses in ((1.0, 0), (65536.0, count), (65536.0, 0), (32768.0, count), (0.25, count), (0.25, 0)):
        state.predictions.zero_()
        state.bucket.fill_(gk.Bucket.FOCUS)
        state.bucket_weights = (1, 1, 0)
        step(state, logits, labels, upstream)
        assert state.predictions.tolist() == [count - misses, misses]


def test_the_upstream_gradient_survives_a_checkpoint(tmp_path):
    state = gk.SampleState(3)
    state.upstream.fill_(0.125)
    state.save(tmp_path / "state.safetensors")
    assert gk.SampleState.load(tmp_path / "state.safetensors").upstream == 0.125


def test_a_second_backward_computes_anew(emulated):
    logits, labels = batch(2, 3, 50)
    leaf = logits.requires_grad_()
    loss = gk.weighted_loss(leaf, labels)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    assert EmulatedRows.calls == 1 and first.data_ptr() != second.data_ptr()
    torch.testing.assert_close(first, second)


def test_in_place_forbids_a_second_backward(emulated):
    logits, labels = batch(2, 3, 50)
    used = logits.requires_grad_() * 1
    loss = gk.weighted_loss(used, labels, inplace=True)
    torch.autograd.grad(loss, used, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, used)


@pytest.mark.parametrize("option", [{"reduction": "none"}, {"softcap": 5.0}])
def test_options_that_do_not_predict(emulated, option):
    logits, labels = batch(2, 3, 50)
    gk.weighted_loss(logits.requires_grad_(), labels, **option).sum().backward()
    assert EmulatedRows.calls == 0


def test_calls_that_do_not_predict(emulated, monkeypatch):
    logits, labels = batch(2, 3, 50)
    gk.weighted_loss(logits, labels)  # no gradient
    leaf = logits.clone().requires_grad_()
    with torch.no_grad():
        gk.weighted_loss(leaf, labels)
    checkpoint(lambda x: gk.weighted_loss(x * 1, labels), leaf, use_reentrant=False).backward()
    gk.weighted_loss(
        logits[..., :47].detach().requires_grad_(), labels.clamp(max=40)
    )  # rows of the gradient lie elsewhere
    gk.weighted_loss(logits.half().requires_grad_() * 1, labels, inplace=True)
    monkeypatch.setattr(ops, "_override", "triton")
    gk.weighted_loss(leaf, labels)
    assert EmulatedRows.calls == 0


def test_the_efficiency_report_counts_both_kinds():
    efficiency = pytest.importorskip("geko_kernels.training.report.efficiency")
    counts, state = efficiency.Efficiency(torch.device("cpu")), gk.SampleState(2)
    counts.predictions = state.predictions
    for _ in range(2):
        state.predictions += torch.tensor([5, 2])
        counts.collect()
    report = counts.report()
    assert (report["gradients_predicted"], report["gradients_corrected"]) == (10, 4)
