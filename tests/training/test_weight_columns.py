"""`token_weights` and `sample_weights` as columns of the training data."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn import functional as F
from training import MapDataset, classified, curve, sentences, tiny_classifier, tiny_llama, trainer_of, weights
from transformers import DataCollatorWithFlattening, default_data_collator

import geko_kernels as gk
from geko_kernels.training.data import Identified

Dataset = pytest.importorskip("datasets").Dataset

UNIFORM = gk.GEKOConfig.uniform()


def weighed(count: int = 12, ragged: bool = True, **columns) -> list[dict]:
    """Sentences with random weights of both kinds, or with those given by `columns`."""
    random = torch.Generator().manual_seed(3)
    items = sentences(count, ragged=ragged)
    for i, item in enumerate(items):
        u = torch.rand(len(item["labels"]), generator=random)
        u[0] = 0
        item["token_weights"] = u.tolist()
        item["sample_weights"] = 0.25 * (i % 4)
    return [{**item, **{name: make(item) for name, make in columns.items()}} for item in items]


def without(items: list[dict], *names: str) -> list[dict]:
    return [{key: value for key, value in item.items() if key not in names} for item in items]


def exact_loss(items: list[dict]) -> float:
    """Of the untrained model over all items but those of weight 0: `sum(v u l) / sum(u)`, by PyTorch, item by item."""
    model, total, divisor = tiny_llama(), 0.0, 0.0
    for item in (item for item in items if item.get("sample_weights", 1.0) > 0):
        tokens = torch.tensor(item["input_ids"])
        u = torch.tensor(item.get("token_weights", [1.0] * len(tokens)))[1:]
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, :-1]
        token = F.cross_entropy(logits, torch.tensor(item["labels"])[1:], reduction="none")
        total += item.get("sample_weights", 1.0) * float((u * token).sum())
        divisor += float(u.sum())
    return total / divisor


@pytest.mark.parametrize("kept", [("token_weights",), ("sample_weights",), ("token_weights", "sample_weights")])
@pytest.mark.parametrize("form", ["list", "dataset", "every column"])
def test_the_loss_of_a_step_is_the_weighted_one(tmp_path, kept, form):
    items = without(weighed(8), *({"token_weights", "sample_weights"} - {*kept}))
    data = Dataset.from_list(items) if form == "dataset" else items
    fields = {"remove_unused_columns": form != "every column", "per_device_train_batch_size": 4}
    trainer = trainer_of(tmp_path, data, UNIFORM, max_steps=1, gradient_accumulation_steps=2, **fields)
    trainer.train()
    assert curve(trainer)[0] == pytest.approx(exact_loss(items), rel=1e-5)


def test_weights_of_one_change_nothing(tmp_path):
    items = sentences(24, ragged=True)
    ones = [{**item, "token_weights": [1.0] * len(item["labels"]), "sample_weights": 1} for item in items]
    runs = []
    for name, data in (("plain", items), ("ones", ones)):
        trainer = trainer_of(tmp_path / name, data, num_train_epochs=6)
        trainer.train()
        runs.append((curve(trainer), weights(trainer.model), trainer.sample_state.state_dict()))
    assert runs[0][0] == runs[1][0] and runs[0][1].equal(runs[1][1])
    assert all(column.equal(runs[1][2][name]) for name, column in runs[0][2].items())


def test_a_token_weight_of_zero_is_a_label_that_does_not_count(tmp_path):
    items = sentences(24, ragged=True)
    masked = [{**item, "labels": [-100, -100, *item["labels"][2:]]} for item in items]
    zeros = [{**item, "token_weights": [0.0, 0.0] + [1.0] * (len(item["labels"]) - 2)} for item in items]
    curves = []
    for name, data in (("masked", masked), ("zeros", zeros)):
        trainer = trainer_of(tmp_path / name, data, num_train_epochs=4)
        trainer.train()
        curves.append(curve(trainer))
    assert curves[0] == curves[1]


class OwnWeights(torch.nn.Module):
    """Takes a column of that name itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.seen = torch.nn.Linear(6, 4), None

    def forward(self, input_ids, labels=None, sample_weights=None):
        self.seen = sample_weights
        logits = self.head(input_ids / 20)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_what_the_model_takes_itself_is_its_own(tmp_path):
    items = [{**item, "sample_weights": float(i)} for i, item in enumerate(classified(4))]
    curves, seen = [], []
    for name, data in (("own", items), ("plain", without(items, "sample_weights"))):
        model, fields = OwnWeights(), {"max_steps": 1, "data_collator": default_data_collator}
        trainer = trainer_of(tmp_path / name, data, UNIFORM, model, **fields)
        trainer.train()
        curves.append(curve(trainer))
        seen.append(model.seen)
    assert curves[0] == curves[1] and sorted(seen[0].tolist()) == [0, 1, 2, 3] and seen[1] is None


