"""What `train` makes of JSON lines, of labels and of long texts, and what it says to wrong ones."""

import json
import os

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from command import WORDS, refusal, train, write_jsonl
from tiny_model import save_tiny_model
from transformers import AutoModelForSequenceClassification

from geko_kernels.training.formats import DataError, Records, find_classes, read_records

NO_CLASSES: dict[int, str] = {}


def labelled(*labels):
    rows = [{"text": "a", "label": label} for label in labels]
    return Records("data", ("text", "label"), rows, [f"line {i + 1}" for i in range(len(rows))])


class TestLines:
    @pytest.mark.parametrize(
        "content, rows",
        [
            ('{"text": "a\u2028b"}\n{"text": "c\u2029\x85d"}\n', ["a\u2028b", "c\u2029\x85d"]),
            ('\ufeff{"text": "a"}\r\n\r\n{"text": "b"}', ["a", "b"]),
            ('{"text": "a\\u2028\\u0000b"}\n\n \t\n', ["a\u2028\0b"]),
            ('{"text": "\\ud83d\\ude00"}', ["\U0001f600"]),
        ],
    )
    def test_only_a_line_feed_ends_a_line(self, tmp_path, content, rows):
        path = tmp_path / "data.jsonl"
        path.write_bytes(content.encode())
        assert [row["text"] for row in read_records(str(path)).rows] == rows

    @pytest.mark.parametrize(
        "content, message",
        [
            ('{"text": "a\u2028b\x85"}\n\n{"text": 1}', "line 3: `text` must be text, got 1"),
            ('{"text": "a"}\u2028{"text": "b"}', "line 1 is not JSON (Extra data at column 14)"),
            ('{"text": "a"}\n\u2028\n', "line 2 is not JSON (Expecting value at column 1)"),
            ('{"text": "a"}\n{"text": "a\0"}', "line 2 holds NUL bytes"),
            ('{"text": "a", "text": "b"}', "line 1 is not JSON (the key 'text' is there twice)"),
            ('{"text": ' + "[" * 100_000, "line 1 nests too deeply; write one flat JSON object a line"),
            (
                '{"text": ' + "9" * 5000 + "}",
                "line 1 is not JSON (a number of 5,000 digits; at most 4,300 can be read)",
            ),
            ('{"text": "\\ud800"}', "line 1: `text` has a lone surrogate (\\ud800 to \\udfff)"),
            ('{"text": "a", "label": "\\udfff"}', "line 1: `label` has a lone surrogate"),
            ('{"text": "a", "label": NaN}', "`label` must be a number or a name, and numbers must be whole, got nan"),
            ('{"text": "a", "label": [1]}', "`label` must be a number or a name, got [1]"),
        ],
    )
    def test_wrong_line_is_named(self, tmp_path, content, message):
        path = tmp_path / "data.jsonl"
        path.write_bytes(content.encode())
        with pytest.raises(DataError) as told:
            read_records(str(path))
        assert f"{path}" in str(told.value) and message in str(told.value) and len(str(told.value)) < 400

    def test_bytes_that_are_no_text(self, tmp_path):
        for content, message in (
            (b'{"text": "a"}\n{"text": "\xff"}', "line 2 is not UTF-8 text (byte 10 of it); convert the file first"),
            ('{"text": "a"}'.encode("utf-16"), "line 1 holds NUL bytes: the file is damaged or not UTF-8"),
            (b"\x1f\x8b\x08", "is compressed with gzip; unpack it with gunzip first"),
        ):
            (tmp_path / "data.jsonl").write_bytes(content)
            with pytest.raises(DataError) as told:
                read_records(str(tmp_path / "data.jsonl"))
            assert message in str(told.value)

    def test_no_regular_file(self, tmp_path, capsys):
        (tmp_path / "folder.jsonl").mkdir()
        os.mkfifo(tmp_path / "pipe.jsonl")
        (tmp_path / "null.jsonl").symlink_to("/dev/null")
        (tmp_path / "data.jsonl.gz").write_bytes(b"\x1f\x8b")
        assert "(it is a directory); rename it" in refusal(capsys, tmp_path, data=tmp_path / "folder.jsonl")
        assert "(it is a pipe or a device); give" in refusal(capsys, tmp_path, data=tmp_path / "pipe.jsonl")
        assert "(it is a pipe or a device); give" in refusal(capsys, tmp_path, data=tmp_path / "null.jsonl")
        (tmp_path / "data.jsonl.xz").write_bytes(b"\xfd7zXZ")
        assert "cannot be unpacked with gzip" in refusal(capsys, tmp_path, data=tmp_path / "data.jsonl.gz")
        told = refusal(capsys, tmp_path, data=tmp_path / "data.jsonl.xz")
        assert "does not end in .jsonl, .ndjson, .json, .csv, .tsv, .parquet; give such a file (unpacked" in told
        assert "(embedded null byte)" in refusal(capsys, tmp_path, data="a\0.jsonl")


