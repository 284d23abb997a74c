"""GEKOTrainer in one process."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from training import arguments, classified, curve, sentences, standard, tiny_classifier, tiny_llama, weights
from transformers import DataCollatorWithFlattening, default_data_collator

import geko_kernels as gk

FREEZE, LIGHT, FOCUS, HARD = range(4)
ADAM = 5e-5  # at a learning rate of 1e-2 Adam turns the rounding of a gradient near 0 into this much of a weight
PLAIN = {"use_curriculum": False, "uniform_finish": 0.0, "noise_guard": False}


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


def trainer_of(folder, data=None, config=None, model=None, **fields) -> gk.GEKOTrainer:
    named = {name: fields.pop(name) for name in ("data_collator", "eval_dataset", "callbacks") if name in fields}
    data = sentences(24) if data is None else data
    model = tiny_llama() if model is None else model
    return gk.GEKOTrainer(model, arguments(folder, **fields), train_dataset=data, config=config, **named)


# The loss is Trainer's where every weight is 1


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("bf16", [False, True])
def test_uniform_weights_give_the_standard_curve(tmp_path, accumulation, bf16):
    """Order, dropout, learning rate and normalisation included: 22 ragged samples, the last batch is short."""
    options = {"gradient_accumulation_steps": accumulation, "bf16": bf16, "warmup_steps": 2}
    args, data = arguments(tmp_path, **options), sentences(22, ragged=True)
    ours, theirs = tiny_llama(attention_dropout=0.1), tiny_llama(attention_dropout=0.1)
    trainer = gk.GEKOTrainer(ours, args, train_dataset=data, config=gk.GEKOConfig.uniform())
    trainer.train()
    reference = standard(theirs, args, data, data_collator=trainer.data_collator)
    reference.train()
    assert len(curve(reference)) == {1: 18, 4: 6}[accumulation]
    close = {"rtol": 2e-2, "atol": 2e-3} if bf16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(curve(trainer), curve(reference), **close)
    torch.testing.assert_close(curve(trainer, "learning_rate"), curve(reference, "learning_rate"), rtol=1e-9, atol=0)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=5e-2 if bf16 else ADAM)


def test_uniform_weights_give_the_standard_curve_for_classification(tmp_path):
    """Without accumulation: with it Transformers 5.17 adds up the micro-batches' means of a classifier undivided."""
    args, data = arguments(tmp_path), classified(22)
    ours, theirs = tiny_classifier(), tiny_classifier()
    trainer = gk.GEKOTrainer(ours, args, train_dataset=data, config=gk.GEKOConfig.uniform())
    trainer.train()
    reference = standard(theirs, args, data, data_collator=default_data_collator)
    reference.train()
    torch.testing.assert_close(curve(trainer), curve(reference), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=ADAM)
    assert (trainer.sample_state.times_seen == 3).all()


@pytest.mark.parametrize("make", [tiny_llama, tiny_classifier])
def test_micro_batches_equal_one_batch_under_weights(tmp_path, make):
    lm = make is tiny_llama
    config = gk.GEKOConfig(**PLAIN, bucket_weights=(3, 2, 1), correct_loss=3.4 if lm else 1.3)
    data, runs = sentences(16, ragged=True) if lm else classified(16), []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = make()
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = trainer_of(tmp_path, data, config, model, num_train_epochs=1, **options)
        trainer.train()
        runs.append((weights(model), torch.tensor(curve(trainer)), trainer.sample_state.last_loss))
    for one, many in zip(*runs, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-4, atol=ADAM)


def test_the_loss_is_weighted(tmp_path):
    """gekolib never weights its loss."""
    losses = []
    for focus in (1, 2):
        config = gk.GEKOConfig(**PLAIN, bucket_weights=(3, focus, 0))
        trainer = trainer_of(tmp_path, config=config, max_steps=1)
        trainer.train()
        losses.append(curve(trainer)[0])
        assert curve(trainer, "geko_loss")[0] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-5)


# Data