@pytest.mark.parametrize("as_datasets", [False, True])
def test_a_sample_of_weight_zero_is_never_drawn(tmp_path, as_datasets):
    items = [{**item, "sample_weights": float(i % 2)} for i, item in enumerate(sentences(8))]
    data = items
    if as_datasets:
        data = pytest.importorskip("datasets").Dataset.from_list(items)
    trainer = trainer_of(tmp_path, data, UNIFORM, num_train_epochs=2)
    trainer.train()
    assert trainer.sample_state.times_seen.tolist() == [0, 2] * 4
    report = trainer.get_efficiency_report()
    assert report["samples_idle"] == 0 and report["samples_backward"] == 8 and trainer.state.global_step == 2
    alone = trainer_of(tmp_path, [item for item in items if item["sample_weights"]], UNIFORM, num_train_epochs=2)
    alone.train()
    assert curve(alone) == pytest.approx(curve(trainer), rel=1e-6)


def test_a_sample_of_weight_zero_of_another_dataset_is_trained_with_weight_zero(tmp_path):
    """Its items may open files, so none is read beforehand."""
    items = [{**item, "sample_weights": float(i % 2)} for i, item in enumerate(sentences(8))]
    trainer = trainer_of(tmp_path, MapDataset(items), UNIFORM, num_train_epochs=1)
    trainer.train()
    assert trainer.sample_state.times_seen.tolist() == [1] * 8
    assert trainer.get_efficiency_report()["samples_idle"] == 4


def test_without_any_weight_there_is_nothing_to_train(tmp_path):
    items = [{**item, "sample_weights": 0} for item in sentences(8)]
    with pytest.raises(ValueError, match="sample_weights must be above 0 in an item of train_dataset, got 0 in all"):
        trainer_of(tmp_path, items, UNIFORM).train()


def test_one_label_a_row_takes_sample_weights_alone(tmp_path):
    items = [{**item, "sample_weights": 0.5 + i % 2} for i, item in enumerate(classified(8))]
    trainer = trainer_of(
        tmp_path, items, UNIFORM, tiny_classifier(), max_steps=1, per_device_train_batch_size=8, data_collator=stack
    )
    trainer.train()
    model = tiny_classifier()
    batch = stack(without(items, "sample_weights"))
    with torch.no_grad():
        token = F.cross_entropy(model(batch["input_ids"]).logits, batch["labels"], reduction="none")
    v = torch.tensor([item["sample_weights"] for item in items])
    assert curve(trainer)[0] == pytest.approx(float((v * token).mean()), rel=1e-5)
    bad = [{**item, "token_weights": [1.0]} for item in classified(8)]
    with pytest.raises(ValueError, match="token_weights need one label a token, .* give sample_weights"):
        trainer_of(tmp_path, bad, UNIFORM, tiny_classifier(), data_collator=stack).train()


def stack(items):
    assert all(not {"token_weights", "sample_weights"} & {*item} for item in items), "they leave the items before"
    return {name: torch.tensor([item[name] for item in items]) for name in items[0]}


def test_the_divisor_is_the_sum_over_all_processes(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, weighed(8), UNIFORM)
    trainer._loss_shifts_labels = True
    u = torch.tensor([[9.0, 1, 2, 4], [9, 8, 16, 32]])
    labels = torch.tensor([[1, 1, -100, 1], [1, -100, 1, 1]])
    batches = [{"labels": labels, "token_weights": u}, {"labels": labels[:1], "token_weights": u[:1] / 2}]
    assert trainer._sum_of_weights(batches, torch.device("cpu")) == 1 + 4 + 16 + 32 + 2.5
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    monkeypatch.setattr(trainer.accelerator, "gather", lambda total: torch.stack([total, total + 1]))
    assert trainer._sum_of_weights(batches, torch.device("cpu")) == 2 * 55.5 + 1


def left(items):
    longest = max(len(item["input_ids"]) for item in items)
    pad = {"input_ids": 0, "labels": -100}
    return {
        name: torch.tensor([[fill] * (longest - len(item[name])) + item[name] for item in items])
        for name, fill in pad.items()
        if name in items[0]
    }


def collate(collator, items, **options):
    made = gk.IdCollator(collator, weights=("token_weights", "sample_weights"), **options)
    return made([Identified(i, item) for i, item in enumerate(items)])


def test_weights_are_padded_as_the_labels_are():
    items = [
        {"input_ids": [5, 6], "labels": [5, 6], "token_weights": [0.5, 2], "sample_weights": 3},
        {"input_ids": [7, 8, 9], "labels": [-100, 8, 9], "token_weights": [1, 0, 4], "sample_weights": 0},
    ]
    batch = collate(left, items)
    assert batch["token_weights"].tolist() == [[0, 0.5, 2], [1, 0, 4]] and batch["sample_weights"].tolist() == [3, 0]
    joined = collate(DataCollatorWithFlattening(), items)
    assert joined["token_weights"].tolist() == [[0.5, 2, 1, 0, 4]]
    assert joined["sample_weights"].tolist() == [[3, 3, 0, 0, 0]]
    made = collate(lambda some: {**left(some), "labels": left(some)["input_ids"]}, without(items, "labels"))
    assert made["token_weights"].equal(batch["token_weights"])  # labels that the collator makes of input_ids

    def packs(some, sample_ids):
        return {**left(some), "sample_ids": torch.tensor([[-1, 0, 0], [1, 1, 1]])}

    packed = collate(packs, without(items, "token_weights"))
    assert packed["sample_weights"].tolist() == [[0, 3, 3], [0, 0, 0]]
    with pytest.raises(ValueError, match="the data collator packs rows in its own way: give sample_weights"):
        collate(packs, items)


