"""Data of `load_dataset` in a run: what the command says of them, and that ids are rows of the user's data."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from command import WORDS, refusal, train, write_jsonl
from tiny_model import save_tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
)

import geko_kernels as gk
from geko_kernels.training.report.figures import read_figures
from geko_kernels.training.report.summary import row_of

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chats(tmp_path):
    """Eight of them; rows 1 and 4 have no turn of the assistant."""
    rows = [[{"role": "user", "content": f"what is {word}"}, {"role": "assistant", "content": word}] for word in WORDS]
    said = [turns[:1] if i in (1, 4) else turns for i, turns in enumerate(rows)]
    return write_jsonl(tmp_path / "chats.jsonl", [{"messages": turns} for turns in said])


@pytest.mark.parametrize(
    "skipped, rows", [((), [0, 1, 2]), ((0, 1), [2, 3, 4]), ((1, 4), [0, 2, 3, 5]), ((2,), [0, 1, 3]), ((9,), [0, 1])]
)
def test_rows_of_samples(skipped, rows):
    assert [row_of(sample, skipped) for sample in range(len(rows))] == rows


def test_command_trains_chats_and_tells(model, chats, tmp_path, capsys):
    assert train(model, chats, tmp_path / "run", "--eval-data", chats) == 0
    told = capsys.readouterr().out
    assert f"{chats}: 8 samples with messages\n" in told
    assert "2 of 8 records have no token to train within the 256 tokens that the model can read and are skipped" in told
    assert "skipped: row 1 (line 2), 4 (line 5); rows are counted from 0" in told
    assert json.loads((tmp_path / "run" / "geko_report.json").read_text())["num_samples"] == 6


def test_command_takes_tables_and_a_label_column(model, tmp_path, capsys):
    table = tmp_path / "moods.csv"
    table.write_text("mood,text\n" + "".join(f"{i % 2 == 0},{word}\n" for i, word in enumerate(WORDS)))
    assert train(model, table, tmp_path / "run", "--label-column", "mood", "--epochs", "1") == 0
    assert "the labels are true and false, numbered false = 0, true = 1" in capsys.readouterr().out
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert saved.config.id2label == {0: "false", 1: "true"}
    assert "the first record has no `mod`" in refusal(
        capsys, tmp_path, "--label-column", "mod", data=table, output=tmp_path / "new"
    )


def test_command_seeks_no_local_path_on_the_hub(tmp_path, capsys):
    told = refusal(capsys, tmp_path, data="./org/none")
    assert told.startswith("cannot load ./org/none: there is no such file or folder; a dataset on the hub is written")
    assert "as HF_HUB_OFFLINE is set, only the hub's cache" in refusal(capsys, tmp_path, data="org/none")


class _Quarantine(TrainerCallback):
    """Holds back the second and the last sample."""

    def on_step_end(self, args, state, control, **named):
        self.trainer.sample_state.quarantined[1] = self.trainer.sample_state.quarantined[5] = True


def test_ids_of_the_report_are_rows_of_the_data(model, chats, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    callback = _Quarantine()
    trainer = gk.GEKOTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        gk.GEKOTrainingArguments(str(tmp_path / "run"), num_train_epochs=1, save_strategy="epoch", report_to="none"),
        train_dataset=gk.load_dataset(chats, tokenizer),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    callback.trainer = trainer
    trainer.train()
    report = tmp_path / "run" / "geko_report.json"
    assert sorted(json.loads(report.read_text())["quarantined"]) == [2, 7]
    report.unlink()
    figures, checkpoint = read_figures(tmp_path / "run")
    assert sorted(figures["quarantined"]) == [2, 7] and checkpoint == "checkpoint-1"


def test_ids_that_are_observed_are_rows_of_the_data(model, chats, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = gk.load_dataset(chats, tokenizer)
    assert data.skipped_rows == [1, 4]
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(model),
        gk.GEKOTrainingArguments(str(tmp_path / "run"), num_train_epochs=1, report_to="none"),
        train_dataset=data,
        data_collator=gk.training.data.CausalCollator(tokenizer.pad_token_id),
    )
    observation = gk.observe(trainer)
    trainer.train()
    observation.write_samples(tmp_path / "samples.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [0, 2, 3, 5, 6, 7] and all(row["losses"][0] > 0 for row in rows)