class MapDataset:
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.mark.parametrize("kind", ["list", "map", "torch", "dict", "datasets"])
def test_any_dataset_with_a_length(tmp_path, kind):
    items = [{**item, "note": "kept out of the model"} for item in sentences(12)]
    before = copy.deepcopy(items)
    if kind == "datasets":
        data = pytest.importorskip("datasets").Dataset.from_list(items)
    elif kind == "torch":
        data = torch.utils.data.Subset(items, range(12))
    else:
        data = {"list": items, "map": MapDataset(items), "dict": dict(enumerate(items))}[kind]
    trainer = trainer_of(tmp_path, data, gk.GEKOConfig.uniform(), data_collator=default_data_collator)
    trainer.train()
    assert items == before  # gekolib writes its ids into the user's items
    assert trainer.sample_state.times_seen.tolist() == [3] * 12
    with torch.no_grad():
        batch = default_data_collator(sentences(12))
        assert trainer.model(**batch).loss < 3.4


def test_ids_are_the_samples_own(tmp_path):
    """Each row of the state is about the item of that index, however the epoch is shuffled."""
    data, model = sentences(12, ragged=True), tiny_llama()
    trainer = trainer_of(tmp_path, data, gk.GEKOConfig.uniform(), model, learning_rate=0.0, num_train_epochs=1)
    trainer.train()
    for i, item in enumerate(data):
        tokens = torch.tensor([item["input_ids"]])
        with torch.no_grad():
            loss = model.eval()(input_ids=tokens, labels=tokens).loss
        torch.testing.assert_close(trainer.sample_state.last_loss[i], loss, rtol=1e-4, atol=1e-5)


def test_quick_start(tmp_path, monkeypatch):
    """As the GEKO document prints it: a tokenizer without padding token, samples of many lengths, no labels."""
    from tiny_model import save_tiny_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    path = save_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = None
    your_dataset = [tokenizer("geko " * n) for n in range(1, 9)]
    trainer = gk.GEKOTrainer(model=model, tokenizer=tokenizer, train_dataset=your_dataset)
    trainer.train()
    report = trainer.get_efficiency_report()
    assert report["samples_forward"] == report["samples_standard"] == 24
    with pytest.raises(TypeError, match="another name of processing_class"):
        gk.GEKOTrainer(model, tokenizer=tokenizer, processing_class=tokenizer)


def state_after(folder, data, collator):
    """The state after one epoch in which nothing is learnt."""
    options = {"num_train_epochs": 1, "learning_rate": 0.0}
    trainer = trainer_of(folder, data, gk.GEKOConfig.uniform(), data_collator=collator, **options)
    trainer.train()
    return trainer.sample_state


def packer(items, sample_ids):
    """Two samples a row, as a packing collator of one's own would do it."""
    rows = {"input_ids": [], "labels": [], "position_ids": [], "sample_ids": []}
    for start in range(0, len(items), 2):
        pair = items[start : start + 2]
        lengths = [len(item["input_ids"]) for item in pair]
        pad = 16 - sum(lengths)
        tokens = [token for item in pair for token in item["input_ids"]]
        labels = [token for item in pair for token in [-100, *item["input_ids"][1:]]]
        rows["input_ids"].append(tokens + [0] * pad)
        rows["labels"].append(labels + [-100] * pad)
        rows["position_ids"].append([place for length in lengths for place in range(length)] + list(range(pad)))
        owners = sample_ids[start : start + 2]
        ids = [owner for owner, length in zip(owners, lengths, strict=True) for _ in range(length)]
        rows["sample_ids"].append(ids + [-1] * pad)
    return {name: torch.tensor(row) for name, row in rows.items()}


def test_merged_rows_count_for_each_sample(tmp_path):
    """Padding-free collators, Transformers' and TRL's, and one that packs on its own."""
    data = sentences(10, ragged=True)
    expected = state_after(tmp_path, data, None)
    collators = [DataCollatorWithFlattening(), packer]
    try:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        collators.append(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True))
    except ImportError:
        pass
    for collator in collators:
        state = state_after(tmp_path, data, collator)
        assert state.times_seen.tolist() == [1] * 10
        if collator is not packer:  # rows of several samples attend across them in this model
            torch.testing.assert_close(state.last_loss, expected.last_loss, rtol=1e-3, atol=1e-3)