@pytest.mark.parametrize("length", [1, 3])
def test_a_pack_of_one_sample(length):
    """The collator for packs sets its first label to -100, so the labels are not the item's own."""
    item = {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "token_weights": [0.5, 2, 4], "sample_weights": 3}
    item = {name: value if isinstance(value, int) else value[:length] for name, value in item.items()}
    batch = collate(DataCollatorWithFlattening(), [item])
    assert batch["token_weights"].tolist() == [[0.5, 2, 4][:length]] and batch["labels"][0, 0] == -100


def test_masked_labels_do_not_hide_on_which_side_the_padding_is():
    def masks(some):
        batch = left(some)
        return {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == 5, -100)}

    items = [{"input_ids": [i, 6], "labels": [i, 6], "token_weights": [0.5, 2]} for i in (5, 4)]
    items += [{"input_ids": [7, 8, 9], "labels": [7, 8, 9], "token_weights": [1, 3, 4]}]
    assert collate(masks, items)["token_weights"].tolist() == [[0, 0.5, 2], [0, 0.5, 2], [1, 3, 4]]
    with pytest.raises(ValueError, match="so it is unknown which token a weight of token_weights belongs to"):
        collate(lambda some: {**left(some), "labels": left(some)["labels"].roll(-1, 1)}, items)


def test_weights_are_in_float32_whatever_the_default_dtype():
    item = {"input_ids": [5, 6], "labels": [5, 6], "token_weights": [0.1, 257], "sample_weights": 257.3}
    torch.set_default_dtype(torch.bfloat16)
    try:
        batch, joined = collate(left, [item] * 2), collate(DataCollatorWithFlattening(), [item] * 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert batch["token_weights"].equal(torch.tensor([[0.1, 257]] * 2))
    assert batch["sample_weights"].equal(torch.tensor([257.3] * 2))
    assert joined["token_weights"].equal(torch.tensor([[0.1, 257, 0.1, 257]]))
    assert joined["sample_weights"].equal(torch.tensor([[257.3] * 4]))


def test_a_collator_for_other_loops_leaves_the_columns_alone():
    seen = []
    items = [{"input_ids": [5, 6], "labels": [5, 6], "token_weights": [0.5, 2]}]
    gk.IdCollator(lambda some: seen.extend(some) or left(some))([Identified(0, items[0])])
    assert seen == items


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"token_weights": [1.0]},
            "token_weights must be as long as labels: sample 1 has 1 of them and labels of shape",
        ),
        ({"token_weights": [1.0, -1.0]}, "token_weights must be finite numbers of 0 or more, sample 1 has -1.0 at 1"),
        ({"token_weights": [[1.0, 1.0]]}, "token_weights must be a list of numbers an item, sample 1 has shape (1, 2)"),
        ({"sample_weights": float("nan")}, "sample_weights must be finite numbers of 0 or more, sample 1 has nan"),
        ({"sample_weights": [1.0, 2.0]}, "sample_weights must be one number an item, sample 1 has [1.0, 2.0]"),
        (
            {"sample_weights": None},
            "sample_weights must be in every item of train_dataset or in none: sample 0 has it",
        ),
    ],
)
def test_what_is_refused(change, message):
    item = {"input_ids": [5, 6], "labels": [5, 6], "token_weights": [1.0, 1.0], "sample_weights": 1.0}
    with pytest.raises(ValueError, match=re.escape(message)):
        collate(left, [item, {**item, **change}])


def test_a_collator_that_cuts_or_shifts_is_refused(tmp_path):
    items = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "token_weights": [1.0, 2, 3]}] * 2
    with pytest.raises(ValueError, match="so it is unknown which token a weight of token_weights belongs to"):
        collate(lambda some: {name: values[:, :2] for name, values in left(some).items()}, items)
    shifts = lambda some: {**left(some), "shift_labels": left(some)["labels"]}  # noqa: E731
    with pytest.raises(ValueError, match="do not combine with a collator's shift_labels"):
        trainer_of(tmp_path, weighed(8), data_collator=shifts).train()


def test_weights_that_only_some_batches_have_are_refused(tmp_path):
    data = sentences(4) + weighed(4, ragged=False)
    said = r"those of one batch have \['token_weights', 'sample_weights'\], those of the first have \[\]"
    with pytest.raises(ValueError, match=said):
        trainer_of(tmp_path, data, UNIFORM, train_sampling_strategy="sequential").train()