class TestLabels:
    @pytest.mark.parametrize(
        "labels, names, numbers, note",
        [
            ((1, 0, 2), ["0", "1", "2"], [1, 0, 2], ""),
            (
                (5_000_000, 9, 10),
                ["9", "10", "5000000"],
                [2, 0, 1],
                "taken as names, numbered 9 = 0, 10 = 1, 5000000 = 2",
            ),
            ((1, -1), ["-1", "1"], [1, 0], "not 0, 1, ... without a gap"),
            ((True, False), ["false", "true"], [1, 0], "the labels are true and false, numbered false = 0, true = 1"),
            (("b", "a", "1"), ["1", "a", "b"], [2, 1, 0], "the labels are names, numbered 1 = 0, a = 1, b = 2"),
        ],
    )
    def test_numbers_without_a_gap_stay_and_others_are_names(self, labels, names, numbers, note):
        classes = find_classes(labelled(*labels), NO_CLASSES)
        assert classes.names == names and note in classes.note and bool(classes.note) == bool(note)
        assert classes.numbers(labelled(*labels)) == numbers

    def test_the_model_keeps_the_classes_that_it_has(self):
        classes = find_classes(labelled("good", "bad"), {0: "good", 1: "bad"})
        assert classes.names == ["good", "bad"] and classes.numbers(labelled("bad")) == [1]
        assert find_classes(labelled(0, 1), {0: "good", 1: "bad"}).names == ["good", "bad"]
        assert find_classes(labelled(0, 1), {0: "LABEL_0", 1: "LABEL_1"}).names == ["0", "1"]
        assert find_classes(labelled("a", "b"), {0: "LABEL_0", 1: "LABEL_1"}).names == ["a", "b"]

    def test_kinds_do_not_mix(self):
        message = r"data: the label is a number in line 1 \(1\) and a name in line 3 \('1'\); write all labels alike"
        with pytest.raises(DataError, match=message):
            find_classes(labelled(1, 0, "1"), NO_CLASSES)
        with pytest.raises(DataError, match=r"true or false in line 2 \(True\)"):
            find_classes(labelled(0, True), NO_CLASSES)
        with pytest.raises(DataError, match="every record has the label 5000000; a classifier needs two or more"):
            find_classes(labelled(5_000_000, 5_000_000), NO_CLASSES)

    def test_held_out_labels_are_those_of_training(self):
        classes = find_classes(labelled(*range(0, 40, 2)), NO_CLASSES)
        with pytest.raises(DataError, match=r"data, line 2: the label 3 is not .* has 0, 2, .* 18 and 10 more"):
            classes.numbers(labelled(2, 3))
        with pytest.raises(DataError, match="the label '2' is not in the training data"):
            classes.numbers(labelled("2"))

    def test_saved_model_has_the_names(self, model, tmp_path, capsys):
        rows = [{"text": word, "label": 5_000_000 if i % 2 else 7} for i, word in enumerate(WORDS)]
        data = write_jsonl(tmp_path / "data.jsonl", rows)
        assert train(model, data, tmp_path / "run", "--epochs", "1") == 0
        assert "so they are taken as names, numbered 7 = 0, 5000000 = 1" in capsys.readouterr().out
        saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
        assert saved.config.id2label == {0: "7", 1: "5000000"} and saved.score.weight.shape[0] == 2


class TestLength:
    """The tiny model reads 256 tokens, a byte each."""

    def test_what_the_model_cannot_read_is_cut_and_counted(self, model, tmp_path, capsys):
        rows = [{"text": word * (100 if i < 3 else 1)} for i, word in enumerate(WORDS)]
        data = write_jsonl(tmp_path / "data.jsonl", rows)
        assert train(model, data, tmp_path / "run", "--epochs", "1") == 0
        told = f"{data}: 3 of 8 records are longer than the 256 tokens that the model can read and lose their end"
        assert told in capsys.readouterr().out
        report = json.loads((tmp_path / "run" / "geko_report.json").read_text())
        assert report["efficiency"]["tokens_forward"] == 3 * 256 + sum(len(word) + 1 for word in WORDS[3:])

    def test_shorter_limit_of_the_user(self, model, tmp_path, capsys):
        rows = [{"prompt": word * 9, "completion": " x"} for word in WORDS]
        data = write_jsonl(tmp_path / "data.jsonl", rows)
        assert train(model, data, tmp_path / "run", "--epochs", "1", "--max-length", "30") == 0
        told = "2 of 8 records are longer than --max-length 30 and lose the start of their prompt, then the end of"
        assert told in capsys.readouterr().out

    def test_tokenizer_larger_than_the_model(self, tmp_path, capsys):
        from transformers import AutoTokenizer

        folder = save_tiny_model(tmp_path / "tiny")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["<new>", "<newer>"])
        tokenizer.save_pretrained(folder)
        data = write_jsonl(tmp_path / "data.jsonl", [{"text": word} for word in WORDS])
        told = refusal(capsys, tmp_path, model=folder, data=data)
        assert "has 260 tokens, but the model embeds only 258" in told
        assert "or call model.resize_token_embeddings(260) and save it again" in told