def test_a_collator_that_hides_whose_tokens_they_are_is_refused(tmp_path):
    def merge(items):
        tokens = torch.tensor([token for item in items for token in item["input_ids"]])
        return {"input_ids": tokens.view(2, -1), "labels": tokens.view(2, -1)}

    with pytest.raises(ValueError, match="unknown which token belongs to which sample"):
        trainer_of(tmp_path, data_collator=merge).train()
    with pytest.raises(ValueError, match="needs labels"):
        trainer_of(tmp_path, data_collator=lambda items: {"input_ids": torch.ones(4, 3, dtype=torch.long)}).train()


@pytest.mark.parametrize("strategy", ["group_by_length", "sequential"])
def test_sampling_strategies(tmp_path, strategy):
    trainer = trainer_of(tmp_path, sentences(30, ragged=True), train_sampling_strategy=strategy, num_train_epochs=1)
    trainer.train()
    plan = trainer.sampler.plan.ids.tolist()
    assert sorted(plan) == list(range(30))
    assert (plan == list(range(30))) == (strategy == "sequential")


# Models


class Bag(nn.Module):
    """A module of one's own; `form` is how it gives its logits."""

    def __init__(self, form):
        super().__init__()
        self.embed, self.head, self.form = nn.Embedding(32, 8), nn.Linear(8, 32), form

    def forward(self, input_ids):
        logits = self.head(self.embed(input_ids))
        return {"tensor": logits, "tuple": (None, logits), "dict": {"logits": logits}, "none": {"logits": None}}[
            self.form
        ]


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_modules_that_return_logits(tmp_path, form):
    data, eval_data = sentences(12), sentences(4)
    trainer = trainer_of(tmp_path, data, model=Bag(form), eval_dataset=eval_data, data_collator=default_data_collator)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert (trainer.sample_state.times_seen > 0).all()


def test_logits_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="returned no logits"):
        trainer_of(tmp_path, model=Bag("none"), data_collator=default_data_collator).train()


def test_labels_shift_where_asked(tmp_path):
    losses = []
    for shift in (True, False):
        options = {"shift_labels": shift, "max_steps": 1, "data_collator": default_data_collator}
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path, sentences(4), gk.GEKOConfig.uniform(), Bag("tensor"), **options)
        trainer.train()
        losses.append(trainer.efficiency.train["labels"])
    assert losses == [4 * 7, 4 * 8]


def test_adapters_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    trainer = trainer_of(tmp_path, model=model, save_strategy="epoch", config=gk.GEKOConfig.uniform())
    trainer.train()
    assert (trainer.sample_state.times_seen == 3).all()
    assert (tmp_path / "checkpoint-6" / "adapter_model.safetensors").exists()


def test_compiled_models_save_their_own_names(tmp_path):
    """gekolib's checkpoints of compiled models carry `_orig_mod.` keys."""
    options = {"torch_compile": True, "torch_compile_backend": "eager", "save_strategy": "epoch", "num_train_epochs": 1}
    trainer_of(tmp_path, sentences(8), **options).train()
    with safe_open(tmp_path / "checkpoint-2" / "model.safetensors", "pt") as file:
        assert all(name.startswith(("model.", "lm_head.")) for name in file.keys())  # noqa: SIM118


# The run


def frozen(trainer, ids) -> None:
    """Set the state as if `ids` had been mastered."""
    state = trainer.sample_state
    state.times_seen[ids], state.bucket[ids], state.confidence[ids] = 1, FREEZE, 0.99


def test_frozen_samples_are_not_loaded(tmp_path):
    loaded = []

    class Watched(MapDataset):
        def __getitem__(self, index):
            loaded.append(index)
            return self.items[index]

    trainer = trainer_of(tmp_path, Watched(sentences(24)), gk.GEKOConfig(**PLAIN, probes=False), num_train_epochs=2)
    frozen(trainer, slice(0, 12))
    trainer.train()
    assert sorted(loaded) == sorted(list(range(12, 24)) * 2)
    report = trainer.get_efficiency_report()
    assert report["samples_standard"] == 48 and report["samples_forward"] == report["samples_backward"] == 24
    assert report["saved_compute"] == pytest.approx(0.5)
    assert trainer.state.global_step == 6


