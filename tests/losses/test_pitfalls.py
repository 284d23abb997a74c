"""Where other loss kernels were bitten, each a test; the linear path has the same names in its own file."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import geko_kernels as gk

REDUCTIONS = ["mean", "token_mean", "sum", "none"]


def batch(device, rows=3, length=4, vocab=11):
    logits = torch.randn(rows, length, vocab, device=device)
    return logits, torch.randint(vocab, (rows, length), device=device), torch.arange(rows, device=device)


def columns(state):
    return {name: column.clone() for name, column in state.state_dict().items()}


def same(before, state):
    return all(before[name].equal(column) for name, column in state.state_dict().items())


@pytest.mark.parametrize("p", [0.99, 0.999, 0.9999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pitfall_01_gradient_of_a_confident_token_keeps_its_precision(backend, device, p, dtype):
    logits = torch.zeros(1, 1, 64, device=device, dtype=dtype)
    logits[..., 5] = torch.tensor(p / (1 - p) * 63).log()
    logits.requires_grad_()
    gk.weighted_loss(logits, torch.full((1, 1), 5, device=device)).backward()
    exact = logits.detach().double()[0, 0].softmax(0) - F.one_hot(torch.tensor(5, device=device), 64)
    error = (logits.grad.double()[0, 0] - exact).abs() / exact.abs()
    in_fp32 = 3e-7 / (1 - p)  # what 1 - p itself loses there
    assert error[5] < torch.finfo(dtype).eps + in_fp32, "the -1 at the target is taken before rounding"


def test_pitfall_02_rows_without_a_loss_are_written(backend, device):
    logits, labels, ids = batch(device)
    labels[0, 2], labels[1] = -100, -100
    logits.requires_grad_()
    loss, stats = gk.weighted_loss(
        logits, labels, ids, gk.SampleState(3, device=device), reduction="none", return_stats=True
    )
    loss.sum().backward()
    assert loss[1] == 0 and not logits.grad[0, 2].any() and not logits.grad[1].any()
    for values in (*stats, loss, logits.grad):
        assert values.isfinite().all()


def test_pitfall_03_the_gradient_overwrites_the_logits_only_when_asked(backend, device):
    values, labels, ids = batch(device)

    def backward(inplace):
        leaf = values.clone().requires_grad_()
        logits = leaf * 1
        gk.weighted_loss(logits, labels, ids, gk.SampleState(3, device=device), inplace=inplace).backward()
        return leaf.grad, logits.detach(), logits._version

    grad, untouched, version = backward(False)
    assert untouched.equal(values) and version == 0
    same_grad, overwritten, version = backward(True)
    assert same_grad.equal(grad) and overwritten.equal(grad) and version > 0


def test_pitfall_03_another_user_of_overwritten_logits_hears_of_it(backend, device):
    values, labels, _ = batch(device)
    leaf = values.clone().requires_grad_()
    logits = leaf * 1
    other = (logits**2).sum()
    gk.weighted_loss(logits, labels, inplace=True).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("how", ["non_uniform", "expanded", "not_one", "strided"])
def test_pitfall_04_upstream_gradients(backend, device, how):
    logits, labels, ids = batch(device)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    config = gk.GEKOConfig(bucket_weights=(2, 2, 2), freeze_weight=2.0)
    loss = gk.weighted_loss(ours, labels, ids, gk.SampleState(3, config, device=device), reduction="none")
    plain = 2 * F.cross_entropy(theirs.transpose(1, 2), labels, reduction="none").mean(1)
    upstream = {
        "non_uniform": torch.tensor([0.5, -2.0, 0.0], device=device),
        "expanded": torch.tensor(0.3, device=device).expand(3),
        "not_one": torch.full((3,), 7.0, device=device),
        "strided": torch.tensor([[0.5, 1], [2, 3], [4, 5]], device=device)[:, 0],
    }[how]
    loss.backward(upstream)
    plain.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_pitfall_04_upstream_gradient_per_visit_of_a_packed_row(backend, device):
    logits, labels, _ = batch(device, rows=1, length=6)
    ids = torch.tensor([[2, 2, -1, 0, 0, 0]], device=device)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = gk.weighted_loss(ours, labels, ids, reduction="none")
    (loss * torch.tensor([0.5, -3, 9, 9, 9, 9], device=device)).sum().backward()
    plain = F.cross_entropy(theirs[0], labels[0], reduction="none")
    (0.5 * plain[:2].mean() - 3 * plain[3:].mean()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("why", ["all_ignored", "zero_weights", "empty_batch", "empty_rows", "all_padding"])
def test_pitfall_05_nothing_to_learn_gives_zero_not_nan(backend, device, reduction, why):
    rows, length = {"empty_batch": (0, 4), "empty_rows": (3, 0)}.get(why, (3, 4))
    logits, labels, ids = batch(device, rows, length)
    config = gk.GEKOConfig(bucket_weights=(0, 0, 0)) if why == "zero_weights" else gk.GEKOConfig()
    if why == "all_ignored":
        labels[:] = -100
    if why == "all_padding":
        ids = torch.full((3, 4), -1, device=device)
    state = gk.SampleState(3, config, device=device)
    logits.requires_grad_()
    loss = gk.weighted_loss(logits, labels, ids, state, reduction=reduction)
    loss.sum().backward()
    assert (loss == 0).all() and (logits.grad == 0).all() and logits.grad.shape == logits.shape
    assert state.times_seen.tolist() == ([1] * 3 if why == "zero_weights" else [0] * 3)


@pytest.mark.parametrize("reduction", ["mean", "token_mean"])
@pytest.mark.parametrize("parts", [2, 4])
def test_pitfall_06_micro_batches_equal_one_batch(backend, device, reduction, parts):
    logits, labels, ids = batch(device, rows=8, length=5)
    labels[torch.rand(labels.shape, device=device) < 0.3] = -100
    labels[3] = -100
    items = (labels != -100).sum() if reduction == "token_mean" else (labels != -100).any(1).sum()
    whole, split = gk.SampleState(8, device=device), gk.SampleState(8, device=device)
    one = logits.clone().requires_grad_()
    total = gk.weighted_loss(one, labels, ids, whole, reduction=reduction)
    total.backward()
    many, accumulated = logits.clone().requires_grad_(), 0.0
    for rows in torch.arange(8, device=device).chunk(parts):
        part = gk.weighted_loss(many[rows], labels[rows], ids[rows], split, reduction=reduction, num_items=items)
        part.backward()
        accumulated += part.item()
    assert accumulated == pytest.approx(total.item(), rel=1e-5)
    torch.testing.assert_close(many.grad, one.grad, rtol=1e-5, atol=1e-7)
    assert all(x.equal(whole.state_dict()[name]) for name, x in split.state_dict().items())


def test_pitfall_07_losses_accumulate_in_fp32(backend, device):
    logits = (torch.randn(2, 3000, 5, device=device) * 2).bfloat16()
    labels = torch.randint(5, (2, 3000), device=device)
    loss, stats = gk.weighted_loss(logits, labels, reduction="sum", return_stats=True)
    exact = F.cross_entropy(logits.double().transpose(1, 2), labels, reduction="none").mean(1)
    assert loss.dtype == stats.loss.dtype == torch.float32
    torch.testing.assert_close(stats.loss.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pitfall_08_padded_vocabulary_columns_do_not_count(backend, device, dtype):
    logits, labels, ids = batch(device, vocab=37)
    logits = logits.to(dtype)
    for padding in (3, 5000):  # 5000: whole blocks of -inf
        for where in ("behind", "before"):
            pad = torch.full((3, 4, padding), -torch.inf, device=device, dtype=dtype)
            padded = torch.cat([logits, pad] if where == "behind" else [pad, logits], 2).requires_grad_()
            narrow = logits.clone().requires_grad_()
            moved = labels if where == "behind" else labels + padding
            loss, stats = gk.weighted_loss(padded, moved, ids, gk.SampleState(3, device=device), return_stats=True)
            want, plain = gk.weighted_loss(narrow, labels, ids, gk.SampleState(3, device=device), return_stats=True)
            loss.backward()
            want.backward()
            torch.testing.assert_close((loss, stats.confidence), (want, plain.confidence))
            kept = padded.grad[..., :37] if where == "behind" else padded.grad[..., padding:]
            torch.testing.assert_close(kept, narrow.grad)
            assert padded.grad.count_nonzero() == narrow.grad.count_nonzero()


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_pitfall_08_a_large_common_offset_changes_nothing(backend, device, offset):
    logits, labels, _ = batch(device)
    logits = (logits * 64).round() / 64 + offset  # exact in fp32
    loss, stats = gk.weighted_loss(logits, labels, return_stats=True)
    want, plain = gk.weighted_loss(logits.double() - offset, labels, return_stats=True)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.confidence.double(), plain.confidence, rtol=1e-5, atol=1e-6)


def test_pitfall_09_offsets_beyond_int32(backend, device):
    torch.use_deterministic_algorithms(False)  # the memory between the rows must stay untouched
    vocab, stride = 50, 2**31 + 7
    memory = torch.empty(stride + vocab, dtype=torch.bfloat16, device=device)
    logits = memory.as_strided((2, 1, vocab), (stride, vocab, 1))
    logits.copy_(torch.randn(2, 1, vocab))
    labels, near = torch.tensor([[3], [4]], device=device), logits.clone().requires_grad_()
    far = logits.detach().requires_grad_()
    a, b = gk.weighted_loss(far, labels), gk.weighted_loss(near, labels)
    a.backward()
    b.backward()
    assert a == b and far.grad.equal(near.grad)


def test_pitfall_09_a_distributed_tensor_is_refused_by_name():
    class Sharded(torch.Tensor):
        def full_tensor(self):
            raise NotImplementedError

    with pytest.raises(TypeError, match=r"logits must be a plain tensor, got a Sharded; use logits.full_tensor\(\)"):
        gk.weighted_loss(torch.randn(2, 3).as_subclass(Sharded), torch.zeros(2, dtype=torch.long))


def test_pitfall_10_many_visits_to_one_row_end_and_repeat(backend, device):
    logits, labels, _ = batch(device, rows=64, length=2, vocab=5)
    ids = torch.zeros(64, dtype=torch.long, device=device)
    states = [gk.SampleState(2, device=device) for _ in range(3)]
    for state in states:
        gk.weighted_loss(logits, labels, ids, state)
    single = gk.SampleState(2, device=device)
    gk.weighted_loss(logits[-1:], labels[-1:], ids[-1:], single)
    assert all(same(columns(single), state) for state in states)


def test_pitfall_11_missing_logits_and_untouched_classes():
    with pytest.raises(TypeError, match="logits must be a torch.Tensor, got NoneType; this model returned no logits"):
        gk.weighted_loss(None, torch.zeros(2, dtype=torch.long))
    assert F.cross_entropy.__module__ == "torch.nn.functional"
    assert torch.nn.CrossEntropyLoss.forward.__module__ == "torch.nn.modules.loss"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("labels_made_inside", [False, True])
def test_pitfall_12_checkpointing_counts_a_visit_once(backend, device, reentrant, labels_made_inside):
    config = gk.GEKOConfig(quality="std", correct_loss=3.0, freeze_confidence=0.7, bucket_weights=(5, 3, 2))
    hidden, labels, ids = batch(device, vocab=7)
    checkpointed, plain = gk.SampleState(3, config, device=device), gk.SampleState(3, config, device=device)
    grads = []
    for state, repeat in ((checkpointed, True), (plain, False)):
        leaf = hidden.clone().requires_grad_()
        for _ in range(3):  # the bucket of a second update would differ

            def step(x, state=state):
                y = labels[:, 1:] * 1 if labels_made_inside else labels
                return gk.weighted_loss(x[:, : y.shape[1]] * 2, y, ids, state)

            (checkpoint(step, leaf, use_reentrant=reentrant) if repeat else step(leaf)).backward()
        grads.append(leaf.grad)
    assert checkpointed.times_seen.tolist() == [3, 3, 3] and same(columns(plain), checkpointed)
    assert grads[0].equal(grads[1])


def test_pitfall_12_two_checkpointed_losses_of_the_same_labels_keep_their_own_gradient(backend, device):
    hidden, labels, ids = batch(device)
    grads = []
    for repeat in (True, False):
        state, leaf = gk.SampleState(3, device=device), hidden.clone().requires_grad_()

        def step(x, scale, state=state):
            return gk.weighted_loss(x * scale, labels, ids, state)

        one, two = (
            checkpoint(step, leaf, scale, use_reentrant=False) if repeat else step(leaf, scale) for scale in (1.0, 3.0)
        )
        (one + two).backward()
        assert state.times_seen.tolist() == [2, 2, 2]
        grads.append(leaf.grad)
    assert grads[0].equal(grads[1])


@pytest.mark.parametrize("how", ["update_false", "no_grad", "inference_mode"])
def test_pitfall_12_evaluation_leaves_the_state(backend, device, how):
    logits, labels, ids = batch(device)
    state = gk.SampleState(3, device=device)
    gk.weighted_loss(logits, labels, ids, state)
    before = columns(state)
    context = {"no_grad": torch.no_grad(), "inference_mode": torch.inference_mode()}.get(how, torch.enable_grad())
    with context:
        loss, stats = gk.weighted_loss(
            logits, labels, ids, state, update=False if how == "update_false" else None, return_stats=True
        )
    assert same(before, state) and stats.num_tokens.tolist() == [4, 4, 4]
    again, counted = gk.weighted_loss(logits, labels, ids, state, return_stats=True)
    assert loss == again and stats.q_value.equal(counted.q_value), "what it would have been"


def test_pitfall_12_repeated_samples_count_once_a_call(backend, device):
    logits, labels, _ = batch(device, rows=4)
    state, single = gk.SampleState(3, device=device), gk.SampleState(3, device=device)
    logits[3], labels[3] = logits[0], labels[0]
    gk.weighted_loss(logits, labels, torch.tensor([0, 1, 2, 0], device=device), state)
    gk.weighted_loss(logits[:3], labels[:3], torch.arange(3, device=device), single)
    assert same(columns(single), state)
