"""`token_weights` and `sample_weights` as columns of GEKOSFTTrainer's data."""

from __future__ import annotations

import pytest
import torch
from test_sft import rows, trainer_of
from test_weight_columns import exact_loss, weighed, without

import geko_kernels as gk

datasets = pytest.importorskip("datasets")
UNIFORM = gk.GEKOConfig.uniform()
FORMS = {
    "padded": {},
    "free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 40},
    "cut": {"max_length": 4},
    "cut and packed": {"packing": True, "max_length": 5},
    "cut at the front": {"max_length": 4, "truncation_mode": "keep_end"},
}


def first_loss(folder, data, **fields):
    fields = {"config": UNIFORM, "max_steps": 1, "per_device_train_batch_size": 8, **fields}
    trainer = trainer_of(gk.GEKOSFTTrainer, folder, data, **fields)
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.filterwarnings("ignore:The `'keep_end'`")
@pytest.mark.parametrize("kept", [("token_weights",), ("sample_weights",), ("token_weights", "sample_weights")])
@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_a_step_is_the_weighted_one(tmp_path, kept, form):
    """Of items that are cut as SFT cuts them; all documents fit into the step's rows."""
    items = without(weighed(8), *({"token_weights", "sample_weights"} - {*kept}))
    log = first_loss(tmp_path, datasets.Dataset.from_list(items), **FORMS[form])
    if "cut" in form:
        most = FORMS[form]["max_length"]
        part = slice(-most, None) if "front" in form else slice(most)
        items = [{k: v[part] if isinstance(v, list) else v for k, v in item.items()} for item in items]
    assert log["loss"] == pytest.approx(exact_loss(items), rel=1e-5)


@pytest.mark.parametrize("form", ["padded", "free", "packed"])
def test_weights_of_text(tmp_path, form):
    """With packing they are not lost; the divisor does not see them."""
    data = rows("prompt", 8)
    twos = data.add_column("sample_weights", [2.0] * 8)
    logs = [first_loss(tmp_path / str(i), some, **FORMS[form]) for i, some in enumerate((data, twos))]
    assert logs[1]["loss"] == pytest.approx(2 * logs[0]["loss"], rel=1e-5)
    for key in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert logs[1][key] == pytest.approx(logs[0][key], rel=1e-6)


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("fused", [True, False])
def test_tokens_of_weight_zero_are_not_in_the_metrics(tmp_path, monkeypatch, form, fused):
    if not fused:
        monkeypatch.setattr("geko_kernels.training.model_loss.found_loss.find_head", no_head)
    items = without(weighed(8), "token_weights", "sample_weights")
    masked = [{**item, "labels": [-100, -100, *item["labels"][2:]]} for item in items]
    zeros = [{**item, "token_weights": [0.0, 0.0] + [1.0] * (len(item["labels"]) - 2)} for item in items]
    logs = [
        first_loss(tmp_path / str(i), datasets.Dataset.from_list(some), **FORMS[form])
        for i, some in enumerate((masked, zeros))
    ]
    for key in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
        assert logs[1][key] == pytest.approx(logs[0][key], rel=1e-5), key


def no_head(*_):
    raise ValueError("no head")


def test_a_token_weight_too_few_is_named(tmp_path):
    items = weighed(8)
    items[3]["token_weights"].pop()
    many = len(items[3]["input_ids"])
    with pytest.raises(ValueError, match=rf"as long as input_ids: sample 3 has {many - 1} of them and {many} tokens"):
        first_loss(tmp_path, datasets.Dataset.from_list(items))


def test_rows_that_are_shuffled_or_dropped_keep_their_weights(tmp_path):
    items = weighed(12)
    for item in items[::3]:
        item["labels"] = [-100] * 4 + item["labels"][4:]
    fields = {"max_length": 4, "shuffle_dataset": True}
    trainer = trainer_of(gk.GEKOSFTTrainer, tmp_path, datasets.Dataset.from_list(items), **fields)
    for i in trainer._present.tolist():
        assert trainer.train_dataset[i]["token_weights"] == pytest.approx(items[i]["token_weights"][:4])
        assert trainer.train_dataset[i]["sample_weights"] == items[i]["sample_weights"]
    assert torch.equal(trainer._present, torch.tensor([i for i in range(12) if i % 3]).int())


def test_weights_of_documents_that_are_cut_into_packs_are_refused(tmp_path):
    fields = {"packing": True, "max_length": 8, "packing_strategy": "wrapped", "config": UNIFORM}
    data = rows("text").add_column("sample_weights", [1.0] * 12)
    with pytest.raises(
        ValueError, match=r"'wrapped' makes rows of parts .* has \['sample_weights'\] of whole documents"
    ):
        trainer_of(gk.GEKOSFTTrainer, tmp_path, data, **fields)