def test_a_forgotten_sample_thaws_at_its_next_probe(tmp_path):
    trainer = trainer_of(tmp_path, config=gk.GEKOConfig(**PLAIN), num_train_epochs=3, learning_rate=0.0)
    frozen(trainer, slice(0, 12))  # an untrained model: every probe finds them wrong
    trainer.train()
    report = trainer.get_efficiency_report()
    assert [epoch["probes"] for epoch in report["epochs"]] == [0, 6, 6]  # even ids, then odd ones
    assert [epoch["samples"] for epoch in report["epochs"]] == [12, 18, 24]
    assert [epoch["forgotten"] for epoch in report["epochs"]] == [0, 6, 6]
    assert trainer.sampler.forgotten.tolist() == [1] * 12 + [0] * 12
    assert report["samples_forward"] - report["samples_backward"] == 12


def test_probes_leave_the_model_alone(tmp_path):
    model = tiny_llama()
    trainer = trainer_of(tmp_path, config=gk.GEKOConfig(**PLAIN), model=model, num_train_epochs=3)
    frozen(trainer, slice(0, 24))
    before, seen = weights(model).clone(), []
    probe = trainer._probe
    trainer._probe = lambda *args: (probe(*args), seen.append(torch.equal(weights(model), before)))
    trainer.train()
    assert seen[0]
    assert trainer.state.global_step > 0  # and what they found was trained


def test_learning_rate_decays_fully_however_short_the_epochs(tmp_path):
    for options in ({"num_train_epochs": 4}, {"max_steps": 20}):
        trainer = trainer_of(tmp_path, config=gk.GEKOConfig(**PLAIN, probes=False), warmup_steps=1, **options)
        frozen(trainer, slice(0, 16))
        trainer.train()
        steps = {"num_train_epochs": 8, "max_steps": 20}[next(iter(options))]
        assert trainer.state.global_step == steps
        rates = curve(trainer, "learning_rate")
        assert rates[-1] < rates[1] / 6
        assert trainer.lr_scheduler.get_last_lr() == [0.0, 0.0]


def test_the_first_step_has_a_rate(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=2)
    trainer.train()
    assert curve(trainer, "learning_rate")[0] == 1e-2


def test_weights_move_along_the_curriculum_within_an_epoch(tmp_path):
    trainer = trainer_of(tmp_path, config=gk.GEKOConfig.seed(), num_train_epochs=1)
    trainer.args.per_device_train_batch_size = 1
    trainer._train_batch_size = 1
    trainer.train()
    phases = list(zip(*(curve(trainer, f"geko_phase_{name}") for name in ("hard", "focus", "light")), strict=True))
    assert set(phases) == {(1, 2, 3), (2, 3, 1), (5, 2, 0)}


def test_nothing_left_to_teach_ends_the_run_in_order(tmp_path):
    trainer = trainer_of(tmp_path, config=gk.GEKOConfig(**PLAIN, probes=False), save_strategy="steps", save_steps=100)
    frozen(trainer, slice(0, 24))
    trainer.train()
    assert trainer.state.global_step == 0
    assert [epoch["samples"] for epoch in trainer.get_efficiency_report()["epochs"]] == [0, 0, 0]
    assert trainer.get_efficiency_report()["saved_compute"] == 1.0
    assert (tmp_path / "checkpoint-0" / "geko_state.safetensors").exists()


def test_max_steps_with_nothing_left_goes_on_uniformly(tmp_path):
    trainer = trainer_of(tmp_path, config=gk.GEKOConfig(**PLAIN, probes=False), max_steps=9, learning_rate=0.0)
    frozen(trainer, slice(0, 24))
    trainer.train()
    assert trainer.state.global_step == 9
    assert trainer.get_efficiency_report()["samples_standard"] == 36


def test_save_steps_counts_optimizer_steps(tmp_path):
    """gekolib counts micro-batches."""
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 2}
    trainer_of(tmp_path, **options).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_evaluation_leaves_the_state_alone(tmp_path):
    trainer = trainer_of(tmp_path, eval_dataset=sentences(8), num_train_epochs=1)
    trainer.train()
    before = {name: column.clone() for name, column in trainer.sample_state.state_dict().items()}
    loss = trainer.evaluate()["eval_loss"]
    reference = standard(trainer.model, trainer.args, None, eval_dataset=sentences(8))
    assert loss == pytest.approx(reference.evaluate()["eval_loss"], rel=1e-5)
    for name, column in trainer.sample_state.state_dict().items():
        assert torch.equal(column, before[name])


