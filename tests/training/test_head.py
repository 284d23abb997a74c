"""GEKOTrainer computes the head together with the loss where the model lets it, and says so where not."""

from __future__ import annotations

import pytest
import torch
from training import arguments, classified, curve, sentences, tiny_classifier, tiny_llama, weights
from transformers import Trainer

import geko_kernels as gk
from geko_kernels.training.model_loss import found_loss
from geko_kernels.training.model_loss import head as head_module


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the hidden states that the fused loss was called with."""
    seen = []
    loss = head_module.weighted_linear_loss
    monkeypatch.setattr(
        head_module,
        "weighted_linear_loss",
        lambda *args, **options: (seen.append(args[0].shape), loss(*args, **options))[1],
    )
    return seen


def train(folder, model, data=None, **fields):
    config = gk.GEKOConfig(correct_loss=2.5, use_curriculum=False)
    trainer = gk.GEKOTrainer(model, arguments(folder, **fields), train_dataset=data or sentences(12), config=config)
    trainer.train()
    return trainer


def without_head(monkeypatch):
    def refuse(question, form):
        raise ValueError("not now")

    monkeypatch.setattr(found_loss, "find_head", refuse)


@pytest.mark.parametrize(
    ("dtype", "trained", "where", "mib"),
    [
        (torch.float32, True, "cuda", 512),
        (torch.bfloat16, False, "cuda", 512),  # frozen, as beside an adapter
        (torch.bfloat16, True, "cuda", None),  # several fills would take as much again as its gradient
        (torch.float32, True, "cpu", None),
    ],
)
def test_a_step_takes_a_smaller_buffer_where_that_costs_no_other_memory(dtype, trained, where, mib):
    weight = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=trained)
    assert head_module.step_budget(weight, torch.device(where)) == mib


@pytest.mark.parametrize("tied", [False, True])
def test_training_is_that_of_all_logits(tmp_path, monkeypatch, calls, tied):
    ours, theirs = tiny_llama(tie_word_embeddings=tied), tiny_llama(tie_word_embeddings=tied)
    fused = train(tmp_path, ours)
    assert calls and all(shape[-1] == 16 for shape in calls)
    count = len(calls)
    without_head(monkeypatch)
    plain = train(tmp_path, theirs)
    assert len(calls) == count
    torch.testing.assert_close(curve(fused), curve(plain), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-3)
    assert fused.sample_state.times_seen.equal(plain.sample_state.times_seen)


def test_evaluation_returns_logits_and_nothing_stays_patched(tmp_path, calls):
    model = tiny_llama()
    trainer = train(tmp_path, model)
    count = len(calls)
    predictions = trainer.predict(sentences(3)).predictions
    assert predictions.shape == (3, 8, 32) and len(calls) == count
    assert "forward" not in vars(model.lm_head) and model(torch.ones(1, 4, dtype=torch.int64)).logits.shape[-1] == 32


@pytest.mark.parametrize("trained", [False, True])
def test_a_loss_alone_is_evaluated_without_logits(tmp_path, calls, trained):
    model, held_out = tiny_llama(), sentences(5)
    data = {"train_dataset": sentences(12), "eval_dataset": held_out}
    trainer = gk.GEKOTrainer(model, arguments(tmp_path, per_device_eval_batch_size=2), **data)
    if trained:
        trainer.train()
    state, rng = trainer.sample_state.state_dict(), torch.get_rng_state()
    state = {name: column.clone() for name, column in state.items()}
    count = len(calls)
    loss = trainer.evaluate()["eval_loss"]
    assert len(calls) >= count + 3 and all(shape[-1] == 16 for shape in calls[count:])
    after = torch.get_rng_state()
    assert "forward" not in vars(model.lm_head)
    for name, column in trainer.sample_state.state_dict().items():
        assert torch.equal(column, state[name]), name
    reference = Trainer(model, trainer.args, trainer.data_collator, eval_dataset=held_out)
    torch.set_rng_state(rng)
    assert loss == pytest.approx(reference.evaluate()["eval_loss"], rel=1e-5)
    assert torch.get_rng_state().equal(after)


def whole(model, **options):
    return torch.compile(model, **options)


def in_place(model, **options):
    model.compile(**options)
    return model


def its_forward(model, **options):
    model.forward = torch.compile(model.forward, **options)
    return model


def its_class(model, **options):
    forward = torch.compile(type(model).forward, **options)
    model.__class__ = type("Decorated", (type(model),), {"forward": forward})
    return model


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("compiled_by", [whole, in_place, its_forward, its_class])
def test_a_compiled_model_trains_alike_and_is_compiled_once(tmp_path, calls, compiled_by, fullgraph):
    """The loss leaves the graph at the head; a model that has to stay one graph keeps its logits."""
    torch._dynamo.reset()
    eager = train(tmp_path, tiny_llama())
    count = len(calls)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = compiled_by(tiny_llama(), backend=backend, fullgraph=fullgraph)
    compiled = train(tmp_path, model, remove_unused_columns=False)  # Trainer cannot see the signature of a wrapper
    assert len(calls) - count == (0 if fullgraph else count)
    assert len(graphs) == (1 if fullgraph else 2)  # before the loss and after it
    torch.testing.assert_close(curve(compiled), curve(eager), rtol=1e-4, atol=1e-5)
    assert compiled.sample_state.times_seen.equal(eager.sample_state.times_seen)


def test_blocks_of_one_graph_leave_the_head_fused(tmp_path, calls):
    torch._dynamo.reset()
    model = tiny_llama()
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    trainer = train(tmp_path, model)
    assert trainer._found.head is not None and calls


def test_metrics_are_evaluated_with_logits(tmp_path, calls):
    shapes = []

    def metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {}

    model = tiny_llama()
    trainer = gk.GEKOTrainer(
        model, arguments(tmp_path), train_dataset=sentences(12), eval_dataset=sentences(3), compute_metrics=metrics
    )
    assert trainer.evaluate()["eval_loss"] > 0 and shapes == [(3, 8, 32)] and not calls


def test_a_frozen_head_and_adapters(tmp_path, calls):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = model.base_model.model.lm_head.weight.detach().clone()
    train(tmp_path, model)
    assert calls and model.base_model.model.lm_head.weight.equal(before)


class Capped(type(tiny_llama())):
    """A Llama that does more to its logits than its head."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, **kwargs)
        outputs.logits = 5 * torch.tanh(outputs.logits * 3)
        if labels is not None:
            outputs.loss = self.loss_function(outputs.logits, labels, 32, **kwargs)
        return outputs


@pytest.mark.parametrize("why", ["classifier", "capped", "hooked", "patched"])
def test_other_models_fall_back_with_one_line(tmp_path, monkeypatch, calls, why):
    data = None
    if why == "classifier":
        model, data = tiny_classifier(), classified(12)
    elif why == "capped":
        model = Capped(tiny_llama().config)
    else:
        model = tiny_llama()
        if why == "hooked":
            model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
        else:
            model.lm_head.forward = model.lm_head.forward
    lines = []
    monkeypatch.setattr(found_loss.logger, "info", lines.append)
    train(tmp_path, model, data)
    assert not calls
    assert len(lines) == 1 and "from all logits" in lines[0]
