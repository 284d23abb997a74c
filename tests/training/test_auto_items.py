"""What is read of items: question and answer, groups, and the same item with another's answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from auto_run import auto_trainer, few_samples, noisy, report_of
from training import arguments, tiny_llama, trainer_of, weights

import geko_kernels as gk
from geko_kernels.training.stopping import looked_at as module
from geko_kernels.training.stopping.items import ExcerptOf, WithoutGroups, parts_of, read, with_answer
from geko_kernels.training.stopping.looked_at import looked_at, sentinels
from geko_kernels.training.stopping.sentinels import joined

ROW = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}


@pytest.fixture(autouse=True)
def one_thread(reference):
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("item", "parts"),
    [
        (ROW, ("row", [5, 6], [7, 8])),
        ({name: torch.tensor(values) for name, values in ROW.items()}, ("row", [5, 6], [7, 8])),
        ({name: np.array(values) for name, values in ROW.items()}, ("row", [5, 6], [7, 8])),
        ({**ROW, "attention_mask": [0, 1, 1, 1]}, ("row", [6], [7, 8])),
        ({"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}, ("row", [5, 6], [7])),
        ({"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}, ("row", [], [5, 6])),
        ({"input_ids": [5, 6], "label": 3}, ("label", [5, 6], [3])),
        ({"input_ids": [5, 6], "label": "cat"}, ("label", [5, 6], ["cat"])),
        ({"input_ids": [5, 6], "labels": torch.tensor(3)}, ("label", [5, 6], [3])),
        ({"input_ids": [5, 6], "labels": [8, 9, -100]}, ("label", [5, 6], [8, 9])),
        ({"input_ids": [5, 6], "labels": [1, -100]}, ("aligned", [5, 6], [1, -100])),
        ({"pixel_values": torch.zeros(3, 2, 2), "labels": 1}, None),
        ({"input_ids": [[5, 6], [7, 8]], "labels": 1}, None),
        ((torch.zeros(2), 1), None),
    ],
)
def test_question_and_answer_of_an_item(item, parts):
    assert parts_of(item) == parts
    assert ExcerptOf(())(item).kind == ("" if parts is None else parts[0])


def test_labels_of_another_name():
    assert parts_of({"input_ids": [5, 6], "target": 2}, ("target",)) == ("label", [5, 6], [2])


def test_the_answer_of_another_row():
    other = {"input_ids": [1, 2, 3, 4, 9], "labels": [-100, 2, 3, 4, 9]}
    assert with_answer(ROW, other) == {"input_ids": [5, 6, 2, 3, 4], "labels": [-100, -100, 2, 3, 4]}
    assert with_answer(other, ROW) == {"input_ids": [1, 7, 8], "labels": [-100, 7, 8]}
    masked = with_answer({**ROW, "attention_mask": [1] * 4, "length": 4, "source": "a"}, other)
    assert masked["attention_mask"] == [1] * 5 and masked["source"] == "a" and "length" not in masked
    tensors = [{name: torch.tensor(values) for name, values in item.items()} for item in (ROW, other)]
    assert with_answer(*tensors)["labels"].equal(torch.tensor([-100, -100, 2, 3, 4]))
    trl = [{"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}, {"input_ids": [1, 2], "completion_mask": [0, 1]}]
    assert with_answer(*trl) == {"input_ids": [5, 6, 2], "completion_mask": [0, 0, 1]}


def test_the_label_of_another_item():
    assert with_answer({"input_ids": [5], "label": 3}, {"input_ids": [6], "label": 4}) == {"input_ids": [5], "label": 4}
    pair = {"input_ids": [5, 6], "labels": [1], "decoder_input_ids": [0]}, {"input_ids": [7], "labels": [2, 3]}
    assert with_answer(pair[0], {**pair[1], "decoder_input_ids": [0, 2]}) == {
        "input_ids": [5, 6],
        "labels": [2, 3],
        "decoder_input_ids": [0, 2],
    }


def test_where_no_swap_can_be_made():
    other = {"input_ids": [1, 2], "labels": [-100, 2]}
    assert with_answer({"input_ids": [5, 6]}, {"input_ids": [7, 8]}) is None  # no question
    assert with_answer({**ROW, "position_ids": [0, 1, 2, 3]}, other) is None
    assert with_answer({"input_ids": [5, 6], "labels": [1, 0]}, {"input_ids": [5, 7], "labels": [0, 1]}) is None
    assert with_answer(ROW, {"input_ids": [5], "labels": 1}) is None


def test_groups_are_joined_however_large():
    assert len(set(joined([[i] for i in range(100)], ["a"] * 60 + [None] * 40))) == 41


def test_groups_are_held_back_whole_and_leave_the_items(tmp_path):
    """The collator would stack a column of numbers, and the model refuse it."""
    data = [{**item, "groups": i // 4} for i, item in enumerate(noisy(400))]
    with few_samples():
        trainer = auto_trainer(tmp_path, data, num_train_epochs=0.5, remove_unused_columns=False)
        trainer.train()
    held = report_of(trainer)["stopping"]["held_back"]
    assert len(held) == 40 and all(4 * (i // 4) + k in held for i in held for k in range(4))
    assert data[0]["groups"] == 0


def test_sentinels_are_the_same_whatever_reads_them(tmp_path):
    data = noisy(400)
    with few_samples():
        ids = [sentinels(data, 3, arguments(tmp_path, dataloader_num_workers=workers)) for workers in (0, 2)]
        other = sentinels(data, 4, arguments(tmp_path))
        images = [{"pixel_values": torch.zeros(1), "labels": 0}] * 400
        blind = sentinels(images, 3, arguments(tmp_path))
    assert ids[0].equal(ids[1]) and len(ids[0]) == 40 and not ids[0].equal(other) and len(blind) == 40
    assert len(sentinels(data, 3, arguments(tmp_path))) == 0  # fewer than 2,000
    assert list(read(data, [2, 1], arguments(tmp_path))) == [data[2], data[1]]


def test_pairs_have_other_questions_and_other_answers(tmp_path):
    data = noisy(400)
    trainer = trainer_of(tmp_path, data)
    trainer.label_names = []
    held = torch.arange(0, 400, 8)
    collate = WithoutGroups(trainer.data_collator)
    at = looked_at(trainer, held, collate)
    assert len(at.seen) == 50 and not set(at.seen.tolist()) & set(held.tolist())
    for ids, swapped in ((at.held, at.swapped[0]), (at.seen, at.swapped[1])):
        assert 20 <= len(swapped.items) < 50
        for item, place in zip(swapped.items, swapped.places.tolist(), strict=True):
            own = data[ids[place]]
            assert item["input_ids"][:4] == own["input_ids"][:4] and item["input_ids"][4] != own["input_ids"][4]


def test_a_collator_that_does_not_take_made_up_items_arms_the_rule(tmp_path):
    def collate(items):
        if any(item not in data for item in items):
            raise KeyError("only what is in the data")
        return {name: torch.tensor([item[name] for item in items]) for name in ("input_ids", "labels")}

    data = noisy(400)
    with few_samples():
        trainer = auto_trainer(tmp_path, data, num_train_epochs=0.5, data_collator=collate)
        trainer.train()
    report = report_of(trainer)["stopping"]
    assert not report["swap_test"] and report["kept"] is not None and module.FEWEST == 2000


def test_of_adapters_the_adapters_alone_are_averaged(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    fields = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 20}
    with few_samples():
        trainer = auto_trainer(tmp_path, model=model, config=gk.GEKOConfig.auto(), **fields)
        trainer.train()
        names = trainer._stopping and sorted(path.name for path in (tmp_path / "checkpoint-20").glob("geko_*"))
        torch.manual_seed(0)
        again = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        resumed = auto_trainer(tmp_path, model=again, config=gk.GEKOConfig.auto(), **fields)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert "geko_raw.safetensors" in names and "geko_kept.safetensors" in names
    assert (tmp_path / "checkpoint-20" / "geko_raw.safetensors").stat().st_size < 10_000
    assert all(p.equal(before[name]) for name, p in model.named_parameters() if name in before)
    assert weights(again).equal(weights(model))


def test_a_group_is_one_value(tmp_path):
    args = arguments(tmp_path)
    with few_samples(), pytest.raises(TypeError, match=r"groups must be one value an item .*, sample 7 has \['x', 7\]"):
        sentinels([{**item, "groups": ["x", 7] if i == 7 else i} for i, item in enumerate(noisy(100))], 0, args)
    with few_samples(), pytest.raises(TypeError, match=r"sample 0 has \[0, 1\]"):
        sentinels([{**item, "groups": torch.tensor([0, 1])} for item in noisy(100)], 0, args)


def test_where_only_a_handful_fits_none_is_held_back(tmp_path):
    """40 should be: four groups of 100 are too large, and 19 samples without one too few to decide."""
    data = [{"pixel_values": torch.zeros(1), "labels": 0, "groups": i // 100 if i < 400 else None} for i in range(420)]
    with few_samples():
        assert len(sentinels(data[:419], 0, arguments(tmp_path))) == 0
        assert sentinels(data, 0, arguments(tmp_path)).tolist() == list(range(400, 420))