# Figures


def test_report_and_logs(tmp_path):
    trainer = trainer_of(tmp_path, sentences(24, ragged=True), num_train_epochs=30, logging_steps=5)
    trainer.train()
    written = json.loads((tmp_path / "geko_report.json").read_text())
    report = trainer.get_efficiency_report()
    assert written["efficiency"] == json.loads(json.dumps(report)) | {"seconds": written["efficiency"]["seconds"]}
    assert {"version", "num_samples", "config", "efficiency", "log_history", "most_forgotten"} <= written.keys()
    assert {"num_quarantined", "quarantined"} <= written.keys()
    assert report["samples_standard"] == 24 * 30
    assert 0 < report["samples_backward"] <= report["samples_forward"] < 24 * 30
    assert report["samples_backward"] == sum(epoch["samples"] for epoch in report["epochs"])
    work = report["samples_forward"] + 2 * report["samples_backward"]
    assert report["saved_compute"] == pytest.approx(1 - work / (3 * 24 * 30))
    assert (
        report["tokens_backward"] < report["tokens_forward"] or report["samples_forward"] == report["samples_backward"]
    )
    parts = ("steps", "probes", "selection", "evaluation", "checkpoints")
    assert report["seconds"]["total"] >= sum(report["seconds"][part] for part in parts) > 0
    assert all(sum(epoch["buckets"].values()) == 24 for epoch in report["epochs"])
    assert report["epochs"][-1]["accuracy"] > report["epochs"][0]["accuracy"]
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    shares = [entry[f"geko_{name}"] for name in ("freeze", "light", "focus", "hard")]
    assert sum(shares) == pytest.approx(1) and all(isinstance(share, float) for share in shares)
    assert [item["id"] for item in written["most_forgotten"]] == list(
        dict.fromkeys(item["id"] for item in written["most_forgotten"])
    )


def test_the_bar_shows_the_buckets(tmp_path, capsys):
    trainer_of(tmp_path, disable_tqdm=False, num_train_epochs=1).train()
    assert "focus 100%" in capsys.readouterr().err


# Errors


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from sentences(4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance"),
        ({"data": Stream(), "max_steps": 3}, "with a length"),
    ],
)
def test_what_does_not_combine_is_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **options)


def test_wrong_use_is_named(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func"):
        gk.GEKOTrainer(tiny_llama(), arguments(tmp_path), train_dataset=[], compute_loss_func=lambda *_: 0)
    with pytest.raises(TypeError, match="config must be a GEKOConfig, got dict"):
        trainer_of(tmp_path, config={"selection": True})
    regression = [{"input_ids": [1, 2, 3], "labels": 0.5}] * 4
    with pytest.raises(ValueError, match="labels must be integers"):
        trainer_of(tmp_path, regression, model=tiny_classifier(1), data_collator=default_data_collator).train()
    trainer = trainer_of(tmp_path)
    trainer.train_dataset = sentences(5)
    with pytest.raises(ValueError, match="another dataset needs a new GEKOTrainer"):
        trainer.train()
    with pytest.raises(IndexError, match="labels: 99"):
        trainer_of(tmp_path, [{"input_ids": [1, 2, 3], "labels": [1, 99, 3]}] * 4).train()


def test_the_samples_saved_can_be_spent(tmp_path):
    """As many samples as the standard run trains, in more and shorter epochs."""
    config = gk.GEKOConfig(**PLAIN, probes=False, spend_saved=True)
    trainer = trainer_of(tmp_path, config=config, num_train_epochs=2, learning_rate=0.0)
    frozen(trainer, slice(0, 12))
    trainer.train()
    assert trainer.state.global_step == 12
    samples = [epoch["samples"] for epoch in trainer.get_efficiency_report()["epochs"]]
    assert sum(samples) == 48 and samples[0] == 12
